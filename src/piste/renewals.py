"""Inverse roots and eigenvectors of Kronecker factors, worked out anew every so many steps.

:class:`piste.kronecker.Kronecker` multiplies with what comes out here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod

import torch
from torch import Tensor

from piste.costs import EIGEN, QR, costing
from piste.kronecker import Kronecker
from piste.matrices import Work, eigenbases, inverse_roots, next_bases

__all__ = ["rebasing", "rooting"]

log = logging.getLogger("piste")

#: the most numbers of factors that are renewed in one stack on CPUs, where stacking large matrices only takes memory
_MOST_STACKED = 1 << 18

Renewal = Callable[[Tensor, Tensor], "tuple[Tensor, int]"]


@cache
def rooting(how: Kronecker, method: str, relative: bool) -> Work:
    """The function that renews inverse roots; see :func:`piste.matrices.inverse_roots` for ``method``, ``relative``.

    Returns:
        A function of stacks of factors and of the roots so far, the exponent (0 for one over twice the number of axes
        with factors), the ridge, and the shape of the weight.
    """

    def cost(shape: Sequence[int], numbers: Sequence[float]) -> float:
        if method == "eigen":
            return _eigen(how, shape) + 2 * how.layout(shape).cubes
        return 160 * how.layout(shape).cubes  # some twenty iterations of four products, of two each

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

    @costing(lambda shape, numbers: QR * how.layout(shape).cubes if method == "qr" else _eigen(how, shape))
    def bases(flat: Tensor, old: Tensor, *shape: float) -> Tensor:
        return _renewed(how, flat, old, shape, "eigenbases", renew)

    return Work(bases, partial(_held, how, 3), renews=True, blocks=how)


def _rising(stack: Tensor, old: Tensor) -> tuple[Tensor, int]:
    found, failed = eigenbases(stack, old.flip(-1))
    return found.flip(-1), failed


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


def _joined(stacks: list[Tensor]) -> Tensor:
    return torch.cat(stacks) if len(stacks) > 1 else stacks[0]


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


def _eigen(how: Kronecker, shape: Sequence[int]) -> float:
    """Eigendecompositions of all factors, and three products with four vectors each for their residuals."""
    layout = how.layout(shape)
    return EIGEN * layout.cubes + 24.0 * sum(count * size[axis] ** 2 for count, size, axis in layout.sides())
