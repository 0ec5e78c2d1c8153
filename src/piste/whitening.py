"""Kronecker-factored whitening: a triangular or diagonal factor for each axis, moved in its group (Li 2018, 2024).

With ``Q = Q_1 x Q_2 x ...`` the preconditioner is ``P = Q^T Q``, and ``P g`` is as white as a random probe once Q fits:
the mean of ``(Q g)(Q g)^T`` along each axis is that of ``(Q^-T v)(Q^-T v)^T`` for standard normal v. All factors of a
weight are kept side by side in one flat tensor; functions work on stacks of weights of equal shape.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from zlib import crc32

import torch
from torch import Tensor

from piste.costs import costing
from piste.matrices import full_precision
from piste.products import symmetric_products, triangular_products

__all__ = ["Whitening", "whitening"]

log = logging.getLogger("piste")


def _whitening_cost(how: Whitening, shape: Sequence[int], numbers: Sequence[float]) -> float:
    """Along each axis with a matrix two products, or Q^T Q and one; with a diagonal a square and a product."""
    total, every = 0.0, prod(shape)
    for n, *columns in how.sizes(how.axes(shape)):
        if not columns:
            total += 2.0 * every
        elif _squares_first(n, every // n):
            total += 2.0 * n**3 + 2.0 * n * every
        else:
            total += 4.0 * n * every
    return total


def _fitting_cost(how: Whitening, shape: Sequence[int], numbers: Sequence[float]) -> float:
    """Along each axis with a matrix a product, a triangular system (half of one), two outer products, then Q's own.

    The norm of a sum of outer products takes two products with a vector. Diagonals take some eight operations a number.
    """
    every = prod(shape)
    sizes = how.sizes(how.axes(shape))
    return sum(7.0 * n * every + 2.0 * n**3 + 4.0 * n**2 if columns else 8.0 * every for n, *columns in sizes)


def _squares_first(n: int, rows: int) -> bool:
    """Are rows so long that Q^T Q and one product take less than two products?"""
    return 2 * n <= rows


@dataclass(frozen=True)
class Whitening:
    """Which axes of a weight have triangular factors; :func:`whitening` makes one for each choice.

    Attributes:
        longest: longer axes have a diagonal factor; None for no limit. So have axes of one, and vectors.
        diagonal: ``"none"`` of the other axes, the ``"longest"`` one, or ``"all"``.
        merge: weights of more than two axes are taken for matrices: the most nearly square of (first, others) and
            (others, last).
    """

    longest: int | None
    diagonal: str
    merge: bool

    def axes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes that have factors, by their lengths."""
        if len(shape) < 3 or not self.merge:
            return tuple(shape) or (1,)
        ways = (prod(shape[:-1]), shape[-1]), (shape[0], prod(shape[1:]))
        return min(ways, key=lambda way: max(way) / max(1, min(way)))

    def count(self, ndim: int) -> int:
        """How many factors a weight of this rank has."""
        return 2 if ndim > 2 and self.merge else max(ndim, 1)

    def sizes(self, axes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of factors: ``(n,)`` where diagonal."""
        limit = max(axes) if self.longest is None else self.longest
        flat = [n == 1 or n > limit or len(axes) == 1 or self.diagonal == "all" for n in axes]
        if self.diagonal == "longest":
            flat[axes.index(max(axes))] = True
        return [(n,) if diagonal else (n, n) for n, diagonal in zip(axes, flat, strict=True)]

    def factors(self, flat: Tensor, axes: tuple[int, ...]) -> list[Tensor]:
        """Views of the factors in a stack of flat tensors."""
        sizes = self.sizes(axes)
        ends = accumulate(map(prod, sizes))
        return [flat[:, end - prod(size) : end].view(len(flat), *size) for size, end in zip(sizes, ends, strict=True)]

    def identity(self, weight: Tensor) -> Tensor:
        """Factors that change nothing."""
        axes = self.axes(weight.shape)
        flat = torch.zeros(1, sum(map(prod, self.sizes(axes))), device=weight.device)
        for q in self.factors(flat, axes):
            (q if q.ndim == 2 else q.diagonal(dim1=-2, dim2=-1)).fill_(1.0)
        return flat[0]

    @costing(_whitening_cost)
    def whitened(self, stack: Tensor, flat: Tensor) -> Tensor:
        """Each weight's numbers multiplied by ``Q^T Q`` along every axis."""
        axes = self.axes(stack.shape[1:])
        x = stack.reshape(len(stack), *axes)
        for axis, q in enumerate(self.factors(flat, axes)):
            x = _from_rows(_whitened(q, _rows(x, axis)), x, axis)
        return x.reshape(stack.shape)

    @costing(_fitting_cost)
    def fitted(self, stack: Tensor, flat: Tensor, rate: float, seed: float, step: float, balance: float) -> Tensor:
        """Factors that whiten a little better: a step down the fitting criterion, in the group of triangular matrices.

        Args:
            stack: what is to be white.
            flat: factors so far.
            rate: length of the step, in the norm of the criterion's slope.
            seed: of the probe, with the next one; weights of one shape have the same probe at the same own step.
            step: the weights' own step.
            balance: if not 0, the factors of each weight are first brought to one size, which leaves ``Q`` as it is.
        """
        axes = self.axes(stack.shape[1:])
        x, new = stack.reshape(len(stack), *axes), flat.clone()
        factors = self.factors(new, axes)
        if balance:
            _balance(factors)
        v = _probe(x[:1], int(seed), int(step))
        # a thousandth of noise: without it factors of gradients that lack rank would grow for ever
        jitter = torch.finfo(torch.float32).eps ** 0.5 * x.abs().flatten(1).mean(1)
        a, b = x + jitter.view(-1, *[1] * len(axes)) * v, v.expand_as(x)
        with full_precision():
            for axis, q in enumerate(factors):
                a, b = _along(q, a, axis), _solved(q, b, axis)
            for axis, q in enumerate(factors):
                (_step_triangular if q.ndim == 3 else _step_diagonal)(q, _rows(a, axis), _rows(b, axis), rate)
        good = torch.isfinite(new).all(1)
        if not bool(good.all()):
            log.warning("%d of %d whitening factors failed and stay as they were", int((~good).sum()), len(good))
        return torch.where(good[:, None], new, flat)


@cache
def whitening(longest: int | None, diagonal: str, *, merge: bool) -> Whitening:
    """The one :class:`Whitening` of this choice, so that equal rules share their plans."""
    return Whitening(longest, diagonal, merge)


def _probe(like: Tensor, seed: int, step: int) -> Tensor:
    """Standard normal numbers that follow from the seed, the step and the shape, whatever was drawn before."""
    generator = torch.Generator(like.device).manual_seed(crc32(f"probe {seed} {step}".encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device).to(like.dtype)


def _rows(x: Tensor, axis: int) -> Tensor:
    """Stacks as matrices whose rows go along an axis."""
    return x.movedim(axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)


def _from_rows(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    return rows.reshape(like.movedim(axis + 1, 1).shape).movedim(1, axis + 1)


def _whitened(q: Tensor, rows: Tensor) -> Tensor:
    """Multiplied by ``Q^T Q``, which is worked out first where rows are so long that it takes less."""
    if q.ndim == 2:
        return q.square()[:, :, None] * rows
    if _squares_first(q.shape[-1], rows.shape[-1]):
        return symmetric_products(q.mT, q) @ rows
    return triangular_products(q, triangular_products(q, rows), transposed=True)


def _along(q: Tensor, x: Tensor, axis: int) -> Tensor:
    """Multiplied along an axis by a factor."""
    rows = _rows(x, axis)
    return _from_rows(triangular_products(q, rows) if q.ndim == 3 else q[:, :, None] * rows, x, axis)


def _solved(q: Tensor, x: Tensor, axis: int) -> Tensor:
    """Multiplied along an axis by the inverse of the transposed factor."""
    rows = _rows(x, axis)
    if q.ndim == 2:
        return _from_rows(rows / q[:, :, None], x, axis)
    return _from_rows(torch.linalg.solve_triangular(q.mT, rows, upper=False), x, axis)


def _balance(factors: Sequence[Tensor]) -> None:
    """Bring factors to one largest number; their product stays."""
    sizes = torch.stack([q.abs().flatten(1).amax(1) for q in factors])
    for q, ratio in zip(factors, sizes.log().mean(0).exp() / sizes, strict=True):
        q.mul_(ratio.view(-1, *[1] * (q.ndim - 1)))


def _step_diagonal(q: Tensor, a: Tensor, b: Tensor, rate: float) -> None:
    seen, wanted = a.square().sum(-1), b.square().sum(-1)
    size = (seen + wanted).amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    q.sub_(rate * (seen - wanted) * q / size)


def _step_triangular(q: Tensor, a: Tensor, b: Tensor, rate: float) -> None:
    seen, wanted = symmetric_products(a, a.mT), symmetric_products(b, b.mT)
    size = _spectral_norm_at_least(seen + wanted).clamp(min=torch.finfo(q.dtype).tiny)
    q.sub_(triangular_products(rate * torch.triu(seen - wanted) / size[:, None, None], q))


def _spectral_norm_at_least(stack: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue of positive matrices: how much it stretches its longest column, twice."""
    largest = stack.abs().amax((-2, -1))
    a = stack / torch.where(largest > 0, largest, 1.0)[:, None, None]
    longest = a.square().sum(-2).argmax(-1)
    x = a.gather(-1, longest[:, None, None].expand(-1, a.shape[-1], 1))
    x = a.mT @ x
    x = a @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny))
    stretched: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return stretched * largest
