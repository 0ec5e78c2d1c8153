"""The orthogonal factor of QR decompositions, from products where these are faster than LAPACK's own routine."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonal_factors"]

#: columns that are reflected at once; 32 to 96 are alike
_PANEL = 64
#: the side from which on products win: one thread takes 42 ms for 1024 where LAPACK takes 61, 6.4 for 512 where it
#: takes 8.9, and as long for 384
_LEAST = 512


def orthogonal_factors(stack: Tensor) -> Tensor:
    """Q of the QR decomposition of square matrices; where they lack rank, whole all the same.

    The reflections are LAPACK's, so Q has its signs. The matrices may be overwritten: with large ones on a CPU Q takes
    their place, transposed, since fresh memory costs as much as a tenth of the work.
    """
    if stack.device.type != "cpu" or stack.shape[-1] < _LEAST:
        found: Tensor = torch.linalg.householder_product(*torch.geqrf(stack))
        return found
    for matrix in stack:
        reflections = _reflections(matrix)
        _multiply(reflections, matrix.mT.zero_().fill_diagonal_(1.0))
    return stack.mT


def _reflections(a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Those that make a matrix upper triangular, panel by panel, each as V and T of their product ``I - V T V^T``.

    LAPACK reflects the columns of a panel, all others are multiplied (Schreiber and Van Loan 1989). The inverse of T
    has the products of the columns of V above its diagonal, on which are those of LAPACK's ``1 / tau``.
    """
    found = []
    for start in range(0, a.shape[0], _PANEL):
        panel, rest = a[start:, start : start + _PANEL], a[start:, start + _PANEL :]
        reflected, tau = torch.geqrf(panel)
        v = reflected.tril_(-1)
        v.diagonal().fill_(1.0)
        inverse = (v.mT @ v).triu_(1)
        inverse.diagonal().copy_(1 / tau.clamp(min=torch.finfo(tau.dtype).tiny))  # 0 where nothing is reflected
        t = torch.linalg.solve_triangular(inverse, torch.eye(*inverse.shape, dtype=a.dtype), upper=True)
        rest.addmm_(v, t.mT @ (v.mT @ rest), alpha=-1)
        found.append((v, t))
    return found


def _multiply(reflections: list[tuple[Tensor, Tensor]], q: Tensor) -> None:
    """The identity, multiplied in place by all reflections: from the last one on, which changes the fewest numbers."""
    for v, t in reversed(reflections):
        part = q[-len(v) :, -len(v) :]
        part.addmm_(v, t @ (v.mT @ part), alpha=-1)
