"""Whole matrices to the processes that work on them, and what comes out back to all: one collective each way.

A :class:`Team` is the processes that share work. An :class:`Exchange` knows, for some tensors that belong to weights of
a team, who owns which of them, or which part, and what part of each every process has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from piste.sharding import Spread, box, together

__all__ = ["Box", "Exchange", "Pending", "Stake", "Team", "everything", "gathered_flat"]

Box: TypeAlias = "tuple[slice, ...]"


def gathered_flat(flat: Tensor, own: Tensor, group: Any, *, waits: bool = True) -> Any:
    """Fill ``flat`` with what each process of a group has, one after the other."""
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    return getattr(torch.distributed, name)(flat, own, group, async_op=not waits)


class Team:
    """Processes that share work, as one of them sees them.

    Args:
        group: of ``torch.distributed``.
        mesh: on which these processes stand, where their weights are on one; each has a place there.

    Attributes:
        size: how many there are.
        rank: which of them this process is.
        places: of each, where it stands on the mesh.
    """

    def __init__(self, group: Any, mesh: Any = None) -> None:
        self.group, self.mesh = group, mesh
        self.size: int = torch.distributed.get_world_size(group)
        self.rank: int = torch.distributed.get_rank(group)
        members = torch.distributed.get_process_group_ranks(group)
        self.places = [tuple((mesh.mesh == r).nonzero()[0].tolist()) for r in members] if mesh is not None else []

    def __deepcopy__(self, memo: Any) -> Team:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer that shares work with other processes cannot be pickled; legal: its state_dict(), called on "
            "every process"
        )


class Pending:
    """A collective that may still be under way."""

    def __init__(self, work: Any, size: int, what: str, finish: Callable[[], list[list[Tensor]]]) -> None:
        self._work, self._size, self._what, self._finish = work, size, what, finish

    def wait(self) -> list[list[Tensor]]:
        """What arrived: for each kind of value, the tensors of all weights, or the parts of them that are due here."""
        with together(self._what, self._size):
            self._work.wait()
        return self._finish()


class Stake(NamedTuple):
    """A part of a weight and who works on it.

    Attributes:
        weight: by its place among those of an exchange.
        owner: by rank within the team.
        box: where it is in the weight.
    """

    weight: int
    owner: int
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.box)


def everything(shape: Sequence[int]) -> Box:
    """All of a tensor of this shape."""
    return tuple(slice(0, n) for n in shape)


def _size(part: Box) -> int:
    return math.prod(s.stop - s.start for s in part)


def _common(a: Box, b: Box) -> Box:
    starts = [max(x.start, y.start) for x, y in zip(a, b, strict=True)]
    stops = [min(x.stop, y.stop) for x, y in zip(a, b, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in zip(starts, stops, strict=True))


def _within(part: Box, frame: Box) -> Box:
    """A part of a tensor as what it is of another part, the frame, that holds it."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(part, frame, strict=True))


class Exchange:
    """What goes between the owners of some weights and the others.

    Args:
        team: the processes.
        spread: how what is exchanged lies on them; None, or replicas alone, where each has all of it.
        shapes: of the weights.
        stakes: who owns what, weight by weight; those of a weight are all of it.
        what: for messages.

    Attributes:
        mine: the places of the stakes that are owned here.
    """

    def __init__(
        self,
        team: Team,
        spread: Spread | None,
        shapes: Sequence[Sequence[int]],
        stakes: Sequence[Stake],
        what: str = "a step that shares matrix work",
    ) -> None:
        self.team, self.shapes, self.stakes, self.what = team, shapes, stakes, what
        self.spread = spread if spread is not None and any(p.is_shard() for p in spread.placements) else None
        self.mine = [i for i, stake in enumerate(stakes) if stake.owner == team.rank]

    @cached_property
    def _here(self) -> list[Box]:
        """By weight, the part of it that this process has."""
        if self.spread is None:
            return [everything(shape) for shape in self.shapes]
        return [box(self.spread, self.team.places[self.team.rank], shape) for shape in self.shapes]

    @cached_property
    def _boxes(self) -> list[list[Box]]:
        """By process and stake, the part of the weight that is in both."""
        assert self.spread is not None
        return [
            [_common(box(self.spread, place, self.shapes[s.weight]), s.box) for s in self.stakes]
            for place in self.team.places
        ]

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """By process and stake, how many numbers that part has."""
        return [list(map(_size, parts)) for parts in self._boxes]

    def _sends(self, sender: int, owner: int) -> bool:
        """Does it fall to this process to send its part? Of replicas, the one on the owner's side does."""
        assert self.spread is not None
        here, there = self.team.places[sender], self.team.places[owner]
        return all(p.is_shard() or a == b for p, a, b in zip(self.spread.placements, here, there, strict=True))

    def of_mine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What is owned here, in the order of stakes, of weights that every process has."""
        return [parts[weight][part] for weight, _, part in (self.stakes[i] for i in self.mine)]

    def to_owners(self, values: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What is owned here, whole and in the order of stakes, from the parts that each process has.

        Args:
            values: for each kind of value, the parts here of all weights, in one dtype.
        """
        if self.spread is None:
            return [self.of_mine(parts) for parts in values]
        team, sizes, boxes = self.team, self._sizes, self._boxes
        of = [[i for i, s in enumerate(self.stakes) if s.owner == r] for r in range(team.size)]
        going = [of[r] if self._sends(team.rank, r) else [] for r in range(team.size)]
        sent = [self._piece(parts, i).reshape(-1) for r in range(team.size) for parts in values for i in going[r]]
        ins = [len(values) * sum(sizes[team.rank][i] for i in chosen) for chosen in going]
        senders = [r for r in range(team.size) if self._sends(r, team.rank)]
        outs = [len(values) * sum(sizes[r][i] for i in self.mine) if r in senders else 0 for r in range(team.size)]
        like = values[0][0]
        flat = like.new_empty(sum(outs))
        with together(self.what, team.size):
            source = torch.cat(sent) if sent else like.new_empty(0)
            torch.distributed.all_to_all_single(flat, source, outs, ins, group=team.group)
        wholes = [[like.new_empty(self.stakes[i].shape) for i in self.mine] for _ in values]
        start = 0
        for r in senders:
            for kind in wholes:
                for i, whole in zip(self.mine, kind, strict=True):
                    part = whole[_within(boxes[r][i], self.stakes[i].box)]
                    part.copy_(flat[start : start + sizes[r][i]].view(part.shape))
                    start += sizes[r][i]
        return wholes

    def _piece(self, parts: Sequence[Tensor], i: int) -> Tensor:
        """What this process has of a stake."""
        weight = self.stakes[i].weight
        return parts[weight][_within(self._boxes[self.team.rank][i], self._here[weight])]

    def from_owners(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        """To every process what it needs of what owners have; it may go on until it is waited for.

        Args:
            values: for each kind of value, what is owned here, in the order of stakes.
            like: a tensor with the dtype and the device of all of them.
        """
        return self._to_all(values, like) if self.spread is None else self._to_parts(values, like)

    def _to_all(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        team, kinds = self.team, len(values)
        shares = [0] * team.size
        for stake in self.stakes:
            shares[stake.owner] += kinds * _size(stake.box)
        longest, total = max(shares), sum(shares)
        # few owners among many: gathering pads all shares to the longest; adding zeros sends everything twice instead
        padded = team.size * longest <= 2 * total
        starts = [r * longest if padded else sum(shares[:r]) for r in range(team.size)]
        flat = like.new_empty(team.size * longest) if padded else like.new_zeros(total)
        own = like.new_zeros(longest) if padded else flat[starts[team.rank] :]
        if self.mine:
            torch.cat([x.reshape(-1) for kind in values for x in kind], out=own[: shares[team.rank]])
        with together(self.what, team.size):
            if padded:
                work = gathered_flat(flat, own, team.group, waits=False)
            else:
                work = torch.distributed.all_reduce(flat, group=team.group, async_op=True)
        boxes = [stake.box for stake in self.stakes]
        # what is sent has to live as long as the sending
        return Pending(work, team.size, self.what, lambda: (own, self._found(flat, starts, boxes, kinds))[1])

    def _to_parts(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        team, sizes, kinds = self.team, self._sizes, len(values)
        pieces = [
            x[_within(self._boxes[r][i], self.stakes[i].box)].reshape(-1)
            for r in range(team.size)
            for kind in values
            for i, x in zip(self.mine, kind, strict=True)
        ]
        source = torch.cat(pieces) if pieces else like.new_empty(0)
        ins = [kinds * sum(sizes[r][i] for i in self.mine) for r in range(team.size)]
        outs = [0] * team.size
        for i, stake in enumerate(self.stakes):
            outs[stake.owner] += kinds * sizes[team.rank][i]
        flat = like.new_empty(sum(outs))
        with together(self.what, team.size):
            work = torch.distributed.all_to_all_single(flat, source, outs, ins, group=team.group, async_op=True)
        starts, boxes = [sum(outs[:r]) for r in range(team.size)], self._boxes[team.rank]
        return Pending(work, team.size, self.what, lambda: (source, self._found(flat, starts, boxes, kinds))[1])

    def _found(self, flat: Tensor, starts: Sequence[int], boxes: Sequence[Box], kinds: int) -> list[list[Tensor]]:
        """For each kind of value what is due here of all weights, out of what arrived.

        Args:
            flat: what arrived, owner by owner.
            starts: where that of each owner begins.
            boxes: by stake, which part of the weight arrived.
            kinds: how many kinds there are.
        """
        at = list(starts)
        found: list[list[Tensor]] = []
        for _ in range(kinds):
            parts: list[list[tuple[Box, Tensor]]] = [[] for _ in self.shapes]
            for stake, part in zip(self.stakes, boxes, strict=True):
                size = _size(part)
                extents = [s.stop - s.start for s in part]
                parts[stake.weight].append((part, flat[at[stake.owner] : at[stake.owner] + size].view(extents)))
                at[stake.owner] += size
            found.append([_joined(*pair) for pair in zip(parts, self._here, strict=True)])
        return found


def _joined(parts: Sequence[tuple[Box, Tensor]], frame: Box) -> Tensor:
    """The parts of a tensor as one, of which the frame is due."""
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty([s.stop - s.start for s in frame])
    for part, x in parts:
        whole[_within(part, frame)] = x
    return whole
