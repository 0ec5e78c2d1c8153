"""Which runs a race asks for: equal trials, dimensions, sweeps, screening, TPE, timing passes, targets, budgets."""

from __future__ import annotations

import io
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from piste.race import costs
from piste.race.budget import BudgetError, Pace, expected_seconds, fitted, pace_of_script, parse_budget
from piste.race.contenders import ContenderError, make_contenders
from piste.race.driver import Driver
from piste.race.inspection import TaskCard
from piste.race.power import seeds_needed
from piste.race.progress import Ledger
from piste.race.protocol import (
    MOST_EXTENSIONS,
    TIMED_STEPS,
    Plan,
    confirmations,
    next_runs,
    tuning,
)
from piste.race.record import CONFIRM, DIVERGED, FINISHED, SCREEN, TIME, TUNE, Cost, Curve, RunKey, RunRecord
from piste.race.space import parse_sweep
from piste.race.standings import study_result
from piste.race.store import Store
from piste.race.terminal import PlainView
from piste.race.worker import Run

CARD = TaskCard("/line.py", "line", "f00d", "", "loss", False, 100, 5, (60, 20, 20), 0.001, 0.001)
HERE, THERE = {"system": "here"}, {"system": "there"}
SGDS = ["weight_decay", "momentum", "rho"]  # what there is to search of SGD with SAM round it
Score = Callable[[RunKey], float]


def plan_for(
    names: str = "adamw,sgd_momentum", *, trials: int = 5, sweeps: tuple[str, ...] = (), **more: object
) -> Plan:
    made = make_contenders(names.split(","), (), trials=trials, sweeps=[parse_sweep(text) for text in sweeps])
    fields: dict[str, object] = {"seeds": 3, "device": "cpu", "versions": {"torch": "2"}}
    return Plan((CARD,), made, None, trials, **(fields | more))  # type: ignore[arg-type]


def record_of(key: RunKey, score: float, *, step_seconds: float = 0.01, machine: dict[str, str] = HERE) -> RunRecord:
    done = math.isfinite(score)
    curve = Curve([0, key.steps], [0.0] * 2, [9.0, score], [9.0, score], [9.0, score])
    tested = score if done and key.phase == CONFIRM else None
    cost = Cost(step_seconds, step_seconds / 10, 80, 10**6, key.steps, 5)
    status = FINISHED if done else DIVERGED
    return RunRecord(2, key.id, key, status, "", curve, tested, tested, cost, machine, "2026-01-01")


def raced(plan: Plan, score: Score) -> tuple[dict[str, RunRecord], list[list[RunKey]]]:
    """All records of a race, and the keys it asked for, batch by batch."""
    records: dict[str, RunRecord] = {}
    asked = []
    while missing := [key for _, _, key in next_runs(plan, records)]:
        asked.append(missing)
        records |= {key.id: record_of(key, score(key)) for key in missing}
    return records, asked


def bowl(key: RunKey) -> float:
    """Best at the centre of both priors."""
    return 1.0 + abs(math.log10(key.lr / {"adamw": 2e-3, "sgd_momentum": 0.05}.get(key.optimizer, 4e-3)))


def trials_of(plan: Plan, index: int = 0, records: dict[str, RunRecord] | None = None) -> list[RunKey]:
    return tuning(plan, CARD, plan.contenders[index], records or {}).runs


# Trials


def test_the_first_trial_is_the_preset_as_it_is() -> None:
    plan = plan_for(trials=12)
    for index, center in enumerate((2e-3, 0.05)):
        first, *others = trials_of(plan, index)
        assert first.hyperparameters == {"lr": center}
        assert all({"lr", "weight_decay"} <= key.hyperparameters.keys() for key in others)
        assert len({key.id for key in (first, *others)}) == 12


@pytest.mark.parametrize(
    ("trials", "adamw", "ranger", "sam"),
    [
        (9, [], [], []),
        (10, ["weight_decay"], ["weight_decay", "beta1"], SGDS),
        (26, ["weight_decay", "eps"], ["weight_decay", "beta1", "eps"], SGDS),
        (50, ["weight_decay", "eps", "beta2"], ["weight_decay", "beta1", "eps", "beta2"], SGDS),
    ],
)
def test_more_trials_search_more_dimensions(trials: int, adamw: list[str], ranger: list[str], sam: list[str]) -> None:
    """AdamW's companion, one_cycle, sets beta1 in every step: to search it would be to search nothing."""
    found = make_contenders(["adamw", "ranger", "sam+sgd_momentum"], (), trials=trials)
    assert [[dimension.name for dimension in contender.space] for contender in found] == [adamw, ranger, sam]
    for contender in found:
        for dimension in contender.space:
            low, high = dimension.at(0.0), dimension.at(1.0)
            assert (low, high) == pytest.approx((dimension.low, dimension.high), rel=1e-3)
            assert dimension.position(dimension.at(0.25)) == pytest.approx(0.25, abs=1e-2)


def test_a_sweep_tries_each_value_at_the_same_rates_and_the_others_get_as_many_trials() -> None:
    plan = plan_for(trials=3, sweeps=("eps=1,0.1,0.01,1e-4",))
    swept, plain = trials_of(plan, 0), trials_of(plan, 1)
    assert len(swept) == len(plain) == plan.trials_each == 12
    by_eps: dict[float, set[float]] = {}
    for key in swept:
        by_eps.setdefault(key.hyperparameters["eps"], set()).add(key.lr)
    assert sorted(by_eps) == [1e-4, 0.01, 0.1, 1.0]
    assert len({frozenset(lrs) for lrs in by_eps.values()}) == 1
    assert {key.lr for key in plain} > {key.lr for key in trials_of(plan_for(trials=3), 1)}


def test_a_sweep_of_a_scripts_optimizer_is_tried_without_its_schedule() -> None:
    assert make_contenders(["adamw"], (), sweeps=[parse_sweep("eps=1e-4")], script=True)[0].cells
    with pytest.raises(ContenderError, match="--sweep beta2=2 is not legal for adamw"):
        make_contenders(["adamw"], (), sweeps=[parse_sweep("beta2=0.5,2")], script=True)


def test_sweeps_without_values_take_the_lists_of_each_family() -> None:
    sweeps = [parse_sweep("eps"), parse_sweep("rho")]
    adamw, belief, sam, asam = make_contenders(
        ["adamw", "adabelief", "sam+sgd_momentum", "asam+sgd_momentum"], (), sweeps=sweeps
    )
    assert {cell["eps"] for cell in adamw.cells} == {1.0, 0.1, 0.01, 1e-4, 1e-8}
    assert {cell["eps"] for cell in belief.cells} == {1e-8, 1e-10, 1e-12, 1e-14, 1e-16}
    assert [cell["rho"] for cell in sam.cells] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    assert [cell["rho"] for cell in asam.cells] == [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("text", ["lr=1", "eps=1,x", "eps=1,1", "eps=inf", "weight_decay", "=1", "a b=1"])
def test_sweeps_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"legal|sweep another"):
        parse_sweep(text)


def test_a_best_at_the_edge_of_any_dimension_extends_it() -> None:
    plan = plan_for("adamw", trials=12)
    before = trials_of(plan)

    def score(key: RunKey) -> float:
        return bowl(key) - 5 * math.log10(key.hyperparameters.get("weight_decay", 1e-3))

    records, _ = raced(plan, score)
    state = tuning(plan, CARD, plan.contenders[0], records)
    added = state.runs[len(before) :]
    assert state.edges["weight_decay"] == "high"
    highest = max(key.hyperparameters.get("weight_decay", 0.0) for key in before)
    beyond = [key.hyperparameters["weight_decay"] for key in added if key.hyperparameters["weight_decay"] > highest]
    assert len(beyond) == MOST_EXTENSIONS
    assert beyond == sorted(beyond)
    assert state.extensions == len(added)


def test_a_swept_list_is_not_extended_but_its_edge_is_told() -> None:
    plan = plan_for("adamw", trials=3, sweeps=("eps=1,0.1",))
    state = tuning(plan, CARD, plan.contenders[0], raced(plan, lambda key: bowl(key) - key.hyperparameters["eps"])[0])
    assert state.edges == {"eps": "high"}
    assert {key.hyperparameters["eps"] for key in state.runs} == {1.0, 0.1}


def test_sweeps_and_edges_are_told() -> None:
    plan = plan_for("adamw", trials=3, sweeps=("eps=1,0.1",), remarks=("as planned",))
    records, _ = raced(plan, lambda key: bowl(key) - key.hyperparameters["eps"])
    about = {"title": "", "created": "", "command": "", "workers": 1, "machine": {}}
    notes = study_result(plan, records, **about).notes  # type: ignore[arg-type]
    assert notes[0] == "as planned"
    assert any(
        "eps of adamw+one_cycle, best validation loss of one seed" in n and "1: 0 and 0.1: 0.9" in n for n in notes
    )
    assert "line: the best eps is the highest tried for adamw+one_cycle; a better one may lie beyond." in notes


def test_screening_halves_whole_schedules_and_keeps_the_better_half() -> None:
    plan = plan_for("adamw", trials=8, screens=2)
    records, asked = raced(plan, bowl)
    by_steps: dict[int, list[RunKey]] = {}
    for key in trials_of(plan, 0, records):
        by_steps.setdefault(key.steps, []).append(key)
    assert [(steps, len(keys)) for steps, keys in by_steps.items()] == [(25, 8), (50, 4), (100, 2)]
    assert {key.phase for key in by_steps[100]} == {TUNE}
    assert {key.phase for steps in (25, 50) for key in by_steps[steps]} == {SCREEN}
    best = sorted(by_steps[25], key=bowl)
    assert {key.lr for key in by_steps[50]} == {key.lr for key in best[:4]}
    assert {key.lr for key in by_steps[100]} == {key.lr for key in best[:2]}
    assert len(asked[0]) == 8  # nothing of a later stage before the one before is there


def test_agnostic_contenders_are_the_same_in_every_field() -> None:
    (own,), (agnostic,) = (make_contenders(["adabelief"], (), agnostic=each) for each in (False, True))
    assert own.settings == ()
    assert agnostic.settings == (("eps", 1e-16),)


# TPE


def test_tpe_asks_one_after_the_other_and_the_same_for_the_same_records() -> None:
    pytest.importorskip("optuna")
    plan = plan_for("adamw", trials=12, sampler="tpe")
    records, asked = raced(plan, bowl)
    assert [len(keys) for keys in asked][:7] == [6] + 6 * [1]
    random = trials_of(replace(plan, sampler="halton"))
    assert [key.id for key in trials_of(plan, 0, records)][:6] == [key.id for key in random][:6]
    assert raced(plan, bowl)[0].keys() == records.keys()
    part = {key: records[key] for key in list(records)[:8]}
    state = tuning(plan, CARD, plan.contenders[0], part)
    assert (len(state.runs), len(state.missing), state.unknown, state.best) == (9, 1, 3, None)


def test_tpe_survives_lost_trials_and_sweeps() -> None:
    pytest.importorskip("optuna")
    plan = plan_for("adamw", trials=4, sampler="tpe", sweeps=("eps=1,1e-8",))
    records, _ = raced(plan, lambda key: math.inf if key.hyperparameters["eps"] == 1 else bowl(key))
    state = tuning(plan, CARD, plan.contenders[0], records)
    assert state.best is not None
    assert state.best.key.hyperparameters["eps"] == 1e-8


# Timing


def test_timing_passes_come_last_take_turns_and_belong_to_a_machine() -> None:
    plan = plan_for(trials=3, timing=2, machine="m1")
    records, asked = raced(plan, bowl)
    passes = asked[-1]
    assert {key.phase for keys in asked[:-1] for key in keys} == {TUNE, CONFIRM}
    assert [(key.optimizer, key.seed) for key in passes] == [
        ("adamw", 0),
        ("sgd_momentum", 0),
        ("adamw", 1),
        ("sgd_momentum", 1),
    ]
    assert {key.steps for key in passes} == {TIMED_STEPS}
    assert next_runs(plan, records) == []
    one = {key: made for key, made in records.items() if made.key.optimizer == "adamw" and made.key.phase != TIME}
    assert {key.optimizer for _, _, key in next_runs(plan, one)} == {"sgd_momentum"}  # turns take two
    elsewhere = [key for _, _, key in next_runs(replace(plan, machine="m2"), records)]
    assert [key.phase for key in elsewhere] == 4 * [TIME]


@pytest.mark.parametrize("more", [{"screens": 1}, {"sampler": "tpe"}])
def test_what_is_kept_from_run_to_run_is_what_the_records_say(more: dict[str, object]) -> None:
    """Whatever order runs end in, and whichever of them are lost: nothing of a race is seen too late."""
    two = replace(CARD, reference="/two.py", name="two", task_hash="beef")
    plan = replace(plan_for(trials=3, timing=1, seeds=2, **more), cards=(CARD, two))
    records: dict[str, RunRecord] = {}
    ledger, chance = Ledger(plan, records), random.Random(0)
    while missing := ledger.next_runs():
        key = chance.choice(missing)[2]
        records[key.id] = record_of(key, math.inf if chance.random() < 0.2 else bowl(key))
        ledger.changed(key)
        anew = Ledger(plan, records)
        assert (repr(ledger.rows), ledger.next_runs()) == (repr(anew.rows), anew.next_runs())  # nan is no equal of nan
    assert {run.key.phase for run in records.values()} >= {TUNE, CONFIRM, TIME}


def test_times_are_medians_of_passes_and_never_of_two_machines() -> None:
    plan = plan_for("adamw", timing=3)
    (tuned, *_) = trials_of(plan)
    timed = [plan.key(CARD, plan.contenders[0], {"lr": 1.0}, round_, TIME) for round_ in range(3)]
    quality = [record_of(tuned, 1.0, step_seconds=0.001), record_of(tuned, 1.0, step_seconds=0.0001, machine=THERE)]
    passes = [record_of(key, 1.0, step_seconds=s) for key, s in zip(timed, (0.03, 0.01, 0.02), strict=True)]
    home = costs.home([*quality, *passes])
    assert costs.pooled([*quality, *passes], home).step_seconds == 0.02
    assert costs.pooled(quality, home).step_seconds == 0.001
    assert math.isnan(costs.pooled(quality[1:], home).step_seconds)
    assert costs.pooled(quality[1:], home).state_bytes == 80


class Lanes:
    """Two workers that take jobs and never end them."""

    def __init__(self) -> None:
        self.lanes = [None, None]
        self.jobs: list[Run] = []

    @property
    def width(self) -> int:
        return len(self.lanes)

    @property
    def idle(self) -> int:
        return len(self.lanes) - len(self.jobs)

    def submit(self, job: Run) -> None:
        self.jobs.append(job)


def test_a_timing_pass_is_alone_on_the_machine(tmp_path: Path) -> None:
    plan = plan_for(trials=3, timing=2)
    records, _ = raced(plan, bowl)
    store = Store(tmp_path / "race")
    with store.writing():
        for record in records.values():
            if record.key.phase != TIME:
                store.add(record)
    lanes, passes = Lanes(), []
    driver = Driver(plan, store, PlainView(Console(file=io.StringIO())), lanes, lambda: False)  # type: ignore[arg-type]
    while driver._submit():
        assert len(lanes.jobs) == 1
        job = lanes.jobs.pop()
        passes.append((job.key.phase, job.key.optimizer))
        driver._handle(job, records[job.key.id])
        lanes.lanes.clear()  # all workers are lost
        assert driver._submit() == bool(driver.missing)  # what is missing waits for others
        assert not lanes.jobs
        lanes.lanes = [None, None]
    assert passes == 2 * [(TIME, "adamw"), (TIME, "sgd_momentum")]


# Targets and seeds


def test_a_target_that_was_asked_for_is_in_the_result() -> None:
    plan = plan_for(target=0.7)
    about = {"title": "", "created": "", "command": "", "workers": 1, "machine": {}}
    assert study_result(plan, {}, **about).results[0].target == 0.7  # type: ignore[arg-type]


def test_confirmation_seeds_are_fresh_and_common() -> None:
    plan = plan_for()
    seeds = [[key.seed for key in confirmations(plan, CARD, contender, {"lr": 1.0})] for contender in plan.contenders]
    assert seeds == 2 * [[1, 2, 3]]
    assert 0 not in seeds[0]


def test_the_rule_for_seeds_is_said_of_a_tie() -> None:
    """n = 2 (z sd / delta)^2 with z for a 95 % interval and a power of 80 %: a difference of one deviation takes 16."""
    assert [seeds_needed(1.0, delta) for delta in (1.0, -0.5, 100.0)] == [16, 63, 2]
    wobble = {"adamw": [0.0, 0.02, 0.0], "sgd_momentum": [0.02, 0.0, 0.01]}

    def score(key: RunKey) -> float:
        return 1.0 + wobble[key.optimizer][key.seed - 1] if key.phase == CONFIRM else bowl(key)

    plan = plan_for()
    records, _ = raced(plan, score)
    about = {"title": "", "created": "", "command": "", "workers": 1, "machine": {}}
    task = study_result(plan, records, **about).results[0]  # type: ignore[arg-type]
    said = " ".join([task.verdict, *getattr(task, "caveats", [])])
    differences = [0.02, -0.02, 0.01]
    needed = math.ceil(2.802**2 * statistics.variance(differences) / statistics.mean(differences) ** 2)
    assert f"needs about {needed} seeds, if their difference is the 0.0033 seen here." in said


# What is kept


def test_a_plan_comes_back_from_its_file_and_so_does_one_of_an_older_version() -> None:
    plan = plan_for("adamw,sam+sgd_momentum", trials=30, sweeps=("eps=1,0.1",), remarks=("a",), screens=1)
    assert Plan.from_json(plan.to_json()) == plan
    old = plan_for().to_json()
    for name in ("sampler", "screens", "timing", "machine", "target", "remarks"):
        del old[name]
    for contender in old["contenders"]:
        del contender["settings"], contender["space"]
    assert Plan.from_json(old) == plan_for()


# Budgets


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400)])
def test_budgets_are_times(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0m", "-1m", "10m!", "ten minutes"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="legal"):
        parse_budget(text)


def fit(plan: Plan, part: float) -> Plan:
    """The plan that fits into a part of what the whole one takes."""
    paces = {(CARD.reference, contender.name): Pace(0.0, 0.01) for contender in plan.contenders}
    left = part * expected_seconds(plan, paces, 2)
    found = fitted(plan, left, left, paces, 2, lambda trials: plan_for(trials=trials).contenders)
    assert expected_seconds(found, paces, 2) <= left
    return found


def test_a_script_is_never_shortened_and_its_first_runs_count() -> None:
    card = replace(CARD, steps=0, step_seconds=0.0, evaluation_seconds=0.0)
    plan = replace(plan_for(trials=4, seeds=4), cards=(card,))
    paces = {(card.reference, contender.name): Pace(10.0, 0.0) for contender in plan.contenders}
    room = 1.15
    assert expected_seconds(plan, paces, 1) == pytest.approx(room * 10 * 2 * (4 + 1 + 4))
    assert expected_seconds(plan, paces, 1, made=1) == pytest.approx(room * 10 * 2 * (3 + 1 + 4))

    def fit_script(left: float) -> Plan:
        return fitted(plan, left, left, paces, 1, lambda trials: plan.contenders, made=1)

    smallest = room * 10 * 2 * (2 + 1 + 3)
    least = fit_script(smallest + 1)
    assert (least.trials, least.seeds, least.cards) == (3, 3, (card,))
    assert "given up for it: 1 of 4 trials each, 1 of 4 seeds each." in least.remarks[0]
    with pytest.raises(BudgetError, match="is too short"):
        fit_script(smallest - 1)


def test_a_timing_pass_of_a_script_takes_what_comes_before_its_end() -> None:
    """A run of 100 s, of which 940 steps of 0.1 s come after those of a pass."""
    contender = plan_for().contenders[0]
    run = record_of(plan_for().key(CARD, contender, {"lr": 1.0}, 0, TUNE), 1.0, step_seconds=0.1)
    run = replace(run, cost=replace(run.cost, steps=1000))
    assert pace_of_script(run, 100.0).of_a_pass(60) == pytest.approx(6.0)
    assert pace_of_script(replace(run, cost=Cost.unknown()), 100.0).of_a_pass(60) == 100.0  # at most a whole run
    card = replace(CARD, steps=0, step_seconds=0.0, evaluation_seconds=0.0)
    plan = replace(plan_for(trials=1, seeds=1, timing=3), cards=(card,))
    paces = {(card.reference, who.name): pace_of_script(run, 100.0) for who in plan.contenders}
    assert expected_seconds(plan, paces, 1) == pytest.approx(1.15 * 2 * (2 * 100 + 3 * 6))


def test_a_plan_says_that_it_does_not_know_what_packs_gain() -> None:
    plan = plan_for(trials=3)
    assert "packs" not in fit(plan, 1.0).remarks[0]
    assert "packs of them may be done before" in fit(replace(plan, cards=(replace(CARD, packs=True),)), 1.0).remarks[0]


def test_a_budget_gives_up_trials_then_seeds_then_length_and_says_so() -> None:
    plan = plan_for(trials=12, seeds=5)
    whole = fit(plan, 1.0)
    assert (whole.trials, whole.seeds) == (12, 5)
    assert "nothing had to be given up" in whole.remarks[0]
    fewer = fit(plan, 0.7)
    assert (fewer.trials, fewer.seeds, fewer.steps_of(fewer.cards[0])) == (6, 5, 100)
    assert "given up for it: 6 of 12 trials each." in fewer.remarks[0]
    assert all(not contender.space for contender in fewer.contenders)  # so few trials search the learning rate alone
    seeds = fit(plan, 0.45)
    assert (seeds.trials, seeds.seeds) == (3, 4)
    assert "9 of 12 trials each, 1 of 5 seeds each" in seeds.remarks[0]
    shorter = fit(plan, 0.3)
    assert shorter.steps_of(shorter.cards[0]) == 50
    assert "line 50 of 100 steps a run" in shorter.remarks[0]
    assert (shorter.trials, shorter.seeds) > (3, 3)
    with pytest.raises(BudgetError, match="is too short"):
        fit(plan, 0.05)
