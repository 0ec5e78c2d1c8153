"""Parts that scale the direction."""

from __future__ import annotations

from piste.ops import Value, maximum, mean, minimum, norm, rectifier, rho, sign, sqrt, where
from piste.slots import Hyper, States, scale
from piste.storage import moment

__all__ = [
    "cautious",
    "corrected_step",
    "heavy_ball",
    "rectified",
    "rectified_step",
    "trust_of_new_weights",
    "trust_ratio",
]


@scale
def cautious(d: Value, g: Value) -> Value:
    """Only where the direction agrees with the gradient, at the same mean length (Liang et al. 2024, algorithm 1).

    The share that agrees counts as a thousandth at least, as in the authors' code.
    """
    agree = maximum(sign(d * g), 0.0)
    return d * (agree / maximum(mean(agree), 1e-3))


@scale
def rectified_step(d: Value, hp: Hyper, t: Value) -> Value:
    """RAdam's step size: bias correction, times the rectifier once the variance of the adaptive step is known."""
    c1, c2 = 1 - hp.beta1**t, 1 - hp.beta2**t
    return d * (rectifier(hp.beta2, t) * sqrt(c2) / c1) if rho(hp.beta2, t) > 5 else d / c1


@scale
def corrected_step(d: Value, hp: Hyper, t: Value) -> Value:
    """The bias correction in RAdam's step size alone; :func:`rectified` is the rest of :func:`rectified_step`."""
    c1, c2 = 1 - hp.beta1**t, 1 - hp.beta2**t
    return d * (sqrt(c2) / c1) if rho(hp.beta2, t) > 5 else d / c1


@scale
def rectified(d: Value, hp: Hyper, t: Value) -> Value:
    """RAdam's rectifier alone, once the variance of the adaptive step is known."""
    return d * rectifier(hp.beta2, t) if rho(hp.beta2, t) > 5 else d


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
    return d * _trust(norm(p), norm(d), hp)


@scale
def trust_of_new_weights(d: Value, p: Value, hp: Hyper) -> Value:
    """The trust ratio of over9000's Ralamb: its denominator is the norm of the weights after a step without it.

    That norm is nearly the weight's own, so the ratio is about 1, or ``max_weight_norm`` over the weight's norm.
    """
    kept = 1 - hp.lr * hp.weight_decay if hp.decoupled_weight_decay else 1.0
    return d * _trust(norm(p), norm(kept * p - hp.lr * d), hp)


def _trust(weight: Value, step: Value, hp: Hyper) -> Value:
    if hp.max_weight_norm is not None:
        weight = minimum(weight, hp.max_weight_norm)
    ratio = where(weight > 0, where(step > 0, weight / step, 1.0), 1.0)
    return minimum(ratio, 1.0) if hp.trust_clip else ratio
