"""Parts that scale the direction."""

from __future__ import annotations

from piste.ops import Value, rectifier, rho, sqrt
from piste.slots import Hyper, States, scale
from piste.storage import moment

__all__ = ["heavy_ball", "rectified_step"]


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
