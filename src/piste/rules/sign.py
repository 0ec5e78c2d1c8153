"""Rules that go by the sign of the gradient."""

from __future__ import annotations

from piste.ops import Value, lerp, sign
from piste.slots import Hyper, States, direction
from piste.storage import moment

__all__ = ["lion"]


@direction(m=moment)
def lion(g: Value, st: States, hp: Hyper) -> Value:
    """Chen et al. 2023, program 1: the sign of one average of gradients, while a slower one is kept."""
    return sign(lerp(st.m, g, 1 - hp.beta1)), {"m": lerp(st.m, g, 1 - hp.beta2)}
