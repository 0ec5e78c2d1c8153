"""Parts that scale the direction."""

from __future__ import annotations

from piste.ops import Value, minimum, norm, rectifier, rho, sqrt, where
from piste.slots import Hyper, States, scale
from piste.storage import moment

__all__ = ["heavy_ball", "rectified_step", "trust_ratio"]


@scale
def rectified_step(d: Value, hp: Hyper, t: Value) -> Value:
    """RAdam's step size: bias correction, times the rectifier once the variance of the adaptive step is known."""
    c1, c2 = 1 - hp.beta1**t, 1 - hp.beta2**t
    return d * (rectifier(hp.beta2, t) * sqrt(c2) / c1) if rho(hp.beta2, t) > 5 else d / c1


@scale(buf=moment)
def heavy_ball(d: Value, st: States, hp: Hyper) -> Value:
    """Momentum on a direction that is already normalised, as in RMSprop."""
    if hp.momentum == 0:
        return d
    buf = hp.momentum * st.buf + d
    return buf, {"buf": buf}


@scale
def trust_ratio(d: Value, p: Value, hp: Hyper) -> Value:
    """Steps as long as the weight is (You et al. 2020, algorithm 2); 1 where either norm is 0.

    ``max_weight_norm`` bounds the weight's norm from above, ``trust_clip`` the ratio by 1. Without ``always_adapt``,
    weights that are not decayed take the direction as it is.
    """
    if not hp.always_adapt and hp.weight_decay == 0:
        return d
    weight, step = norm(p), norm(d)
    if hp.max_weight_norm is not None:
        weight = minimum(weight, hp.max_weight_norm)
    ratio = where(weight > 0, where(step > 0, weight / step, 1.0), 1.0)
    return d * (minimum(ratio, 1.0) if hp.trust_clip else ratio)
