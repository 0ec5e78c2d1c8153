"""Products on the blocks of a weight: the sums of outer products that are its Kronecker factors, and with factors.

The functions work on stacks of weights of equal shape, and on all blocks of one shape at once. Where blocks and factors
are, :mod:`piste.blocks` says; roots and eigenvectors of factors are made in :mod:`piste.renewals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from piste.blocks import NARROW, Layout, merged
from piste.costs import costing
from piste.matrices import descending, moved, picked
from piste.products import outer, symmetric_products

__all__ = ["Kronecker", "kronecker"]


def _rows(blocks: Tensor, joint: tuple[int, ...]) -> Tensor:
    """Blocks as matrices whose rows go along some neighbouring axes; the last ones cost no copy, nor do the first."""
    size = blocks.shape[1:]
    before, n, after = prod(size[: joint[0]]), prod(size[i] for i in joint), prod(size[joint[-1] + 1 :])
    if after == 1:
        return blocks.reshape(len(blocks), before, n).mT
    return blocks.reshape(len(blocks), before, n, after).transpose(1, 2).reshape(len(blocks), n, before * after)


def _outers(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each of the axes that rows go along together, the sum of outer products along it alone."""
    if rows.shape[1] == 1:
        return [torch.linalg.vector_norm(rows, dim=(1, 2)).square().view(-1, 1, 1)] * len(sizes)
    together = symmetric_products(rows, rows.mT).view(len(rows), *sizes, *sizes)
    axes = [*range(1, len(sizes) + 1)]
    found = []
    for axis in axes:  # the trace over all others
        second = [0 if i == axis else i for i in axes]
        found.append(torch.einsum(together, [len(axes) + 1, *axes, *second], [len(axes) + 1, axis, 0]))
    return found


def _kronecker(factors: list[Tensor]) -> Tensor:
    """The Kronecker products of stacks of matrices."""
    found = factors[0]
    for factor in factors[1:]:
        n = found.shape[-1] * factor.shape[-1]
        found = (found[:, :, None, :, None] * factor[:, None, :, None, :]).reshape(len(found), n, n)
    return found


def _products(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    """Operations of one product of each block along each axis."""
    return sum(2.0 * count * prod(size) * size[axis] for count, size, axis in how.layout(shape).sides())


def _norms(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    return 2.0 * prod(shape)


def _rebasing(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    """Two products of each block along each axis, or one and that of both factors, whichever is less."""
    sides = ((count, prod(size), size[axis]) for count, size, axis in how.layout(shape).sides())
    return sum(2.0 * count * n * (every + min(every, n * n)) for count, every, n in sides)


def _ordering(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    return 2 * how.layout(shape).cubes


@dataclass(frozen=True)
class Kronecker:
    """How weights are cut into blocks; :func:`kronecker` makes one for each choice.

    Attributes:
        block: longest side of a block; None for whole weights.
        merge: longest axis that merging neighbours may make; None merges nothing.
        backwards: merge from the last axis on.
        longest: axes longer than this have no factor; None for no limit.
        one_sided: only the shortest axis has a factor.
    """

    block: int | None
    merge: int | None
    backwards: bool
    longest: int | None
    one_sided: bool

    def layout(self, shape: Sequence[int]) -> Layout:
        """That of a weight of this shape."""
        return _layout(self, tuple(shape))

    def edges(self, shape: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
        """The first axis of a weight on which there are several blocks, and where on it blocks begin and end.

        A part between two edges has, as a weight of its own, the same blocks, exponents and factors. None where there
        is no such axis, or where which axes have factors depends on how long they are.
        """
        if self.block is None or self.longest is not None or self.one_sided:
            return None
        axes = self.layout(shape).shape
        first = next((i for i, n in enumerate(axes) if n > self.block), None)
        if first is None:
            return None
        n, before = axes[first], prod(axes[:first])
        axis = next((i for i, m in enumerate(shape) if m == n and prod(shape[:i]) == before), None)
        if axis is None:  # neighbours were merged into it
            return None
        edges = [*range(0, n, self.block), n]

        def alike(rows: int) -> bool:
            part = (*shape[:axis], rows, *shape[axis + 1 :])
            return self.layout(part).shape == (*axes[:first], rows, *axes[first + 1 :])

        if not alike(n - edges[-2]):  # a short rest would be merged with the next axis
            del edges[-2]
        return (axis, tuple(edges)) if alike(self.block) else None

    def places(self, shape: Sequence[int], rows: slice) -> list[slice]:
        """Where the factors of a part between two of those edges are among all, in the order of the part's own."""
        layout = self.layout(shape)
        first = next(i for i, n in enumerate(layout.shape) if self.block is not None and n > self.block)
        found: list[slice] = []
        for alike in layout.kinds:
            box, size = alike.box[first], alike.shape[first]
            low, high = ((min(max(at, box.start), box.stop) - box.start) // size for at in (rows.start, rows.stop))
            for axis, start in alike.starts.items():
                each = prod(alike.counts[first + 1 :]) * alike.shape[axis] ** 2
                found.append(slice(start + low * each, start + high * each))
        return [place for place in found if place.start < place.stop]

    def zeros(self, weight: Tensor) -> Tensor:
        """Factors of zero for a weight."""
        return torch.zeros(self.layout(weight.shape).total, device=weight.device)

    def identity(self, weight: Tensor) -> Tensor:
        """Factors that change nothing."""
        layout = self.layout(weight.shape)
        flat = torch.zeros(1, layout.total, device=weight.device)
        for _, _, factors in layout.factors(flat):
            factors.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return flat[0]

    @costing(_products)
    def gram(self, stack: Tensor) -> Tensor:
        """For each axis of each block the sum of outer products along it: ``G G^T`` and ``G^T G`` of a matrix."""
        return self.averaged(stack, stack.new_zeros(len(stack), self.layout(stack.shape[1:]).total), 0.0, 1.0)

    @costing(_products)
    def averaged(self, stack: Tensor, before: Tensor, kept: float, share: float) -> Tensor:
        """``kept`` of the factors so far and ``share`` of those sums."""
        layout = self.layout(stack.shape[1:])
        blocks = layout.taken_apart(stack)
        flat = torch.empty_like(before)
        old, new = layout.factors_of(before), layout.factors_of(flat)
        for kind, joint in layout.joints():
            rows, places = _rows(blocks[kind], joint), [(kind, axis) for axis in joint]
            if len(joint) == 1 and rows.shape[1] > 1:
                outer(rows, new[places[0]], plus=old[places[0]], beta=kept, alpha=share)
                continue
            sums = _outers(rows, [blocks[kind].shape[axis + 1] for axis in joint])
            for place, own in zip(places, sums, strict=True):
                torch.add(kept * old[place], own.view_as(old[place]), alpha=share, out=new[place])
        return flat

    @costing(_products)
    def times(self, stack: Tensor, flat: Tensor) -> Tensor:
        """Each block multiplied by its factor along every axis: ``L G R`` for symmetric factors of a matrix."""
        return self._through(stack, lambda length, factor: [factor.mT], flat)

    @costing(_products)
    def turned(self, stack: Tensor, flat: Tensor) -> Tensor:
        """The same with transposed factors: into the basis that the columns of the factors are."""
        return self._through(stack, lambda length, factor: [factor], flat)

    @costing(_rebasing)
    def rebased(self, stack: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """From one basis into another, as by :meth:`times` and :meth:`turned`.

        Where there are more columns than an axis is long, both factors are multiplied first.
        """

        def right(length: int, before: Tensor, after: Tensor) -> list[Tensor]:
            return [before.mT @ after] if before.shape[-1] <= length else [before.mT, after]

        return self._through(stack, right, old, new)

    def _through(self, stack: Tensor, right: Callable[..., list[Tensor]], *flats: Tensor) -> Tensor:
        """Blocks times what ``right`` makes of their factors, axis by axis.

        The first axis, or the first narrow ones together, are multiplied and become the last. So few products need a
        copy, and once every axis has had its turn all are where they were.

        Args:
            stack: weights.
            right: of the number of columns and of one factor out of each of ``flats``: the matrices to multiply with,
                one after the other.
            flats: factors.
        """
        layout = self.layout(stack.shape[1:])
        factors = [layout.factors_of(flat) for flat in flats]
        blocks = []
        for kind, x in enumerate(layout.taken_apart(stack)):
            size, count = x.shape[1:], x.shape[0]
            for joint in layout.kinds[kind].joint:
                columns = x.reshape(count, prod(size[axis] for axis in joint), -1)
                if joint[0] not in layout.kinds[kind].starts:
                    x = columns.mT
                    continue
                own = [_kronecker([each[kind, axis].flatten(0, 1) for axis in joint]) for each in factors]
                first, *others = right(columns.shape[2], *own)
                # on CPUs a product with few columns takes twice as long as one with few rows and the copy that follows
                x = (first.mT @ columns).mT if columns.shape[1] <= NARROW else columns.mT @ first
                for factor in others:
                    x = x @ factor
            blocks.append(x.reshape(count, *size))
        return layout.put_together(blocks, stack)

    @costing(_ordering)
    def moved(self, flat: Tensor, bases: Tensor, *shape: float) -> Tensor:
        """Where factors take the columns of bases; renewing these by QR and :meth:`in_order` ask for it."""
        layout = self.layout([int(n) for n in shape])
        result = torch.empty_like(flat)
        three = (layout.factors(flat), layout.factors(bases), layout.factors(result))
        for (_, _, factors), (_, _, columns), (_, _, images) in zip(*three, strict=True):
            images.copy_(moved(factors, columns))
        return result

    @costing(_norms)
    def in_order(self, stack: Tensor, images: Tensor, bases: Tensor) -> Tensor:
        """Numbers that belong to the columns of bases, in the order that renewing brings those into."""
        layout = self.layout(stack.shape[1:])
        blocks = layout.taken_apart(stack)
        for (kind, axis, seen), (_, _, columns) in zip(layout.factors(images), layout.factors(bases), strict=True):
            order = descending(seen.flatten(0, 1), columns.flatten(0, 1))
            blocks[kind] = picked(blocks[kind], order, axis)
        return layout.put_together(blocks, stack)

    @costing(_norms)
    def norms(self, stack: Tensor) -> Tensor:
        """Every number replaced by the norm of the block that it is in."""
        layout = self.layout(stack.shape[1:])
        blocks = []
        for part in layout.taken_apart(stack):
            norm = torch.linalg.vector_norm(part.flatten(1), dim=1)
            blocks.append(norm.view(-1, *[1] * (part.ndim - 1)).expand_as(part))
        return layout.put_together(blocks, stack)


@cache
def _layout(how: Kronecker, shape: tuple[int, ...]) -> Layout:
    axes = (shape or (1,)) if how.merge is None else merged(shape, how.merge, backwards=how.backwards)
    return Layout(axes, how.block, how.longest, one_sided=how.one_sided)


@cache
def kronecker(
    block: int | None,
    merge: int | None = None,
    *,
    backwards: bool = False,
    longest: int | None = None,
    one_sided: bool = False,
) -> Kronecker:
    """The one :class:`Kronecker` of this choice, so that equal rules share their plans."""
    return Kronecker(block, merge, backwards, longest, one_sided)
