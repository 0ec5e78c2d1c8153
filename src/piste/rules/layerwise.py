"""Rules that normalise the gradient of a whole weight at once."""

from __future__ import annotations

from piste.ops import Value, maximum, sqrt, square, sum_, where
from piste.slots import Hyper, States, direction
from piste.storage import moment, squared_norm

__all__ = ["novograd"]


@direction(m=moment, v=squared_norm, vmax=squared_norm)
def novograd(g: Value, p: Value, st: States, hp: Hyper) -> Value:
    """Ginsburg et al. 2019, algorithm 1: momentum of gradients of unit norm, the decay inside it.

    The running squared norm starts as the first one that is not zero, as in NVIDIA's code.
    """
    n = sum_(square(g))
    v = where(st.v == 0, n, hp.beta2 * st.v + (1 - hp.beta2) * n)
    new = {"v": v}
    if hp.amsgrad:
        v = new["vmax"] = maximum(st.vmax, v)
    h = g / (sqrt(v) + hp.eps)
    if not hp.decoupled_weight_decay and hp.weight_decay != 0:
        h = h + hp.weight_decay * p
    m = new["m"] = hp.beta1 * st.m + (h * (1 - hp.beta1) if hp.grad_averaging else h)
    return m, new
