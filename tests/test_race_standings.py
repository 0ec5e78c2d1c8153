"""From records to the verdict, on races made up number by number: which runs are asked for, and what they count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from piste.race.contenders import Contender, make_contenders
from piste.race.inspection import TaskCard
from piste.race.protocol import MOST_EXTENSIONS, TUNE_SEED, Plan, next_runs, tuning
from piste.race.record import CONFIRM, DIVERGED, FAILED, FINISHED, TUNE, Cost, Curve, RunKey, RunRecord
from piste.race.report.card import mood_of
from piste.race.standings import study_result
from piste.race.verdict import recommended

CARD = TaskCard("/line.py", "line", "f00d", "", "loss", False, 10, 5, (60, 20, 20), 0.001, 0.001)
UNTRAINED = 9.0
Outcome = float | str  # the score of a run, or the status of one that did not finish


def plan_for(names: str = "adamw,ranger,sgd", *, trials: int = 5, seeds: int = 5, higher: bool = False) -> Plan:
    card = replace(CARD, higher_is_better=higher, metric_name="accuracy" if higher else "loss")
    return Plan((card,), make_contenders(names.split(","), ()), None, trials, seeds, "cpu", {"torch": "2"})


def record_of(key: RunKey, outcome: Outcome, *, untrained: float = UNTRAINED, step_seconds: float = 0.01) -> RunRecord:
    """A run that reached ``outcome``, or ended with it after the first look."""
    done = isinstance(outcome, float)
    losses = [untrained, outcome] if isinstance(outcome, float) else [untrained]
    curve = Curve(list(range(len(losses))), [0.0] * len(losses), losses, losses, losses)
    tested = outcome if isinstance(outcome, float) and key.phase == CONFIRM else None
    cost = Cost(step_seconds, step_seconds / 10, 80, 10**6, 10, 5)
    status, message = (FINISHED, "") if done else (str(outcome), "as planned")
    return RunRecord(1, key.id, key, status, message, curve, tested, tested, cost, {"cores": "2"}, "2026-01-01")


def raced(
    plan: Plan, outcome: Callable[[RunKey], Outcome], slow: str = "", untrained: float = UNTRAINED
) -> dict[str, RunRecord]:
    """All records of a race in which every run ends as ``outcome`` says, in the order in which it asks for them."""
    records: dict[str, RunRecord] = {}
    while missing := next_runs(plan, records):
        for _, _, key in missing:
            seconds = 0.05 if slow and key.optimizer == slow else 0.01
            records[key.id] = record_of(key, outcome(key), untrained=untrained, step_seconds=seconds)
    return records


def result_of(plan: Plan, records: dict[str, RunRecord]):  # type: ignore[no-untyped-def]
    return study_result(plan, records, title="", created="", command="", workers=1, machine={})


def middle(plan: Plan, contender: str) -> float:
    """The middle one of the learning rates that a contender tries at first."""
    who = next(c for c in plan.contenders if c.name == contender)
    return sorted(key.lr for key in tuning(plan, plan.cards[0], who, {}).runs)[plan.trials // 2]


def valley(plan: Plan, **confirmed: Callable[[int], Outcome]) -> Callable[[RunKey], Outcome]:
    """Tune losses with their best at the middle learning rate; confirmed runs as given for each optimizer."""

    def outcome(key: RunKey) -> Outcome:
        if key.phase == CONFIRM:
            return confirmed[key.optimizer](key.seed)
        return 1.0 + abs(math.log10(key.lr / middle(plan, key.contender)))

    return outcome


# What is run


def test_all_contenders_get_the_same_number_of_trials_and_the_same_fresh_seeds() -> None:
    plan = plan_for()
    made = raced(plan, valley(plan, adamw=lambda s: 1.0 + s, ranger=lambda s: 2.0 + s, sgd=lambda s: 3.0 + s)).values()
    for contender in plan.contenders:
        own = [record.key for record in made if record.key.contender == contender.name]
        tried = [key for key in own if key.phase == TUNE]
        assert len({key.lr for key in tried}) == len(tried) == 5
        assert {key.seed for key in tried} == {TUNE_SEED}
        low = contender.lr_center / 10**contender.decades_below
        high = contender.lr_center * 10**contender.decades_above
        assert all(low * 0.999 <= key.lr <= high * 1.001 for key in tried)
        again = [key for key in own if key.phase == CONFIRM]
        assert sorted(key.seed for key in again) == [1, 2, 3, 4, 5]
        assert {key.lr for key in again} == {middle(plan, contender.name)}


def test_more_trials_keep_the_earlier_ones() -> None:
    few, many = (plan_for(trials=trials) for trials in (3, 8))
    for contender in few.contenders:
        first, second = ([key.id for key in tuning(plan, CARD, contender, {}).runs] for plan in (few, many))
        assert second[:3] == first


@pytest.mark.parametrize(("sign", "edge"), [(1, "low"), (-1, "high")])
def test_a_best_at_the_edge_extends_the_range_twice_and_is_told(sign: int, edge: str) -> None:
    plan = plan_for("adamw")
    first = [key.lr for key in tuning(plan, CARD, plan.contenders[0], {}).runs]
    records = raced(plan, lambda key: 5.0 + sign * math.log10(key.lr))
    state = tuning(plan, plan.cards[0], plan.contenders[0], records)
    assert (state.edge, state.extensions) == (edge, MOST_EXTENSIONS)
    added = [key.lr for key in state.runs[len(first) :]]
    assert added == sorted(added, reverse=edge == "low")
    assert all(lr < min(first) if edge == "low" else lr > max(first) for lr in added)
    result = result_of(plan, records)
    assert result.results[0].standings[0].edge == edge
    words = f"the best lr is the {edge}est tried after {MOST_EXTENSIONS} extensions of the range for adamw+one_cycle;"
    assert any(f"line: {words} a better one may lie beyond." == note for note in result.notes)


MANY = "sgd,sgd_momentum,sgd_nesterov,adamw,radam,ranger"


def edge_notes(optimizers: str, outcome: Callable[[RunKey], Outcome]) -> list[str]:
    plan = plan_for(optimizers)
    return [note for note in result_of(plan, raced(plan, outcome)).notes if "best lr" in note]


def test_edges_take_a_line_a_task_that_names_three() -> None:
    """Rising and falling losses end at an edge in spite of all extensions; they are told in one line."""

    def outcome(key: RunKey) -> Outcome:
        sign = 1 if key.optimizer in ("sgd", "radam") else -1
        return 5.0 + sign * math.log10(key.lr)

    assert edge_notes(MANY, outcome) == [
        "line: the best lr is the highest tried after 2 extensions of the range for sgd_momentum+one_cycle, "
        "sgd_nesterov+one_cycle, adamw+one_cycle and 1 more, the lowest tried after 2 extensions of the range for "
        "sgd+one_cycle and radam+one_cycle; a better one may lie beyond."
    ]


@pytest.mark.parametrize(
    ("at_edge", "told"),
    [
        ("adamw", "the best lr of adamw+one_cycle was at an edge, so 1 trial was added beyond it."),
        ("sgd,adamw", "of sgd+one_cycle and adamw+one_cycle was at an edge, so 1 trial each was added beyond it."),
        (MANY, "and 3 more was at an edge, so 1 trial each was added beyond it."),
    ],
)
def test_added_trials_take_a_line_a_task(at_edge: str, told: str) -> None:
    """The best of the first trials is the highest; the one added beyond is worse."""
    first = {c.name: max(key.lr for key in tuning(p, CARD, c, {}).runs) for p in [plan_for(MANY)] for c in p.contenders}

    def outcome(key: RunKey) -> Outcome:
        at = first[key.contender] if key.optimizer in at_edge.split(",") else middle(plan_for(MANY), key.contender)
        return 1.0 + abs(math.log10(key.lr / at))

    notes = edge_notes(MANY, outcome)
    assert len(notes) == 1
    assert notes[0].startswith("line: the best lr of ")
    assert notes[0].endswith(told)


def test_an_edge_next_to_diverged_runs_is_no_edge_of_what_was_tried() -> None:
    """The highest lr diverged: the best one below it has a neighbour, so nothing is extended."""
    plan = plan_for("adamw")
    lrs = sorted(key.lr for key in tuning(plan, CARD, plan.contenders[0], {}).runs)
    records = raced(plan, lambda key: DIVERGED if key.lr == lrs[-1] else 5.0 - math.log10(key.lr))
    state = tuning(plan, CARD, plan.contenders[0], records)
    assert state.best is not None
    assert (state.best.key.lr, state.edge, state.extensions) == (lrs[-2], "", 0)
    assert result_of(plan, records).results[0].standings[0].diverged_trials == 1


def test_contenders_take_turns_and_trials_come_first() -> None:
    plan = plan_for()
    order = [who.name for _, who, _ in next_runs(plan, {})]
    assert order[:3] == order[3:6] == [contender.name for contender in plan.contenders]
    records = {run.id: record_of(run, 1.0) for run in tuning(plan, CARD, plan.contenders[0], {}).runs}
    phases = [key.phase for _, _, key in next_runs(plan, records)]
    assert phases == sorted(phases, key=[TUNE, CONFIRM].index)


# What it counts


@pytest.mark.parametrize("higher", [False, True])
def test_a_lost_confirmation_counts_as_the_worst_seen_and_stays(higher: bool) -> None:
    """Four brilliant seeds and a lost one do not beat five good ones, and the lost one is in scores and failures."""
    plan = plan_for("adamw,ranger", higher=higher)
    good, brilliant, untrained = (0.8, 0.9, 0.1) if higher else (0.2, 0.1, 0.9)

    def outcome(key: RunKey) -> Outcome:
        if key.phase == TUNE:
            distance = abs(math.log10(key.lr / middle(plan, key.contender))) / 100
            return good - distance if higher else good + distance
        if key.optimizer == "adamw":
            return good + key.seed / 1e4
        return FAILED if key.seed == 3 else brilliant + key.seed / 1e4

    task = result_of(plan, raced(plan, outcome, untrained=untrained)).results[0]
    by_name = {standing.optimizer: standing for standing in task.standings}
    assert task.standings[0].optimizer == "adamw"
    assert by_name["ranger"].scores[2] == untrained
    assert len(by_name["ranger"].scores) == by_name["ranger"].seeds == 5
    assert by_name["ranger"].failures == [f"seed 3 at lr {middle(plan, 'ranger+flat_cosine'):g}: failed, as planned"]
    assert not by_name["ranger"].tied
    assert recommended(task.standings) is by_name["adamw"]


def test_one_that_loses_runs_is_no_equal_of_a_leader_that_does_not() -> None:
    plan = plan_for("adamw,ranger", seeds=3)
    ends = valley(plan, adamw=lambda s: 1.0 + s, ranger=lambda s: DIVERGED if s == 1 else 1.0 + s)
    task = result_of(plan, raced(plan, ends)).results[0]
    assert [standing.optimizer for standing in task.standings] == ["adamw", "ranger"]
    assert [standing.tied for standing in task.standings] == [True, False]


def test_one_whose_trials_all_fail_is_last_and_in_the_table() -> None:
    plan = plan_for("ranger,adamw")
    ends = valley(plan, adamw=lambda s: 1.0 + s / 100)
    records = raced(plan, lambda key: FAILED if key.optimizer == "ranger" else ends(key))
    task = result_of(plan, records).results[0]
    last = task.standings[-1]
    assert (last.optimizer, last.scores, last.diverged_trials, last.best_hyperparameters) == ("ranger", [], 5, {})
    assert len(last.failures) == 5
    assert "adamw+one_cycle wins on line" in task.verdict
    assert "no other contender finished" in task.verdict


def test_nothing_that_finishes_gives_no_verdict() -> None:
    task = result_of(plan := plan_for(), raced(plan, lambda key: DIVERGED)).results[0]
    assert task.verdict.startswith("No verdict on line:")
    assert recommended(task.standings) is None
    assert len(task.standings) == 3


def test_before_anyone_is_confirmed_the_verdict_is_open() -> None:
    """Not "no result": nothing has gone wrong."""
    plan = plan_for("adamw,ranger")
    made = raced(plan, valley(plan, adamw=lambda s: 1.0, ranger=lambda s: 2.0))
    tuned = {id_: run for id_, run in made.items() if run.key.phase == TUNE}
    for records in ({}, tuned):
        task = result_of(plan, records).results[0]
        assert task.verdict == "No verdict on line yet: no contender has been confirmed on every seed."
        assert mood_of(task.standings, None) == ("open", "not yet", "No answer yet")


def test_who_loses_every_trial_is_said_to_and_why() -> None:
    plan = plan_for("adamw,adam,ranger")
    ends = valley(plan, adamw=lambda s: 1.0 + s / 9, adam=lambda s: 1.0 + s / 9)
    result = result_of(plan, raced(plan, lambda key: FAILED if key.optimizer == "ranger" else ends(key)))
    assert result.results[0].verdict.endswith(" Without a result: ranger+flat_cosine.")
    assert "Behind them" not in result.results[0].verdict
    [note] = [note for note in result.notes if "were lost" in note]
    assert note.startswith("line: all 5 trials of ranger+flat_cosine were lost; failed: ")


def test_of_a_tied_group_the_cheapest_is_taken_and_the_others_are_named() -> None:
    plan = plan_for()
    wobble = [0.0, 0.03, -0.02, 0.05, -0.04, 0.01]
    ends = valley(plan, adamw=lambda s: 1.0 + s / 9, ranger=lambda s: 0.999 + s / 9 + wobble[s], sgd=lambda s: 4.0 + s)
    task = result_of(plan, raced(plan, ends, slow="ranger")).results[0]
    assert {standing.optimizer for standing in task.standings if standing.tied} == {"adamw", "ranger"}
    chosen = recommended(task.standings)
    assert chosen is not None
    assert chosen.optimizer == "adamw"
    assert "No difference found on line" in task.verdict
    assert "Take adamw+one_cycle" in task.verdict
    assert task.verdict.count("Behind them: sgd+") == 1


def test_of_many_tied_ones_three_are_named_and_the_rest_counted() -> None:
    plan = plan_for(MANY + ",adam,adabelief")
    ends = valley(
        plan,
        **dict.fromkeys(MANY.split(","), lambda s: 1.0 + s / 9),
        adam=lambda s: 4.0 + s,
        adabelief=lambda s: 5.0 + s,
    )
    verdict = result_of(plan, raced(plan, ends)).results[0].verdict
    assert verdict.startswith(
        "No difference found on line between sgd+one_cycle, sgd_momentum+one_cycle, sgd_nesterov+one_cycle and 3 more ("
    )
    assert "Take sgd+one_cycle, the cheapest of the 6 best: " in verdict
    assert verdict.endswith("Behind them: adam+one_cycle and adabelief+one_cycle.")


def test_times_are_those_of_the_fastest_run() -> None:
    """A machine that was busy during most runs of one contender makes it no dearer."""
    plan = plan_for("adamw,ranger")
    ends = valley(plan, adamw=lambda s: 1.0 + s / 9, ranger=lambda s: 1.0 + s / 9)
    records = raced(plan, ends, slow="adamw")
    quiet = next(id for id, each in records.items() if each.key.optimizer == "adamw" and each.key.seed == 4)
    records[quiet] = replace(records[quiet], cost=replace(records[quiet].cost, step_seconds=0.005, state_bytes=8))
    task = result_of(plan, records).results[0]
    costs = {standing.optimizer: standing.cost for standing in task.standings}
    assert (costs["adamw"].step_seconds, costs["adamw"].state_bytes) == (0.005, 80)
    chosen = recommended(task.standings)
    assert chosen is not None
    assert chosen.optimizer == "adamw"


def test_a_clear_win_says_by_how_much() -> None:
    plan = plan_for("adamw,ranger")
    ends = valley(plan, adamw=lambda s: 1.0 + s / 10, ranger=lambda s: 1.5 + s / 10 + s / 1000)
    task = result_of(plan, raced(plan, ends)).results[0]
    assert "adamw+one_cycle wins on line" in task.verdict
    assert "0.503" in task.verdict
    assert "lower than the next, ranger+flat_cosine" in task.verdict


def test_one_seed_claims_nothing() -> None:
    plan = plan_for("adamw,ranger", seeds=1)
    task = result_of(plan, raced(plan, valley(plan, adamw=lambda s: 1.0, ranger=lambda s: 8.0))).results[0]
    assert "one seed cannot tell a difference from chance" in task.verdict
    assert recommended(task.standings) is task.standings[0]
    cheaper_but_worse = result_of(plan, raced(plan, valley(plan, adamw=lambda s: 8.0, ranger=lambda s: 1.0)))
    best = recommended(cheaper_but_worse.results[0].standings)
    assert best is not None
    assert best.optimizer == "ranger"


def test_a_race_cut_short_compares_common_seeds_and_says_so() -> None:
    plan = plan_for("adamw,ranger")
    records = raced(plan, valley(plan, adamw=lambda s: 1.0 + s, ranger=lambda s: 2.0 + s))
    kept = {
        name: record
        for name, record in records.items()
        if not (record.key.phase == CONFIRM and record.key.optimizer == "ranger" and record.key.seed in (1, 4))
    }
    result = result_of(plan, kept)
    scores = {standing.optimizer: standing.scores for standing in result.results[0].standings}
    assert scores == {"adamw": [3.0, 4.0, 6.0], "ranger": [4.0, 5.0, 7.0]}
    assert any("not finished: 2 or more runs are missing" in note for note in result.notes)


def test_the_plan_survives_its_file() -> None:
    plan = plan_for()
    assert Plan.from_json(plan.to_json()) == plan
    assert isinstance(Plan.from_json(plan.to_json()).contenders[0], Contender)


def test_too_few_seeds_tell_nothing_and_say_so() -> None:
    """Two seeds would find differences many times those seen, of a size that no score here could have."""
    plan = plan_for("adamw,ranger", seeds=2)
    result = result_of(plan, raced(plan, lambda key: 1.0 + 0.01 * ((key.seed + (key.optimizer == "ranger")) % 3)))
    assert "with 2 seeds not even the largest difference" in result.results[0].caveats[0]
