"""What can be told about a step: whether it was taken, and the norms of its gradients and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.sharding import complete, local, spread_of

__all__ = ["LastStep", "nonfinite"]


class LastStep:
    """What can be told about the last step.

    Attributes:
        skipped: True if nothing was changed, because of non-finite gradients or a loss scale that overflowed.
        renewed: True if inverse roots or eigenbases were worked out anew, which other steps only use (Shampoo, SOAP).
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        totals: Mapping[str, Tensor],
        inverse_scale: Tensor | None,
        skipped: bool | Tensor,
        renewed: bool = False,
    ) -> None:
        self._groups, self._totals, self._inverse_scale = groups, totals, inverse_scale
        self._skipped, self.renewed = skipped, renewed

    @property
    def skipped(self) -> bool:
        return bool(self._skipped)

    @property
    def gradient_norm(self) -> float:
        """Global norm of the gradients before clipping.

        Without ``clip_norm`` it is computed when you ask, from the gradients as they are then: ask before
        ``zero_grad()``.
        """
        if "gradient_norm" in self._totals:
            return float(self._totals["gradient_norm"].sqrt())
        grads = [p.grad for group in self._groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise RuntimeError("the gradients are gone; read last_step.gradient_norm before zero_grad()")
        norms = [local(g).detach().norm(dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        squares = _completed([n.double().square() for n in norms], grads, "sum")
        scale = 1.0 if self._inverse_scale is None else float(self._inverse_scale)
        return float(torch.stack([s.cpu() for s in squares]).sum().sqrt()) * scale

    @property
    def update_norm(self) -> float:
        """Global norm of what the step added to the weights; needs ``optimizer.measure_updates = True`` before it."""
        if "update_norm" not in self._totals:
            raise RuntimeError("the update was not measured; set optimizer.measure_updates = True before the step")
        return float(self._totals["update_norm"].sqrt())

    def __repr__(self) -> str:
        return f"LastStep(skipped={self.skipped})"


def nonfinite(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The weights whose gradients are not finite, on whichever process: each its group and its place in that."""
    grads = [(p.grad, i, n) for i, group in enumerate(groups) for n, p in enumerate(group["params"])]
    present = [(g, i, n) for g, i, n in grads if g is not None and g.numel()]
    flags = _completed([_flag(local(g)) for g, _, _ in present], [g for g, _, _ in present], "peak")
    return [(i, n) for (_, i, n), flag in zip(present, _numbers(flags), strict=True) if flag]


def _flag(g: Tensor) -> Tensor:
    """1 if a number of a gradient is NaN or infinite, else 0."""
    if not g.numel():
        return torch.zeros((), device=g.device)
    peak = g.abs().amax() if g.is_complex() else torch.linalg.vector_norm(g, torch.inf)
    return (~torch.isfinite(peak)).float()


def _completed(results: list[Tensor], tensors: Sequence[Tensor], op: str) -> list[Tensor]:
    """Reductions of the parts of tensors that are here, completed over the processes that have the others."""
    for spread in dict.fromkeys(map(spread_of, tensors)):
        if spread is not None:
            mine = [i for i, tensor in enumerate(tensors) if spread_of(tensor) == spread]
            for i, whole in zip(mine, complete([results[i] for i in mine], op, spread), strict=True):
                results[i] = whole
    return results


def _numbers(tensors: list[Tensor]) -> list[float]:
    """Tensors of one number as numbers; one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    found = [0.0] * len(tensors)
    for members in by_device.values():
        for i, number in zip(members, torch.stack([tensors[i] for i in members]).tolist(), strict=True):
            found[i] = number
    return found
