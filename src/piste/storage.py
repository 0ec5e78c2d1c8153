"""What an optimizer remembers about a weight, and how it is stored.

A rule declares each state with its *role*; the role decides how the state may be stored, the rule never does. Today
every state is stored in full precision: float32, or float64 for float64 weights. States of half-precision weights are
float32 too, so nothing is lost to the weight's own format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from piste.symbol import FULL, MATRIX, TENSOR, Kind, reduced

__all__ = [
    "STATE_FORMATS",
    "WEIGHT_FORMATS",
    "State",
    "accumulator",
    "accumulator_along",
    "allocate",
    "anchor",
    "compute_dtype",
    "kept_over",
    "moment",
    "number",
    "product",
    "second_moment",
    "shape_of",
    "squared_norm",
]

Role = Literal["moment", "second_moment", "gradient", "weight", "accumulator"]

#: legal values of the optimizers' options ``state=`` and ``weights=``
STATE_FORMATS = ("fp32",)
WEIGHT_FORMATS = ("plain",)


@dataclass(frozen=True)
class State:
    """A tensor that a rule keeps for every weight.

    Args:
        role: what the numbers are: a signed ``"moment"``, a non-negative ``"second_moment"``, a stored ``"gradient"``,
            a copy of the ``"weight"``, or an ``"accumulator"``.
        start: ``"zeros"``, ``"ones"``, ``"weight"`` (a copy of the weight as it was before its first step), or, for
            matrix states, a function of the weight.
        kind: ``FULL`` (the weight's shape), ``reduced(keep)``, ``TENSOR`` (one number), or ``MATRIX``; or a function
            of the weight's rank that gives one of these.
    """

    role: Role
    start: Literal["zeros", "ones", "weight"] | Callable[[Tensor], Tensor] = "zeros"
    kind: Kind | Callable[[int], Kind] = FULL

    def kind_of(self, ndim: int) -> Kind:
        """Its kind for weights of this rank."""
        return self.kind if isinstance(self.kind, Kind) else self.kind(ndim)


moment = State("moment")
second_moment = State("second_moment")
accumulator = State("accumulator")
anchor = State("weight", start="weight")
#: a number per weight
number = State("accumulator", kind=TENSOR)
#: a running product of numbers, one per weight
product = State("accumulator", start="ones", kind=TENSOR)
#: a squared norm of the whole weight
squared_norm = State("second_moment", kind=TENSOR)


def kept_over(role: Role, axes: Callable[[int], Iterable[int]]) -> State:
    """A state with one number for each index of some axes, which the weight's rank tells; no axes, one number."""
    return State(role, kind=lambda ndim: reduced(axes(ndim)))


def accumulator_along(axis: int) -> State:
    """An accumulator with one number for each index of an axis."""
    return State("accumulator", kind=reduced((axis,)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a rule is worked out for weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(kind: Kind, weight: Tensor) -> tuple[int, ...] | None:
    """The shape of a state of this kind; None for matrix states, which have shapes of their own."""
    if kind == MATRIX:
        return None
    if kind.level == 2:
        return tuple(n if i in kind.keep else 1 for i, n in enumerate(weight.shape)) if kind.keep else ()
    return tuple(weight.shape)


def allocate(state: State, weight: Tensor) -> Tensor:
    """A fresh state for ``weight`` (real; complex weights come as their real view)."""
    dtype = compute_dtype(weight.dtype)
    if callable(state.start):
        return state.start(weight).to(dtype=dtype, device=weight.device)
    if state.start == "weight":
        return torch.empty_like(weight, dtype=dtype).copy_(weight)
    fill = 1.0 if state.start == "ones" else 0.0
    kind = state.kind_of(weight.ndim)
    if kind == FULL:
        return torch.full_like(weight, fill, dtype=dtype)
    shape = shape_of(kind, weight)
    if shape is None:
        raise ValueError("a matrix state has a shape of its own: its start must be a function of the weight")
    return torch.full(shape, fill, dtype=dtype, device=weight.device)
