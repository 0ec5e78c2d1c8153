"""A weight in blocks, with a square matrix, its factor, for each axis of each block: where all of them are.

All factors of a weight are kept side by side in one flat tensor, in the order of :class:`Layout`, so that a rule has
one state for them whatever the weight's rank. What is worked out with them stands in :mod:`piste.kronecker`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from torch import Tensor

__all__ = ["NARROW", "Layout", "merged"]


def merged(shape: Sequence[int], limit: int, *, backwards: bool) -> tuple[int, ...]:
    """The axes of a weight, neighbours multiplied while the product is at most ``limit``; axes of one are dropped.

    Args:
        shape: of the weight.
        limit: the longest axis that merging may make.
        backwards: begin at the last axis, as Meta's code does; Google's begins at the first.

    >>> from piste.blocks import merged
    >>> merged((1, 2, 512, 1, 2048, 1, 3, 4), 1024, backwards=False)
    (1024, 2048, 12)
    >>> merged((32, 3, 64, 64), 8192, backwards=True)
    (96, 4096)
    """
    axes = [n for n in shape if n != 1]
    found: list[int] = []
    for n in reversed(axes) if backwards else axes:
        if found and found[-1] * n <= limit:
            found[-1] *= n
        else:
            found.append(n)
    return tuple(reversed(found) if backwards else found) or (1,)


class _Alike(NamedTuple):
    """The blocks of one shape: a box of the weight, cut evenly.

    Attributes:
        shape: of a block.
        counts: how many there are along each axis.
        box: where they are in the weight.
        starts: for each axis that has factors, where those of all blocks begin in the flat tensor.
        joint: all axes, narrow neighbours with factors together: they are multiplied at once.
    """

    shape: tuple[int, ...]
    counts: tuple[int, ...]
    box: tuple[slice, ...]
    starts: dict[int, int]
    joint: tuple[tuple[int, ...], ...]

    def _of(self, x: Tensor) -> Tensor:
        where = slice(None), *self.box
        return x[where]

    def cut(self, x: Tensor) -> Tensor:
        """The blocks of all weights of a stack, ``(weights * blocks, *shape)``."""
        pairs = [n for pair in zip(self.counts, self.shape, strict=True) for n in pair]
        grid = self._of(x).reshape(len(x), *pairs)
        return grid.permute(0, *range(1, grid.ndim, 2), *range(2, grid.ndim, 2)).reshape(-1, *self.shape)

    def put(self, blocks: Tensor, x: Tensor) -> None:
        """The way back, into a stack."""
        axes = len(self.shape)
        grid = blocks.reshape(len(x), *self.counts, *self.shape)
        woven = grid.permute(0, *(axis for i in range(axes) for axis in (1 + i, 1 + axes + i)))
        box = self._of(x)
        box.copy_(woven.reshape(box.shape))


class Layout:
    """Where the blocks of a weight are, and where their factors.

    Args:
        shape: of the weight, with neighbours merged.
        block: longest side of a block; None for the whole weight.
        longest: axes longer than this have no factor; None for no limit.
        one_sided: only the shortest axis has a factor, of equal ones the first.
    """

    def __init__(self, shape: tuple[int, ...], block: int | None, longest: int | None, *, one_sided: bool) -> None:
        self.shape = shape
        sides = [shape.index(min(shape))] if one_sided else range(len(shape))
        self.axes = tuple(i for i in sides if longest is None or shape[i] <= longest)
        self.kinds: list[_Alike] = []
        self.total = 0
        for parts in product(*(_parts(n, block) for n in shape)):
            size, counts, box = zip(*parts, strict=True)
            starts: dict[int, int] = {}
            for axis in self.axes:
                starts[axis] = self.total
                self.total += prod(counts) * size[axis] ** 2
            self.kinds.append(_Alike(size, counts, box, starts, _joint(size, self.axes)))

    def factors(self, flat: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """For each kind of blocks (by number) and axis, a view of the factors there, ``(weights, blocks, n, n)``."""
        weights = flat.shape[0]
        for kind, alike in enumerate(self.kinds):
            count = prod(alike.counts)
            for axis, start in alike.starts.items():
                n = alike.shape[axis]
                yield kind, axis, flat[:, start : start + count * n * n].view(weights, count, n, n)

    def factors_of(self, flat: Tensor) -> dict[tuple[int, int], Tensor]:
        """The same, by kind and axis."""
        return {(kind, axis): factors for kind, axis, factors in self.factors(flat)}

    def joints(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """For each kind of blocks the axes with factors, narrow neighbours together."""
        for kind, alike in enumerate(self.kinds):
            yield from ((kind, joint) for joint in alike.joint if joint[0] in alike.starts)

    def sides(self) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """For each kind of blocks and axis with factors: how many blocks there are, their shape, the axis."""
        for alike in self.kinds:
            for axis in alike.starts:
                yield prod(alike.counts), alike.shape, axis

    @property
    def cubes(self) -> float:
        """The cubes of the sides of all factors, added up: what decompositions of them cost grows with these."""
        return sum(float(count) * size[axis] ** 3 for count, size, axis in self.sides())

    def taken_apart(self, stack: Tensor) -> list[Tensor]:
        """For each kind the blocks of all weights of a stack."""
        x = stack.reshape(len(stack), *self.shape)
        return [alike.cut(x) for alike in self.kinds]

    def put_together(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """The way back, in the shape of the stack ``like``."""
        if len(self.kinds) == 1 and self.kinds[0].shape == self.shape:
            return blocks[0].reshape(like.shape)
        result = like.new_empty(len(like), *self.shape)
        for part, alike in zip(blocks, self.kinds, strict=True):
            alike.put(part, result)
        return result.reshape(like.shape)


def _parts(n: int, block: int | None) -> list[tuple[int, int, slice]]:
    """An axis as the whole blocks on it and the rest: (size, how many, where)."""
    if block is None or n <= block:
        return [(n, 1, slice(0, n))]
    rest = n % block
    whole = [(block, n // block, slice(0, n - rest))]
    return [*whole, (rest, 1, slice(n - rest, n))] if rest else whole


#: the most numbers along neighbouring axes that are taken together: the 3 x 3 of a convolution's window
NARROW = 16


def _joint(size: tuple[int, ...], axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for axis in range(len(size)):
        longer = (*found[-1], axis) if found else (axis,)
        if len(longer) > 1 and prod(size[i] for i in longer) <= NARROW and {*longer} <= {*axes}:
            found[-1] = longer
        else:
            found.append((axis,))
    return tuple(found)
