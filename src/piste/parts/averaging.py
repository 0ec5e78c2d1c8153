"""Parts that keep averages of weights."""

from __future__ import annotations

from piste.ops import Value, lerp
from piste.slots import Hyper, States, after
from piste.storage import anchor

__all__ = ["moving_average"]


@after(average=anchor)
def moving_average(p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """An exponential moving average that begins as the first weight it sees."""
    average = st.average
    return p, {"average": p if t == 1 else lerp(average, p, 1 - hp.decay)}
