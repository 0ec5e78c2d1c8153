"""Matrix functions: what rules call through :func:`piste.ops.opaque`, on stacks of equal shapes.

Plain torch functions, each usable and tested by itself. A stack has the shape ``(n, *shape)``; a weight of more than
two axes stands for the matrix ``(first axis, all others)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from piste.householder import orthogonal_factors
from piste.products import outer

__all__ = [
    "MOST_RESIDUAL",
    "Work",
    "descending",
    "eigen",
    "eigenbases",
    "full_precision",
    "inverse_roots",
    "largest_eigenvalue",
    "moved",
    "next_bases",
    "picked",
    "probes",
    "root_by_eigen",
    "root_by_newton",
]


@dataclass(frozen=True, eq=False)
class Work:
    """A function of stacks, and what is known of its cost.

    Args:
        call: the function.
        held: of the shape of a weight and the number of weights in a stack: how many numbers it holds at most besides
            what it takes and gives.
        renews: it works out anew what steps without it only use: roots, bases.
        recordable: nothing in it waits for the device, so that a CUDA graph can record it.
        blocks: what cuts weights into the blocks of which it sees each alone (:class:`piste.shares.Blocks`), if any.
    """

    call: Callable[..., Tensor]
    held: Callable[[Sequence[int], int], int]
    renews: bool = False
    recordable: bool = False
    blocks: Any = None

    def __call__(self, *values: Any) -> Tensor:
        return self.call(*values)

    @property
    def flops(self) -> Callable[..., float] | None:
        """The formula of its cost (:func:`piste.costs.costing`), if it has one."""
        return getattr(self.call, "flops", None)


# ---------------------------------------------------------------------------------------------------------------------
# Inverse roots of symmetric positive matrices


#: an inverse root is taken only where its residual is below this
MOST_RESIDUAL = 0.1


def _switches() -> list[tuple[Any, str, Any]]:
    """What lets torch multiply float32 matrices in less: an object, its attribute, and the value that forbids it."""
    kinds = (torch.backends.cuda, torch.backends.mkldnn)
    new: list[tuple[Any, str, Any]] = [
        (kind.matmul, "fp32_precision", "ieee") for kind in kinds if hasattr(kind, "matmul")
    ]
    found = [switch for switch in new if hasattr(switch[0], "fp32_precision")]
    return found or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # before torch 2.9


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32: TF32 and bfloat16 would ruin small eigenvalues."""
    before = [(place, name, getattr(place, name)) for place, name, _ in _switches()]
    try:
        for place, name, value in _switches():
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _finite(stack: Tensor) -> Tensor:
    """Which matrices are finite (and far enough from overflow for a sum); one pass."""
    return torch.isfinite(stack.sum((-2, -1)))


@cache
def probes(n: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """So many vectors of normal numbers, the same ones every time."""
    return torch.randn(n, count, generator=torch.Generator().manual_seed(n)).to(device, dtype)


def eigen(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues in rising order, eigenvectors, and residuals of symmetric matrices.

    The residual is the Frobenius norm of ``A - Q diag(values) Q^T`` over the largest eigenvalue, measured on four
    random vectors (of normal numbers z, the norm of ``E z`` is that of E on average), the largest of the four. Where a
    decomposition fails it is repeated in float64; where that fails too, or the matrix is not finite, the residual is
    NaN.
    """
    finite = _finite(stack)
    safe = stack
    if not bool(finite.all()):
        eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        safe = torch.where(finite[:, None, None], stack, eye)
    try:
        values, vectors = torch.linalg.eigh(safe)
    except LinAlgError:
        found = [_eigen_of_one(matrix) for matrix in safe]
        values, vectors = (torch.stack(parts) for parts in zip(*found, strict=True))
    z = probes(stack.shape[-1], 4, stack.dtype, stack.device)
    error = torch.linalg.vector_norm(safe @ z - vectors @ (values[:, :, None] * (vectors.mT @ z)), dim=-2).amax(-1)
    residual = error / values.abs().amax(-1).clamp(min=torch.finfo(values.dtype).tiny)
    return values, vectors, torch.where(finite, residual, torch.nan)


def _eigen_of_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
    except LinAlgError:
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


def root_by_eigen(stack: Tensor, exponent: float, eps: float, *, relative: bool) -> tuple[Tensor, Tensor]:
    """``(A + ridge I)^-exponent`` by eigendecomposition, and residuals.

    Args:
        stack: symmetric matrices; eigenvalues that rounding made negative count as 0.
        exponent: above 0.
        eps: the ridge.
        relative: the ridge is ``eps`` times the largest eigenvalue.
    """
    values, vectors, residual = eigen(stack)
    values = values.clamp(min=0.0)
    ridge = eps * values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny) if relative else eps
    half = vectors * (values + ridge)[:, None, :] ** (-exponent / 2)
    return outer(half, torch.empty_like(stack)), residual


def largest_eigenvalue(stack: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """By power iteration from the longest column, which cannot be orthogonal to the eigenvector; each stops alone."""
    longest = stack.square().sum(-2).argmax(-1)
    v = stack.gather(-1, longest[:, None, None].expand(-1, stack.shape[-1], 1))
    value = stack.new_zeros(len(stack))
    moves = torch.ones_like(value, dtype=torch.bool)
    for _ in range(steps):
        norm = torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)
        v = stack @ (v / norm.clamp(min=torch.finfo(v.dtype).tiny))
        before, value = value, torch.where(moves, torch.linalg.vector_norm(v, dim=(-2, -1)), value)
        moves = (value - before).abs() > tolerance * value
        if not bool(moves.any()):
            break
    return value


def root_by_newton(stack: Tensor, exponent: float, eps: float, *, relative: bool) -> tuple[Tensor, Tensor]:
    """The same by the coupled Newton iteration (Higham 2008, Functions of Matrices, eq. 7.18), products alone.

    ``1 / exponent`` has to be a whole number. The residual is the largest number in ``X^p (A + ridge I) - I``, of the
    iteration's own estimate of that product. A matrix rests once its residual is below 1e-6 (1e-12 in float64), and
    one whose residual grows by a fifth goes back to its last state and stays there.

    On CPUs each matrix has products of its own, for those of a stack may be rounded by where in memory they stand: so
    the root of a matrix does not depend, in any bit, on what it is stacked with.
    """
    if stack.device.type == "cpu" and len(stack) > 1:
        alone = [root_by_newton(matrix[None], exponent, eps, relative=relative) for matrix in stack]
        roots, residuals = (torch.cat(parts) for parts in zip(*alone, strict=True))
        return roots, residuals
    p = round(1 / exponent)
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    finite = torch.isfinite(stack).flatten(1).all(1)
    stack = torch.where(finite[:, None, None], stack, eye)
    ridge = eps * largest_eigenvalue(stack).clamp(min=torch.finfo(stack.dtype).tiny) if relative else eps
    a = stack + (ridge[:, None, None] if isinstance(ridge, Tensor) else ridge) * eye
    norm = torch.linalg.vector_norm(a, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    z = (1 + p) / (2 * norm)
    m, x = z * a, z ** (1 / p) * eye
    error = (m - eye).abs().amax((-2, -1))
    active = torch.ones_like(finite)
    tolerance = 1e-12 if stack.dtype == torch.float64 else 1e-6
    for _ in range(100):
        active = active & (error > tolerance)
        if not bool(active.any()):
            break
        t = (1 + 1 / p) * eye - m / p
        m_new, x_new = torch.linalg.matrix_power(t, p) @ m, x @ t
        new = (m_new - eye).abs().amax((-2, -1))
        active = active & (new < 1.2 * error)
        at = active[:, None, None]
        m, x, error = torch.where(at, m_new, m), torch.where(at, x_new, x), torch.where(active, new, error)
    return x, torch.where(finite, error, torch.nan)


def inverse_roots(
    stack: Tensor, old: Tensor, exponent: float, eps: float, *, method: str, relative: bool
) -> tuple[Tensor, int]:
    """Inverse roots that can be trusted, and how many could not be had.

    Args:
        stack: symmetric positive matrices; all of one size.
        old: what to keep for a matrix whose root fails.
        exponent: above 0.
        eps: the ridge that is added to the diagonal.
        method: ``"eigen"``, or ``"newton"``, whose failures are tried again by eigendecomposition.
        relative: the ridge is ``eps`` times the largest eigenvalue.
    """
    with full_precision():
        by = root_by_newton if method == "newton" else root_by_eigen
        found, residual = by(stack, exponent, eps, relative=relative)
        good = _trusted(found, residual)
        if method == "newton" and not bool(good.all()):
            again, residual = root_by_eigen(stack[~good], exponent, eps, relative=relative)
            found[~good] = again
            good[~good] = _trusted(again, residual)
    return _else_old(good, found, old)


def _trusted(found: Tensor, residual: Tensor) -> Tensor:
    return (residual < MOST_RESIDUAL) & _finite(found)


def _else_old(good: Tensor, found: Tensor, old: Tensor) -> tuple[Tensor, int]:
    """What was found where it is good, else what was there before, and how often that is."""
    failed = int((~good).sum())
    return (torch.where(good[:, None, None], found, old) if failed else found), failed


# ---------------------------------------------------------------------------------------------------------------------
# Eigenbases


def eigenbases(stack: Tensor, old: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors of symmetric matrices, of the largest eigenvalue first, and how many could not be had: old ones."""
    with full_precision():
        _, vectors, residual = eigen(stack)
    return _else_old(_trusted(vectors, residual), vectors.flip(-1), old)


def moved(stack: Tensor, bases: Tensor, out: Tensor | None = None) -> Tensor:
    """Where symmetric matrices take the columns of bases: ``(A Q)^T``, each column a row."""
    with full_precision():
        return torch.matmul(bases.mT, stack, out=out)


def _diagonal(images: Tensor, bases: Tensor) -> Iterator[Tensor]:
    """Of ``Q^T A Q``, panel by panel: columns are copied, then made rows, which are read beside those of images.

    Of 1024 this takes 1.2 ms on a CPU; reading them across one another 3.4, on top of the time for fresh memory.
    """
    for start in range(0, bases.shape[-1], 128):
        rows = slice(start, start + 128)
        columns = bases[:, :, rows].contiguous().mT.contiguous()
        yield (columns * images[:, rows]).sum(-1)


def descending(images: Tensor, bases: Tensor) -> Tensor:
    """The order of columns by the eigenvalues that ``Q^T A Q`` has on its diagonal, the largest first.

    ``images`` are those of :func:`moved`. Where they are not finite, columns stay where they are.
    """
    values = torch.cat([*_diagonal(images, bases)], -1)
    order = values.argsort(dim=-1, descending=True, stable=True)
    finite = torch.isfinite(values).all(-1, keepdim=True)
    return torch.where(finite, order, torch.arange(order.shape[-1], device=order.device))


def picked(stack: Tensor, order: Tensor, axis: int) -> Tensor:
    """What each of a stack has along an axis of its own, in the order that is given for it."""
    if len(stack) == 1:  # a tenth of the time
        return stack[0].index_select(axis, order[0])[None]
    index = order.view(len(stack), *(-1 if i == axis else 1 for i in range(stack.ndim - 1)))
    return stack.gather(axis + 1, index.expand_as(stack))


def next_bases(images: Tensor, old: Tensor) -> tuple[Tensor, int]:
    """Nearer to the eigenvectors by one power iteration: ``A Q`` in descending order, made orthogonal (QR).

    Args:
        images: what :func:`moved` says of the matrices and the bases so far.
        old: those bases; what is kept, in that order, where the images are not finite.
    """
    order = descending(images, old)
    good = _finite(images)
    if not bool(good.all()):
        images = torch.where(good[:, None, None], images, old.mT)
    with full_precision():
        found = orthogonal_factors(picked(images, order, 0).mT)
    good = good & _finite(found)
    return _else_old(good, found, picked(old, order, 1) if not bool(good.all()) else old)
