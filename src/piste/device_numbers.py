"""The numbers of a step that is recorded into a CUDA graph: worked out on the device, by the device.

Step numbers are tensors that the step itself counts on; learning rate and decay are tensors that a schedule fills. What
follows from them (bias corrections, rectification, whose turn it is) is worked out from the very formulas that the host
would use, in double, one number per weight, into buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.ops import EVALUATE
from piste.symbol import Row, Sym, host_operation, topological

__all__ = ["Clock", "Counters", "give_numbers", "recording", "restored", "stored_before"]


def recording() -> bool:
    """Is a CUDA graph being recorded on this thread's current stream?"""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(begun and torch.cuda.is_current_stream_capturing())


# ---------------------------------------------------------------------------------------------------------------------
# Step numbers


class Clock(NamedTuple):
    """The step numbers of some weights: where they stand, and at which places; None for all of them in order."""

    counts: Tensor
    places: Tensor | None

    def next(self) -> Tensor:
        """The numbers of the steps that they now take."""
        return (self.counts if self.places is None else self.counts[self.places]) + 1


class Counters:
    """The step numbers of an optimizer's weights, side by side on their device.

    ``state["step"]`` of each weight is a view of its number. The memory stays the same as long as the weights do, so
    that a step that was recorded before a checkpoint was loaded, counts on from the number that was loaded.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        places: dict[torch.device, int] = {}
        self.place = []
        for p in weights:
            self.place.append((p.device, places.get(p.device, 0)))
            places[p.device] = places.get(p.device, 0) + 1
        self.counts = {device: torch.zeros(n, dtype=torch.int64, device=device) for device, n in places.items()}
        self.views = [self.counts[device][place] for device, place in self.place]

    def serves(self, weights: Sequence[Tensor]) -> bool:
        """Are they made for these weights, where they are now?"""
        return len(weights) == len(self.weights) and all(
            p is known and p.device == device
            for p, known, (device, _) in zip(weights, self.weights, self.place, strict=True)
        )

    def settle(self, states: Sequence[dict[str, Any]], active: Sequence[int]) -> None:
        """Take over numbers that stand elsewhere: of weights that have no count yet, or one that was loaded."""
        for i in active:
            view, step = self.views[i], states[i].get("step", 0)
            if step is not view:
                view.fill_(step) if not isinstance(step, Tensor) else view.copy_(step)
                states[i]["step"] = view

    def clock(self, members: Sequence[int]) -> Clock:
        """Of weights of one device."""
        device = self.place[members[0]][0]
        places = [self.place[i][1] for i in members]
        counts = self.counts[device]
        whole = places == list(range(len(counts)))
        return Clock(counts, None if whole else torch.tensor(places, device=device))

    def advance(self, clocks: Sequence[Clock], skip: Tensor | None) -> None:
        """Count the step of these weights, unless it is to be skipped."""
        for counts, places in clocks:
            taken = torch.ones((), dtype=torch.int64, device=counts.device)
            if skip is not None:
                taken = (skip == 0).to(counts.device, torch.int64)
            if places is None:
                counts.add_(taken)
            else:
                counts.index_add_(0, places, taken.expand(len(places)))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the plan


def give_numbers(bucket: Bucket) -> None:
    """Work out what a plan takes as ``number``, into buffers that the bucket's seats keep."""
    numbers = bucket.plan.numbers
    if not numbers:
        return
    kept = bucket.seats.kept
    if "numbers" not in kept:
        table = torch.empty(len(numbers), len(bucket), dtype=bucket.dtype, device=bucket.device)
        kept["numbers"] = list(table.unbind()), [list(row.unbind()) for row in table]
    rows, values = kept["numbers"]
    for row, found in zip(rows, _evaluated([sym.args[0] for sym in numbers], bucket), strict=True):
        row.copy_(found) if isinstance(found, Tensor) else row.fill_(found)
    for sym, each in zip(numbers, values, strict=True):
        bucket.values[sym] = each


def _evaluated(roots: Sequence[Sym], bucket: Bucket) -> list[Tensor | float]:
    """The values of host symbols: numbers where no tensor has a part in them, else doubles, per weight or for all."""
    known: dict[Sym, Tensor | float] = {}
    for sym in topological(roots):
        if sym.op == "const":
            known[sym] = float(sym.attr)
        elif sym.op == "t":
            assert bucket.clock is not None
            known[sym] = bucket.clock.double()
        elif sym.op == "hp":
            known[sym] = _hyperparameter(bucket, sym.attr)
        elif sym.op in ("shape", "numel"):
            known[sym] = _extents(bucket, sym)
        else:
            known[sym] = _applied(sym.op, [known[a] for a in sym.args], bucket.device)
    return [known[root] for root in roots]


def _applied(op: str, args: Sequence[Tensor | float], device: torch.device) -> Tensor | float:
    if not any(isinstance(a, Tensor) for a in args):
        return host_operation(op)(*args)
    if op == "where":  # torch would choose between two Python numbers in single precision
        args = [args[0], *(a if isinstance(a, Tensor) else _constant(a, device) for a in args[1:])]
    result: Tensor = EVALUATE[op](*args)
    return result


def _constant(value: float, device: torch.device) -> Tensor:
    """Filled in by the device: a recorded step may not send anything."""
    return torch.full((), value, dtype=torch.float64, device=device)


def _hyperparameter(bucket: Bucket, name: str) -> Tensor | float:
    """One number where all groups agree, else one per weight."""
    groups = list(dict.fromkeys(bucket.seats.groups))
    values = [bucket.hp[group][name] for group in groups]
    given: list[Any] = [v.to(bucket.device, torch.float64) if isinstance(v, Tensor) else v for v in values]
    if all(v is given[0] or (isinstance(v, float) and v == given[0]) for v in given):
        return given[0]  # type: ignore[no-any-return]
    tensors = [v if isinstance(v, Tensor) else _constant(v, bucket.device) for v in given]
    places = _kept(bucket, "groups", lambda: [groups.index(group) for group in bucket.seats.groups], torch.int64)
    return torch.stack(tensors)[places]


def _extents(bucket: Bucket, sym: Sym) -> Tensor | float:
    """A size of every weight."""
    rows = [Row({}, 0, shape) for shape in bucket.seats.shapes]
    sizes = [float(row.numel if sym.op == "numel" else row.shape[sym.attr]) for row in rows]
    return sizes[0] if sizes.count(sizes[0]) == len(sizes) else _kept(bucket, sym, lambda: sizes, torch.float64)


def _kept(bucket: Bucket, key: Any, numbers: Any, dtype: torch.dtype) -> Tensor:
    """A tensor with an entry per weight that is sent once."""
    kept = bucket.seats.kept
    if ("device", key) not in kept:
        kept["device", key] = torch.tensor(numbers(), dtype=dtype, device=bucket.device)
    found: Tensor = kept["device", key]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Skipping


def stored_before(bucket: Bucket) -> Mapping[str, list[Tensor]]:
    """Copies of what is stored as codes: codes of a number that has not changed need not be the same codes."""
    held = bucket.seats.encoded & bucket.seats.homes.keys()  # not every code has something beside it
    return {home: [x.clone() for x in bucket.homes[home]] for home in held}


def restored(bucket: Bucket, before: Mapping[str, list[Tensor]], skip: Tensor) -> None:
    """Put them back if the step is to be skipped."""
    undone = (skip != 0).to(bucket.device)
    for home, copies in before.items():
        for stored, copy in zip(bucket.seats.homes[home], copies, strict=True):
            stored.copy_(torch.where(undone, copy, stored))
