"""Rules whose second moments cover a weight with few numbers."""

from __future__ import annotations

from functools import reduce

from piste.ops import Value, minimum, peak, rsqrt, square, where
from piste.slots import Hyper, States, direction
from piste.storage import accumulator, accumulator_along, moment

__all__ = ["sm3"]

#: one accumulator for each of the first axes; an axis beyond them needs none, for the others cover every element
_AXES = {f"acc{axis}": accumulator_along(axis) for axis in range(8)}


@direction(buf=moment, acc=accumulator, **_AXES)
def sm3(g: Value, st: States, hp: Hyper, ndim: int) -> Value:
    """Anil et al. 2019, SM3-II: each element's sum of squares is bounded by the least accumulator over it.

    Vectors and scalars have the sum itself. With ``beta`` below 1 the sum becomes a running mean, and accumulators
    can shrink again. A gradient whose square is 0 moves nothing, whatever eps.
    """
    names = list(_AXES)[:ndim] if ndim > 1 else ["acc"]
    bound = reduce(minimum, [getattr(st, name) for name in names])
    sums = bound + square(g) if hp.beta == 1 else hp.beta * bound + (1 - hp.beta) * square(g)
    new = {name: peak(sums, keep=(axis,)) if ndim > 1 else sums for axis, name in enumerate(names)}
    d = g * where(sums > 0, rsqrt(sums + hp.eps), 0.0)
    if hp.momentum != 0:
        d = new["buf"] = hp.momentum * st.buf + (1 - hp.momentum) * d
    return d, new
