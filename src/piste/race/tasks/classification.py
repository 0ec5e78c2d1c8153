"""Loss and metric of tasks whose batches are pairs: what is to be told apart, and the number of its class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the batch, in nats."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    """Share of the batch whose class has the largest logit."""
    inputs, labels = batch
    hits: Tensor = model(inputs).argmax(dim=1) == labels
    return hits.float().mean()
