"""Rules whose second moment is kept in pieces: by rows and columns, or by units."""

from __future__ import annotations

from collections.abc import Callable

from piste.ops import Value, lerp, maximum, mean, minimum, rsqrt, scratch, sqrt, square
from piste.slots import Hyper, Part, States, update
from piste.storage import kept_over, moment, second_moment

__all__ = ["adafactor", "adafactor_last", "amos", "amos_transposed"]


def _rms(x: Value) -> Value:
    return sqrt(mean(square(x)))


def _pace(hp: Hyper, t: Value) -> Value:
    """The learning rate; without one, Shazeer & Stern 2018's relative step size."""
    if hp.lr is not None:
        return hp.lr
    return minimum(1e-6 * t if hp.warmup_init else 1e-2, 1 / sqrt(t))


def _step(u: Value, p: Value, st: States, hp: Hyper, t: Value) -> tuple[Value, dict[str, Value]]:
    """From the normalised gradient to the new weight: update clipping, parameter scale, momentum, decay."""
    u = u / maximum(_rms(u) / hp.clip_threshold, 1.0)
    rate = _pace(hp, t)
    if hp.scale_parameter:
        rate = rate * maximum(_rms(p), hp.eps_scale)
    u = rate * u
    new = {}
    if hp.beta1 is not None:
        u = new["m"] = lerp(st.m, u, 1 - hp.beta1)
    if hp.decoupled_weight_decay and hp.weight_decay != 0:
        p = p - hp.weight_decay * rate * p
    return p - u, new


def _factored(
    g: Value, p: Value, st: States, hp: Hyper, t: Value, rows: tuple[int, ...], columns: tuple[int, ...]
) -> Value:
    """Adafactor where ``rows`` and ``columns`` are the axes that the two factors keep."""
    weight = t**hp.decay_rate  # 1 - beta2, so the averages need no bias correction
    size = square(g) + hp.eps
    row = lerp(st.row, mean(size, keep=rows), weight)
    col = lerp(st.col, mean(size, keep=columns), weight)
    shared = tuple(axis for axis in rows if axis in columns)
    # one root for each row and column, in the place of two for each number
    by_row = scratch(rsqrt(row / mean(row, keep=shared)), "by_row")
    u = g * by_row * scratch(rsqrt(col), "by_column")
    p, new = _step(u, p, st, hp, t)
    return p, new | {"row": row, "col": col}


def _whole(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    v = lerp(st.v, square(g) + hp.eps, t**hp.decay_rate)
    p, new = _step(g * rsqrt(v), p, st, hp, t)
    return p, new | {"v": v}


def _after_first(ndim: int) -> tuple[int, ...]:
    return tuple(range(1, ndim))


def _but(axis: int) -> Callable[[int], tuple[int, ...]]:
    """All axes but this one, counted from the end."""
    return lambda ndim: tuple(i for i in range(ndim) if i != ndim - axis)


_outputs = kept_over("second_moment", lambda ndim: (0,))
_inputs = kept_over("second_moment", _after_first)


@update(row=_outputs, col=_inputs, v=second_moment, m=moment)
def adafactor(g: Value, p: Value, st: States, hp: Hyper, t: Value, ndim: int) -> Value:
    """Shazeer & Stern 2018, algorithm 6; a convolution is the matrix (out, in * kernel) that its patches meet."""
    return _factored(g, p, st, hp, t, (0,), _after_first(ndim)) if ndim > 1 else _whole(g, p, st, hp, t)


@update(row=kept_over("second_moment", _but(1)), col=kept_over("second_moment", _but(2)), v=second_moment, m=moment)
def adafactor_last(g: Value, p: Value, st: States, hp: Hyper, t: Value, ndim: int) -> Value:
    """Adafactor over the last two axes, one matrix for each index of the others, as fairseq and transformers do."""
    if ndim < 2:
        return _whole(g, p, st, hp, t)
    before = tuple(range(ndim - 2))
    return _factored(g, p, st, hp, t, (*before, ndim - 2), (*before, ndim - 1))


def _amos(axis: int) -> Part:
    """Amos for weights whose outputs lie along this axis: one v and b for each, one for a whole vector."""

    def kept(ndim: int) -> tuple[int, ...]:
        return (axis,) if ndim > 1 else ()

    @update(v=kept_over("second_moment", kept), b=kept_over("accumulator", kept), m=moment)
    def amos(g: Value, p: Value, st: States, hp: Hyper, t: Value, ndim: int) -> Value:
        """Tian & Parikh 2022, algorithm 1; b slows both the decay and the steps down."""
        size = mean(square(g), keep=kept(ndim))
        v = lerp(st.v, size, 1 - hp.beta)
        inverse = (1 - hp.beta**t) / maximum(v, 2.0**-125)
        gamma = rsqrt(1 + hp.c_coef * sqrt(hp.lr) * st.b) * (hp.lr * hp.lr) * inverse * size
        first = hp.lr * hp.scale
        decay = gamma / 2 + hp.weight_decay if hp.decoupled_weight_decay else gamma / 2
        u = (first * sqrt(inverse) * g + decay * p) / (1 + hp.d_coef * sqrt(first) * st.b)
        new = {"v": v, "b": st.b + gamma * (1 + st.b)}
        if hp.momentum != 0:
            u = new["m"] = lerp(st.m, u, 1 - hp.momentum)
        return p - u, new

    return amos


amos, amos_transposed = _amos(0), _amos(1)
