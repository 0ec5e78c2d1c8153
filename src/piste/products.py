"""Products that are symmetric, or of triangular matrices, without what is known of them beforehand.

Halves and panels pay on CPUs alone, from some size on: accelerators are faster with the whole.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

__all__ = ["outer", "symmetric_product", "symmetric_products", "triangular_products"]

#: rows or columns of triangular matrices that are worked out at once; below three times as many, a whole product is as
#: fast
_PANEL = 128
#: rows of symmetric products that are worked out at once; bfloat16, which is twice as fast, wants more
_ROWS, _ROWS_IN_BFLOAT16 = 96, 128
#: multiplications of a row, ``n * k``, from which half of a product with its mirroring takes less time than the whole
#: on one thread: 0.9 of it there for n from 256 on, 0.8 at 2^18, 0.7 at 2^20; bfloat16 is there at four times as many
_WORTH, _WORTH_IN_BFLOAT16 = 1 << 16, 1 << 18
#: the same for each of several threads, which are busier with the whole than with panels: two of them take 1.2 of its
#: time for 512 x 512, and 0.9 for 768 x 768 and 512 x 2048, in either precision
_WORTH_TOGETHER = 1 << 18


def _halves(rows: Tensor) -> bool:
    """Does it pay to work out half of a symmetric product of ``n x k`` with ``k x n``?"""
    if rows.device.type != "cpu":
        return False
    n, k = rows.shape[-2:]
    threads = torch.get_num_threads()
    alone = _WORTH_IN_BFLOAT16 if rows.dtype == torch.bfloat16 else _WORTH
    return n >= 2 * _ROWS and k >= _ROWS and n * k >= (alone if threads == 1 else threads * _WORTH_TOGETHER)


def symmetric_product(
    a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """``beta * plus + alpha * a @ b`` of matrices, into ``out``, known to be symmetric: half of it, mirrored.

    Each panel goes along the rows from the diagonal on. Its mirror image is made side by side before it is put in
    place, which torch does four times as fast as it transposes in place.
    """
    n, rows = len(a), _ROWS_IN_BFLOAT16 if a.dtype == torch.bfloat16 else _ROWS
    plus = out if plus is None else plus
    for start in range(0, n, rows):
        end = min(n, start + rows)
        panel = slice(start, end), slice(start, None)
        torch.addmm(plus[panel], a[start:end], b[:, start:], beta=beta, alpha=alpha, out=out[panel])
        out[end:, start:end] = out[start:end, end:].contiguous().mT.contiguous()
    return out


def symmetric_products(
    a: Tensor, b: Tensor, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """The same of stacks, as a new one."""
    out = a.new_empty(len(a), a.shape[1], a.shape[1])
    if not _halves(a):
        return torch.baddbmm(out if plus is None else plus, a, b, beta=beta, alpha=alpha)
    for i in range(len(a)):
        symmetric_product(a[i], b[i], out[i], plus=None if plus is None else plus[i], beta=beta, alpha=alpha)
    return out


def outer(rows: Tensor, out: Tensor, *, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``beta * plus + alpha * X X^T`` for each X of a stack, into ``out``: matrices with any leading axes, in order."""
    plus = out if plus is None else plus
    if not _halves(rows):
        return out.copy_(symmetric_products(rows, rows.mT, plus.flatten(0, -3), beta, alpha).view(out.shape))
    for at, x in zip(product(*map(range, out.shape[:-2])), rows, strict=True):
        symmetric_product(x, x.mT, out[at], plus=plus[at], beta=beta, alpha=alpha)
    return out


def triangular_products(upper: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
    """``U X`` for a stack of upper triangular U, or ``U^T X``; panel by panel without the zeros, where that pays."""
    n = upper.shape[-1]
    if upper.device.type != "cpu" or n < 3 * _PANEL:
        return (upper.mT if transposed else upper) @ x
    out = x.new_empty(x.shape)
    for start in range(0, n, _PANEL):
        end = min(n, start + _PANEL)
        if transposed:
            torch.bmm(upper[:, :end, start:end].mT, x[:, :end], out=out[:, start:end])
        else:
            torch.bmm(upper[:, start:end, start:], x[:, start:], out=out[:, start:end])
    return out
