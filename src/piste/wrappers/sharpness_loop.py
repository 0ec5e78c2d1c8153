"""One step of a training loop around a two-pass optimizer, with all that loops usually get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from piste.batchnorm import put_back, statistics_of
from piste.checks import check_choice
from piste.wrappers.sharpness import SAM
from piste.wrappers.sharpness_family import ESAM

__all__ = ["sharpness_step"]

Loss = Callable[[nn.Module, Any], Tensor]


def sharpness_step(
    optimizer: SAM,
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    *,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: str | None = None,
    clip: float | None = None,
    perturbation: str = "local",
) -> Tensor:
    """Both passes of one step of SAM, GSAM or LookSAM, or the one pass of a step that does not climb.

    Args:
        optimizer: the two-pass optimizer.
        model: the model, as it is called in training: under ``DistributedDataParallel`` that wrapper.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch, or a vector of the losses of its samples, as
            :class:`piste.ESAM` needs it; called once for each pass.
        batch: the batch; with ``accumulate``, a sequence of micro-batches of equal size.
        scaler: scales both passes by one number; gradients are unscaled once, weights come back whatever was not
            finite, and the scaler is updated once.
        accumulate: None for one batch. ``"batch"``: one climb with the gradient of all micro-batches, whose second
            passes add up: the same as the whole batch at once, and usually what is wanted. ``"micro"``: a climb for
            each micro-batch with its own gradient (m-sharpness with a small m), and the mean of their second gradients;
            one more copy of the gradients.
        clip: global norm to which the gradient that the optimizer steps with is clipped, after unscaling and after what
            GSAM and LookSAM make of both gradients.
        perturbation: under ``DistributedDataParallel``, ``"local"``: each process climbs with the gradient of its own
            batch, as in the papers, and only second gradients are averaged; or ``"averaged"``: all climb alike. Sharded
            models (FSDP2) have averaged gradients only.

    Returns:
        The mean loss at the weights themselves, detached.

    Running statistics of the model's BatchNorm layers move in the first pass only.

    Raises:
        TypeError: ``optimizer`` has no two passes.
        ValueError: an option is not legal, or there are no micro-batches.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> loss_fn = lambda model, x: model(x).square().mean()
        >>> loss = piste.sharpness_step(optimizer, model, loss_fn, torch.ones(4, 3), clip=1.0)
        >>> halves = [torch.ones(2, 3), torch.ones(2, 3)]
        >>> loss = piste.sharpness_step(optimizer, model, loss_fn, halves, accumulate="batch")
    """
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"sharpness_step got optimizer={type(optimizer).__name__}; legal: piste.SAM and its descendants, around it"
        )
    check_choice("perturbation", perturbation, ("local", "averaged"))
    if accumulate is not None:
        check_choice("accumulate", accumulate, ("batch", "micro"))
    batches = [batch] if accumulate is None else list(batch)
    if not batches:
        raise ValueError("sharpness_step got no micro-batches in batch; legal: at least one")
    optimizer.zero_grad(set_to_none=True)
    loop = _Loop(optimizer, model, loss_fn, scaler, of=len(batches), local=perturbation == "local")
    try:
        losses = loop.each(batches) if accumulate == "micro" else loop.together(batches)
    except BaseException:
        optimizer.restore()
        raise
    loop.take(clip)
    return torch.stack(losses).mean()


class _Loop:
    """The passes of one step. Processes average gradients in a backward pass of theirs where they all climb alike or
    the second gradient is the result; else what each makes of its own gradients is averaged at the end."""

    def __init__(
        self,
        optimizer: SAM,
        model: nn.Module,
        loss_fn: Loss,
        scaler: torch.amp.GradScaler | None,
        *,
        of: int,
        local: bool,
    ) -> None:
        self.optimizer, self.model, self.loss_fn, self.scaler, self.of = optimizer, model, loss_fn, scaler, of
        self.ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self.local = local
        self.average_last = local and optimizer.combines
        self.ready = False
        self.seen: list[Tensor] = []

    def together(self, batches: Sequence[Any]) -> list[Tensor]:
        """One climb for all batches."""
        two = self.optimizer.needs_two_passes
        losses = self.backward(batches, quiet=self.average_last or (two and self.local))
        if two and self.climb():
            before = statistics_of(self.model)
            if self.optimizer.selects:
                batches = [self.selected(data, seen) for data, seen in zip(batches, self.seen, strict=True)]
            self.backward(batches, quiet=self.average_last)
            put_back(before)
        self.ready = self.optimizer.descend()
        return losses

    def each(self, batches: Sequence[Any]) -> list[Tensor]:
        """One climb for each batch, all from the same weights; the mean of what comes of them."""
        self.average_last = self.average_last or self.local
        losses: list[Tensor] = []
        sums: dict[Tensor, Tensor] = {}
        for batch in batches:
            losses += self.together([batch])
            if not self.ready:
                break
            for p in self.weights:
                if p.grad is not None:
                    sums[p] = sums[p].add_(p.grad) if p in sums else p.grad
                    p.grad = None
        for p, gradient in sums.items():
            p.grad = gradient
        return losses

    @property
    def weights(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, batches: Sequence[Any], *, quiet: bool) -> list[Tensor]:
        """Gradients of these batches, averaged over processes with the last of them unless ``quiet``."""
        self.seen = []
        for i, batch in enumerate(batches):
            silent = self.ddp is not None and (quiet or i < len(batches) - 1)
            with self.ddp.no_sync() if silent and self.ddp else nullcontext(), torch.enable_grad():
                loss = self.loss_fn(self.model, batch)
                share = loss.mean() / self.of
                (share if self.scaler is None else self.scaler.scale(share)).backward()  # type: ignore[no-untyped-call]
            self.seen.append(loss.detach())
        return [loss.mean() for loss in self.seen]

    @torch.no_grad()
    def selected(self, batch: Any, before: Tensor) -> Any:
        """The samples of a batch with which the second pass is made."""
        assert isinstance(self.optimizer, ESAM)
        index = self.optimizer.chosen(before, self.loss_fn(self.model, batch))
        return _samples(batch, index, len(before))

    def climb(self) -> bool:
        """Climb on all processes, or on none if the gradients of one are not finite."""
        climbed = self.optimizer.first_step()
        if self.ddp is None:
            return climbed
        verdict = torch.tensor(float(climbed), device=self.weights[0].device)
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN, self.ddp.process_group)
        if climbed and not verdict.item():
            self.optimizer.give_up()
        return bool(verdict.item())

    def take(self, clip: float | None) -> None:
        """Average, unscale, clip, step; or skip, so that the scaler knows."""
        if self.ready and self.ddp is not None and self.average_last:
            self.average()
        if not self.ready and self.scaler is not None:
            for p in self.weights[:1]:
                p.grad = torch.full_like(p, torch.inf)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.ready and clip is not None:
            nn.utils.clip_grad_norm_(self.weights, clip)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.ready:
            self.optimizer.step()
        self.optimizer.finish()

    def average(self) -> None:
        """The mean over processes of every gradient; none counts as zero."""
        assert self.ddp is not None
        group = self.ddp.process_group
        for p in self.weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad, torch.distributed.ReduceOp.SUM, group)
            p.grad /= torch.distributed.get_world_size(group)


def _samples(batch: Any, index: Tensor, count: int) -> Any:
    """Of every tensor in a batch that has one entry for each sample, those of some."""
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, dict):
        return {key: _samples(value, index, count) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_samples(value, index, count) for value in batch)
    return batch
