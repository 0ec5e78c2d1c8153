"""Which runs a worker is given together, and what becomes of them where their pack comes to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_race_protocol import CARD, bowl, plan_for, raced, record_of
from test_race_wishes import Asking

from piste.race.contenders import make_contenders
from piste.race.driver import Driver, State
from piste.race.executors import Death, Event, files
from piste.race.limits import Limits
from piste.race.packing import MOST, jobs, runs_of
from piste.race.record import CONFIRM, FAILED, OUT_OF_MEMORY, TUNE, RunKey, RunRecord
from piste.race.store import Store
from piste.race.wishes import STOPPED, Stop, Wish
from piste.race.worker import Apart, Inspect, Job, Pack, Packed, Progress, Run, _Worker

PLAN = replace(plan_for(trials=3, seeds=1), cards=(replace(CARD, packs=True),))

GUILTY = PLAN.key(PLAN.cards[0], PLAN.contenders[0], {"lr": PLAN.contenders[0].lr_center}, 0, TUNE).id


def pack_of(runs: Sequence[Run]) -> Pack:
    return Pack(runs[0].reference, runs[0].contender, tuple(each.key for each in runs))


def missing(contender: str, count: int, phase: str = TUNE, *, packed: bool = True) -> list[Run]:
    (who,) = make_contenders([contender], ["constant"])
    about = ("net", "", who.name, who.optimizer, "constant")
    lrs = [1e-3 * (1 + place) for place in range(count)]
    return [Run("net", who, RunKey(*about, {"lr": lr}, 10, 0, phase, "cpu", {}, packed=packed)) for lr in lrs]


# Who gets what


def test_packs_are_of_one_contender_and_leave_no_worker_without() -> None:
    wanted = [*missing("adamw", 5), *missing("sgd", 5)]
    assert [len(runs_of(job)) for job in jobs(wanted, [], [], 2)] == [5, 5]
    assert [len(runs_of(job)) for job in jobs(missing("adamw", 5), [], [], 2)] == [3, 2]
    assert [len(runs_of(job)) for job in jobs(missing("adamw", 80), [], [], 1)] == [MOST, MOST, 80 - 2 * MOST]
    first, *_ = jobs(missing("adamw", 5), [], [], 2)
    busy = [each.key.id for each in runs_of(first)]
    (rest,) = jobs(missing("adamw", 5), busy, [], 2)  # no smaller for being the last
    assert len(runs_of(rest)) == 2


def test_what_is_no_trial_is_made_alone_and_a_pack_has_two_at_least() -> None:
    confirmed = missing("adamw", 3, CONFIRM, packed=False)
    assert jobs(confirmed, [], [], 1) == confirmed
    died = missing("adamw", 3)
    assert jobs(died, [], [each.key.id for each in died], 1) == died
    assert jobs(died, [], [died[0].key.id], 1) == [died[0], pack_of(died[1:])]
    assert jobs(died, [], [], 3) == died
    assert jobs(died, [], [], 0) == [pack_of(died)]  # all workers are lost at the moment


def test_a_worker_answers_a_pack_with_a_record_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []

    class Pipe:
        send = staticmethod(answers.append)

    serving = _Worker(Pipe())  # type: ignore[arg-type]
    serving.serve(Inspect("quadratic_axis", "cpu", pack=True))
    card = answers.pop()
    assert (card.packs, card.not_packed) == (True, "")
    runs = [
        replace(each, reference="quadratic_axis", key=replace(each.key, task=card.name, task_hash=card.task_hash))
        for each in missing("adamw", 3)
    ]
    serving.serve(pack_of(runs))
    made = answers.pop()
    assert [record.key for record in made.records] == [each.key for each in runs]
    assert all(record.finished for record in made.records)

    def leave(*arguments: object) -> None:
        raise SystemExit

    monkeypatch.setattr("piste.race.worker.run_pack", leave)
    serving.serve(pack_of(runs))
    assert answers.pop() == Apart()
    serving.serve(Inspect("quadratic_axis", "cpu"))
    assert not answers.pop().packs  # where nobody asked


def test_a_pack_finds_its_task_on_other_machines(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.touch()
    job = replace(pack_of(missing("adamw", 2)), reference=f"{path}:mine")
    assert files.source_of(job) == str(path)
    moved = files.moved(job, str(path), "/there/task.py")
    assert [run.reference for run in runs_of(moved)] == 2 * ["/there/task.py:mine"]
    assert [run.key for run in runs_of(moved)] == [run.key for run in runs_of(job)]


# A race with packs


class Workers:
    """They do what ``fate`` says of a job, which is over unless that is progress or nothing, and die when stopped.

    A look at them takes a second of their own clock.
    """

    def __init__(self, fate: Callable[[Job], object], width: int = 1) -> None:
        self.fate, self.width = fate, width
        self.jobs: list[Job] = []
        self.given: list[Job] = []
        self.reasons: dict[int, str] = {}
        self.now = 0.0
        self.stopped_at: list[float] = []

    @property
    def idle(self) -> int:
        return self.width - len(self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.given.append(job)

    def stop(self, job: Job, reason: str) -> None:
        self.reasons[id(job)] = reason
        self.stopped_at.append(self.now)

    def events(self, timeout: float) -> Iterator[Event]:
        self.now += 1
        for job in list(self.jobs):
            reason = self.reasons.get(id(job))
            answer = Death(reason) if reason else self.fate(job)
            if answer is None:
                continue
            if not isinstance(answer, Progress):
                self.jobs.remove(job)
            yield Event(job, answer)  # type: ignore[arg-type]


def well(job: Job) -> Packed | RunRecord:
    made = [record_of(run.key, bowl(run.key)) for run in runs_of(job)]
    return Packed(tuple(made)) if isinstance(job, Pack) else made[0]


def race_of(
    folder: Path, workers: Workers, *asked: Callable[[State], Wish], limits: Limits | None = None
) -> dict[str, RunRecord]:
    """The records, each of which was kept once."""
    kept: list[str] = []

    class View(Asking):
        def finished(self, state: State, made: RunRecord) -> None:
            kept.append(made.id)

    store = Store(folder / "race")
    with store.writing():
        driver = Driver(PLAN, store, View(*asked), workers, lambda: False, limits=limits)  # type: ignore[arg-type]
        driver.run()
    assert sorted(kept) == sorted(driver.records)
    assert store.load().keys() == driver.records.keys()
    return driver.records


def sizes(given: Sequence[Job], packed: bool = True) -> list[int]:
    return [len(runs_of(job)) for job in given if runs_of(job)[0].key.packed == packed]


def test_trials_are_packed_and_confirmations_are_not(tmp_path: Path) -> None:
    workers = Workers(well)
    made = race_of(tmp_path, workers)
    assert sizes(workers.given)[:2] == [3, 3]
    assert {isinstance(job, Pack) for job in workers.given if not runs_of(job)[0].key.packed} == {False}
    assert {record.key.phase for record in made.values() if record.key.packed} == {TUNE}
    alone = raced(replace(PLAN, cards=(CARD,)), bowl)[0]
    assert sorted(replace(record.key, packed=False).id for record in made.values()) == sorted(alone)


@pytest.mark.parametrize(
    "end", [Apart(), Death("it was killed by SIGSEGV"), Death("it took too much", out_of_memory=True)], ids=str
)
def test_what_comes_to_nothing_together_is_made_alone(tmp_path: Path, end: object) -> None:
    """And only there it shows whose fault it was."""

    def fate(job: Job) -> object:
        is_guilty = GUILTY in [run.key.id for run in runs_of(job)]
        return (end if isinstance(job, Pack) else Death("alone, too", None, True)) if is_guilty else well(job)

    workers = Workers(fate)
    made = race_of(tmp_path, workers)
    assert sorted(sizes(workers.given))[:3] == [1, 1, 1]
    lost = [record for record in made.values() if not record.finished]
    assert [(record.id, record.status, record.message) for record in lost] == [(GUILTY, OUT_OF_MEMORY, "alone, too")]


def test_a_run_is_stopped_in_its_pack_and_the_others_are_packed_again(tmp_path: Path) -> None:
    workers = Workers(lambda job: None if workers.now < 3 else well(job))
    made = race_of(tmp_path, workers, lambda state: Stop(state.running[1][0].key.id))
    lost = [record for record in made.values() if not record.finished]
    assert [(record.status, record.message) for record in lost] == [(FAILED, STOPPED)]
    first, again, *_ = workers.given
    assert lost[0].key == runs_of(first)[1].key
    assert [run.key for run in runs_of(again)] == [run.key for run in runs_of(first) if run.key != lost[0].key]
    assert isinstance(again, Pack)


def test_a_stop_that_comes_as_a_pack_falls_apart_counts(tmp_path: Path) -> None:
    class Late(Workers):
        def stop(self, job: Job, reason: str) -> None:
            """Too late: the answer is on its way."""

    workers = Late(lambda job: None if workers.now < 3 else Apart() if isinstance(job, Pack) else well(job))
    made = race_of(tmp_path, workers, lambda state: Stop(state.running[1][0].key.id))
    assert [record.message for record in made.values() if not record.finished] == [STOPPED]
    assert [job for job in workers.given if isinstance(job, Run) and made[job.key.id].message == STOPPED] == []


def test_a_pack_may_take_the_time_of_all_its_runs_and_then_each_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, float] = {}

    def fate(job: Job) -> object:
        if GUILTY not in [run.key.id for run in runs_of(job)]:
            return well(job)
        begun.setdefault(id(job), workers.now)
        return Progress(int(workers.now - begun[id(job)]))

    workers = Workers(fate)
    monkeypatch.setattr(time, "monotonic", lambda: workers.now)
    made = race_of(tmp_path, workers, limits=Limits(seconds=10))
    lost = [record for record in made.values() if not record.finished]
    assert [(record.id, record.message) for record in lost] == [(GUILTY, "took longer than 0:10 (--timeout)")]
    together, alone = begun.values()
    assert [workers.stopped_at[0] - together, workers.stopped_at[-1] - alone] == pytest.approx([3 * 10, 10], abs=2)
