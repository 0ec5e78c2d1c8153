"""What it takes to reach a target: steps, gradient evaluations or seconds, over seeds, and over several tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from piste.race.record import DIVERGED, RunRecord
from piste.race.statistics import LEVEL

STEPS: Final = "steps"
EVALUATIONS: Final = "gradient evaluations"
SECONDS: Final = "seconds"

# Largest factor behind the best that a profile counts, as in AlgoPerf.
MOST_BEHIND: Final = 4.0
# How much of the way from the untrained model to the best is left at the first target, and at the last but one.
_FIRST_TARGET, _LAST_TARGET = 0.9, 0.01
_RESAMPLES = 2000
Values = NDArray[np.float64]
_SEED = 20


@dataclass(frozen=True)
class Reach:
    """When a run first met a target.

    Args:
        at: how much it had spent; if it did not meet it, how much it was seen to spend without.
        met: whether it did.
    """

    at: float
    met: bool


def spent(run: RunRecord, what: str) -> list[float]:
    """What a run had spent at each of its evaluations.

    Args:
        what: ``STEPS``, ``EVALUATIONS`` or ``SECONDS`` of training.

    Raises:
        ValueError: ``what`` is none of these.
    """
    if what == SECONDS:
        return list(run.curve.train_seconds)
    if what not in (STEPS, EVALUATIONS):
        raise ValueError(f"what={what!r} is not legal; legal: {STEPS}, {EVALUATIONS}, {SECONDS}")
    each = 1.0 if what == STEPS else passes_a_step(run)
    return [step * each for step in run.curve.step]


def passes_a_step(run: RunRecord) -> float:
    """Gradient evaluations a step; nan where they were not counted."""
    made = run.key.steps if run.finished else max(run.curve.step, default=0)
    count = run.cost.gradient_evaluations
    return count / made if made and count else math.nan


def reach(run: RunRecord, target: float, higher_is_better: bool, what: str) -> Reach:
    """When the validation metric of a run first met a target, at its evaluations and nowhere between.

    A run that diverged never meets it, however long one waits. One that failed for another reason, or came to its last
    step, tells only that so much was not enough.
    """
    sign = -1.0 if higher_is_better else 1.0
    places = spent(run, what)
    for place, value in zip(places, run.curve.valid_metric, strict=True):
        if sign * value <= sign * target:
            return Reach(place, True)
    return Reach(math.inf if run.status == DIVERGED else max(places, default=0.0), False)


def median_reach(reaches: Sequence[Reach]) -> float:
    """The median over seeds, misses censored (Kaplan and Meier); inf where fewer than half met the target."""
    known = [each for each in reaches if not math.isnan(each.at)]
    if not any(each.met for each in known):
        return math.inf
    longest = max(each.at for each in known if math.isfinite(each.at))
    met = [each.at for each in known if each.met]
    missed = [min(each.at, longest) for each in known if not each.met]
    if min(missed, default=math.inf) >= max(met):  # as most of a report's thousands: then a miss is only a late one
        return sorted([*met, *(math.inf for _ in missed)])[(len(known) - 1) // 2]
    left = stats.ecdf(stats.CensoredData(uncensored=met, right=missed)).sf
    # rounding of products of shares must not hide that exactly half are left
    below = np.flatnonzero(left.probabilities <= 0.5 + 1e-9)
    return float(left.quantiles[below[0]]) if len(below) else math.inf


def median_reaches(runs: Sequence[RunRecord], goals: Sequence[float], higher_is_better: bool, what: str) -> list[float]:
    """The ``median_reach`` of these runs for each of several targets."""
    if not runs or not goals:
        return [math.inf] * len(goals)
    sign = -1.0 if higher_is_better else 1.0
    found = [_reaches(run, sign * np.asarray(goals), sign, what) for run in runs]
    at, met = np.array([each for each, _ in found]), np.array([each for _, each in found])
    longest = np.max(at, axis=0, where=np.isfinite(at), initial=-math.inf)
    missed = np.min(np.minimum(at, longest), axis=0, where=~met, initial=math.inf)
    # with a number that is not known, no comparison holds
    plain = met.any(axis=0) & (missed >= np.max(at, axis=0, where=met, initial=-math.inf))
    medians = np.sort(np.where(met, at, math.inf), axis=0)[(len(runs) - 1) // 2]
    return [
        float(median) if is_plain else median_reach([Reach(*pair) for pair in zip(*column, strict=True)])
        for median, is_plain, *column in zip(medians, plain, at.T.tolist(), met.T.tolist(), strict=True)
    ]


def _reaches(run: RunRecord, goals: Values, sign: float, what: str) -> tuple[Values, NDArray[np.bool_]]:
    """``reach`` for many targets, of which the sign is such that lower is better: what was spent, and whether met."""
    places = spent(run, what)
    values = sign * np.asarray(run.curve.valid_metric, dtype=float)
    best = np.minimum.accumulate(np.where(np.isnan(values), math.inf, values))
    first = np.searchsorted(-best, -goals)
    end = math.inf if run.status == DIVERGED else max(places, default=0.0)
    return np.array([*places, end])[first], first < len(places)


def targets(runs: Sequence[RunRecord], higher_is_better: bool, count: int = 24) -> list[float]:
    """Targets from hardly trained to the best that any run reached, the closer together the harder they are.

    Args:
        runs: confirmation runs of a task.
        higher_is_better: direction of the metric.
        count: how many; fewer come back where there is no range to divide.
    """
    sign = -1.0 if higher_is_better else 1.0
    curves = [[value for value in run.curve.valid_metric if math.isfinite(value)] for run in runs]
    curves = [values for values in curves if len(values) > 1]
    if not curves:
        return []
    easiest = sign * min(sign * values[0] for values in curves)
    hardest = sign * min(sign * value for values in curves for value in values)
    if sign * hardest >= sign * easiest:
        return []
    left = np.geomspace(_FIRST_TARGET, _LAST_TARGET, count - 1)  # of the way from easiest to hardest
    return [*(hardest + (easiest - hardest) * left).tolist(), hardest]


@dataclass(frozen=True)
class SpeedUp:
    """How many times less one contender needs than another for a target.

    Args:
        factor: ratio of the medians, above 1 where the first needs less; inf if the second misses, nan if both do.
        low, high: interval by the paired bootstrap over seeds; nan from a single seed.
    """

    factor: float
    low: float
    high: float


def speed_up(first: Sequence[Reach], second: Sequence[Reach]) -> SpeedUp:
    """Compare what two contenders need for one target, over the same seeds in the same order.

    Raises:
        ValueError: the numbers of seeds differ, or are zero.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"both must hold equally many seeds, one at least, not {len(first)} and {len(second)}")
    both = np.asarray([[each.at if each.met else math.inf for each in side] for side in (first, second)])
    factor = float(_ratio(both))
    if len(first) < 2:
        return SpeedUp(factor, math.nan, math.nan)
    seeds = np.random.default_rng(_SEED).integers(len(first), size=(_RESAMPLES, len(first)))
    ratios = _ratio(both[:, seeds])
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        return SpeedUp(factor, math.nan, math.nan)
    # order statistics, because between a number and infinity nothing can be interpolated
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return SpeedUp(factor, float(low), float(high))


def _ratio(both: np.ndarray) -> np.ndarray:
    """Of the medians along the last axis, the lower of two middle ones, as Kaplan and Meier have it."""
    middle = (both.shape[-1] - 1) // 2
    first, second = np.sort(both, axis=-1)[..., middle]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: np.ndarray = second / first
    return ratio


@dataclass(frozen=True)
class Profile:
    """How often a contender is how close to the best, over tasks (Dolan and Moré 2002).

    Args:
        factors: where the curve rises, from 1 on.
        shares: share of the tasks on which it needs at most so many times what the best needs.
        score: area under the curve up to ``MOST_BEHIND``, 1 for whoever is the best on every task (AlgoPerf).
    """

    factors: list[float]
    shares: list[float]
    score: float


def profiles(needed: Mapping[str, Sequence[float]]) -> dict[str, Profile]:
    """Performance profiles over tasks.

    Args:
        needed: for each contender what it needs on each task, in one order of tasks; inf for a miss.

    Raises:
        ValueError: the numbers of tasks differ, or are zero.
    """
    counts = {len(each) for each in needed.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"needed must hold a number for each of the same tasks, one at least, not {counts}")
    best = [min(column) for column in zip(*needed.values(), strict=True)]
    return {name: _profile(own, best) for name, own in needed.items()}


def _profile(own: Sequence[float], best: Sequence[float]) -> Profile:
    solved = [(mine, least) for mine, least in zip(own, best, strict=True) if math.isfinite(least)]
    ratios = [1.0 if mine == least else mine / least if least else math.inf for mine, least in solved]
    met = sorted(ratio for ratio in ratios if math.isfinite(ratio))
    factors = sorted({1.0, *met})
    shares = [sum(ratio <= factor for ratio in met) / len(own) for factor in factors]
    area = sum(max(0.0, MOST_BEHIND - ratio) for ratio in met) / len(own)
    return Profile(factors, shares, area / (MOST_BEHIND - 1))
