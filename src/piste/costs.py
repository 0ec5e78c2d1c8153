"""What matrix functions cost, in floating-point operations, by formula.

A function that rules call through :func:`piste.ops.opaque` names its formula with :func:`costing`. Work is dealt out to
processes by these numbers (:mod:`piste.distribution`), and ``docs/scaling.md`` is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

__all__ = ["EIGEN", "QR", "costing", "flops", "is_light", "orthogonalization"]

#: operations of an eigendecomposition with vectors and of a QR decomposition with Q, over the cube of the side
EIGEN, QR = 9.0, 8 / 3
#: operations per number up to which a function is not worth sending its result for
_LIGHT = 4.0

_Function = TypeVar("_Function", bound=Callable[..., Any])
Formula = Callable[..., float]


def costing(formula: Formula) -> Callable[[_Function], _Function]:
    """Give a function its formula.

    Args:
        formula: of the shape of one weight and the host numbers that the function is called with; of a method, the
            object comes first.
    """

    def mark(function: _Function) -> _Function:
        function.flops = formula  # type: ignore[attr-defined]
        return function

    return mark


def flops(function: Callable[..., Any], shape: Sequence[int], numbers: Sequence[float] = ()) -> float:
    """Floating-point operations of one call for one weight of this shape.

    A function without a formula counts as one product of the weight along each of its axes.

    >>> from piste.costs import flops
    >>> from piste.orthogonal import orthogonalizer
    >>> flops(orthogonalizer("quintic", "fp32"), (512, 2048), (5, 1))  # five steps, one matrix
    12079595520.0
    """
    formula = getattr(function, "flops", None)
    if formula is None:
        return float(2 * prod(shape) * sum(shape))
    owner = getattr(function, "__self__", None)
    return float(formula(shape, numbers) if owner is None else formula(owner, shape, numbers))


def is_light(function: Callable[..., Any], shape: Sequence[int], numbers: Sequence[float] = ()) -> bool:
    """Is its result cheaper to work out everywhere than to send?"""
    return flops(function, shape, numbers) <= _LIGHT * prod(shape)


def orthogonalization(short: float, long: float, squared: Sequence[bool], rank: int = 0) -> float:
    """``X X^T`` and the polynomial times X in each step, and the square of the first where it is used.

    Args:
        short: the shorter side of the matrix.
        long: the longer one.
        squared: for each step, whether its polynomial has a fifth power.
        rank: of a deflation before: five products with so many vectors, two QR decompositions, eigenvectors.
    """
    deflation = 10 * short * long * rank + 4 * (QR * short * rank**2) + EIGEN * rank**3
    return len(squared) * 4 * short**2 * long + sum(squared) * 2 * short**3 + deflation
