"""Parts of grafting: how long a step would be, and one step's direction at another step's length."""

from __future__ import annotations

from typing import NamedTuple

from piste.ops import Value, maximum, sign, sqrt, square, sum_, total, where
from piste.slots import Hyper, Part, States, instead, update
from piste.storage import State, anchor, number, squared_norm

__all__ = ["Kit", "graft", "grafted", "kit"]

_change = State("gradient")


def grafted(d: Value, length: Value, wanted: Value, eps: Value) -> tuple[Value, Value]:
    """``d``, of this length, at the length that is wanted, and the ratio of the two; of no length, it stays so.

    Lengths are those of a weight, of each of its blocks, or of all weights together: whoever grafts says which.
    """
    ratio = where(length > 0, wanted / (length + eps), 0.0)
    return ratio * d, ratio


class Kit(NamedTuple):
    """What is done with the step of an optimizer inside.

    Attributes:
        measure: note the squared norm of the step.
        keep: note the squared norm and the step.
        recede: for a step that was taken, with ``change`` holding the weight before it: take it back, then as ``keep``.
    """

    measure: Part
    keep: Part
    recede: Part


def kit(*, together: bool) -> Kit:
    """The parts for norms of every weight, or for the one norm of all weights together."""

    def squared(d: Value) -> Value:
        return total(square(d), "step_size") if together else sum_(square(d))

    @instead(size=squared_norm)
    def measure(p: Value, d: Value) -> Value:
        return p, {"size": squared(d)}

    @instead(size=squared_norm, change=_change)
    def keep(p: Value, d: Value) -> Value:
        return p, {"size": squared(d), "change": d}

    @update(size=squared_norm, change=anchor)
    def recede(p: Value, st: States) -> Value:
        d = p - st.change
        return st.change, {"size": squared(d), "change": d}

    return Kit(measure, keep, recede)


@update(change=_change, size=squared_norm, magnitude=squared_norm, scale=number, counted=number)
def graft(p: Value, st: States, hp: Hyper) -> Value:
    """Decay, and the kept change at the magnitude's length; a change of zero stays one (Agarwal et al. 2020).

    ``scale`` is the running mean of the ratio of both steps, each divided by its learning rate.
    """
    norm = sqrt(st.size)
    change, ratio = grafted(st.change, norm, sqrt(st.magnitude), hp.eps)
    p = (p if hp.decay == 0 else p * (1 - hp.decay)) + hp.lr * change
    if hp.unit == 0:  # a learning rate is 0: this step says nothing about the ratio
        return p
    counted = st.counted + maximum(sign(norm), 0.0)
    scale = st.scale + where(norm > 0, hp.unit * ratio - st.scale, 0.0) / maximum(counted, 1.0)
    return p, {"counted": counted, "scale": scale}
