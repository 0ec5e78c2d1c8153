"""Time to a target: misses censored, diverged runs never there, ratios with infinities, profiles over tasks."""

from __future__ import annotations

import math
import random

import pytest
from report_studies import run
from scipy import stats  # type: ignore[import-untyped]

from piste.race.record import Cost, Curve, RunRecord
from piste.race.targets import (
    EVALUATIONS,
    SECONDS,
    STEPS,
    Reach,
    median_reach,
    median_reaches,
    passes_a_step,
    profiles,
    reach,
    speed_up,
    spent,
    targets,
)


def made(values: list[float], *, status: str = "finished", passes: int = 1) -> RunRecord:
    """A run with an evaluation every 10 steps of half a second each."""
    steps = list(range(0, 10 * len(values), 10))
    curve = Curve(steps, [step / 2 for step in steps], list(values), list(values), list(values))
    last = steps[-1] if steps else 0
    cost = Cost(0.5, 0.1, 8, 0, passes * last, 100)
    return run("t", "a", 0.1, 1, "confirm", curve, cost, status=status, steps=last if status == "finished" else 1000)


def test_a_target_is_met_at_the_first_evaluation_that_meets_it() -> None:
    sam = made([4.0, 3.0, 2.0, 2.5], passes=2)
    assert reach(sam, 3.0, False, STEPS) == Reach(10.0, True)
    assert reach(sam, 2.9, False, STEPS) == Reach(20.0, True)
    assert reach(sam, 2.9, False, EVALUATIONS) == Reach(40.0, True)
    assert reach(sam, 2.9, False, SECONDS) == Reach(10.0, True)
    assert reach(sam, 1.0, False, STEPS) == Reach(30.0, False)
    assert reach(made([0.1, 0.5, 0.9]), 0.5, True, STEPS) == Reach(10.0, True)


def test_who_diverged_never_arrives_and_who_crashed_is_not_known() -> None:
    assert reach(made([4.0, math.nan], status="diverged"), 3.0, False, STEPS) == Reach(math.inf, False)
    assert reach(made([4.0, 3.5], status="out_of_memory"), 3.0, False, STEPS) == Reach(10.0, False)
    assert reach(made([], status="failed"), 3.0, False, STEPS) == Reach(0.0, False)


def test_evaluations_are_counted_for_runs_that_ended_early() -> None:
    assert passes_a_step(made([4.0, 3.0], status="diverged", passes=2)) == 2.0
    assert math.isnan(passes_a_step(made([4.0])))


def test_an_unknown_currency_is_refused() -> None:
    with pytest.raises(ValueError, match="what='tokens' is not legal; legal: steps"):
        spent(made([1.0, 2.0]), "tokens")


def test_the_median_is_kaplan_and_meiers() -> None:
    """The textbook case: 1, 2+, 3, 4+, 5 (+ censored). Survival is 4/5, 4/5, 8/15, 8/15, 0, so the median is 5."""
    data = [Reach(1, True), Reach(2, False), Reach(3, True), Reach(4, False), Reach(5, True)]
    assert median_reach(data) == 5
    dropped = [each for each in data if each.met]
    early = [Reach(1, False), Reach(2, False), Reach(3, True), Reach(4, True), Reach(5, True)]
    assert median_reach(early) == 4  # survival is 2/3, 1/3, 0; as late ones the two would have made it 5
    assert median_reach(dropped) == 3  # what leaving the misses out would have claimed


def test_the_median_of_seeds_that_all_arrive_is_the_middle_one() -> None:
    assert median_reach([Reach(at, True) for at in (9.0, 1.0, 5.0)]) == 5.0
    assert median_reach([Reach(at, True) for at in (1.0, 2.0, 3.0, 4.0)]) == 2.0


@pytest.mark.parametrize("what", [STEPS, EVALUATIONS, SECONDS])
@pytest.mark.parametrize("higher", [False, True])
def test_medians_for_many_targets_are_those_of_each(higher: bool, what: str) -> None:
    """Of runs that end early, diverge, are at nan, or leave nothing at all; some groups censor in the middle."""
    draw = random.Random(20)
    for _ in range(60):
        runs = []
        for _ in range(draw.randint(1, 7)):
            status = draw.choice(["finished", "finished", "diverged", "failed"])
            values = [
                draw.choice([math.nan, *(float(value) for value in range(9))])
                for _ in range(draw.randint(status == "finished", 6))
            ]
            runs.append(made(values, status=status))
        goals = [float(goal) for goal in range(-1, 10)]
        expected = [median_reach([reach(each, goal, higher, what) for each in runs]) for goal in goals]
        assert median_reaches(runs, goals, higher, what) == expected


def test_a_miss_that_is_seen_after_all_who_arrived_is_only_a_late_one() -> None:
    """Kaplan and Meier's estimate by scipy, for every number of misses."""
    for missed in range(5):
        data = [*(Reach(at, True) for at in (1.0, 2.0, 3.0, 4.0, 5.0)), *(missed * [Reach(5.0, False)])]
        left = stats.ecdf(stats.CensoredData(uncensored=[1, 2, 3, 4, 5], right=[5] * missed)).sf
        below = [at for at, share in zip(left.quantiles, left.probabilities, strict=True) if share <= 0.5 + 1e-9]
        assert median_reach(data) == (below[0] if below else math.inf)


def test_too_many_misses_are_infinite() -> None:
    assert median_reach([Reach(1.0, True), Reach(9.0, False), Reach(math.inf, False)]) == math.inf
    assert median_reach([Reach(9.0, False)]) == math.inf
    assert median_reach([]) == math.inf
    # a run that diverged at step 1 stays at risk for good: it is no evidence for the others
    assert median_reach([Reach(5.0, True), Reach(math.inf, False)]) == 5.0


def test_targets_run_from_hardly_trained_to_the_best_seen() -> None:
    """From a tenth of the way to all but a hundredth of it, in equal ratios of what is left, and then the end."""
    found = targets([made([8.0, 4.0, 2.0]), made([8.0, 3.0, 1.0])], higher_is_better=False, count=4)
    assert found == pytest.approx([1 + 7 * 0.9, 1 + 7 * math.sqrt(0.9 * 0.01), 1 + 7 * 0.01, 1.0])
    assert found[-1] == 1.0
    rising = targets([made([0.1, 0.5]), made([0.1, 0.9])], higher_is_better=True, count=3)
    assert rising == pytest.approx([0.9 - 0.8 * 0.9, 0.9 - 0.8 * 0.01, 0.9])


def test_without_progress_there_is_no_target() -> None:
    assert targets([], higher_is_better=False) == []
    assert targets([made([1.0, 2.0])], higher_is_better=False) == []
    assert targets([made([math.nan, math.nan])], higher_is_better=False) == []


def arrivals(*places: float) -> list[Reach]:
    return [Reach(place, math.isfinite(place)) for place in places]


def test_a_speed_up_is_a_ratio_of_medians_with_an_interval() -> None:
    found = speed_up(arrivals(10.0, 20.0, 30.0), arrivals(20.0, 40.0, 60.0))
    assert found.factor == 2.0
    assert found.low == found.high == 2.0  # pairs of seeds cancel what a seed does to both
    wide = speed_up(arrivals(10.0, 20.0, 30.0), arrivals(30.0, 20.0, 40.0))
    assert wide.factor == 1.5
    assert wide.low < 1.5 < wide.high


def test_a_speed_up_over_who_never_arrives_is_infinite() -> None:
    found = speed_up(arrivals(10.0, 20.0), arrivals(math.inf, math.inf))
    assert found.factor == found.low == found.high == math.inf
    assert math.isnan(speed_up(arrivals(math.inf), arrivals(math.inf)).factor)
    assert speed_up(arrivals(math.inf), arrivals(5.0)).factor == 0.0
    assert math.isnan(speed_up(arrivals(5.0), arrivals(10.0)).low)


def test_profiles_by_hand() -> None:
    found = profiles({"a": [10.0, 20.0, math.inf], "b": [20.0, 10.0, 5.0], "c": [10.0, 100.0, math.inf]})
    assert (found["a"].factors, found["a"].shares) == ([1.0, 2.0], [1 / 3, 2 / 3])
    assert (found["b"].factors, found["b"].shares) == ([1.0, 2.0], [2 / 3, 1.0])
    assert found["b"].score == pytest.approx((3 + 2 + 3) / 9)  # areas up to a factor of 4, of 3 each
    assert found["c"].score == pytest.approx(3 / 9)  # ten times behind counts nothing
    assert profiles({"a": [math.inf]})["a"].score == 0.0  # a task that nobody solves makes nobody the best


def test_who_is_best_everywhere_scores_one() -> None:
    assert profiles({"a": [1.0, 2.0], "b": [5.0, 9.0]})["a"].score == 1.0


def test_unequal_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        profiles({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match="equally many seeds"):
        speed_up(arrivals(1.0), arrivals(1.0, 2.0))
