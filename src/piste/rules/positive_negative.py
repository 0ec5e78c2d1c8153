"""Positive-negative momentum: a difference of two averages, which makes the noise of the gradient larger or smaller."""

from __future__ import annotations

from piste.ops import Value, debias, lerp, maximum, sqrt, square
from piste.slots import Hyper, States, direction
from piste.storage import moment, second_moment

__all__ = ["adapnm", "pnm"]


def _momentum(g: Value, st: States, beta1: Value, beta0: Value, t: Value) -> tuple[Value, dict[str, Value]]:
    """Xie et al. 2021, eq. 5: two averages take the gradients of odd and of even steps."""
    own, other = ("odd", "even") if t % 2 == 1 else ("even", "odd")
    positive = lerp(getattr(st, own), g, 1 - beta1**2)
    negative = getattr(st, other)
    size = sqrt((1 + beta0) ** 2 + beta0**2)
    return ((1 + beta0) * positive - beta0 * negative) / size, {own: positive}


@direction(odd=moment, even=moment)
def pnm(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Xie et al. 2021, algorithm 1."""
    return _momentum(g, st, hp.momentum, hp.beta0, t)


@direction(odd=moment, even=moment, v=second_moment, vmax=second_moment)
def adapnm(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Xie et al. 2021, algorithm 2: Adam's denominator; amsgrad is taken before the bias correction."""
    m, new = _momentum(g, st, hp.beta1, hp.beta0, t)
    v = new["v"] = lerp(st.v, square(g), 1 - hp.beta2)
    if hp.amsgrad:
        v = new["vmax"] = maximum(st.vmax, v)
    return debias(m, hp.beta1, t) / (sqrt(debias(v, hp.beta2, t)) + hp.eps), new
