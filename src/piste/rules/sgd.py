"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from piste.ops import Value
from piste.slots import Hyper, States, direction
from piste.storage import moment

__all__ = ["sgd"]


@direction(buf=moment)
def sgd(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Heavy-ball or Nesterov momentum, the learning rate outside of the buffer (Sutskever et al. 2013, as in torch)."""
    if hp.momentum == 0:
        return g
    buf = g if t == 1 else hp.momentum * st.buf + (1 - hp.dampening) * g  # the first gradient is not dampened
    return (g + hp.momentum * buf if hp.nesterov else buf), {"buf": buf}
