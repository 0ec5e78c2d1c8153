"""A variational autoencoder of handwritten digits.

The data are those of ``digits``, brightness as the probability that a pixel is lit. The loss is the negative evidence
lower bound in nats per image: cross-entropy of the pixels plus the divergence of the code from a standard normal.

Source: Kingma & Welling 2014, arXiv 1312.6114; on MNIST it is a problem of DeepOBS (Schneider et al. 2019).
Known result: with tuned learning rates Adam trains it and SGD, with momentum or without, does much worse or sticks
(DeepOBS's runs on MNIST: 27.8 with Adam, 38 and 53 with SGD and momentum; digits show the same order).
Cost: about 2 s a run on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from piste.race.data import Splits
from piste.race.task import Task
from piste.race.tasks.digits import parts

PIXELS = 64
HIDDEN = 128
CODE = 8


def _data() -> Splits:
    images = [(x.flatten(1) + 0.5,) for x, _ in parts()]  # brightness between 0 and 1
    return Splits(*images)


class VariationalAutoencoder(nn.Module):
    """Two layers to mean and log-variance of a code, two layers back to the pixels' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * CODE)
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels, mean and log-variance of the code. In evaluation the noise is always the same."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        if self.training:
            noise = torch.randn_like(mean)
        else:
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        logits: Tensor = self.decoder(mean + noise * (log_variance / 2).exp())
        return logits, mean, log_variance


def _loss(model: nn.Module, batch: Any) -> Tensor:
    (x,) = batch
    logits, mean, log_variance = model(x)
    pixels = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    return (pixels + divergence) / len(x)


digits_vae = Task(
    name="digits_vae",
    model=VariationalAutoencoder,
    data=_data,
    loss=_loss,
    steps=400,
    batch_size=64,
    domain="vision",
    description="a variational autoencoder of handwritten digits; nats per image",
)
