"""BatchNorm's running statistics, computed anew for the weights that a model has now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["put_back", "recalibrate", "statistics_of"]


class _Moments:
    """Mean and summed squared deviation of each channel over all batches so far, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        variance, mean = torch.var_mean(x.double(), axes, correction=0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, variance * count
            return
        apart, whole = mean - self.mean, self.count + count
        self.mean = self.mean + apart * (count / whole)
        self.squares = self.squares + variance * count + apart.square() * (self.count * count / whole)
        self.count = whole


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
) -> int:
    """Give a model's BatchNorm layers the mean and variance of their inputs over a whole set of batches.

    Weights that were averaged, or stand elsewhere than where they were trained, do not fit the running statistics of
    training. Each layer's statistics become those of all its inputs together, so a smaller last batch weighs less, and
    what differs between batches counts: ``torch.optim.swa_utils.update_bn`` takes the mean of each batch's statistics
    instead. Other layers are in evaluation mode meanwhile (no dropout); BatchNorm layers normalise each batch by its
    own statistics, as in training.

    Use it inside ``with ema.average():`` on a copy, or after :meth:`piste.ModelEMA.copy_to`; and for the weights at
    which a schedule-free optimizer evaluates. Not needed for models without BatchNorm, where it reads no batch.

    Args:
        model: the model; its modes (training or evaluation) are as before afterwards.
        batches: a loader. Tuples and lists are taken to begin with the input, dictionaries to be keyword arguments.
        forward: your own call of the model on a batch. Without it, inputs are moved to the model's device.

    Returns:
        The number of batches read.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there was no batch. Nothing has been changed then, as after any other error.

    >>> import torch, piste
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    >>> piste.recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [10.0]])])
    2
    >>> model[0].running_mean.item(), round(model[0].running_var.item(), 4)
    (4.0, 18.6667)

    Source: Wu & Johnson, "Rethinking Batch in BatchNorm" (2021, arXiv 2105.07576), section 3; variances of batches are
    combined with the formula of Chan, Golub & LeVeque (1983).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recalibrate got model={type(model).__name__}; legal: an nn.Module")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    call = _call if forward is None else forward
    moments = {layer: _Moments() for layer in layers}
    modes = [(module, module.training) for module in model.modules()]
    saved = statistics_of(model)
    read = 0
    with ExitStack() as stack:
        stack.callback(_restore, modes)
        for layer, seen in moments.items():
            stack.callback(layer.register_forward_pre_hook(seen).remove)
        model.eval()
        for layer in layers:
            layer.train()
        try:
            for batch in batches:
                call(model, batch)
                read += 1
            if not read:
                raise ValueError("recalibrate got no batch in batches; legal: at least one")
        finally:
            put_back(saved)
    for layer, seen in moments.items():
        if seen.mean is not None and seen.squares is not None:
            layer.running_mean.copy_(seen.mean)  # type: ignore[union-attr]
            layer.running_var.copy_(seen.squares / max(1, seen.count - 1))  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(read)
    return read


def statistics_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The running statistics of a model's BatchNorm layers, each with a copy."""
    layers = (m for m in model.modules() if isinstance(m, _BatchNorm))
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


def put_back(statistics: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Make running statistics what they were when :func:`statistics_of` was called."""
    for buffer, before in statistics:
        buffer.copy_(before)


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _call(model: nn.Module, batch: Any) -> object:
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(batch, dict):
        return model(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(first.to(device) if isinstance(first, Tensor) else first)
