r"""Convex logistic regressions on real data, with their exact minimum.

:math:`f(W, b) = \text{mean cross-entropy} + \tfrac{1}{2n} \lVert W \rVert^2` on standardised features, all n training
examples in every step. The score is the decadic logarithm of :math:`f - f^*`, worked out in float64 whatever the
weights' precision; :math:`f^*` comes from L-BFGS in float64, to a gradient of 1e-9. The validation and report loss are
those of held-out examples, where the score is that of the training objective: what is measured is optimization.

Source: the data sets breast_cancer, wine and digits that come with scikit-learn; as in benchopt's first benchmarks.
Known result: the minimum is unique, so every optimizer that converges reaches the same one.
Cost: less than 1 s a run on one core; digits 2 s.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from piste.race.data import Splits
from piste.race.task import Task

TINY = 1e-16  # what the logarithm is taken of where the minimum is met
_HELD_OUT = 0.2  # of the examples, for each of the two parts that are not trained on


@cache
def splits(name: str) -> Splits:
    """A bundled data set in three parts, every feature standardised by the first."""
    from sklearn import datasets  # type: ignore[import-untyped]

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float64), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out = int(len(y) * _HELD_OUT)
    train, valid, report = torch.split(order, [len(y) - 2 * held_out, held_out, held_out])
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0).clamp_min(1e-3)  # some pixels are never lit
    return Splits(*((x[part].float(), y[part]) for part in (train, valid, report)))


def objective(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy and the penalty."""
    return functional.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()


@cache
def minimum(name: str) -> float:
    """The least value that the training objective has, by L-BFGS in float64."""
    x, labels = training(name)
    classes, dimensions = int(labels.max()) + 1, x.shape[1]

    def value_and_slope(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        point = torch.tensor(flat).view(classes, dimensions + 1).requires_grad_()
        with torch.enable_grad():  # evaluation asks for this, without gradients
            value = objective(point[:, :-1], point[:, -1], x, labels, 1 / len(x))
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.flatten().numpy()

    start = np.zeros(classes * (dimensions + 1))
    limits = {"maxiter": 20_000, "maxfun": 50_000, "gtol": 1e-9, "ftol": 0.0}
    found = minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options=limits)
    return float(found.fun)


def training(name: str) -> tuple[Tensor, Tensor]:
    """Training features in float64, and labels."""
    x, labels = splits(name).train  # type: ignore[misc]
    return x.double(), labels


def _weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = model.parameters()
    return weight, bias


def regression(name: str, description: str, steps: int) -> Task:
    """The task of one of scikit-learn's data sets."""
    count = len(training(name)[0])
    classes, dimensions = int(training(name)[1].max()) + 1, training(name)[0].shape[1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, labels = batch
        return objective(*_weights(model), x, labels, 1 / count)

    def suboptimality(model: nn.Module, batch: Any) -> float:
        weight, bias = (p.detach().cpu().double() for p in _weights(model))
        value = float(objective(weight, bias, *training(name), 1 / count))
        return float(np.log10(max(value - minimum(name), TINY)))

    return Task(
        name=f"logistic_{name}",
        model=lambda: nn.Linear(dimensions, classes),
        data=lambda: splits(name),
        loss=loss,
        metric=suboptimality,
        metric_name="log10 of suboptimality",
        steps=steps,
        batch_size=count,
        settings={"weight_decay": 0.0},
        description=description,
    )


def logistic_breast_cancer() -> Task:
    """Two classes, 30 features."""
    return regression("breast_cancer", "convex: logistic regression on 343 tumours, distance from the minimum", 300)


def logistic_wine() -> Task:
    """Three classes, 13 features."""
    return regression("wine", "convex: logistic regression on 108 wines, distance from the minimum", 300)


def logistic_digits() -> Task:
    """Ten classes, 64 features."""
    return regression("digits", "convex: logistic regression on 1,079 digits, distance from the minimum", 300)
