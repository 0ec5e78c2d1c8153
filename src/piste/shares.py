"""Who works on a weight: one process of a team, or several, each on some of the blocks that it falls into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from piste.exchange import Box, Stake, Team, everything

__all__ = ["Blocks", "Cut", "Share"]


class Blocks(Protocol):
    """What sees each block of a weight alone, as :class:`piste.kronecker.Kronecker` does."""

    def edges(self, shape: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
        """An axis of a weight, and where on it parts may begin and end that are like weights of their own."""

    def places(self, shape: Sequence[int], rows: slice) -> list[slice]:
        """Where, among the factors of a weight, those of a part between two edges are, in their own order."""


class Cut(NamedTuple):
    """A weight in parts of whole blocks.

    Attributes:
        blocks: what knows the weight's blocks.
        shape: of the weight.
        axis: along which it is cut.
        edges: where the parts begin, and where the last one ends.
    """

    blocks: Blocks
    shape: tuple[int, ...]
    axis: int
    edges: tuple[int, ...]

    @property
    def rows(self) -> list[slice]:
        """The parts, along the axis."""
        return [slice(start, stop) for start, stop in pairwise(self.edges)]

    @property
    def boxes(self) -> list[Box]:
        """The parts."""
        whole = everything(self.shape)
        return [(*whole[: self.axis], rows, *whole[self.axis + 1 :]) for rows in self.rows]


class Share(NamedTuple):
    """Who works on a weight.

    Attributes:
        team: the processes.
        owners: by part of the weight, which of them, by rank; no process has two parts.
        cut: the parts; None if one process has all.
    """

    team: Team
    owners: tuple[int, ...]
    cut: Cut | None = None

    @property
    def mine(self) -> int | None:
        """The part that is worked on here; None if there is none."""
        return self.owners.index(self.team.rank) if self.team.rank in self.owners else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """That of the part here, where the weight is cut."""
        if self.cut is None or self.mine is None:
            return None
        return Stake(0, self.team.rank, self.cut.boxes[self.mine]).shape

    def stakes(self, weight: int, shape: Sequence[int]) -> list[Stake]:
        """The parts of a weight of this shape, which has this place in an exchange."""
        boxes = [everything(shape)] if self.cut is None else self.cut.boxes
        return [Stake(weight, owner, box) for owner, box in zip(self.owners, boxes, strict=True)]

    def matrix_stakes(self, weight: int, shape: Sequence[int]) -> list[tuple[Stake, Box]]:
        """The same of a matrix of this shape that goes with the weight, and where each is in what its owner keeps."""
        if self.cut is None:
            return [(stake, stake.box) for stake in self.stakes(weight, shape)]
        found: list[tuple[Stake, Box]] = []
        for owner, rows in zip(self.owners, self.cut.rows, strict=True):
            start = 0
            for place in self.cut.blocks.places(self.cut.shape, rows):
                stop = start + place.stop - place.start
                found.append((Stake(weight, owner, (place,)), (slice(start, stop),)))
                start = stop
        return found
