"""Which word follows which, learned by one matrix, where words are as unequal as in a text.

Of 512 words the k-th comes with a frequency proportional to 1/k; half of the time the word before it decides which one
it is. The model is a table of logits, a row for each word before: a softmax regression on indicators. Every step sees
all 512 rows, each weighted by how often its word stands first, so noise of batches plays no part, and the problem is
convex. The loss is the mean cross-entropy of the next word; its three parts are counted from texts of their own.

Sources: Kunstner et al. 2024, arXiv 2402.19449 (heavy-tailed classes); Kunstner & Bach 2025, arXiv 2505.19227 (bigrams
by Zipf's law).
Known result: SGD, with momentum or without, is far behind Adam however its learning rate is tuned: it learns a row at
a pace that goes with its frequency. Where all words are equally frequent the two are alike.
Cost: about 1 s a run on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task

WORDS = 512
PAIRS = 2**21  # words of a text
DECIDED = 0.5  # of the words follow from the one before


def frequencies(exponent: float) -> Tensor:
    """In proportion to ``rank ** -exponent``: 1 is Zipf's law, 0 is balance."""
    return torch.arange(1, WORDS + 1, dtype=torch.float64) ** -exponent


def texts(exponent: float) -> Splits:
    """Three texts as counts: which words there are, and for each the shares of all pairs that it begins."""
    draw = torch.Generator().manual_seed(0)
    weights = frequencies(exponent)

    def drawn(count: int) -> Tensor:
        return torch.multinomial(weights, count, replacement=True, generator=draw)

    successors = drawn(WORDS)

    def part() -> tuple[Tensor, Tensor]:
        first, free = drawn(PAIRS), drawn(PAIRS)
        decided = torch.rand(PAIRS, generator=draw) < DECIDED
        second = torch.where(decided, successors[first], free)
        counts = torch.bincount(first * WORDS + second, minlength=WORDS**2).view(WORDS, WORDS)
        # A mean over the rows of a batch is then one over pairs.
        return torch.arange(WORDS), counts.float() * (WORDS / PAIRS)

    return Splits(train=part(), valid=part(), report=part())


def table() -> nn.Module:
    """Logits of the next word for each word; all alike at first but for a little noise."""
    model = nn.Embedding(WORDS, WORDS)
    nn.init.normal_(model.weight, std=0.01)
    return model


def _loss(model: nn.Module, batch: Any) -> Tensor:
    words, shares = batch
    loss: Tensor = -(shares * model(words).log_softmax(dim=1)).sum(dim=1).mean()
    return loss


zipf_bigram = Task(
    name="zipf_bigram",
    model=table,
    data=lambda: texts(exponent=1.0),
    loss=_loss,
    steps=200,
    batch_size=WORDS,
    settings={"weight_decay": 0.0},
    description="a linear softmax guesses the next of 512 words with frequencies by Zipf's law",
)
