"""Linear classification where few classes have most of the examples, as few words make most of a text.

The k-th of 256 classes has a share of examples proportional to 1/k. An example is its class's direction plus noise, in
64 dimensions; the model is one matrix. Every step sees all training examples, so noise of batches plays no part.

Source: Kunstner et al. 2024, arXiv 2402.19449, who show it for language models and for a linear model like this.
Known result: SGD, with momentum or without, lags far behind Adam: it is slow on rare classes, and most classes are
rare. Where all classes are equally frequent the two are alike.
Cost: about 4 s a run on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from piste.race.data import Splits
from piste.race.task import Task

CLASSES = 256
DIMENSIONS = 64
NOISE = 0.5
TRAINING, HELD_OUT = 2_048, 1_024


def examples(exponent: float) -> Splits:
    """Examples with class frequencies proportional to ``rank ** -exponent``: 1 is Zipf's law, 0 is balance."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(CLASSES, DIMENSIONS, generator=draw)
    frequencies = torch.arange(1, CLASSES + 1, dtype=torch.float32) ** -exponent

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(frequencies, count, replacement=True, generator=draw)
        return directions[labels] + NOISE * torch.randn(count, DIMENSIONS, generator=draw), labels

    return Splits(train=part(TRAINING), valid=part(HELD_OUT), report=part(HELD_OUT))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    x, labels = batch
    return functional.cross_entropy(model(x), labels)


zipf_softmax = Task(
    name="zipf_softmax",
    model=lambda: nn.Linear(DIMENSIONS, CLASSES, bias=False),
    data=lambda: examples(exponent=1.0),
    loss=_loss,
    steps=200,
    batch_size=TRAINING,
    description="a linear softmax over 256 classes with frequencies by Zipf's law, all examples in every step",
)
