r"""Two problems that are linear in what they compute and not in their weights, with the minimum known exactly.

``linear_autoencoder``: six matrices without anything between them squeeze 64 numbers into 8 and back. The best that any
weights can do is to keep the eight leading principal components (Baldi & Hornik 1989). The data's variances fall like
1/rank^2, and a product of many matrices is flat near zero and steep away from it: what curvature methods were shown on.

``matrix_factorisation``: two matrices of rank 8 whose product shall be a given 64 x 48 matrix of that rank, with
singular values from 1 to 1/100. The minimum is zero.

Both take every step on all data. The score is the decadic logarithm of the loss above its minimum, as a share of what
weights of zero would lose, in float64. Held-out rows only give the losses of the validation and report splits; seeds
differ in initial weights.

Sources: Baldi & Hornik 1989; Martens 2010 (deep autoencoders by curvature); Saxe et al. 2014, arXiv 1312.6120.
Known result: what sees a matrix (SOAP, Shampoo, Muon) needs fewer steps than AdamW on the autoencoder; docs/quality.md
has what a race found.
Cost: about 1 s a run on one core with AdamW, 3 s with Shampoo.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task

INPUTS, CODE, ROWS = 64, 8, 512
WIDTHS = (INPUTS, 32, 16, CODE, 16, 32, INPUTS)
HEIGHT, WIDTH, RANK, CONDITION = 64, 48, 8, 100.0
TINY = 1e-16  # what the logarithm is taken of where the minimum is met


@cache
def rows() -> Splits:
    """What the autoencoder is shown: variances along random directions of 1, 1/4, 1/9, …"""
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=draw, dtype=torch.float64)).Q
    scales = torch.arange(1, INPUTS + 1, dtype=torch.float64) ** -1

    def part() -> tuple[Tensor]:
        return ((torch.randn(ROWS, INPUTS, generator=draw, dtype=torch.float64) * scales @ directions.T).float(),)

    return Splits(train=part(), valid=part(), report=part())


@cache
def covariance() -> tuple[Tensor, float]:
    """Second moments of the training rows, and what the best code of 8 numbers loses of their trace."""
    (x,) = rows().train  # type: ignore[misc]
    moments = x.double().T @ x.double() / len(x)
    return moments, float(torch.linalg.eigvalsh(moments)[:-CODE].sum())


def _squared_error(model: nn.Module, batch: Any) -> Tensor:
    (x,) = batch
    error: Tensor = (model(x) - x).square().sum(dim=1).mean()
    return error


def autoencoder_excess(model: nn.Module, batch: Any) -> float:
    """How much more the training rows lose than they must, by the product of all matrices."""
    left = torch.eye(INPUTS, dtype=torch.float64)
    for weight in model.parameters():
        left = weight.detach().cpu().double() @ left
    left = torch.eye(INPUTS, dtype=torch.float64) - left
    moments, least = covariance()
    return _log10((float((left @ moments @ left.T).trace()) - least) / (float(moments.trace()) - least))


@cache
def target() -> Tensor:
    """The matrix to be factorised, its largest singular value 1."""
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(HEIGHT, RANK, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=draw, dtype=torch.float64)).Q
    product: Tensor = left * torch.logspace(0, -1, RANK, base=CONDITION, dtype=torch.float64) @ right.T
    return product


def factors() -> nn.Module:
    """Two thin matrices, small at first; called on numbers of rows, their product's rows."""
    model = nn.Sequential(nn.Linear(HEIGHT, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    return model


def _entries() -> Splits:
    rows = (torch.eye(HEIGHT), target().float())
    return Splits(train=rows, valid=rows, report=rows)


def _entry_error(model: nn.Module, batch: Any) -> Tensor:
    row, entries = batch
    error: Tensor = (model(row) - entries).square().sum(dim=1).mean() * HEIGHT
    return error


def factorisation_excess(model: nn.Module, batch: Any) -> float:
    """The squared error of all entries, as a share of what they are."""
    first, second = (weight.detach().cpu().double() for weight in model.parameters())
    return _log10(float(((second @ first).T - target()).square().sum() / target().square().sum()))


def _log10(share: float) -> float:
    return float(torch.tensor(max(share, TINY), dtype=torch.float64).log10())


linear_autoencoder = Task(
    name="linear_autoencoder",
    model=lambda: nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(WIDTHS))),
    data=rows,
    loss=_squared_error,
    metric=autoencoder_excess,
    metric_name="log10 of excess loss",
    steps=400,
    batch_size=ROWS,
    settings={"weight_decay": 0.0, "heads": ()},
    description="six matrices in a row learn eight principal components",
)

matrix_factorisation = Task(
    name="matrix_factorisation",
    model=factors,
    data=_entries,
    loss=_entry_error,
    metric=factorisation_excess,
    metric_name="log10 of excess loss",
    steps=400,
    batch_size=HEIGHT,
    settings={"weight_decay": 0.0, "heads": ()},
    description="two thin matrices whose product is a given one of condition 100",
)
