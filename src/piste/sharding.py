"""Weights whose parts lie on several processes: ``DTensor``, as FSDP2's ``fully_shard`` makes them.

Engines see the part that is here and never a ``DTensor``. What an optimizer keeps about a weight is spread as the
weight is, so that torch's tools for checkpoints gather it and cut it anew. Sums over a weight are completed over the
processes that share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Spread",
    "box",
    "by_rows",
    "complete",
    "first_element",
    "gathered",
    "is_sharded",
    "joined",
    "local",
    "matching",
    "part_of",
    "placed",
    "spread_of",
    "together",
]


class Spread(NamedTuple):
    """How a weight lies on processes."""

    mesh: Any
    placements: tuple[Any, ...]

    def groups(self, kept: Sequence[int], over: Sequence[int] | None = None) -> list[Any]:
        """The groups of processes that have to add up what was reduced over all axes, or these, but not those kept."""
        return [
            self.mesh.get_group(dim)
            for dim, placement in enumerate(self.placements)
            if placement.is_shard() and placement.dim not in kept and (over is None or placement.dim in over)
        ]


def is_sharded(tensor: Tensor) -> bool:
    """Is it a ``DTensor``? Asked without an import of ``torch.distributed``, which costs a third of torch's own."""
    return hasattr(tensor, "device_mesh")


def spread_of(tensor: Tensor) -> Spread | None:
    """How it lies on processes; None if it is all here."""
    return Spread(tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part that is here, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def placed(part: Tensor, weight: Tensor, kept: Iterable[int] | None = None) -> Tensor:
    """What this process has of a tensor that goes with a weight, as a tensor spread like it.

    Args:
        part: this process's part.
        weight: the weight. One that is not sharded leaves ``part`` as it is.
        kept: the axes along which ``part`` goes with the weight; None for all.
    """
    placements = _placements(weight, kept)
    if placements is None:
        return part
    from torch.distributed.tensor import DTensor

    axes = {p.dim for p in placements if p.is_shard()}
    shape = torch.Size(weight.shape[i] if i in axes else n for i, n in enumerate(part.shape))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def matching(tensor: Tensor, weight: Tensor, kept: Iterable[int] | None = None) -> Tensor:
    """A whole or otherwise spread tensor, spread as what goes with a weight is; see :func:`placed`."""
    placements = _placements(weight, kept)
    if placements is None:
        return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    if not is_sharded(tensor):
        tensor = DTensor.from_local(tensor.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: DTensor = tensor  # type: ignore[assignment]
    return found if tuple(found.placements) == placements else found.redistribute(mesh, placements)


def joined(part: Tensor, spread: Spread, shape: Sequence[int]) -> Tensor:
    """The parts that each process has as one tensor of this shape, spread so."""
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part.contiguous(), spread.mesh, spread.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def gathered(part: Tensor, spread: Spread, shape: Sequence[int]) -> Tensor:
    """A whole weight (or what has its shape), on every process, from the parts that each has."""
    whole: Tensor = joined(part, spread, shape).full_tensor()  # type: ignore[attr-defined]
    return whole


def part_of(whole: Tensor, spread: Spread) -> Tensor:
    """What this process has of something that every process has whole; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(whole, spread.mesh, [Replicate()] * spread.mesh.ndim, run_check=False)
    return everywhere.redistribute(spread.mesh, spread.placements).to_local()


def _placements(weight: Tensor, kept: Iterable[int] | None) -> tuple[Any, ...] | None:
    """How a tensor lies that goes with a weight along some of its axes; None if every process has all of it."""
    if not is_sharded(weight):
        return None
    from torch.distributed.tensor import Replicate

    axes = set(range(weight.ndim) if kept is None else kept)
    own = weight.placements  # type: ignore[attr-defined]
    found = tuple(p if p.is_shard() and p.dim in axes else Replicate() for p in own)
    return found if any(p.is_shard() for p in found) else None


def by_rows(weight: Tensor) -> bool:
    """Does each process have whole rows of the weight, one after the other?"""
    placements: Any = weight.placements if is_sharded(weight) else ()  # type: ignore[attr-defined]
    return all(type(p).__name__ in ("Shard", "Replicate") and (p.is_replicate() or p.dim == 0) for p in placements)


def first_element(weight: Tensor) -> int:
    """How many elements of a weight that is sharded by rows go before the part that is here."""
    spread = spread_of(weight)
    if spread is None or not weight.ndim:
        return 0
    rows = box(spread, spread.mesh.get_coordinate(), weight.shape)[0]
    return int(rows.start) * math.prod(weight.shape[1:])


def box(spread: Spread, place: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The part of a tensor of this shape that the process at this place of the mesh has.

    Args:
        spread: how the tensor lies on processes; placements are shards of whole chunks, or replicas.
        place: where the process stands on each axis of the mesh.
        shape: of the whole tensor.
    """
    found = [slice(0, n) for n in shape]
    for dim, placement in enumerate(spread.placements):
        if placement.is_shard():
            have = found[placement.dim]
            part = -(-(have.stop - have.start) // spread.mesh.size(dim))
            start = min(have.stop, have.start + part * place[dim])
            found[placement.dim] = slice(start, min(have.stop, start + part))
    return tuple(found)


@contextmanager
def together(what: str, size: int) -> Iterator[None]:
    """Say what to do where a collective fails, mostly because a process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} needs all {size} processes, and one has ended or is late: {error}\n"
            "The step is not whole: end this process, and start again from the last checkpoint, on fewer processes if "
            "one is gone for good (docs/scaling.md, 'When a process dies')."
        ) from error


def complete(
    parts: Sequence[Tensor], op: str, spread: Spread, kept: Sequence[int] = (), over: Sequence[int] | None = None
) -> list[Tensor]:
    """Results of reductions over the parts of weights as results over the weights, the same on every process.

    Args:
        parts: one for each weight.
        op: ``"sum"`` or ``"peak"``, the largest.
        spread: how these weights lie on processes.
        kept: the axes over which was not reduced.
        over: the axes that what was reduced had; None for all of the weight's. Along others each process had all of it.
    """
    groups = spread.groups(kept, over)
    if not groups or not parts:
        return list(parts)
    flat = torch.cat([part.reshape(-1) for part in parts])
    how = torch.distributed.ReduceOp.MAX if op == "peak" else torch.distributed.ReduceOp.SUM
    for group in groups:
        with together("a step over sharded weights", torch.distributed.get_world_size(group)):
            torch.distributed.all_reduce(flat, how, group)
    cut = torch.split(flat, [part.numel() for part in parts])
    return [x.view(part.shape) for x, part in zip(cut, parts, strict=True)]
