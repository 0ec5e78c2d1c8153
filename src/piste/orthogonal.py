"""Matrices made orthogonal by products: what Muon calls through :func:`piste.ops.opaque`, on stacks of equal shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from piste.costs import costing, orthogonalization
from piste.matrices import Work, eigen, probes
from piste.products import symmetric_products

__all__ = ["ITERATIONS", "PRECISIONS", "Iteration", "orthogonalizer"]

_Triples = Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Iteration:
    """How singular values are brought near 1.

    Args:
        triples: odd polynomials ``a x + b x^3 + c x^5`` of singular values, one for each step; the last one repeats.
        steps: how many are taken where nobody says how many.
        deflated: they are taken of what :func:`_deflated` leaves, under the tight bound of :func:`_first_factor`.
    """

    triples: tuple[tuple[float, float, float], ...]
    steps: int = 5
    deflated: bool = False

    def polynomials(self, steps: int) -> _Triples:
        """One for each of so many steps."""
        return [self.triples[min(step, len(self.triples) - 1)] for step in range(steps)]


ITERATIONS: dict[str, Iteration] = {
    # Jordan et al. 2024: the steepest at 0 that keeps values near 1
    "quintic": Iteration(((3.4445, -4.7750, 2.0315),)),
    # Amsel et al. 2025 (arXiv 2505.16932), theorem 3.1 for values from 1e-3 to 1: each the best for what the last left
    "polar_express": Iteration(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        )
    ),
    # By the same theorem for values from 0.025 to 1, each interval made wider by a hundredth at both ends, for
    # rounding: two quintics, and two cubics, which need a product less; then Newton and Schulz's
    "deflated": Iteration(
        (
            (7.532762870342928, -21.41257337435839, 15.691825850475377),
            (3.0445386752111823, -2.244928207816602, 0.4693743721457672),
            (1.6824316451657897, -0.5198208200289367, 0.0),
            (1.5242923018603927, -0.5012851723520004, 0.0),
            (1.5, -0.5, 0.0),
        ),
        steps=3,
        deflated=True,
    ),
}
PRECISIONS = ("auto", "fp32", "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def _at_most_one(x: Tensor, iteration: str) -> Tensor:
    """Divided by the Frobenius norm, so that no singular value exceeds 1; zeros stay zeros."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / (1.02 * norm + 1e-6) if iteration == "polar_express" else x / norm.clamp(min=1e-7)


def _of_norm_one(x: Tensor) -> Tensor:
    """The same to rounding, also where squares would be too large or too small."""
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / norm.clamp(min=1e-7)


#: the largest singular values are brought down to this part of the largest one at most; what bfloat16 makes of a
#: matrix has singular values of about 1e-4 of it
_FLOOR = 0.01


def _rank(rows: int) -> int:
    """How many singular values are brought down: an eighth, and not too few of small matrices."""
    return min(max(rows // 8, 16), rows // 4)


def _exact(x: Tensor) -> Tensor:
    """In float32 at least, for decompositions."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _basis(y: Tensor) -> Tensor:
    """Orthonormal columns that span the same."""
    q: Tensor = torch.linalg.qr(_exact(y))[0]
    return q.to(y.dtype)


def _deflated(x: Tensor) -> Tensor:
    """The largest singular values brought down to the least of them; others and all singular vectors as they are.

    A polynomial cannot tell small singular values from 0 that are below 1/degree, and a few large ones is what
    gradients mostly have. So these are found first, by block power iteration (Halko, Martinsson and Tropp 2011,
    algorithm 4.4): of thin matrices, at a small part of the price. Where singular values do not fall, vectors are
    poor and there is little to bring down. On CPUs each matrix is seen alone: no bit of it depends on the stack.
    """
    rank = _rank(x.shape[-2])
    if not rank:
        return x
    if x.device.type == "cpu" and len(x) > 1:
        return torch.cat([_deflated(matrix[None]) for matrix in x])
    q = _basis(x @ probes(x.shape[-1], rank, x.dtype, x.device))
    q = _basis(x @ (q.mT @ x).mT)
    part = q.mT @ x
    squares, vectors, _ = eigen(_exact(part) @ _exact(part).mT)
    sizes = squares.clamp(min=0.0).sqrt()
    level = torch.maximum(sizes[:, :1], _FLOOR * sizes[:, -1:])
    less = 1 - (level / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(max=1.0)
    change = (vectors * less[:, None]) @ vectors.mT
    return torch.baddbmm(x, q @ change.to(x.dtype), part, alpha=-1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _factor(gram: Tensor, b: float, c: float) -> Tensor:
    """``b G + c G^2``."""
    return symmetric_products(gram, gram, gram, b, c) if c else b * gram


def _first_factor(x: Tensor, gram: Tensor, b: float, c: float) -> Tensor:
    """The same of what is divided by a bound s of its largest singular value; X and G are divided in place.

    s is the fourth root of the Frobenius norm of G^2, which is there anyway: the Schatten 8-norm of X (Gelfand's
    formula; Grishina, Smirnov and Rakhuba 2025, arXiv 2506.10935, use it so).
    """
    square = symmetric_products(gram, gram)
    norm: Tensor = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True)
    bound = 1.01 * norm.sqrt().sqrt().clamp(min=1e-6)
    x.div_(bound)
    gram.div_(bound**2)
    return (b * gram).addcmul_(square, c / bound**4)


def _by_products(x: Tensor, triples: _Triples, bounded: bool) -> Tensor:
    """The iteration as it is written: ``(a I + b G + c G^2) X`` with ``G = X X^T``."""
    for step, (a, b, c) in enumerate(triples):
        gram = symmetric_products(x, x.mT)
        known = bounded or step > 0
        # no name for the factor, which would be held on to while the next one is made
        x = torch.baddbmm(x, _factor(gram, b, c) if known else _first_factor(x, gram, b, c), x, beta=a)
    return x


#: steps after which :func:`_by_gram` looks at the matrix itself again; its error stays that of the plain iteration
_RESTART = 3


def _by_gram(x: Tensor, triples: _Triples, bounded: bool) -> Tensor:
    """The same for wide matrices: three steps of G alone, whose products are small and all symmetric.

    With ``Z = a I + b G + c G^2`` the next G is ``Z G Z``, since they commute, and X is multiplied by all Z at once.
    Squares of small singular values drown in rounding, so G is made anew before its error has grown; in bfloat16 it
    would be too late.
    """
    for start in range(0, len(triples), _RESTART):
        part = triples[start : start + _RESTART]
        gram = symmetric_products(x, x.mT)
        every = x.new_empty(0)
        for i, (a, b, c) in enumerate(part):
            z = _factor(gram, b, c) if bounded or start or i else _first_factor(x, gram, b, c)
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            every = symmetric_products(z, every) if i else z
            if i + 1 < len(part):
                gram = symmetric_products(symmetric_products(z, gram), z)
        x = every @ x
    return x


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@cache
def orthogonalizer(iteration: str, precision: str) -> Work:
    """The function that brings the singular values of matrices near 1 and leaves their singular vectors.

    Args:
        iteration: one of ``ITERATIONS``.
        precision: ``"bf16"``, ``"fp32"``, or ``"auto"``: float32 on CPUs, bfloat16 elsewhere. Matrices in float64 are
            worked on in float64.

    Returns:
        A function of a stack, the number of steps, and the number of blocks of rows that are matrices of their own
        (3 for queries, keys and values in one weight). Its result has the precision of the stack.
    """
    how = ITERATIONS[iteration]

    def cost(shape: Sequence[int], numbers: Sequence[float]) -> float:
        steps, split = numbers
        rows, columns = shape[0] / split, prod(shape[1:])
        short, long = min(rows, columns), max(rows, columns)
        squared = [c != 0 for _, _, c in how.polynomials(int(steps))]
        return split * orthogonalization(short, long, squared, _rank(int(short)) if how.deflated else 0)

    @costing(cost)
    def orthogonalize(stack: Tensor, steps: float, split: float) -> Tensor:
        rows = stack.shape[1] // int(split)
        x = stack.reshape(len(stack) * int(split), rows, -1)
        upright = rows > x.shape[-1]
        x = x.mT if upright else x
        low = precision == "bf16" or (precision == "auto" and x.device.type != "cpu")
        x = _of_norm_one(x) if how.deflated else x
        x = x.bfloat16() if low and x.dtype == torch.float32 else x
        x = _deflated(x) if how.deflated else _at_most_one(x, iteration)
        wide = 2 * x.shape[-1] >= 3 * x.shape[-2] and x.dtype in (torch.float32, torch.float64)
        x = (_by_gram if wide else _by_products)(x, how.polynomials(int(steps)), not how.deflated)
        return (x.mT if upright else x).reshape(stack.shape).to(stack.dtype)

    def held(shape: Sequence[int], count: int) -> int:
        rows, columns = shape[0], prod(shape[1:])
        return count * 2 * (rows * columns + min(rows, columns) ** 2)

    return Work(orthogonalize, held, recordable=not how.deflated)
