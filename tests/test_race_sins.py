"""Each lint of the race on a race that commits the sin and on one that does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from test_race_standings import plan_for, raced, result_of

import piste
from piste.race import lints
from piste.race.lints import Evidence
from piste.race.protocol import Plan, keys_so_far
from piste.race.record import CONFIRM, TUNE, RunKey, RunRecord
from piste.race.result import CLEAR, COMMITTED, EXCLUDED
from piste.race.sins import SINS, audit, notes

BIG = 10_000


def fair_plan(names: str = "adamw,sgd_momentum,radam", *, trials: int = 5, seeds: int = 5) -> Plan:
    """A race that has nothing to hold against itself, on a task of a decent size."""
    plan = plan_for(names, trials=trials, seeds=seeds)
    return replace(plan, cards=tuple(replace(card, parameters=BIG) for card in plan.cards))


def fair(plan: Plan) -> Callable[[RunKey], float]:
    """The best rate in the middle of each range, and all equally good up to luck."""
    tried = {}
    for _, contender, key in keys_so_far(plan, {}):
        tried.setdefault(contender.name, []).append(key.lr)
    middle = {name: sorted(lrs)[len(lrs) // 2] for name, lrs in tried.items()}

    def outcome(key: RunKey) -> float:
        if key.phase == CONFIRM:
            return 1.0 + key.seed / 10
        return 1.0 + abs(math.log10(key.lr / middle[key.contender]))

    return outcome


def evidence_of(
    plan: Plan | None = None,
    change: Callable[[RunRecord], RunRecord] = lambda run: run,
    outcome: Callable[[RunKey], float] | None = None,
    workers: int = 1,
) -> Evidence:
    """A race as it went, each record changed afterwards."""
    plan = plan or fair_plan()
    records = {name: change(run) for name, run in raced(plan, outcome or fair(plan)).items()}
    used = [records[key.id] for _, _, key in keys_so_far(plan, records) if key.id in records]
    return Evidence(plan, records, used, 0, workers)


def with_key(run: RunRecord, **changes: object) -> RunRecord:
    return replace(run, key=replace(run.key, **changes))


def only(optimizer: str, change: Callable[[RunRecord], RunRecord]) -> Callable[[RunRecord], RunRecord]:
    return lambda run: change(run) if run.key.optimizer == optimizer else run


def of_phase(phase: str, change: Callable[[RunRecord], RunRecord]) -> Callable[[RunRecord], RunRecord]:
    return lambda run: change(run) if run.key.phase == phase else run


def with_passes(run: RunRecord) -> RunRecord:
    return replace(run, cost=replace(run.cost, gradient_evaluations=2 * run.key.steps))


def with_start(run: RunRecord) -> RunRecord:
    return replace(run, curve=replace(run.curve, valid_loss=[7.0, *run.curve.valid_loss[1:]]))


def cut_short(run: RunRecord) -> RunRecord:
    return replace(run, curve=replace(run.curve, step=[0, run.key.steps // 2]))


def complete(run: RunRecord) -> RunRecord:
    """The helper's curves end at step 1; these end where the run did."""
    return replace(run, curve=replace(run.curve, step=[0, run.key.steps]))


# lint -> a race that commits the sin, and a piece of what must be said of it
GUILTY: dict[str, tuple[Callable[[], Evidence], str]] = {
    "untuned": (lambda: evidence_of(fair_plan(trials=3)), "Few trials (3)"),
    "no_baseline": (
        lambda: evidence_of(fair_plan("ranger,lion,adan")),
        "no known optimizer to hold the others against",
    ),
    "unequal_budgets": (
        lambda: evidence_of(change=only("radam", lambda run: with_key(run, steps=20))),
        "line: trials were not all of equally many steps.",
    ),
    "best_at_edge": (
        lambda: evidence_of(outcome=lambda key: 5.0 + math.log10(key.lr)),
        "line: the best lr is the lowest tried after 2 extensions of the range for adamw+one_cycle,",
    ),
    "same_seeds": (
        lambda: evidence_of(change=of_phase(TUNE, lambda run: with_key(run, seed=3))),
        "Seeds 3 both chose the learning rates and scored them",
    ),
    "few_seeds": (lambda: evidence_of(fair_plan(seeds=3)), "Few seeds (3)"),
    "report_split_peeked": (
        lambda: evidence_of(change=of_phase(TUNE, lambda run: replace(run, test_metric=1.0))),
        "scored on the report split",
    ),
    "trials_too_short": (
        lambda: evidence_of(change=of_phase(TUNE, lambda run: with_key(run, steps=5))),
        "line: learning rates were chosen in runs of 5 steps and scored in runs of 10",
    ),
    "cost_hidden_by_steps": (
        lambda: evidence_of(change=only("radam", with_passes)),
        "Gradient evaluations a step: radam+one_cycle 2, the others 1.",
    ),
    "contended_times": (lambda: evidence_of(workers=2), "taken while 2 runs went side by side"),
    "other_decay": (lambda: evidence_of(fair_plan("adamw,adam,amos")), "Weight decay is"),
    "frozen_for_some": (
        lambda: evidence_of(
            change=only(
                "adamw", lambda run: with_key(run, hyperparameters={**run.key.hyperparameters, "weight_decay": 0.1})
            )
        ),
        "weight_decay was searched for some contenders",
    ),
    "other_start": (
        lambda: evidence_of(change=only("adamw", with_start)),
        "line: contenders did not start from the same weights on a seed",
    ),
    "stopped_early": (lambda: evidence_of(change=only("adamw", cut_short)), "ended before the last step"),
    "other_groups": (lambda: evidence_of(fair_plan("adamw,ranger")), "on matrices alone for ranger"),
    "other_implementation": (
        lambda: evidence_of(fair_plan("adamw,torch.AdamW")),
        "torch.AdamW ran as torch has it, the others on engines of piste",
    ),
    "other_clipping": (lambda: evidence_of(fair_plan("adamw,clipped")), "Gradients are clipped for clipped"),
    "toy": (
        lambda: evidence_of(plan_for("adamw,sgd_momentum")),
        "line: fewer than 100 weights",
    ),
}


@pytest.fixture(autouse=True)
def preset_that_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """No preset clips gradients and takes another's name; this one stands in."""
    made = replace(piste.presets["adamw"], name="clipped", hyperparameters={"clip_norm": 1.0})
    coupled = replace(piste.presets["adam"], hyperparameters={"weight_decay": 0.01}, wd=replace(made.wd, true_wd=False))
    known = {**piste.presets, "clipped": made, "adam": coupled}
    monkeypatch.setattr(piste, "presets", known)
    monkeypatch.setattr(piste, "list_optimizers", lambda pattern="*": [name for name in known if name == pattern])


def test_every_lint_has_a_race_that_triggers_it() -> None:
    assert {lint.__name__ for _, lint in SINS if not isinstance(lint, str)} == set(GUILTY)


@pytest.mark.parametrize("name", GUILTY)
def test_a_sin_is_named(name: str) -> None:
    make, expected = GUILTY[name]
    assert expected in getattr(lints, name)(make())


@pytest.mark.parametrize("name", GUILTY)
def test_a_fair_race_is_not_accused(name: str) -> None:
    assert getattr(lints, name)(evidence_of(change=complete)) == ""


def test_one_rate_for_all_is_no_tuning() -> None:
    same = evidence_of(change=lambda run: with_key(run, hyperparameters={"lr": 1e-3}))
    assert "One and the same learning rate was taken for all" in lints.untuned(same)


def test_more_trials_for_some_are_an_unequal_budget() -> None:
    evidence = evidence_of()
    favoured = [run for run in evidence.used if run.key.optimizer != "adamw" or run.key.phase == CONFIRM]
    assert "from 0 to 5 trials" in lints.unequal_budgets(replace(evidence, used=favoured))
    assert lints.unequal_budgets(replace(evidence, used=favoured, missing=5)) == ""  # they are still to be made


def test_other_machines_are_told() -> None:
    moved = evidence_of(change=only("adamw", lambda run: replace(run, machine={"cores": "96"})), workers=2)
    assert lints.contended_times(moved).startswith("The runs come from more than one machine")


def test_other_versions_are_told() -> None:
    moved = evidence_of(change=only("adamw", lambda run: with_key(run, versions={"torch": "3"})))
    assert "several versions" in lints.other_implementation(moved)


def test_how_large_a_scripts_model_is_its_runs_say() -> None:
    plan = fair_plan()
    script = replace(plan, cards=tuple(replace(card, parameters=0) for card in plan.cards))
    large, small, unknown = (
        evidence_of(script, lambda run, many=many: replace(run, cost=replace(run.cost, parameters=many)))  # type: ignore[misc]
        for many in (1000, 10, 0)
    )
    assert (lints.toy(large), lints.toy(unknown)) == ("", "")
    assert "fewer than 100 weights" in lints.toy(small)


def test_the_audit_speaks_of_every_sin_once() -> None:
    found = audit(evidence_of(fair_plan(seeds=2), change=complete))
    assert len({finding.sin for finding in found}) == len(found) == len(SINS)
    states = {finding.sin: finding.state for finding in found}
    assert states["too few seeds"] == COMMITTED
    assert states["untuned contenders"] == CLEAR
    assert states["training losses compared"] == EXCLUDED
    assert all(finding.words for finding in found if finding.state != CLEAR)
    assert not any(finding.words for finding in found if finding.state == CLEAR)


def test_what_is_committed_is_a_note_and_what_is_clear_is_not() -> None:
    evidence = evidence_of(fair_plan(seeds=2), change=complete)
    assert notes(evidence, audit(evidence)) == [
        "Few seeds (2): only large differences can be found. 5 or more are better."
    ]


def test_the_result_of_a_study_carries_findings() -> None:
    plan = fair_plan()
    result = result_of(plan, raced(plan, fair(plan)))
    assert [finding.sin for finding in result.findings] == [sin for sin, _ in SINS]


def test_scripts_that_report_after_some_steps_are_not_said_to_have_started_apart() -> None:
    """Their first loss is one of trained weights, in which contenders have to differ."""

    def trained(run: RunRecord) -> RunRecord:
        apart = with_start(run) if run.key.optimizer == "adamw" else run
        return replace(apart, curve=replace(apart.curve, step=[step + 4 for step in run.curve.step]))

    assert lints.other_start(evidence_of(change=with_start)) == ""
    assert lints.other_start(evidence_of(change=only("adamw", with_start))) != ""
    assert lints.other_start(evidence_of(change=trained)) == ""
