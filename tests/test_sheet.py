"""docs/sheet.md: current, complete, and its marks mean what the page says they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piste.race.contenders import GROUPS
from piste.race.record import CONFIRM
from scripts.sheet.claims import ALIKE, BETTER, CLAIMS, KEEPS_UP, SOONER, Claim, Duel, Entry
from scripts.sheet.judgement import AHEAD, BEHIND, BEYOND, EDGE, NEITHER, REFUTED, SUPPORTED, Judgement, verdict_of
from scripts.sheet.page import PAGE, page
from scripts.sheet.races import MAIN, RACES, TASKS, Made, kept


def test_the_page_is_what_the_runs_say() -> None:
    assert page(*kept()) == PAGE.read_text(), "run: python -m scripts.sheet page"


def test_every_optimizer_of_the_sheet_was_confirmed_on_every_common_task() -> None:
    head, runs = kept()
    seeds = {(race["arm"], race["task"]): race["seeds"] for race in head["races"]}
    assert set(seeds) == {(race.arm, race.task) for race in RACES}
    assert len(TASKS) >= 6
    for task in TASKS:
        own = [run for run in runs if run.arm == MAIN and run.task == task]
        assert set(GROUPS["cheatsheet"]) <= {run.optimizer for run in own}
        for name in GROUPS["cheatsheet"]:
            confirmed = [run.seed for run in own if run.optimizer == name and run.phase == CONFIRM]
            trials = [run for run in own if run.optimizer == name and run.phase != CONFIRM]
            assert len(trials) >= 5
            wanted = seeds[MAIN, task] if any(run.score is not None for run in trials) else 0
            assert len(set(confirmed)) == len(confirmed) == wanted


def test_every_claim_has_contenders_that_raced_or_a_reason() -> None:
    head, runs = kept()
    raced = {(run.task, Entry(run.optimizer, run.arm)) for run in runs}
    for claim in CLAIMS:
        assert claim.duels or claim.beside, claim.words
        for duel in claim.duels:
            assert any({(task, duel.first), (task, duel.second)} <= raced for task in duel.tasks), (claim.words, duel)
            assert set(duel.tasks) <= set(head["metric"])


@pytest.mark.parametrize(
    ("counts", "expected", "mark"),
    [
        ({}, BETTER, BEYOND),
        ({EDGE: 5}, BETTER, BEYOND),
        ({AHEAD: 1, NEITHER: 1}, BETTER, SUPPORTED),
        ({AHEAD: 1, NEITHER: 2}, BETTER, BEYOND),
        ({AHEAD: 3, BEHIND: 2}, BETTER, SUPPORTED),
        ({AHEAD: 2, BEHIND: 2}, SOONER, REFUTED),
        ({BEHIND: 1, NEITHER: 6}, BETTER, REFUTED),
        ({NEITHER: 7}, BETTER, BEYOND),
        ({NEITHER: 2, BEHIND: 1, AHEAD: 1}, ALIKE, SUPPORTED),
        ({NEITHER: 1, BEHIND: 1, AHEAD: 1}, ALIKE, REFUTED),
        ({BEHIND: 2, AHEAD: 1, NEITHER: 2}, KEEPS_UP, SUPPORTED),
        ({BEHIND: 2, AHEAD: 2}, KEEPS_UP, REFUTED),
    ],
)
def test_marks(counts: dict[str, int], expected: str, mark: str) -> None:
    assert verdict_of(counts, expected) == mark


def made(optimizer: str, seed: int, score: float | None, **others: object) -> Made:
    run = Made(MAIN, "digits", optimizer, "constant", CONFIRM, seed, {"lr": 0.1}, "finished", score, 20, 20, 0, 10)
    return replace(run, **{"step": [0, 10, 20], "valid": [0.1, 0.5, 0.9], **others})


DUEL = Duel(Entry("adan"), Entry("adamw"), ("digits",))
BETTER_CLAIM = Claim("", (DUEL,))
SOONER_CLAIM = Claim("", (replace(DUEL, expected=SOONER),))
SCORES = (0.90, 0.92, 0.91, 0.93, 0.92, 0.90)


def judged(lead: float, edges: tuple[str, ...] = (), **of_the_first: object) -> Judgement:
    runs = [made("adamw", seed, score) for seed, score in enumerate(SCORES)]
    runs += [made("adan", seed, score + lead + 0.001 * (seed % 2), **of_the_first) for seed, score in enumerate(SCORES)]
    at_edges = {("digits", Entry(name)) for name in edges}
    return Judgement(runs, {"digits": True}, at_edges, (BETTER_CLAIM, SOONER_CLAIM))


def test_who_is_ahead_and_when_that_counts() -> None:
    def found(judgement: Judgement) -> str:
        (outcome,) = judgement.of(BETTER_CLAIM)
        return outcome.found

    assert found(judged(0.05)) == AHEAD
    assert found(judged(-0.05)) == BEHIND
    assert found(judged(-0.0005)) == NEITHER
    assert found(judged(0.05, edges=("adamw",))) == EDGE
    assert found(judged(0.05, edges=("adan",))) == AHEAD  # it leads although its search was cut short


def test_steps_to_where_the_other_ends() -> None:
    (outcome,) = judged(0.0, valid=[0.1, 0.9, 0.9]).of(SOONER_CLAIM)
    assert (outcome.found, outcome.difference) == (AHEAD, -10.0)
    (outcome,) = judged(0.0, valid=[0.1, 0.2, 0.3]).of(SOONER_CLAIM)  # never there: all its steps were not enough
    assert outcome.difference == 0.0


def test_a_lost_run_counts_as_the_worst_seen() -> None:
    runs = [made("adamw", seed, score) for seed, score in enumerate(SCORES)]
    runs += [made("adan", seed, None if seed else 0.9, status="diverged") for seed in range(len(SCORES))]
    assert Judgement(runs, {"digits": True}).standings("digits")["adan"][0] == pytest.approx((0.9 + 5 * 0.1) / 6)
