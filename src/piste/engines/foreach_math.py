"""What the functions that the foreach engine generates call besides torch: list forms that torch does not have.

Some depend on whether a host number is one float for all weights or a list.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from piste.ops import EVALUATE, REDUCTIONS

__all__ = ["HELPERS", "Tensors"]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


def _add_scaled(x: Tensors, y: Tensors, h: Any) -> Tensors:
    if isinstance(h, float):
        return torch._foreach_add(x, y, alpha=h)
    return torch._foreach_add(torch._foreach_mul(y, h), x)


def _add_scaled_(x: Tensors, y: Tensors, h: Any) -> None:
    if isinstance(h, float):
        torch._foreach_add_(x, y, alpha=h)
    else:
        torch._foreach_add_(x, torch._foreach_mul(y, h))


def _lerp(x: Tensors, y: Tensors, w: Any) -> Tensors:
    if isinstance(w, list) and not isinstance(w[0], Tensor):
        return [torch.lerp(a, b, c) for a, b, c in zip(x, y, w, strict=True)]
    return torch._foreach_lerp(x, y, w)


def _lerp_(x: Tensors, y: Tensors, w: Any) -> None:
    if isinstance(w, list) and not isinstance(w[0], Tensor):
        for a, b, c in zip(x, y, w, strict=True):
            a.lerp_(b, c)
    else:
        torch._foreach_lerp_(x, y, w)


def _each(op: str, n: int, *args: Any) -> Tensors:
    """An operation for which torch has no list form."""
    columns = [a if isinstance(a, (list, tuple)) else [a] * n for a in args]
    return [EVALUATE[op](*row) for row in zip(*columns, strict=True)]


def _sum_of_squares(x: Tensors) -> Tensors:
    norms = torch._foreach_norm(x)
    return torch._foreach_mul(norms, norms)


def _total(shares: Tensors) -> Tensors:
    return [torch.stack(shares).sum()]


HELPERS = {
    "torch": torch,
    "add_scaled": _add_scaled,
    "add_scaled_": _add_scaled_,
    "lerp": _lerp,
    "lerp_": _lerp_,
    "each": _each,
    "sum_of_squares": _sum_of_squares,
    "reduce": lambda op, keep, x: [REDUCTIONS[op](t, keep) for t in x],
    "total": _total,
    "cast": lambda x, dtype: [t.to(dtype) for t in x],
    "clone": lambda x: [t.clone() for t in x],
}
