"""Rules that average as they go, in the place of a schedule (Defazio et al. 2024, arXiv 2405.15682).

There are three sequences: z takes the steps, x is the mean of z, and gradients are taken at y between them. Weights
hold y; x is recovered from y and z when it is wanted, and not kept.
"""

from __future__ import annotations

from piste.ops import Value, lerp, rectifier, rho, square
from piste.rules.denominator import denominator
from piste.slots import Hyper, States, update
from piste.storage import anchor, second_moment

__all__ = ["adam", "radam", "rectified", "sgd"]


def _averaged(d: Value, y: Value, z: Value, hp: Hyper, beta: Value) -> tuple[Value, dict[str, Value]]:
    """Their algorithm 1 in y and z alone; decay at y."""
    if hp.decoupled_weight_decay and hp.weight_decay != 0:
        d = d + hp.weight_decay * y
    c, lr = hp.averaging, hp.current_lr
    return lerp(y, z, c) + lr * (beta * (1 - c) - 1) * d, {"z": z - lr * d}


@update(z=anchor)
def sgd(g: Value, p: Value, st: States, hp: Hyper) -> Value:
    """Plain steps."""
    return _averaged(g, p, st.z, hp, hp.momentum)


def _adam(g: Value, st: States, hp: Hyper, t: Value) -> tuple[Value, Value]:
    v = lerp(st.v, square(g), 1 - hp.beta2)
    return g / denominator(v, hp.beta2, t, hp.eps), v


@update(z=anchor, v=second_moment)
def adam(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Adam's steps without a first moment, whose place the averaging takes."""
    d, v = _adam(g, st, hp, t)
    y, new = _averaged(d, p, st.z, hp, hp.beta1)
    return y, new | {"v": v}


def rectified(beta2: float, step: int, early: float) -> float:
    """RAdam's rectifier, and ``early`` as long as there is none (Liu et al. 2019, threshold 4 as in their paper)."""
    return float(rectifier(beta2, step)) if rho(beta2, step) > 4 else early


@update(z=anchor, v=second_moment)
def radam(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """The same, with gradients as they are until the step is rectified; the rectifier is in the learning rate."""
    d, v = _adam(g, st, hp, t)
    y, new = _averaged(d if rho(hp.beta2, hp.schedule_step) > 4 else g, p, st.z, hp, hp.beta1)
    return y, new | {"v": v}
