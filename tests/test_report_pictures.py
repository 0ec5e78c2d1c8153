"""The report's pictures of targets, budgets, prices and tasks: what they draw, from cases worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from report_studies import plain_study, run, standing

from piste.race.analysis import Analysis, analyse, speed_up_to_common
from piste.race.record import Cost, Curve, RunRecord
from piste.race.report.across import across, chances
from piste.race.report.budget import budget
from piste.race.report.card import facts
from piste.race.report.costs import breakdown, pareto
from piste.race.report.page import make_page
from piste.race.report.palette import looks
from piste.race.report.reached import reached
from piste.race.report.stability import settings, stability
from piste.race.result import StudyResult, TaskResult
from piste.race.targets import EVALUATIONS, SECONDS, STEPS

COST = Cost(0.01, 0.002, 800, 2**20, 20, 100)


def made(
    contender: str, values: list[float], seed: int = 1, phase: str = "confirm", lr: float = 0.1, **changes: Any
) -> RunRecord:
    steps = list(range(0, 10 * len(values), 10))
    curve = Curve(steps, [step / 100 for step in steps], list(values), list(values), list(values))
    return run("t", contender, lr, seed, phase, curve, changes.pop("cost", COST), steps=steps[-1], **changes)


def task_of(*standings: Any, task: str = "t", higher: bool = False) -> TaskResult:
    return TaskResult(task, "accuracy" if higher else "loss", higher, list(standings), "")


def placed(name: str, scores: list[float], lead: list[float] | None = None, cost: Cost = COST, **changes: Any) -> Any:
    return standing(name, scores, lead or scores, cost, optimizer=name, **changes)


def looks_of(task: TaskResult) -> Any:
    return looks(StudyResult("", "", [task], [], [], {}, ""))


FAST = [made("adamw", [8.0, 4.0, 2.0], seed) for seed in (1, 2)]
SLOW = [made("sgd", [8.0, 7.0, 4.0], seed) for seed in (1, 2)]
TASK = task_of(placed("adamw", [2.0, 2.1]), placed("sgd", [4.0, 4.1], [2.0, 2.1], tied=False))


# What was worked out


def test_the_target_is_where_a_baseline_ends() -> None:
    found = analyse(TASK, [*FAST, *SLOW])
    assert found.target is not None
    assert (found.target.value, found.target.source) == (2.0, "where adamw ends")
    assert [each.met for each in found.at_target[STEPS]["adamw"]] == [True, True]
    assert [each.met for each in found.at_target[STEPS]["sgd"]] == [False, False]


def test_without_a_baseline_half_of_the_contenders_reach_the_target() -> None:
    task = task_of(*(placed(name, [1.0, 1.1]) for name in ("x", "y", "z")))
    runs = [made(name, [8.0, end], 1) for name, end in (("x", 1.0), ("y", 2.0), ("z", 3.0))]
    found = analyse(task, runs)
    assert found.target is not None
    assert (found.target.value, found.target.source) == (2.0, "what half of the contenders reach")


def test_times_of_two_machines_are_not_compared() -> None:
    assert set(analyse(TASK, [*FAST, *SLOW]).needed) == {STEPS, EVALUATIONS, SECONDS}
    moved = [dataclasses.replace(each, machine={"processor": "another"}) for each in SLOW]
    assert set(analyse(TASK, [*FAST, *moved]).needed) == {STEPS, EVALUATIONS}
    section = make_page(StudyResult("", "", [TASK], [*FAST, *moved], [], {}, "")).sections[0]
    assert [option.label for option in section.pictures[0].switches[0].options] == ["steps", "gradient evaluations"]


def test_steps_saved_are_counted_to_what_both_reach() -> None:
    found = speed_up_to_common([*FAST, *SLOW], "adamw", "sgd", higher_is_better=False)
    assert found is not None
    level, speed = found
    assert (level, speed.factor) == (4.0, 2.0)
    assert speed_up_to_common(FAST, "adamw", "sgd", higher_is_better=False) is None
    choice = TASK.standings[0]
    tiles = {fact.name: fact for fact in facts(choice, TASK, 2, analyse(TASK, [*FAST, *SLOW]), [*FAST, *SLOW])}
    assert tiles["steps to validation loss 4.00"].value == "2.0 times fewer"
    assert tiles["steps to validation loss 4.00"].remark == "than sgd [2.0, 2.0]"
    other = {fact.name: fact for fact in facts(TASK.standings[1], TASK, 2, analyse(TASK, []), [*FAST, *SLOW])}
    assert other["steps to validation loss 4.00"].value == "2.0 times more"
    equal = [*FAST, *(dataclasses.replace(each, key=dataclasses.replace(each.key, contender="sgd")) for each in FAST)]
    [same] = [f for f in facts(choice, TASK, 2, analyse(TASK, []), equal) if f.name.startswith("steps to ")]
    assert same.value == "as many"
    assert same.remark.startswith("as sgd ")


def test_an_empty_task_has_an_analysis() -> None:
    found = analyse(task_of(), [])
    assert (found.target, found.targets, found.pairs, found.budgets, found.sensitivities) == (None, [], {}, {}, {})


# Targets, budgets, prices


def test_a_line_of_targets_ends_where_seeds_miss() -> None:
    found = analyse(TASK, [*FAST, *SLOW])
    picture = reached(TASK, found, looks_of(TASK), "id")
    good, bad = picture.figure.data
    assert None not in good.y
    missed = [goal for goal, needed in zip(bad.x, bad.y, strict=True) if needed is None]
    assert missed
    assert max(missed) < 4.0
    assert picture.figure.layout.xaxis.autorange == "reversed"
    assert [option.label for option in picture.switches[0].options] == [STEPS, EVALUATIONS, "time"]
    # a step of these runs is one evaluation
    assert picture.switches[0].options[1].y == picture.switches[0].options[0].y
    assert "sgd: 0 of 2 seeds" in picture.alt
    assert "adamw: 2 of 2 seeds, the first after 20.0 steps" in picture.alt


def test_the_budget_leaves_extensions_out_and_counts_lost_trials() -> None:
    trials = [made("adamw", [8.0, end], 0, "tune", lr) for lr, end in ((0.1, 3.0), (0.2, 2.0), (0.4, 1.0))]
    trials += [made("sgd", [8.0, 5.0], 0, "tune", 0.1), made("sgd", [8.0, 9.0], 0, "tune", 0.2, status="diverged")]
    found = analyse(TASK, trials)
    assert found.budgets["adamw"].expected == pytest.approx([2.5, 2.0])  # the third was one more than sgd had
    assert found.budgets["sgd"].expected == pytest.approx([6.5, 5.0])
    picture = budget(TASK, found, looks_of(TASK), "id")
    band, line, *_ = picture.figure.data
    assert list(line.x) == [1, 2]
    assert list(band.x) == [1, 2, 2, 1]
    assert not picture.empty
    assert budget(TASK, analyse(TASK, []), looks_of(TASK), "id").empty


def test_the_front_joins_who_is_not_beaten_in_both() -> None:
    prices = {"cheap": 0.01, "good": 0.02, "neither": 0.03}
    scores = {"good": [1.0, 1.1], "neither": [1.5, 1.6], "cheap": [2.0, 2.1]}
    task = task_of(
        *(
            placed(name, own, [1.0, 1.1], dataclasses.replace(COST, step_seconds=prices[name]))
            for name, own in scores.items()
        )
    )
    front, *points = pareto(task, looks_of(task), "id").figure.data
    assert list(front.x) == [10.0, 20.0]
    assert list(front.y) == [2.05, 1.05]
    assert [point.name for point in points] == ["good", "neither", "cheap"]
    upside_down = dataclasses.replace(task, higher_is_better=True)
    assert list(pareto(upside_down, looks_of(task), "id").figure.data[0].x) == [10.0]


def test_the_time_of_a_step_is_split() -> None:
    gradient, optimizer, *_ = breakdown(TASK, looks_of(TASK), "id").figure.data
    assert (list(gradient.x), list(optimizer.x)) == ([8.0], [2.0])
    assert breakdown(task_of(placed("a", [1.0], cost=Cost.unknown())), looks_of(TASK), "id").empty


def test_the_gradient_norm_is_drawn_where_it_was_recorded() -> None:
    assert stability(TASK, FAST, looks_of(TASK), "id") is None
    for record, norms in zip(FAST, ([1.0, 2.0, 3.0], [3.0, math.nan, 5.0]), strict=True):
        record.curve.gradient_norm = norms
    try:
        picture = stability(TASK, FAST, looks_of(TASK), "id")
    finally:
        for record in FAST:
            record.curve.gradient_norm = []
    assert picture is not None
    largest, median = picture.figure.data
    assert list(largest.y) == [3.0, 2.0, 5.0]
    assert list(median.y) == [2.0, 2.0, 4.0]
    assert "adamw: at most 5.00" in picture.alt


def test_settings_are_drawn_where_more_than_the_rate_was_searched() -> None:
    trials = [made("adamw", [8.0, 2.0 + place], 0, "tune", 10.0**-place) for place in range(1, 4)]
    assert settings(TASK, trials, looks_of(TASK), "id") is None
    for place, trial in enumerate(trials):
        trial.key.hyperparameters["weight_decay"] = 0.1 * place
    picture = settings(TASK, trials, looks_of(TASK), "id")
    assert picture is not None
    others, best = picture.figure.data
    assert list(best.y) == [1.0, 0.0, 0.0, None]  # highest lr, no decay, best loss
    assert list(others.y[:4]) == pytest.approx([0.5, 0.5, 0.5, None])  # rates span a hundred: on a log scale
    assert list(others.y[4:]) == [0.0, 1.0, 1.0, None]
    assert list(others.x) == 2 * [0, 1, 2, None]  # a gap after each trial
    assert others.text[5] == "weight_decay 0.2"
    assert (others.line.width, best.line.width) == (1, 3)
    assert list(picture.figure.layout.xaxis.ticktext)[2].startswith("loss<br>")


# Contenders against each other, and over tasks


def test_chances_are_a_square_with_an_empty_diagonal() -> None:
    task = task_of(placed("a", [1.0, 1.2, 1.1, 1.3, 1.2]), placed("b", [2.0, 2.2, 2.2, 2.3, 2.2], [1.0] * 5))
    grid = chances(task, analyse(task, []), looks_of(task))
    assert grid is not None
    (_, _, (empty, ahead)), (_, _, (behind, _)) = grid.rows
    assert empty.text == ""
    assert (ahead.text, behind.text) == ("1.00", "0.00")
    assert ahead.strong
    assert ahead.remark == "[0.57, 1.00]"
    assert chances(task_of(placed("a", [1.0])), analyse(task, []), looks_of(task)) is None


def test_ranks_grey_the_tied_and_the_profile_counts_tasks() -> None:
    first = task_of(
        placed("a", [1.0, 1.1]), placed("b", [1.0, 1.2], tied=True), placed("c", [3.0, 3.1], tied=False), task="one"
    )
    second = task_of(
        placed("c", [1.0, 1.1]), placed("a", [2.0, 2.1], tied=False), placed("b", [3.0, 3.1], tied=False), task="two"
    )
    study = StudyResult("", "", [first, second], [], [], {}, "")
    ends = {("one", "a"): 2, ("one", "b"): 3, ("two", "a"): 4, ("two", "c"): 1}
    runs = {
        task: [made(name, [8.0] * place + [1.0] * (5 - place)) for (of, name), place in ends.items() if of == task]
        for task in ("one", "two")
    }
    analyses = {task.task: analyse(task, runs[task.task]) for task in study.results}
    found = across(study, analyses, looks(study))
    assert found is not None
    cells = {name: row for name, _, row in found.ranks.rows}
    assert [cell.text for cell in cells["a"]] == ["1", "2"]
    assert [cell.grey for cell in cells["a"]] == [True, False]
    assert [cell.grey for cell in cells["b"]] == [True, False]
    assert [cell.strong for cell in cells["c"]] == [False, True]
    lines = {trace.name: trace for trace in found.profile.figure.data}
    # 20 steps where the best needs 20, and 40 where the best needs 10
    assert list(lines["a"].x) == [1.0, 4.0, 4.0, 4.0]
    assert list(lines["a"].y) == [0.5, 0.5, 1.0, 1.0]
    assert max(lines["b"].y) == 0.5
    assert max(lines["c"].y) == 0.5


def test_one_task_has_no_section_of_all_tasks() -> None:
    study = plain_study()
    assert make_page(study).across is not None
    assert make_page(dataclasses.replace(study, results=study.results[:1])).across is None


def test_all_pictures_are_plain_data() -> None:
    page = make_page(plain_study())
    assert page.across is not None
    for picture in [page.across.profile, *(each for section in page.sections for each in section.pictures)]:
        text = json.dumps(picture.data(), allow_nan=False)
        assert "NaN" not in text
        assert len(picture.alt) > 40
        assert picture.caption


def test_an_analysis_of_a_study_is_made_once_a_task() -> None:
    analyses = make_page(plain_study()).analyses
    assert set(analyses) == {"char_transformer", "digits"}
    assert all(isinstance(found, Analysis) for found in analyses.values())
