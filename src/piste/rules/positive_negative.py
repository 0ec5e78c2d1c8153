"""Positive-negative momentum: a difference of two averages, which makes the noise of the gradient larger or smaller."""

from __future__ import annotations

from piste.ops import Value, debias, lerp, maximum, softplus, sqrt, square
from piste.rules.denominator import denominator
from piste.slots import Hyper, States, direction
from piste.storage import accumulator, moment, second_moment

__all__ = ["adapnm", "pnm", "ranger21"]


def _momentum(
    g: Value, st: States, beta1: Value, beta0: Value, t: Value, noise: Value = None
) -> tuple[Value, dict[str, Value]]:
    """Xie et al. 2021, eq. 5: two averages take the gradients of odd and of even steps.

    The result is divided by the size of the noise that ``beta0`` makes, or ``noise`` in its place.
    """
    noise = beta0 if noise is None else noise
    own, other = ("odd", "even") if t % 2 == 1 else ("even", "odd")
    positive = lerp(getattr(st, own), g, 1 - beta1**2)
    negative = getattr(st, other)
    size = sqrt((1 + noise) ** 2 + noise**2)
    return ((1 + beta0) * positive - beta0 * negative) / size, {own: positive}


@direction(odd=moment, even=moment)
def pnm(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Xie et al. 2021, algorithm 1."""
    return _momentum(g, st, hp.momentum, hp.beta0, t)


@direction(odd=moment, even=moment, v=second_moment, vmax=accumulator)
def adapnm(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Xie et al. 2021, algorithm 2: Adam's denominator; amsgrad is taken before the bias correction."""
    m, new = _momentum(g, st, hp.beta1, hp.beta0, t)
    v = new["v"] = lerp(st.v, square(g), 1 - hp.beta2)
    if hp.amsgrad:
        v = new["vmax"] = maximum(st.vmax, v)
    return debias(m, hp.beta1, t) / denominator(v, hp.beta2, t, hp.eps), new


@direction(odd=moment, even=moment, vmax=accumulator)
def ranger21(g: Value, st: States, new: States, hp: Hyper, t: Value) -> Value:
    """Wright & Demeure 2021: AdaPNM over a softened denominator; the second moment is the part's before it.

    As released (``faithful``): the positive part is doubled and the negative one is not scaled, whatever beta0; beta2
    stands in the size of the noise; amsgrad's maximum is forgotten at once; biases are those of another weight.
    """
    count = hp.clock if hp.faithful else t
    if not hp.pnm:
        m = lerp(st.odd, g, 1 - hp.beta1)
        kept = {"odd": m}
    elif hp.faithful:
        m, kept = _momentum(g, st, hp.beta1, 1.0, t, noise=hp.beta2)
    else:
        m, kept = _momentum(g, st, hp.beta1, hp.beta0, t)
    v = new.v
    if hp.amsgrad and not hp.faithful:
        v = kept["vmax"] = maximum(st.vmax, v)
    size = denominator(v, hp.beta2, count, hp.eps)
    return debias(m, hp.beta1, count) / (softplus(size, hp.beta_softplus) if hp.softplus else size), kept
