"""Parts that apply a direction to a weight; :func:`piste.slots.plain` is the usual one."""

from __future__ import annotations

from piste.ops import Value
from piste.slots import Hyper, States, apply
from piste.storage import moment

__all__ = ["lr_in_momentum", "proximal"]


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
    return (p - hp.lr * d) / (1 + hp.lr * hp.weight_decay)
