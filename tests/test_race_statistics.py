"""What a race may claim: nothing where there is nothing, a difference where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from piste.race.statistics import POWER, compare, detectable, holm, interval, intervals, paired_p_value, pairs, power


def _scores(generator: np.random.Generator, means: dict[str, float], seeds: int = 5) -> dict[str, list[float]]:
    luck = generator.normal(0, 0.03, seeds)  # of a seed, shared by all contenders
    return {name: list(mean + luck + generator.normal(0, 0.01, seeds)) for name, mean in means.items()}


def test_equal_contenders_tie() -> None:
    """Four names for one optimizer: a false difference in at most 5 % of races, here of 200 (+ 2 standard errors)."""
    generator = np.random.default_rng(0)
    races = [compare(_scores(generator, dict.fromkeys("abcd", 2.0)), higher_is_better=False) for _ in range(200)]
    false = sum(not all(c.tied for c in race.values()) for race in races)
    assert false <= 16


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_planted_difference_is_found(higher_is_better: bool) -> None:
    """Five standard deviations of the paired noise, five seeds: found nearly always, and in the right direction."""
    generator = np.random.default_rng(1)
    sign = -1 if higher_is_better else 1
    found = 0
    for _ in range(100):
        result = compare(_scores(generator, {"good": 2.0, "bad": 2.0 + 0.05 * sign}), higher_is_better)
        assert next(iter(result)) == "good"
        found += not result["bad"].tied
    assert found >= 90


def test_luck_of_a_seed_cancels() -> None:
    """Scores that vary far more over seeds than between contenders are told apart, because seeds are shared."""
    luck = [0.0, 5.0, -3.0, 9.0, 2.0]
    result = compare({"a": luck, "b": [x + 1 + 0.01 * i for i, x in enumerate(luck)]}, higher_is_better=False)
    assert not result["b"].tied
    assert result["b"].difference == pytest.approx(1.02)


def test_one_seed_claims_nothing() -> None:
    result = compare({"a": [1.0], "b": [100.0]}, higher_is_better=False)
    assert result["b"].tied
    assert math.isnan(result["b"].low)


def test_intervals_cover() -> None:
    """95 % intervals of means of 5 normal scores hold the truth in 90 to 99 % of 300 cases."""
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        low, high = interval(generator.normal(1.0, 0.2, 5))
        held += low <= 1.0 <= high
    assert 0.90 * 300 <= held <= 0.99 * 300


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_bootstrap_is_scipys(count: int) -> None:
    """From the same draws, at the percentiles that Student's quantile and the factor n/(n-1) ask for."""
    values = np.random.default_rng(count).exponential(size=count)
    level = 2 * stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1)) - 1
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, confidence_level=level, method="percentile", random_state=20
    ).confidence_interval
    assert interval(values) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_intervals_of_many_are_those_of_each() -> None:
    rows = np.random.default_rng(5).normal(size=(60, 20))  # more than are drawn at once
    rows[7] = 2.5
    expected = [interval(row) for row in rows]
    np.testing.assert_allclose(intervals(list(rows)), expected, rtol=1e-14, atol=1e-15)  # sums in another order
    assert expected[7] == (2.5, 2.5)


def test_holm() -> None:
    """Against the worked definition: sorted p times the number of hypotheses left, never decreasing."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_equal_steps_of_a_coarse_score_are_no_proof() -> None:
    """Three seeds that differ by just one test image each have no spread, but are within the rounding."""
    assert paired_p_value(np.array([0.01, 0.01, 0.01]), resolution=0.01) > 0.01
    assert paired_p_value(np.array([0.0, 0.0]), resolution=0.0) == 1.0


@pytest.mark.parametrize("scores", [{}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": []}])
def test_bad_scores_are_refused(scores: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="same number of scores"):
        compare(scores, higher_is_better=False)


def test_the_chance_to_beat_counts_seeds_and_halves_draws() -> None:
    found = pairs({"a": [1.0, 2.0, 3.0, 4.0], "b": [2.0, 2.0, 4.0, 3.0]}, higher_is_better=False)
    assert found["a", "b"].chance == (1 + 0.5 + 1 + 0) / 4
    assert found["b", "a"].chance == 1 - found["a", "b"].chance
    assert found["a", "b"].low == pytest.approx(1 - found["b", "a"].high)
    upside_down = pairs({"a": [1.0, 2.0], "b": [2.0, 3.0]}, higher_is_better=True)
    assert upside_down["b", "a"].chance == 1.0


@pytest.mark.parametrize(("won", "count"), [(0, 5), (3, 5), (5, 5), (7, 20)])
def test_the_interval_of_a_chance_is_wilsons(won: int, count: int) -> None:
    """Against scipy's, which exists for whole successes."""
    scores = {"a": [0.0] * count, "b": [1.0] * won + [-1.0] * (count - won)}
    expected = stats.binomtest(won, count).proportion_ci(method="wilson")
    found = pairs(scores, higher_is_better=False)["a", "b"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_pairs_are_corrected_together() -> None:
    generator = np.random.default_rng(3)
    scores = _scores(generator, {"a": 2.0, "b": 2.0, "c": 2.03, "d": 2.05})
    found = pairs(scores, higher_is_better=False)
    compared = compare(scores, higher_is_better=False)
    leader, *others = compared
    for name in others:
        assert found[leader, name].p == found[name, leader].p == compared[name].p
    assert len(found) == 12


@pytest.mark.parametrize(("effect", "count", "level"), [(0.5, 5, 0.05), (1.5, 5, 0.05), (1.0, 12, 0.005)])
def test_power_is_that_of_simulated_races(effect: float, count: int, level: float) -> None:
    """4,000 paired t tests on normal differences: within four standard errors."""
    drawn = np.random.default_rng(4).normal(effect, 1.0, (4000, count))
    found = float(np.mean((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < level) & (drawn.mean(axis=1) > 0)))
    assert power(effect, count, level) == pytest.approx(found, abs=4 * math.sqrt(0.25 / 4000))


def test_what_is_detectable_is_found_at_the_stated_power() -> None:
    differences = [0.3, -0.1, 0.4, 0.2, 0.0]
    spread = float(np.std(differences, ddof=1))
    for comparisons in (1, 6):
        least = detectable(differences, comparisons)
        assert power(least / spread, 5, 0.05 / comparisons) == pytest.approx(POWER, abs=1e-4)
    assert detectable([0.1, 0.1]) == 0.0
    assert math.isnan(detectable([0.1]))
