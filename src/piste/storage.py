"""What an optimizer remembers about a weight, and how it is stored.

A rule declares each state with its *role*; the role decides how the state may be stored, the rule never does. Under
``state="bf16"``, ``"8bit"`` or ``"4bit"`` the moments of a weight of 4,096 numbers or more are stored as codes
(:mod:`piste.codecs`). Everything else is in full precision: float32, or float64 for float64 weights; copies of weights,
stored gradients and accumulators because small changes to them add up over a whole run, and small tensors because they
cost nothing. States of half-precision weights are float32 too, so nothing is lost to the weight's own format.

Under ``weights="stochastic"``, ``"kahan"`` or ``"remainder"`` a bfloat16 weight stands for a number of more bits.

A state under codes is two tensors in ``optimizer.state[weight]``: ``m`` and ``m.scale``. What belongs to a weight
beside itself is its ``p.rest``. What goes with a sharded weight is spread as the weight is (:mod:`piste.sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from piste.codecs import (
    Codec,
    FixedRamp,
    Half,
    Kahan,
    Powers,
    Ramp,
    Remainder,
    ShortRamp,
    row_length,
)
from piste.coding import decode, encode, fresh
from piste.sharding import by_rows, is_sharded, local, placed
from piste.symbol import FULL, MATRIX, TENSOR, Kind, reduced

__all__ = [
    "LEAST",
    "PLAIN",
    "STATE_FORMATS",
    "WEIGHT_FORMATS",
    "Formats",
    "State",
    "accumulator",
    "accumulator_along",
    "allocate",
    "anchor",
    "check_formats",
    "codec_for",
    "companion",
    "compute_dtype",
    "full_precision",
    "in_codes",
    "keep_rest",
    "kept_over",
    "moment",
    "number",
    "out_of_codes",
    "product",
    "put_full_precision",
    "second_moment",
    "shape_of",
    "squared_norm",
    "stored",
    "weight_codec",
]

Role = Literal["moment", "second_moment", "gradient", "weight", "accumulator"]

#: legal values of the optimizers' options ``state=`` and ``weights=``
STATE_FORMATS = ("fp32", "bf16", "8bit", "4bit")
WEIGHT_FORMATS = ("plain", "stochastic", "kahan", "remainder")
#: moments of smaller weights are stored in full
LEAST = 4096
#: and those of shorter vectors, which would not be sharded at whole blocks, where codes come in blocks
LEAST_VECTOR = 65_536
#: and those of matrices with shorter rows, where the words of a block would weigh too much
LEAST_ROW = 64

_CODECS: dict[tuple[str, str], Codec] = {
    ("bf16", "moment"): Half("half", torch.bfloat16, seen=True),
    ("bf16", "second_moment"): Half("half", torch.bfloat16, seen=True),
    ("8bit", "moment"): Powers("powers8", torch.int8, 256, rest=torch.float32),
    ("8bit", "second_moment"): Ramp("ramp8", torch.uint8, 256, rest=torch.int32, count=2),
    ("4bit", "moment"): FixedRamp("fixed4", torch.uint8, 128, packed=True, rest=torch.bfloat16),
    ("4bit", "second_moment"): ShortRamp("ramp4", torch.uint8, 128, packed=True, rest=torch.int16, count=3, levels=15),
}
_WEIGHT_CODECS: dict[str, Codec] = {
    "stochastic": Half("stochastic", torch.bfloat16),
    "kahan": Kahan("kahan", torch.bfloat16, rest=torch.bfloat16),
    "remainder": Remainder("remainder", torch.bfloat16, rest=torch.int16),
}


@dataclass(frozen=True)
class Formats:
    """How a group stores what belongs to its weights.

    Attributes:
        state: one of ``STATE_FORMATS``.
        weights: one of ``WEIGHT_FORMATS``.
        seed: where thresholds of rounding begin.
    """

    state: str = "fp32"
    weights: str = "plain"
    seed: int = 0


PLAIN = Formats()


@dataclass(frozen=True)
class State:
    """A tensor that a rule keeps for every weight.

    Args:
        role: what the numbers are: a signed ``"moment"``, a non-negative ``"second_moment"``, a stored ``"gradient"``,
            a copy of the ``"weight"``, or an ``"accumulator"``.
        start: ``"zeros"``, ``"ones"``, ``"weight"`` (a copy of the weight as it was before its first step), or, for
            matrix states, a function of the weight that asks for nothing but its shape and device.
        kind: ``FULL`` (the weight's shape), ``reduced(keep)``, ``TENSOR`` (one number), or ``MATRIX``; or a function
            of the weight's rank that gives one of these.
        dtype: of a matrix state; None for the precision in which the rule is worked out.
    """

    role: Role
    start: Literal["zeros", "ones", "weight"] | Callable[[Tensor], Tensor] = "zeros"
    kind: Kind | Callable[[int], Kind] = FULL
    dtype: torch.dtype | None = None

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
    """A fresh state for ``weight`` (real; complex weights come as their real view), spread as the weight is."""
    kind = state.kind_of(weight.ndim)
    if callable(state.start):  # of a matrix state, every process has all
        like = local(weight).new_empty(()).expand(weight.shape) if is_sharded(weight) else weight
        return state.start(like).to(dtype=state.dtype or compute_dtype(weight.dtype), device=like.device)
    if is_sharded(weight):
        return placed(allocate(state, local(weight)), weight, None if kind == FULL else kind.keep)
    dtype = compute_dtype(weight.dtype)
    if state.start == "weight":
        return torch.empty_like(weight, dtype=dtype).copy_(weight)
    fill = 1.0 if state.start == "ones" else 0.0
    if kind == FULL:
        return torch.full_like(weight, fill, dtype=dtype)
    shape = shape_of(kind, weight)
    if shape is None:
        raise ValueError("a matrix state has a shape of its own: its start must be a function of the weight")
    return torch.full(shape, fill, dtype=dtype, device=weight.device)


def codec_for(state: State, weight: Tensor, form: str) -> Codec | None:
    """The codec of a state of this weight under a format; None where it is stored in full."""
    if form == "fp32" or weight.numel() < LEAST or state.kind_of(weight.ndim) != FULL:
        return None
    codec = _CODECS.get((form, state.role))
    least = LEAST_ROW if weight.ndim > 1 else LEAST_VECTOR
    return None if codec is not None and codec.block and row_length(weight.shape) < least else codec


def weight_codec(weight: Tensor, form: str) -> Codec | None:
    """The codec of a weight itself; float32 weights beside bfloat16 ones need none."""
    return _WEIGHT_CODECS.get(form) if weight.dtype == torch.bfloat16 else None


def companion(name: str) -> str:
    """Under which name the second tensor of a codec is kept: scales of a state, or the rest of the weight ``"p"``."""
    return "p.rest" if name == "p" else f"{name}.scale"


def stored(
    name: str,
    state: State,
    weight: Tensor,
    formats: Formats,
    *,
    elsewhere: bool = False,
    part: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """A fresh state as it is kept: one tensor, or codes and scales.

    A matrix that is kept elsewhere is nothing, and where only part of the weight, of this shape, is worked on here, it
    is that of the part.
    """
    if state.kind_of(weight.ndim) == MATRIX:
        if elsewhere:
            return {name: local(weight).new_empty(0, dtype=state.dtype or compute_dtype(weight.dtype))}
        weight = weight if part is None else local(weight).new_empty(()).expand(part)
    codec = codec_for(state, weight, formats.state)
    if codec is None:
        return {name: allocate(state, weight)}
    begins_elsewhere = state.start != "zeros" and not weight.is_meta
    return in_codes(name, codec, weight, allocate(state, weight) if begins_elsewhere else None)


def in_codes(name: str, codec: Codec, weight: Tensor, numbers: Tensor | None = None) -> dict[str, Tensor]:
    """A state of this weight under a codec, as it is kept: these numbers, rounded to the nearest, or zeros."""
    codes, rest = fresh(codec, local(weight))
    if numbers is not None:
        encode(codec, local(numbers), codes, rest, step=None)
    found = {name: codes} if rest is None else {name: codes, companion(name): rest}
    return {key: placed(tensor, weight) for key, tensor in found.items()}


def out_of_codes(name: str, codec: Codec, entries: Mapping[str, Any], weight: Tensor) -> Tensor:
    """The numbers of a state of this weight that is kept under a codec."""
    rest = entries.get(companion(name))
    here = decode(codec, local(entries[name]), None if rest is None else local(rest), tuple(local(weight).shape))
    return placed(here, weight)


def keep_rest(weight: Tensor, form: str, state: dict[str, Any]) -> None:
    """See to it that what a weight leaves out under this format is there."""
    codec = weight_codec(weight, form)
    if codec is not None and codec.rest is not None and companion("p") not in state:
        state |= in_codes("p", codec, weight)
        del state["p"]


def _usable_codec(weight: Tensor, state: Mapping[str, Any], form: str) -> Codec | None:
    """The codec of a weight, unless what belongs to it is not there yet."""
    codec = weight_codec(weight, form)
    return None if codec is None or (codec.rest is not None and companion("p") not in state) else codec


def full_precision(weight: Tensor, state: Mapping[str, Any], form: str) -> Tensor:
    """What a weight with this state stands for; a new tensor."""
    codec = _usable_codec(weight, state, form)
    if codec is None:
        return weight.to(compute_dtype(weight.dtype), copy=True) if not weight.is_complex() else weight.clone()
    return out_of_codes("p", codec, {**state, "p": weight}, weight)


def put_full_precision(weight: Tensor, value: Tensor, state: Mapping[str, Any], form: str) -> None:
    """Make a weight with this state stand for ``value``, rounded to the nearest where it has no more bits."""
    codec = _usable_codec(weight, state, form)
    if codec is None:
        weight.copy_(value)
    else:
        rest = state.get(companion("p"))
        encode(codec, local(value), local(weight), None if rest is None else local(rest), step=None)


def check_formats(owner: str, group: Mapping[str, Any], params: Sequence[Tensor], states: Mapping[str, State]) -> None:
    """Refuse formats that make no sense for the weights or the rule of a group."""
    state, weights = group["state"], group["weights"]
    for option, value, whole in (("state", state, "fp32"), ("weights", weights, "plain")):
        for p in params if value != whole else ():
            if not by_rows(p):
                where = f"a weight sharded as {tuple(p.placements)}"  # type: ignore[attr-defined]
                raise ValueError(
                    f"{owner} got {option}={value!r} for {where}; legal: {whole!r}, or shards of whole rows"
                )
            if is_sharded(p) and p.ndim < 2 and p.numel() >= LEAST_VECTOR and state in ("8bit", "4bit"):
                raise ValueError(
                    f"{owner} got state={state!r} for a sharded vector of {p.numel():,} numbers; legal: "
                    "'fp32' or 'bf16' in the group that has it"
                )
    dtypes = list(dict.fromkeys(p.dtype for p in params))
    if state != "fp32" and torch.float64 in dtypes:
        raise ValueError(f"{owner} got state={state!r} for weights of torch.float64; legal: 'fp32'")
    roles = {s.role for s in states.values() if any(s.kind_of(n) == FULL for n in (1, 2))}
    if state != "fp32" and not roles & {"moment", "second_moment"}:
        raise ValueError(f"{owner} got state={state!r}; legal: 'fp32', for it keeps no moments that could be stored so")
    other = [dtype for dtype in dtypes if dtype not in (torch.bfloat16, torch.float32)]
    if weights != "plain" and other:
        raise ValueError(f"{owner} got weights={weights!r} for weights of {other[0]}; legal: 'plain'")
