"""Parts that apply a direction to a weight; :func:`piste.slots.plain` is the usual one."""

from __future__ import annotations

from piste.ops import Value
from piste.slots import Hyper, States, apply
from piste.storage import moment

__all__ = ["decayed_last", "lr_in_momentum", "proximal", "scaled_lr"]


@apply(buf=moment)
def lr_in_momentum(p: Value, d: Value, st: States, hp: Hyper) -> Value:
    """Momentum over whole steps: the buffer holds ``lr * d``, so a new learning rate acts with delay."""
    if hp.momentum == 0:
        return p - hp.lr * d
    buf = hp.momentum * st.buf + hp.lr * d
    return p - buf, {"buf": buf}


@apply
def proximal(p: Value, d: Value, hp: Hyper) -> Value:
    """The step, then the decay as a proximal map: the weight that minimises both (Zhuang et al. 2022)."""
    moved = p - hp.lr * d
    return moved if hp.weight_decay == 0 else moved / (1 + hp.lr * hp.weight_decay)


@apply
def decayed_last(p: Value, d: Value, hp: Hyper, t: Value) -> Value:
    """The step, then decoupled decay of what it made; for a rule that only looks in its first step."""
    moved = p - hp.lr * d
    return moved if hp.weight_decay == 0 or t == 1 else moved * (1 - hp.lr * hp.weight_decay)


@apply
def scaled_lr(p: Value, d: Value, hp: Hyper) -> Value:
    """Gradient descent with a group's own factor on the learning rate; both are host numbers, so it costs nothing."""
    return p - (hp.lr * hp.lr_scale) * d
