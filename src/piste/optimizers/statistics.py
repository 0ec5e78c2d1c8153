"""What Shampoo and SOAP share: factors of other gradients than those of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piste.optimizer import Optimizer
from piste.rules.shampoo import statistics
from piste.storage import allocate

__all__ = ["FactorsOfOthers"]


class FactorsOfOthers(Optimizer):
    """An optimizer with an option ``preconditioner_gradients``; a base class and none of its own."""

    def give_preconditioner_gradients(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Say of which gradients the factors are made from the next step on, until others are given.

        For statistics that are no gradients of the loss: sampled from the model's own predictions they make Fisher
        matrices. Direction, momentum and length stay those of ``p.grad``. No loss scale may be in them.

        Args:
            gradients: for each weight, a tensor of its shape.

        Raises:
            ValueError: a tensor is no weight of a group with ``preconditioner_gradients=True``, or a gradient has
                another shape; nothing has been changed then.
        """
        known = {p for group in self.param_groups if group["preconditioner_gradients"] for p in group["params"]}
        for p, gradient in gradients.items():
            if p not in known:
                raise ValueError(
                    f"give_preconditioner_gradients got a tensor of shape {tuple(p.shape)} that is in no group with "
                    "preconditioner_gradients=True; legal: weights of such groups"
                )
            if gradient.shape != p.shape:
                raise ValueError(
                    f"give_preconditioner_gradients got {tuple(gradient.shape)} for a weight of {tuple(p.shape)}; "
                    "legal: the shape of the weight"
                )
        with torch.no_grad():
            for p, gradient in gradients.items():
                kept = self.state[p]
                if "statistics" not in kept:
                    kept["statistics"] = allocate(statistics, p)
                kept["statistics"].copy_(gradient)

    def advance(self, group: Mapping[str, Any]) -> dict[str, Any]:
        for p in group["params"] if group["preconditioner_gradients"] else ():
            needs = p.grad is not None and p.numel() and self.has_factors(group, p)
            if needs and "statistics" not in self.state[p]:
                raise ValueError(
                    f"{type(self).__name__} has preconditioner_gradients=True and none for a weight of shape "
                    f"{tuple(p.shape)}; legal: to call give_preconditioner_gradients before the first step"
                )
        return {}

    @staticmethod
    def has_factors(group: Mapping[str, Any], weight: Tensor) -> bool:
        """Does a weight of this group have factors?"""
        return True
