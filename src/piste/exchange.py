"""Whole matrices to the processes that work on them, and what comes out back to all: one collective each way.

A :class:`Team` is the processes that share work. An :class:`Exchange` knows, for some tensors that belong to weights of
a team, who owns which and what part of each every process has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from piste.sharding import Spread, box, together

__all__ = ["Exchange", "Pending", "Team", "gathered_flat"]


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


class Exchange:
    """What goes between the owners of some weights and the others.

    Args:
        team: the processes.
        spread: how what is exchanged lies on them; None, or replicas alone, where each has all of it.
        shapes: of the weights.
        owners: who owns each, by rank within the team.
        what: for messages.
    """

    def __init__(
        self,
        team: Team,
        spread: Spread | None,
        shapes: Sequence[Sequence[int]],
        owners: Sequence[int],
        what: str = "a step that shares matrix work",
    ) -> None:
        self.team, self.shapes, self.owners, self.what = team, shapes, owners, what
        self.spread = spread if spread is not None and any(p.is_shard() for p in spread.placements) else None
        self.mine = [i for i, owner in enumerate(owners) if owner == team.rank]

    @cached_property
    def _boxes(self) -> list[list[tuple[slice, ...]]]:
        """By process and weight, the part that it has."""
        assert self.spread is not None
        return [[box(self.spread, place, shape) for shape in self.shapes] for place in self.team.places]

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """By process and weight, how many numbers that part has."""
        return [[math.prod(s.stop - s.start for s in part) for part in parts] for parts in self._boxes]

    def _sends(self, sender: int, owner: int) -> bool:
        """Does it fall to this process to send its part? Of replicas, the one on the owner's side does."""
        assert self.spread is not None
        here, there = self.team.places[sender], self.team.places[owner]
        return all(p.is_shard() or a == b for p, a, b in zip(self.spread.placements, here, there, strict=True))

    def to_owners(self, values: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Whole tensors of the weights that are owned here, in their order, from the parts that each process has.

        Args:
            values: for each kind of value, the parts here of all weights, in one dtype.
        """
        if self.spread is None:
            return [[parts[i] for i in self.mine] for parts in values]
        team, sizes = self.team, self._sizes
        of = [[i for i, owner in enumerate(self.owners) if owner == r] for r in range(team.size)]
        going = [of[r] if self._sends(team.rank, r) else [] for r in range(team.size)]
        sent = [parts[i].reshape(-1) for r in range(team.size) for parts in values for i in going[r]]
        ins = [len(values) * sum(sizes[team.rank][i] for i in chosen) for chosen in going]
        senders = [r for r in range(team.size) if self._sends(r, team.rank)]
        outs = [len(values) * sum(sizes[r][i] for i in self.mine) if r in senders else 0 for r in range(team.size)]
        like = values[0][0]
        flat = like.new_empty(sum(outs))
        with together(self.what, team.size):
            source = torch.cat(sent) if sent else like.new_empty(0)
            torch.distributed.all_to_all_single(flat, source, outs, ins, group=team.group)
        wholes = [[like.new_empty(tuple(self.shapes[i])) for i in self.mine] for _ in values]
        start = 0
        for r in senders:
            for kind in wholes:
                for i, whole in zip(self.mine, kind, strict=True):
                    part = whole[self._boxes[r][i]]
                    part.copy_(flat[start : start + sizes[r][i]].view(part.shape))
                    start += sizes[r][i]
        return wholes

    def from_owners(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        """To every process what it needs of whole tensors that their owners have; it may go on until it is waited for.

        Args:
            values: for each kind of value, the tensors of the weights that are owned here, in their order.
            like: a tensor with the dtype and the device of all of them.
        """
        return self._to_all(values, like) if self.spread is None else self._to_parts(values, like)

    def _to_all(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        team, kinds = self.team, len(values)
        sizes = [math.prod(shape) for shape in self.shapes]
        shares = [0] * team.size
        for owner, size in zip(self.owners, sizes, strict=True):
            shares[owner] += kinds * size
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

        def finish() -> list[list[Tensor]]:
            at = list(starts)
            found: list[list[Tensor]] = []
            for _ in range(kinds):
                found.append([])
                for owner, size, shape in zip(self.owners, sizes, self.shapes, strict=True):
                    found[-1].append(flat[at[owner] : at[owner] + size].view(tuple(shape)))
                    at[owner] += size
            return found

        # what is sent has to live as long as the sending
        return Pending(work, team.size, self.what, lambda: (own, finish())[1])

    def _to_parts(self, values: Sequence[Sequence[Tensor]], like: Tensor) -> Pending:
        team, sizes, kinds = self.team, self._sizes, len(values)
        pieces = [
            x[self._boxes[r][i]].reshape(-1)
            for r in range(team.size)
            for kind in values
            for i, x in zip(self.mine, kind, strict=True)
        ]
        source = torch.cat(pieces) if pieces else like.new_empty(0)
        ins = [kinds * sum(sizes[r][i] for i in self.mine) for r in range(team.size)]
        outs = [0] * team.size
        for i, owner in enumerate(self.owners):
            outs[owner] += kinds * sizes[team.rank][i]
        flat = like.new_empty(sum(outs))
        with together(self.what, team.size):
            work = torch.distributed.all_to_all_single(flat, source, outs, ins, group=team.group, async_op=True)

        def finish() -> list[list[Tensor]]:
            starts = [sum(outs[:r]) for r in range(team.size)]
            found: list[list[Tensor]] = []
            for _ in range(kinds):
                found.append([])
                for i, owner in enumerate(self.owners):
                    size = sizes[team.rank][i]
                    extents = [s.stop - s.start for s in self._boxes[team.rank][i]]
                    found[-1].append(flat[starts[owner] : starts[owner] + size].view(extents))
                    starts[owner] += size
            return found

        return Pending(work, team.size, self.what, lambda: (source, finish())[1])
