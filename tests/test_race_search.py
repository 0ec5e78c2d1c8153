"""What trials say beyond their best, against brute force and cases that can be worked out by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from piste.race.search import budget_curve, counted, redraw, sensitivity

SCORES = [3.0, 1.0, 2.0, 5.0, 4.5]


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_budget_curve_is_the_mean_over_all_choices(higher_is_better: bool) -> None:
    best = max if higher_is_better else min
    found = budget_curve(SCORES, higher_is_better)
    for count in range(1, len(SCORES) + 1):
        every = [best(chosen) for chosen in itertools.combinations(SCORES, count)]
        assert found.expected[count - 1] == pytest.approx(statistics.mean(every))
    assert found.expected[-1] == best(SCORES)


def test_the_band_holds_the_curve_and_ends_at_a_trial() -> None:
    found = budget_curve(SCORES, higher_is_better=False)
    assert all(low <= middle <= high for low, middle, high in zip(found.low, found.expected, found.high, strict=True))
    assert found.low[0] < found.expected[0] < found.high[0]
    assert found.low[-1] == 1.0  # nothing is better than the best that was seen


def test_the_band_covers_a_known_expectation() -> None:
    """Best of 3 of 12 uniform trials is 1/4 in expectation; 95 % bands of 100 studies hold it 85 times at least."""
    generator = np.random.default_rng(0)
    bands = [budget_curve(generator.random(12), higher_is_better=False) for _ in range(100)]
    assert sum(band.low[2] <= 0.25 <= band.high[2] for band in bands) >= 85


def test_sensitivity_by_hand() -> None:
    """A tent over two decades: the mean excess is half of its height, whatever the order of the trials."""
    rising = sensitivity([1e-1, 1e-3, 1e-2], [2.0, 2.0, 1.0], untrained=9.0, higher_is_better=False)
    assert rising.excess == pytest.approx(0.5)
    assert rising.decades == pytest.approx(2.0)
    falling = sensitivity([1e-3, 1e-2, 1e-1], [-2.0, -1.0, -2.0], untrained=-9.0, higher_is_better=True)
    assert falling.excess == pytest.approx(0.5)


def test_a_lost_trial_counts_as_untrained_and_no_worse() -> None:
    for lost in (math.nan, math.inf, 1e9):
        found = sensitivity([1e-3, 1e-2, 1e-1], [1.0, 1.0, lost], untrained=3.0, higher_is_better=False)
        assert found.excess == pytest.approx(0.5)


def test_a_lead_of_every_study_is_a_lead() -> None:
    trials = ([1.0, 1.1, 1.05], [2.0, 2.1, 2.05])
    found = redraw(trials, ([1.0, 1.01, 0.99], [2.0, 2.02, 2.0]), higher_is_better=False)
    assert found.ahead == 1.0
    assert 0.9 < found.low < found.high < 1.1


def test_a_lead_that_hangs_on_one_trial_is_told() -> None:
    """Without its one good trial, which a redrawn set lacks in (2/3)^3 of all cases, the first is far behind."""
    trials = ([1.0, 3.0, 3.0], [1.5, 1.5, 1.5])
    found = redraw(trials, ([1.0] * 5, [1.5] * 5), higher_is_better=False)
    assert found.ahead == pytest.approx(1 - (2 / 3) ** 3, abs=0.04)
    assert found.low == pytest.approx(-1.5)
    assert found.high == pytest.approx(0.5)


def test_seeds_are_resampled_in_pairs() -> None:
    """Two contenders that differ by a constant on seeds that vary wildly: the difference has no spread at all."""
    luck = [0.0, 5.0, -3.0, 9.0]
    found = redraw(([1.0], [1.0]), (luck, [x + 1 for x in luck]), higher_is_better=False)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_the_direction_of_a_score_is_kept() -> None:
    found = redraw(([0.9, 0.8], [0.7, 0.7]), ([0.9, 0.91], [0.7, 0.72]), higher_is_better=True)
    assert found.ahead == 1.0
    assert found.low < found.high < 0  # the second scores lower


def test_trials_without_a_score_are_counted() -> None:
    assert counted([1.0, math.nan, -math.inf], 7.0) == [1.0, 7.0, 7.0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="scores must hold one trial"):
        budget_curve([], higher_is_better=False)
    with pytest.raises(ValueError, match="lrs must hold two different rates"):
        sensitivity([0.1, 0.1], [1.0, 1.0], 1.0, higher_is_better=False)
    with pytest.raises(ValueError, match="trials must hold equally many"):
        redraw(([1.0], [1.0, 2.0]), ([1.0], [1.0]), higher_is_better=False)
    with pytest.raises(ValueError, match="confirmed must hold equally many"):
        redraw(([1.0], [1.0]), ([], []), higher_is_better=False)
