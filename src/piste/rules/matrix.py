"""Rules that see a weight as a matrix."""

from __future__ import annotations

from piste.ops import Value, lerp, maximum, mean, norm, opaque, size, sqrt, square
from piste.orthogonal import ITERATIONS, orthogonalizer
from piste.rules.adaptive import adam_step
from piste.slots import Hyper, States, direction
from piste.storage import kept_over, moment, second_moment

__all__ = ["muon", "normuon"]

_rows = kept_over("second_moment", lambda ndim: (0,))


def _orthogonal(g: Value, st: States, hp: Hyper) -> tuple[Value, Value]:
    """The new momentum, and what it points at made orthogonal."""
    buf = lerp(st.buf, g, 1 - hp.momentum)
    x = lerp(g, buf, hp.momentum) if hp.nesterov else buf
    steps = ITERATIONS[hp.iteration].steps if hp.steps is None else hp.steps
    return buf, opaque(orthogonalizer(hp.iteration, hp.precision), x, steps, hp.split)


def _length(x: Value, hp: Hyper, shape: tuple[Value, ...]) -> Value:
    """How long the step of an orthogonal matrix should be, by the rule of that name."""
    outputs, inputs = shape[0] / hp.split, size(x) / shape[0]
    if hp.transposed:
        outputs, inputs = inputs, outputs
    if hp.scale == "moonlight":
        return 0.2 * sqrt(maximum(outputs, inputs))
    ratio = sqrt(outputs / inputs)
    return maximum(ratio, 1.0) if hp.scale == "keller" else ratio


def _is_matrix(hp: Hyper, ndim: int) -> bool:
    return ndim > 1 and hp.rule != "adamw"


@direction(buf=moment, m=moment, v=second_moment)
def muon(g: Value, st: States, hp: Hyper, t: Value, ndim: int, shape: tuple[Value, ...]) -> Value:
    """Jordan et al. 2024; weights that are no matrices get Adam's direction."""
    if not _is_matrix(hp, ndim):
        return adam_step(g, st, hp, t)
    buf, u = _orthogonal(g, st, hp)
    return _length(g, hp, shape) * u, {"buf": buf}


@direction(buf=moment, rows=_rows, m=moment, v=second_moment)
def normuon(g: Value, st: States, hp: Hyper, t: Value, ndim: int, shape: tuple[Value, ...]) -> Value:
    """Li et al. 2025, algorithm 1: rows of the orthogonal matrix brought to one size, at the same norm of the whole."""
    if not _is_matrix(hp, ndim):
        return adam_step(g, st, hp, t)
    buf, u = _orthogonal(g, st, hp)
    rows = lerp(st.rows, mean(square(u), keep=(0,)), 1 - hp.row_beta)
    even = u / (sqrt(rows) + 1e-10)
    return (_length(g, hp, shape) * norm(u) / (norm(even) + 1e-10)) * even, {"buf": buf, "rows": rows}
