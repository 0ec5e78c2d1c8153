"""What can be said from a few seeds: intervals, paired comparisons, who is tied with the leader, and what goes unseen.

All contenders are scored on the same seeds, so they are compared pair by pair on the differences, in which the luck of
a seed (initial weights, batch order) cancels. Two things must agree before a difference is claimed:

* a paired t test, its p values over all pairs corrected by Holm's method, so that many contenders do not make one of
  them look different by chance, and
* the paired bootstrap interval of the difference, which does not assume a normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats  # type: ignore[import-untyped]

LEVEL: Final = 0.95
POWER: Final = 0.8  # with which a difference that is there should be found
_RESAMPLES = 9999
_BOOTSTRAP_SEED = 20

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Pair:
    """One contender beside another, on the seeds that both have run.

    Args:
        chance: that the first scores better than the second on a new seed; equal scores count half.
        low, high: Wilson's interval of it, wide for few seeds even where all of them agree.
        p: Holm-corrected over all pairs of the race; nan from a single seed.
    """

    chance: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """One contender beside the leader.

    Args:
        mean: of its scores.
        low, high: bootstrap interval of the mean; nan from a single seed.
        difference: mean of (its score minus the leader's), seed by seed.
        difference_low, difference_high: paired bootstrap interval.
        p: Holm-corrected p value of the pair; nan for the leader and from a single seed.
        tied: no difference from the leader was found.
    """

    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    p: float
    tied: bool


def compare(scores: Scores, higher_is_better: bool) -> dict[str, Comparison]:
    """Compare every contender with the one of the best mean, best first.

    Args:
        scores: for each contender one finite score a seed, in the same seed order for all.
        higher_is_better: direction of the score.

    Raises:
        ValueError: there are no contenders, or the numbers of scores differ or are zero.
    """
    columns = _columns(scores)
    sign = -1.0 if higher_is_better else 1.0
    order = sorted(columns, key=lambda name: sign * float(columns[name].mean()))
    leader = order[0]
    p_values = _corrected_p_values(columns)
    own = [columns[name] for name in order]
    bounds = intervals([*own, *(column - columns[leader] for column in own)])
    return {
        name: _beside(column, columns[leader], bound, behind, p_values.get(frozenset((name, leader))))
        for name, column, bound, behind in zip(order, own, bounds, bounds[len(order) :], strict=False)
    }


def pairs(scores: Scores, higher_is_better: bool) -> dict[tuple[str, str], Pair]:
    """Every contender beside every other, in both orders.

    Args:
        scores, higher_is_better: as for ``compare``.

    Raises:
        ValueError: as ``compare``.
    """
    columns = _columns(scores)
    p_values = _corrected_p_values(columns)
    sign = -1.0 if higher_is_better else 1.0
    return {
        (first, second): _pair(sign * (columns[first] - columns[second]), p_values.get(frozenset((first, second))))
        for first, second in permutations(columns, 2)
    }


def power(effect: float, count: int, level: float = 1 - LEVEL) -> float:
    """The chance that a paired t test over ``count`` seeds finds a difference, and in the right direction.

    Args:
        effect: the true difference, in standard deviations of the differences from seed to seed.
        count: seeds, two or more.
        level: chance of a false claim; divide it by the number of comparisons.
    """
    limit = float(stats.t.isf(level / 2, count - 1))
    shift = abs(effect) * math.sqrt(count)
    return float(stats.nct.sf(limit, count - 1, shift))


def detectable(differences: Sequence[float] | NDArray[np.float64], comparisons: int = 1) -> float:
    """The smallest true difference that as many seeds would find in four races of five; nan from a single seed.

    Args:
        differences: one a seed; their spread is taken for the true one.
        comparisons: how many pairs the level is shared among.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    level = (1 - LEVEL) / max(1, comparisons)

    def lacking(effect: float) -> float:
        return power(effect, count, level) - POWER

    most = 4.0
    while lacking(most) < 0:
        most *= 2
    return float(np.std(differences, ddof=1)) * float(optimize.brentq(lacking, 0.0, most, xtol=1e-6))


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Bootstrap interval of a mean, widened for few values; (nan, nan) for a single one.

    A percentile interval from n values is too narrow: the resampled spread lacks the factor n/(n-1), and a normal
    quantile stands where Student's belongs. Both are put right by asking the bootstrap for more extreme percentiles
    (the expanded percentile interval of Hesterberg 2015, "What teachers should know about the bootstrap").
    """
    return intervals([values])[0]


def intervals(rows: Sequence[Sequence[float] | NDArray[np.float64]]) -> list[tuple[float, float]]:
    """The ``interval`` of each of several means over equally many values, all from the same draws."""
    data = np.asarray(rows, dtype=float)
    count = data.shape[1]
    if count < 2:
        return [(math.nan, math.nan)] * len(data)
    quantile = math.sqrt(count / (count - 1)) * float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    found = np.repeat(data[:, :1], 2, axis=1)
    spread = np.flatnonzero(np.ptp(data, axis=1))
    tail = float(stats.norm.sf(quantile))
    means = _resampling(count) @ data[spread].T
    found[spread] = np.quantile(means, [tail, 1 - tail], axis=0).T
    return [(float(low), float(high)) for low, high in found]


@lru_cache(maxsize=4)
def _resampling(count: int) -> NDArray[np.float64]:
    """A row for each resample, with the weight of each of so many values in its mean.

    As ``scipy.stats.bootstrap`` draws them, which would gather the values of each resample for every row anew.
    """
    drawn = np.random.RandomState(_BOOTSTRAP_SEED).randint(count, size=(_RESAMPLES, count))
    places = drawn + count * np.arange(_RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=_RESAMPLES * count).reshape(_RESAMPLES, count) / count


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of even one false claim among all stays below the level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def paired_p_value(differences: NDArray[np.float64], resolution: float) -> float:
    """Two-sided p value that the mean difference is zero; nan from a single pair.

    Args:
        differences: one a seed.
        resolution: the smallest step by which scores can differ. A score known to a step q carries the rounding
            variance q²/12. Without it three seeds that happen to differ by one test image each would look like a
            difference without any spread.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    variance = float(differences.var(ddof=1)) + 2 * resolution**2 / 12
    mean = abs(float(differences.mean()))
    if mean == 0:
        return 1.0
    if variance == 0:
        return 0.0
    return 2 * float(stats.t.sf(mean / math.sqrt(variance / count), count - 1))


def _columns(scores: Scores) -> dict[str, NDArray[np.float64]]:
    lengths = {len(values) for values in scores.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"scores must hold the same number of scores, at least one, for every contender, not {lengths}"
        )
    return {name: np.asarray(values, dtype=float) for name, values in scores.items()}


def _pair(behind: NDArray[np.float64], p: float | None) -> Pair:
    won = float(np.sum(behind < 0)) + float(np.sum(behind == 0)) / 2
    count = len(behind)
    low, high = _wilson(won / count, count)
    return Pair(won / count, low, high, math.nan if p is None else p)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval, from its formula: scipy's takes whole successes only, and a draw is half of one."""
    z = float(stats.norm.isf((1 - LEVEL) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _corrected_p_values(columns: Mapping[str, NDArray[np.float64]]) -> dict[frozenset[str], float]:
    """Over all pairs and not only those with the leader, because the leader was chosen by these same scores."""
    pairs = list(combinations(columns, 2))
    resolution = _resolution(np.concatenate(list(columns.values())))
    raw = [paired_p_value(columns[first] - columns[second], resolution) for first, second in pairs]
    if any(math.isnan(p) for p in raw):
        return {}
    return {frozenset(pair): p for pair, p in zip(pairs, holm(raw), strict=True)}


def _resolution(values: NDArray[np.float64]) -> float:
    """The smallest distance between two different scores."""
    gaps = np.diff(np.unique(values))
    # Rounding of the arithmetic is not a step of the score.
    real = gaps[gaps > 1e-9 * max(1e-300, float(np.abs(values).max()))]
    return float(real.min()) if len(real) else 0.0


def _beside(
    own: NDArray[np.float64],
    leader: NDArray[np.float64],
    bounds: tuple[float, float],
    difference_bounds: tuple[float, float],
    p: float | None,
) -> Comparison:
    is_leader = own is leader
    low, high = difference_bounds
    return Comparison(
        mean=float(own.mean()),
        low=bounds[0],
        high=bounds[1],
        difference=float((own - leader).mean()),
        difference_low=0.0 if is_leader else low,
        difference_high=0.0 if is_leader else high,
        p=math.nan if p is None else p,
        tied=is_leader or p is None or p >= 1 - LEVEL or not (low > 0 or high < 0),
    )
