"""The weights between the two passes of a sharpness-aware step, their gradients, and whom nothing of it may reach."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["Climb", "aligned", "gradient_of", "guard", "is_new", "refuse_lightning"]


class Climb:
    """The weights of one step between its two passes.

    Attributes:
        weights: those that were moved, in order.
        kept: for each, copies of what it was: itself, and what belongs to it where its format keeps a rest.
        clean: for each, the gradient of the first pass, if it is still needed.
    """

    def __init__(self, weights: list[Tensor], kept: list[list[Tensor]], clean: list[Tensor] | None) -> None:
        self.weights, self.kept, self.clean = weights, kept, clean


def gradient_of(p: Tensor) -> Tensor:
    """A weight's gradient, which it has."""
    assert p.grad is not None
    return p.grad


def is_new(p: Tensor, used: Mapping[Tensor, tuple[Tensor, int]]) -> bool:
    """Has a weight a gradient that no step has had?"""
    known = used.get(p)
    return p.grad is not None and (known is None or known[0] is not p.grad or known[1] != p.grad._version)


def aligned(weights: list[Tensor], climb: Climb) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of either pass, each with a gradient of both; where a pass has none it is zero."""
    first = dict(zip(climb.weights, climb.clean or (), strict=True))
    for p in first:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    both = [*weights, *(p for p in first if p not in set(weights))]
    return both, [first[p] if p in first else torch.zeros_like(p) for p in both]


def guard(wrapper: Any) -> RemovableHandle:
    """Let nobody else step the optimizer inside, which would go from perturbed weights, or without a second pass."""
    owner = weakref.ref(wrapper)

    def check(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        outer = owner()
        if outer is not None and outer.optimizer is inner and not outer._stepping:
            raise RuntimeError(
                f"{type(inner).__name__}.step() was called from outside, and this optimizer is inside of "
                f"{type(outer).__name__}: step that one; to go on without it, delete it first. Nothing was changed"
            )

    handle: RemovableHandle = wrapper.optimizer.register_step_pre_hook(check)
    return handle


def refuse_lightning(owner: str, closure: Callable[[], Any]) -> None:
    """Refuse the closure of Lightning's automatic optimization, which clips, logs and accumulates in each of its calls.

    That of manual optimization is the user's own. Neither package is imported for this.
    """
    made_by = getattr(getattr(closure, "func", None), "__module__", None) or ""
    if made_by.partition(".")[0] not in ("lightning", "pytorch_lightning"):
        return
    if any(getattr(argument, "automatic_optimization", False) for argument in getattr(closure, "args", ())):
        raise RuntimeError(
            f"{owner} under Lightning's automatic optimization: derive the module from "
            "piste.integrations.lightning.PisteModule instead of LightningModule, and call super().optimizer_step() "
            "where that is overridden: it makes both passes right under accumulation, clipping and scaling"
        )
