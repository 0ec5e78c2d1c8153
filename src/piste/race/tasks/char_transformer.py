"""Character-level language model on the help text that ships with CPython (``pydoc_data.topics``).

Source: the text is Python's documentation; the model is a GPT (Radford et al. 2018) of two layers and width 64.
Known result: tuned SGD with momentum < AdamW < Muon, Shampoo, SOAP; docs/quality.md has what a race found.
Cost: about 5 s a run on one core.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from piste.race.data import Splits
from piste.race.task import Task

CONTEXT = 32
WIDTH = 64
HEADS = 4
LAYERS = 2
_HELD_OUT = 0.06  # of the text, for each of the two parts that are not trained on
_VALIDATION_WINDOWS = 192  # evaluated several times a run, so a sample of them must do


def _read_text() -> str:
    from pydoc_data.topics import topics

    # Sorted for a fixed order; some topics share one text, which must not stand on both sides of a split.
    return "\n\n".join(dict.fromkeys(text for _, text in sorted(topics.items())))


TEXT = _read_text()
TEXT_HASH = hashlib.sha256(TEXT.encode()).hexdigest()
ALPHABET = "".join(sorted(set(TEXT)))


def _data() -> Splits:
    code = {character: number for number, character in enumerate(ALPHABET)}
    numbers = torch.tensor([code[character] for character in TEXT])
    held_out = int(len(numbers) * _HELD_OUT)
    train, valid, report = numbers[: -2 * held_out], numbers[-2 * held_out : -held_out], numbers[-held_out:]
    # A window is CONTEXT characters and the one that follows. Training windows start anywhere (a view, no copy);
    # held-out windows share no predicted character, so that their losses are counted once.
    windows = valid.unfold(0, CONTEXT + 1, CONTEXT)
    sample = torch.linspace(0, len(windows) - 1, _VALIDATION_WINDOWS).long()
    return Splits(
        train=(train.unfold(0, CONTEXT + 1, 1),),
        valid=(windows[sample],),
        report=(report.unfold(0, CONTEXT + 1, CONTEXT),),
    )


class _Block(nn.Module):
    """Causal attention, then a two-layer perceptron, both on normalised inputs and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.perceptron_norm = nn.LayerNorm(WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, time, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        wide: Tensor = self.perceptron(self.perceptron_norm(x))
        return x + wide


class CharTransformer(nn.Module):
    """A GPT of about 115,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, len(ALPHABET))
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.characters(numbers) + self.positions.weight[: numbers.shape[1]]
        logits: Tensor = self.out(self.norm(self.blocks(x)))
        return logits


def _loss(model: nn.Module, batch: Any) -> Tensor:
    (window,) = batch
    logits: Tensor = model(window[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


char_transformer = Task(
    name="char_transformer",
    model=CharTransformer,
    data=_data,
    loss=_loss,
    steps=300,
    batch_size=16,
    domain="nlp",
    description=f"a small GPT predicts the next character of Python's help text ({len(TEXT):,} characters)",
    # The text differs between Python versions.
    version=f"text {TEXT_HASH}",
)
