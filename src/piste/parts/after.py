"""Parts that act on the weight after the step."""

from __future__ import annotations

from piste.ops import Value, lerp
from piste.slots import Hyper, States, after
from piste.storage import anchor

__all__ = ["late_lookahead", "lookahead", "lookahead_together"]


@after(slow=anchor)
def lookahead(p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Every k steps, go only the fraction alpha of the way and start again from there (Zhang et al. 2019).

    The slow weights begin as the weights before the first step.
    """
    slow = st.slow
    if t % hp.k != 0:
        return p
    slow = lerp(slow, p, hp.alpha)
    return slow, {"slow": slow}


@after(slow=anchor)
def late_lookahead(p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Lookahead whose slow weights begin as the weights after the first k steps: that synchronisation moves nothing."""
    if t % hp.k != 0:
        return p
    slow = p if t == hp.k else lerp(st.slow, p, hp.alpha)
    return slow, {"slow": slow}


@after(slow=anchor)
def lookahead_together(p: Value, st: States, hp: Hyper) -> Value:
    """Lookahead by one count for all weights, ``schedule_step``; a weight without a gradient misses its turn."""
    slow = st.slow
    if hp.schedule_step % hp.k != 0:
        return p
    slow = lerp(slow, p, hp.alpha)
    return slow, {"slow": slow}
