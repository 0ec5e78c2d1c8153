"""Weight decay that is no part of the gradient."""

from __future__ import annotations

from piste.ops import Value, rho
from piste.slots import Hyper, decay, scale

__all__ = ["decoupled", "decoupled_from_second_step", "decoupled_while_moving", "fixed", "into_direction"]


@decay
def decoupled(p: Value, hp: Hyper) -> Value:
    """Shrink by ``lr * weight_decay``, before the step (Loshchilov & Hutter 2019; torch scales it with lr)."""
    return p if hp.weight_decay == 0 else p * (1 - hp.lr * hp.weight_decay)


@decay
def decoupled_while_moving(p: Value, hp: Hyper, t: Value) -> Value:
    """Decoupled decay of RAdam's authors: a weight that rests until the step is rectified is not decayed either."""
    return p if not hp.degenerated_to_sgd and rho(hp.beta2, t) <= 5 else decoupled(p, hp)


@decay
def decoupled_from_second_step(p: Value, hp: Hyper, t: Value) -> Value:
    """Decoupled decay of a rule that only looks in its first step."""
    return p if t == 1 else decoupled(p, hp)


@decay
def fixed(p: Value, hp: Hyper) -> Value:
    """Shrink by ``weight_decay`` alone, whatever the learning rate."""
    return p if hp.weight_decay == 0 else p * (1 - hp.weight_decay)


@scale
def into_direction(d: Value, p: Value, hp: Hyper) -> Value:
    """Decay inside the direction, so that whatever scales the direction scales the decay."""
    return d if hp.weight_decay == 0 else d + hp.weight_decay * p
