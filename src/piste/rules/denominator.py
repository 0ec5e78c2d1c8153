"""Adam's denominator, which many rules share."""

from __future__ import annotations

from piste.ops import Value, debias, sqrt

__all__ = ["denominator"]


def denominator(v: Value, beta: Value, t: Value, eps: Value) -> Value:
    """The root of a mean square that began at 0 and kept the fraction ``beta`` for ``t`` steps; eps is added last."""
    return sqrt(debias(v, beta, t)) + eps
