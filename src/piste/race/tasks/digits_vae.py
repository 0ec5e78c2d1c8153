"""A variational autoencoder of handwritten digits.

The data are those of ``digits``. The loss is the negative evidence lower bound in nats per image, constants left out:
squared errors of the pixels over twice their variance, and the divergence of the code from a standard normal.

Source: Kingma & Welling 2014, arXiv 1312.6114; on MNIST it is a problem of DeepOBS (Schneider et al. 2019).
Known result: with tuned learning rates Adam trains it and SGD, with momentum or without, does much worse or sticks
(DeepOBS's runs on MNIST: 27.8 with Adam, 38 and 53 with SGD and momentum; digits show the same order).
Cost: about 2 s a run on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task
from piste.race.tasks.digits import parts

PIXELS = 64
HIDDEN = 128
CODE = 8
VARIANCE = 0.02  # of a pixel, whose range is 1


def _data() -> Splits:
    return Splits(*((images.flatten(1),) for images, _ in parts()))


class VariationalAutoencoder(nn.Module):
    """Two layers to mean and log-variance of a code, two layers back to the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * CODE)
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pixels, mean and log-variance of the code. In evaluation the noise is always the same."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        if self.training:
            noise = torch.randn_like(mean)
        else:
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        pixels: Tensor = self.decoder(mean + noise * (log_variance / 2).exp())
        return pixels, mean, log_variance


def _loss(model: nn.Module, batch: Any) -> Tensor:
    (x,) = batch
    pixels, mean, log_variance = model(x)
    error = (pixels - x).square().sum() / VARIANCE
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    bound: Tensor = (error + divergence) / (2 * len(x))
    return bound


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
