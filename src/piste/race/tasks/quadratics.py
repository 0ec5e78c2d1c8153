r"""Quadratic bowls, about which everything is known in closed form.

:math:`f(x) = \tfrac12 (x - x^*)^\top A (x - x^*)`, with eigenvalues of A spread evenly in their logarithm between 1 and
1/condition. The score is the decadic logarithm of f itself, whose minimum is zero. ``quadratic_axis`` has its axes
along the coordinates, ``quadratic_rotated`` turned at random; start and minimum are turned with it, so that they are
one problem for every rule that no rotation changes. There is nothing to generalise: the three parts of the data are
one empty example, and seeds differ in where they start.

``quadratic_noisy`` is the problem *quadratic deep* of DeepOBS: a tenth of the eigenvalues in [30, 60], the others in
[0, 1], and every example a bowl whose minimum is drawn round zero. Its score is the loss of unseen examples, of which
:math:`\tfrac12 \sigma^2 \operatorname{tr} A` cannot be avoided.

Sources: Nesterov 2004, Polyak 1964; Schneider et al. 2019 (DeepOBS), arXiv 1903.05499.
Known results: with the best learning rate, gradient descent comes nearer by :math:`(\kappa-1)/(\kappa+1)` a step, and
with the best momentum by :math:`(\sqrt\kappa-1)/(\sqrt\kappa+1)`, rotated or not. Adam is far better on the axes than
rotated. On the noisy one, tuned SGD with momentum and Adam come within a percent of each other.
Cost: less than 1 s a run on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task

DIMENSIONS = 100
CONDITION = 1e3
FAR = 0.1  # standard deviation of each coordinate's distance from the minimum at the start
NOISE = 0.6  # DeepOBS's
TINY = 1e-30  # what the logarithm is taken of where the minimum is met


def eigenvalues(condition: float) -> Tensor:
    """From 1/condition to 1, evenly spaced in their logarithm."""
    return torch.logspace(-1, 0, DIMENSIONS, base=condition, dtype=torch.float64)


def rotation() -> Tensor:
    """A rotation drawn uniformly, always the same."""
    draw = torch.randn(DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(draw)
    turn: Tensor = orthogonal * triangle.diagonal().sign()
    return turn


class Bowl(nn.Module):
    """A point and the bowl it is in; called without arguments, the height above the minimum.

    Args:
        condition: largest by smallest eigenvalue.
        axes: the eigenvectors, as columns; None: the coordinates' own.
    """

    minimum: Tensor
    matrix: Tensor

    def __init__(self, condition: float = CONDITION, axes: Tensor | None = None) -> None:
        super().__init__()
        turn = torch.eye(DIMENSIONS, dtype=torch.float64) if axes is None else axes
        start = FAR * torch.randn(DIMENSIONS, dtype=torch.float64)
        # Away from zero, which decay and small initial weights would find by chance.
        self.register_buffer("minimum", (turn @ torch.ones(DIMENSIONS, dtype=torch.float64)).float())
        self.register_buffer("matrix", (turn * eigenvalues(condition) @ turn.T).float())
        self.point = nn.Parameter((turn @ (1 + start)).float())

    def forward(self) -> Tensor:
        away = self.point - self.minimum
        return away @ (self.matrix @ away) / 2


class NoisyBowl(nn.Module):
    """The mean height over bowls whose minima are the examples of a batch."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        few = DIMENSIONS // 10
        steep = 30 + 30 * torch.rand(few, generator=draw, dtype=torch.float64)
        flat = torch.rand(DIMENSIONS - few, generator=draw, dtype=torch.float64)
        turn = rotation()
        self.register_buffer("matrix", (turn * torch.cat([steep, flat]) @ turn.T).float())
        self.point = nn.Parameter(NOISE / 2 * torch.randn(DIMENSIONS))

    def forward(self, minima: Tensor) -> Tensor:
        away = self.point - minima
        return ((away @ self.matrix) * away).sum(dim=1).mean() / 2


def _one_example() -> Splits:
    nothing = (torch.zeros(1),)
    return Splits(train=nothing, valid=nothing, report=nothing)


def _minima() -> Splits:
    draw = torch.Generator().manual_seed(1)
    parts = [(NOISE * torch.randn(1_000, DIMENSIONS, generator=draw),) for _ in range(3)]
    return Splits(*parts)


def _height(model: nn.Module, batch: Any) -> Tensor:
    height: Tensor = model()
    return height


def _logarithm(model: nn.Module, batch: Any) -> Tensor:
    return _height(model, batch).clamp_min(TINY).log10()


def _noisy_height(model: nn.Module, batch: Any) -> Tensor:
    height: Tensor = model(*batch)
    return height


def _bowl(name: str, description: str, axes: Tensor | None) -> Task:
    return Task(
        name=name,
        model=lambda: Bowl(axes=axes),
        data=_one_example,
        loss=_height,
        metric=_logarithm,
        metric_name="log10 of suboptimality",
        steps=500,
        batch_size=1,
        settings={"weight_decay": 0.0},
        description=description,
    )


quadratic_axis = _bowl("quadratic_axis", "a bowl of condition 1,000 whose axes are the coordinates", None)
quadratic_rotated = _bowl("quadratic_rotated", "the same bowl, turned at random", rotation())
quadratic_noisy = Task(
    name="quadratic_noisy",
    model=NoisyBowl,
    data=_minima,
    loss=_noisy_height,
    steps=500,
    batch_size=128,
    settings={"weight_decay": 0.0},
    description="a bowl with a tenth of steep directions, its minimum drawn anew for every example",
)
