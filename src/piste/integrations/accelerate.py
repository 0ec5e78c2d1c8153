"""piste in accelerate: one-pass optimizers go through ``prepare`` as they are; two passes need a step that knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import piste
from piste.integrations.framework import framework

with framework("accelerate"):
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]

__all__ = ["check_processes", "sharpness_step"]

_UNTRIED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")


def sharpness_step(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    accumulate: str | None = None,
    clip: float | None = None,
    perturbation: str = "local",
) -> Tensor:
    """:func:`piste.sharpness_step` with an optimizer and a model that came out of ``accelerator.prepare``.

    It is the whole step: gradients are cleared, computed, scaled if the accelerator has a scaler, and used. A scheduler
    of the accelerator sees whether the step was skipped.

    Args:
        accelerator: the one that prepared the others.
        optimizer: what ``prepare`` made of a two-pass optimizer.
        model: what ``prepare`` made of the model.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch.
        batch: the batch; with ``accumulate``, a list of micro-batches of equal size: all those of the step.
        accumulate: as in :func:`piste.sharpness_step`.
        clip: as in :func:`piste.sharpness_step`, instead of ``accelerator.clip_grad_norm_``.
        perturbation: as in :func:`piste.sharpness_step`.

    Returns:
        The mean loss at the weights themselves, detached.

    Raises:
        TypeError: ``optimizer`` was not prepared, or has no two passes.
        ValueError: as :func:`piste.sharpness_step`; or the accelerator shards models, which was not tried.
        RuntimeError: inside of ``accelerator.accumulate`` before its last micro-batch, when steps are put off.

    Not for one-pass optimizers: ``accelerator.backward(loss)`` and ``optimizer.step()`` are right for those.

    >>> import torch, piste
    >>> from accelerate import Accelerator
    >>> from piste.integrations.accelerate import sharpness_step
    >>> accelerator, net = Accelerator(cpu=True), torch.nn.Linear(3, 1)
    >>> model, optimizer = accelerator.prepare(net, piste.create("sam+adamw", net))
    >>> loss = sharpness_step(accelerator, optimizer, model, lambda m, x: m(x).square().mean(), torch.ones(4, 3))

    Sources: :class:`piste.SAM` and its descendants name theirs.
    """
    sharpness = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
    if not isinstance(sharpness, piste.SAM):
        had = type(optimizer).__name__ if sharpness is None else f"{type(sharpness).__name__}, prepared"
        raise TypeError(
            f"sharpness_step got optimizer={had}; legal: what accelerator.prepare makes of piste.SAM and the like"
        )
    check_processes("sharpness_step", accelerator)
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "sharpness_step was called inside of accelerator.accumulate before the last micro-batch, when no step is "
            "taken: call it once, outside, with a list of all micro-batches and accumulate='batch'"
        )
    scaler = None if accelerator.scaler is None else cast(torch.amp.GradScaler, _Scaler(accelerator.scaler, optimizer))
    return piste.sharpness_step(
        sharpness, model, loss_fn, batch, scaler=scaler, accumulate=accumulate, clip=clip, perturbation=perturbation
    )


class _Scaler:
    """The accelerator's scaler, whose steps go through the optimizer that it prepared and are noted there."""

    def __init__(self, scaler: torch.amp.GradScaler, prepared: AcceleratedOptimizer) -> None:
        self.prepared, self.scale, self.unscale_ = prepared, scaler.scale, scaler.unscale_

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.prepared.step()  # asks the scaler, and updates it

    def update(self) -> None:
        """It was updated with the step."""


def check_processes(owner: str, accelerator: Accelerator) -> None:
    """Refuse ways of spreading a model over processes in which two passes were not tried.

    Args:
        owner: what refuses.
        accelerator: it knows.

    Raises:
        ValueError: DeepSpeed, Megatron, XLA or sharded models.

    >>> from accelerate import Accelerator
    >>> from piste.integrations.accelerate import check_processes
    >>> check_processes("sharpness_step", Accelerator(cpu=True))
    """
    kind = accelerator.distributed_type.value
    if kind in _UNTRIED:
        raise ValueError(
            f"{owner} got an accelerator of kind {kind}, in which two passes were not tried; legal: whole models, one "
            "a process. piste.sharpness_step in a loop of your own knows FSDP2"
        )
