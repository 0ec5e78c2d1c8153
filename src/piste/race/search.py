"""What the trials of a search say beyond the best of them.

What a smaller budget of trials would have found, how much a wrong learning rate costs, and whether a lead survives
another draw of trials as well as of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special  # type: ignore[import-untyped]

from piste.race.statistics import LEVEL

RESAMPLES: Final = 2000
_SEED = 20

Values = NDArray[np.float64]


@dataclass(frozen=True)
class BudgetCurve:
    """The best score to expect of 1, 2, … trials, with a bootstrap band.

    Args:
        expected: one a number of trials, from one trial on.
        low, high: the band.
    """

    expected: list[float]
    low: list[float]
    high: list[float]


def budget_curve(scores: Sequence[float], higher_is_better: bool) -> BudgetCurve:
    """What the best of k trials is worth, for every k up to all of them.

    The mean over all ways to choose k of the trials made, without putting any back: unbiased, where choosing with
    replacement flatters small budgets (Tang et al. 2020, "Showing your work doesn't always work", after Dodge et al.
    2019). The band resamples the trials themselves.

    Args:
        scores: of the trials; one that did not finish counts as whatever the caller takes for the worst.
        higher_is_better: direction of the score.

    Raises:
        ValueError: there is no trial.
    """
    if not len(scores):
        raise ValueError("scores must hold one trial at least, not none")
    sign = -1.0 if higher_is_better else 1.0
    losses = sign * np.asarray(scores, dtype=float)
    weights = _order_weights(len(losses))
    generator = np.random.default_rng(_SEED)
    redrawn = generator.choice(losses, (RESAMPLES, len(losses)))
    bands = np.quantile(np.sort(redrawn, axis=1) @ weights, _tails(), axis=0)
    low, high = np.sort(sign * bands, axis=0)
    return BudgetCurve((sign * (np.sort(losses) @ weights)).tolist(), low.tolist(), high.tolist())


def _order_weights(count: int) -> Values:
    """Column k: the chances that each trial, from the best on, is the best of k + 1 chosen from all."""
    place, chosen = np.arange(count)[:, None], np.arange(count)[None, :]
    found: Values = special.comb(count - 1 - place, chosen) / special.comb(count, chosen + 1)
    return found


@dataclass(frozen=True)
class Sensitivity:
    """How much a wrong learning rate costs.

    Args:
        excess: expected score lost against the best rate, over the rates tried; never negative.
        decades: width of the range that was tried, in powers of ten.
    """

    excess: float
    decades: float


def sensitivity(lrs: Sequence[float], scores: Sequence[float], untrained: float, higher_is_better: bool) -> Sensitivity:
    """The expected loss in excess of the best over a range of learning rates (Wortsman et al. 2023).

    The mean over the logarithm of the rate, by trapezoids between the trials; nothing counts as worse than the model
    before training.

    Args:
        lrs: of the trials, in any order.
        scores: one a trial; nan for one that did not finish.
        untrained: score of the model before training.
        higher_is_better: direction of the score.

    Raises:
        ValueError: there are fewer than two different rates, or numbers of rates and scores differ.
    """
    if len(set(lrs)) < 2 or len(lrs) != len(scores):
        raise ValueError(f"lrs must hold two different rates or more, one a score, not {lrs} for {len(scores)} scores")
    sign = -1.0 if higher_is_better else 1.0
    order = np.argsort(lrs)
    places = np.log10(np.asarray(lrs, dtype=float)[order])
    losses = np.fmin(sign * np.asarray(scores, dtype=float)[order], sign * untrained)
    width = float(places[-1] - places[0])
    return Sensitivity(float(integrate.trapezoid(losses - losses.min(), places)) / width, width)


@dataclass(frozen=True)
class Redrawn:
    """The difference of two contenders over studies in which trials and seeds are drawn anew.

    Args:
        ahead: share of these studies in which the first scores better; a draw counts half.
        low, high: interval of (second minus first).
    """

    ahead: float
    low: float
    high: float


def redraw(
    trials: tuple[Sequence[float], Sequence[float]],
    confirmed: tuple[Sequence[float], Sequence[float]],
    higher_is_better: bool,
) -> Redrawn:
    """Would the first still beat the second, had other learning rates and other seeds been drawn?

    Seeds and trials are resampled, each as its own stratum and in pairs: a seed is the same for both contenders, and
    the trials are at the same positions of both ranges. A redrawn set of trials may lack the best one; the
    confirmed scores are then shifted by what its best is behind on the validation split.

    Args:
        trials: validation scores of both, in the order of the search; the worst for those that did not finish.
        confirmed: scores of both, seed by seed.
        higher_is_better: direction of the scores.

    Raises:
        ValueError: the contenders differ in the number of trials or of seeds, or one of these is zero.
    """
    sign = -1.0 if higher_is_better else 1.0
    searched, scored = (sign * _paired(name, both) for name, both in (("trials", trials), ("confirmed", confirmed)))
    generator = np.random.default_rng(_SEED)
    tried, seeds = (generator.integers(both.shape[1], size=(RESAMPLES, both.shape[1])) for both in (searched, scored))
    shift = searched[:, tried].min(axis=2) - searched.min(axis=1, keepdims=True)
    first, second = scored[:, seeds].mean(axis=2) + shift
    behind = second - first
    low, high = np.sort(sign * np.quantile(behind, _tails()))
    return Redrawn(float(np.mean(behind > 0) + np.mean(behind == 0) / 2), float(low), float(high))


def _paired(name: str, both: tuple[Sequence[float], Sequence[float]]) -> Values:
    if len(both[0]) != len(both[1]) or not len(both[0]):
        raise ValueError(f"{name} must hold equally many scores of both, one at least, not {[*map(len, both)]}")
    return np.asarray(both, dtype=float)


def _tails() -> list[float]:
    return [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def counted(scores: Sequence[float], worst: float) -> list[float]:
    """``scores`` with ``worst`` in the place of those that are not finite."""
    return [score if math.isfinite(score) else worst for score in scores]
