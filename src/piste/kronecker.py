"""Kronecker factors: a weight in blocks, a symmetric matrix for each axis of each block.

All factors of a weight are kept side by side in one flat tensor, in the order of :class:`Layout`, so that a rule has
one state for them whatever the weight's rank. The functions work on stacks of weights of equal shape, and on all
blocks of one shape at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from piste.costs import EIGEN, QR, costing
from piste.matrices import Work, descending, eigenbases, inverse_roots, moved, next_bases, picked
from piste.products import outer, symmetric_products

__all__ = ["Kronecker", "Layout", "kronecker", "merged", "rebasing", "rooting"]

log = logging.getLogger("piste")


def merged(shape: Sequence[int], limit: int, *, backwards: bool) -> tuple[int, ...]:
    """The axes of a weight, neighbours multiplied while the product is at most ``limit``; axes of one are dropped.

    Args:
        shape: of the weight.
        limit: the longest axis that merging may make.
        backwards: begin at the last axis, as Meta's code does; Google's begins at the first.

    >>> from piste.kronecker import merged
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
_NARROW = 16


def _joint(size: tuple[int, ...], axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for axis in range(len(size)):
        longer = (*found[-1], axis) if found else (axis,)
        if len(longer) > 1 and prod(size[i] for i in longer) <= _NARROW and {*longer} <= {*axes}:
            found[-1] = longer
        else:
            found.append((axis,))
    return tuple(found)


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


def _cubes(how: Kronecker, shape: Sequence[int]) -> float:
    """The cubes of the sides of all factors of a weight, added up."""
    return sum(float(count) * size[axis] ** 3 for count, size, axis in how.layout(shape).sides())


def _eigen(how: Kronecker, shape: Sequence[int]) -> float:
    """Eigendecompositions of all factors, and three products with four vectors each for their residuals."""
    return EIGEN * _cubes(how, shape) + 24.0 * sum(
        count * size[axis] ** 2 for count, size, axis in how.layout(shape).sides()
    )


def _norms(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    return 2.0 * prod(shape)


def _rebasing(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    """Two products of each block along each axis, or one and that of both factors, whichever is less."""
    sides = ((count, prod(size), size[axis]) for count, size, axis in how.layout(shape).sides())
    return sum(2.0 * count * n * (every + min(every, n * n)) for count, every, n in sides)


def _ordering(how: Kronecker, shape: Sequence[int], numbers: Sequence[float]) -> float:
    return 2 * _cubes(how, shape)


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
                x = (first.mT @ columns).mT if columns.shape[1] <= _NARROW else columns.mT @ first
                for factor in others:
                    x = x @ factor
            blocks.append(x.reshape(count, *size))
        return layout.put_together(blocks, stack)

    @costing(_ordering)
    def moved(self, flat: Tensor, bases: Tensor, *shape: float) -> Tensor:
        """Where factors take the columns of bases; :func:`rebasing` by QR and :meth:`in_order` ask for it."""
        layout = self.layout([int(n) for n in shape])
        result = torch.empty_like(flat)
        three = (layout.factors(flat), layout.factors(bases), layout.factors(result))
        for (_, _, factors), (_, _, columns), (_, _, images) in zip(*three, strict=True):
            images.copy_(moved(factors, columns))
        return result

    @costing(_norms)
    def in_order(self, stack: Tensor, images: Tensor, bases: Tensor) -> Tensor:
        """Numbers that belong to the columns of bases, in the order that :func:`rebasing` brings those into."""
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


def _joined(stacks: list[Tensor]) -> Tensor:
    return torch.cat(stacks) if len(stacks) > 1 else stacks[0]


Renewal = Callable[[Tensor, Tensor], "tuple[Tensor, int]"]


#: the most numbers of factors that are renewed in one stack on CPUs, where stacking large matrices only takes memory
_MOST_STACKED = 1 << 18


def _renewed(how: Kronecker, flat: Tensor, old: Tensor, shape: Sequence[float], what: str, renew: Renewal) -> Tensor:
    """What belongs to factors, worked out anew for all of one size at once; a warning tells what could not be."""
    layout = how.layout([int(n) for n in shape])
    result = torch.empty_like(flat)
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    three = (layout.factors(flat), layout.factors(old), layout.factors(result))
    for number, views in enumerate(zip(*three, strict=True)):
        factors, before, after = (view for _, _, view in views)
        alone = flat.device.type == "cpu" and factors.numel() > _MOST_STACKED // 2
        alike.setdefault((factors.shape[-1], number if alone else -1), []).append((factors, before, after))
    for (size, _), parts in alike.items():
        stack, before = (_joined([part[i].flatten(0, 1) for part in parts]) for i in (0, 1))
        found, failed = renew(stack, before)
        if failed:
            log.warning("%d of %d %s of size %d failed and stay as they were", failed, len(stack), what, size)
        counts = [len(after) * after.shape[1] for _, _, after in parts]
        for (_, _, after), new in zip(parts, torch.split(found, counts), strict=True):
            after.copy_(new.view(after.shape))
    return result


def _held(how: Kronecker, each: int, shape: Sequence[int], count: int) -> int:
    """Numbers held for the largest stack of a renewal: so many matrices for each, two more where it is joined.

    Coupled Newton holds less of a stack on a CPU, where it takes one matrix at a time.
    """
    layout = how.layout(shape)
    sizes: dict[int, list[int]] = {}
    for alike in layout.kinds:
        for axis in alike.starts:
            sizes.setdefault(alike.shape[axis], []).append(count * prod(alike.counts) * alike.shape[axis] ** 2)
    joined = [[n for n in same if n <= _MOST_STACKED // 2] for same in sizes.values()]
    alone = [n for same in sizes.values() for n in same]
    return max([0, *(each * n for n in alone), *((each + 2) * sum(same) for same in joined if len(same) > 1)])


@cache
def rooting(how: Kronecker, method: str, relative: bool) -> Work:
    """The function that renews inverse roots; see :func:`piste.matrices.inverse_roots` for ``method``, ``relative``.

    Returns:
        A function of stacks of factors and of the roots so far, the exponent (0 for one over twice the number of axes
        with factors), the ridge, and the shape of the weight.
    """

    def cost(shape: Sequence[int], numbers: Sequence[float]) -> float:
        if method == "eigen":
            return _eigen(how, shape) + 2 * _cubes(how, shape)
        return 160 * _cubes(how, shape)  # some twenty iterations of four products, of two each

    @costing(cost)
    def roots(flat: Tensor, old: Tensor, exponent: float, eps: float, *shape: float) -> Tensor:
        power = exponent or 1 / (2 * max(1, len(how.layout([int(n) for n in shape]).axes)))

        def renew(stack: Tensor, before: Tensor) -> tuple[Tensor, int]:
            return inverse_roots(stack, before, power, eps, method=method, relative=relative)

        return _renewed(how, flat, old, shape, "inverse roots", renew)

    return Work(roots, partial(_held, how, 10 if method == "newton" else 3), renews=True, blocks=how)


@cache
def rebasing(how: Kronecker, method: str) -> Work:
    """The function that renews eigenvectors of factors.

    Args:
        how: how weights are cut up.
        method: ``"eigen"``, those of the largest eigenvalues first; ``"rising"``, those of the smallest first; or
            ``"qr"``: one power iteration from the bases so far, made orthogonal again, sorted as by ``"eigen"``.

    Returns:
        A function of stacks of factors (for ``"qr"``: of what :meth:`Kronecker.moved` makes of them) and of bases, and
        the shape of the weight.
    """
    renew = {"eigen": eigenbases, "rising": _rising, "qr": next_bases}[method]

    @costing(lambda shape, numbers: QR * _cubes(how, shape) if method == "qr" else _eigen(how, shape))
    def bases(flat: Tensor, old: Tensor, *shape: float) -> Tensor:
        return _renewed(how, flat, old, shape, "eigenbases", renew)

    return Work(bases, partial(_held, how, 3), renews=True, blocks=how)


def _rising(stack: Tensor, old: Tensor) -> tuple[Tensor, int]:
    found, failed = eigenbases(stack, old.flip(-1))
    return found.flip(-1), failed
