"""What people may ask of a race while it goes: to end a run, to let one more optimizer in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_race_protocol import Lanes, bowl, plan_for, raced, record_of
from test_race_sins import complete, evidence_of, only

from piste.race import lints
from piste.race.contenders import ContenderError
from piste.race.driver import Driver, InterruptedRaceError, State
from piste.race.executors import Death, Event
from piste.race.planning import with_optimizer
from piste.race.protocol import Plan
from piste.race.record import FAILED, TIME, RunRecord
from piste.race.settings import Settings
from piste.race.store import Store
from piste.race.study import _with_what_joined
from piste.race.wishes import STOPPED, Add, Stop, Wish, with_optimizers
from piste.race.worker import Run

SETTINGS = Settings(("line",), ("adamw", "sgd_momentum"), (), None, 2, 3, "cpu")


class Asking:
    """A view that asks for what follows from the first state it sees, and hears what becomes of it."""

    def __init__(self, *asked: Callable[[State], Wish]) -> None:
        self.asked = list(asked)
        self.heard: list[str] = []

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        self.state = state

    def finished(self, state: State, made: RunRecord) -> None:
        pass

    def tick(self, state: State) -> None:
        self.state = state

    def end(self) -> None:
        pass

    def wishes(self) -> list[Wish]:
        if not self.state.running:
            return []
        asked, self.asked = self.asked, []
        return [wish(self.state) for wish in asked]

    def said(self, words: str) -> None:
        self.heard.append(words)


class Worker:
    """One worker, which needs three looks for a run and dies when it is stopped."""

    width = 1

    def __init__(self) -> None:
        self.jobs: list[Run] = []
        self.looks = 0
        self.reason = ""
        self.made: list[str] = []

    @property
    def idle(self) -> int:
        return 1 - len(self.jobs)

    def submit(self, job: Run) -> None:
        self.jobs.append(job)
        self.made.append(job.key.id)
        self.looks = 0

    def stop(self, job: Run, reason: str) -> None:
        assert job in self.jobs
        self.reason = reason

    def events(self, timeout: float) -> list[Event]:
        self.looks += 1
        (job,) = self.jobs
        if self.looks < 3 and not self.reason:
            return []
        answer = Death(self.reason) if self.reason else record_of(job.key, bowl(job.key))
        self.jobs, self.reason = [], ""
        return [Event(job, answer)]


def raced_with(folder: Path, *asked: Callable[[State], Wish]) -> tuple[Driver, Asking, Worker, Store]:
    store, view, worker = Store(folder / "race"), Asking(*asked), Worker()

    def enlarged(plan: Plan, optimizer: str) -> Plan:
        return with_optimizer(replace(SETTINGS, optimizers=_names(plan)), plan, optimizer)[1]

    plan = plan_for(trials=2, seeds=2)
    with store.writing():
        driver = Driver(plan, store, view, worker, lambda: False, enlarged=enlarged)  # type: ignore[arg-type]
        driver.run()
    return driver, view, worker, store


@pytest.mark.parametrize(
    ("gone", "step", "finished", "words"),
    [
        (3.9, 50, True, "stopping, once 1 run nearly over is finished (about 0:04); Ctrl-C again stops at once"),
        (1000.0, 95, True, "stopping, once 1 run nearly over is finished (about 0:53); Ctrl-C again stops at once"),
        (1000.0, 50, False, "stopping; 1 run will be made again when the race goes on"),
        (12.0, 0, False, "stopping; 1 run will be made again when the race goes on"),
    ],
)
def test_who_wants_to_stop_waits_only_for_what_is_nearly_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: float, step: int, finished: bool, words: str
) -> None:
    """Of a hundred steps of ten seconds, as the task promises; the first run has made so many in so many seconds."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)  # a busy machine would add to the seconds that are said
    store, view, worker = Store(tmp_path / "race"), Asking(), Worker()
    plan = plan_for(trials=2, seeds=2)
    plan = replace(plan, cards=(replace(plan.cards[0], step_seconds=10.0),))

    def stopped() -> bool:
        (job,) = worker.jobs
        driver.since[job.key.id] = now - gone
        driver.step[job.key.id] = step
        return True

    with store.writing():
        driver = Driver(plan, store, view, worker, stopped)  # type: ignore[arg-type]
        with pytest.raises(InterruptedRaceError):
            driver.run()
    assert len(driver.records) == finished
    assert view.heard == [words]


def test_who_joined_is_still_told_when_the_race_is_resumed(tmp_path: Path) -> None:
    store = Store(tmp_path / "race")
    settings, grown = with_optimizer(SETTINGS, plan_for(trials=2), "lion")
    with store.writing():
        store.write_study({"settings": asdict(settings), "plan": grown.to_json()})
    (remark,) = grown.remarks
    resumed = plan_for("adamw,sgd_momentum,lion", trials=2)
    assert _with_what_joined(replace(settings, workers=7), resumed, store).remarks == (remark,)
    assert _with_what_joined(settings, grown, store).remarks == (remark,)
    assert _with_what_joined(replace(settings, trials=3), resumed, store).remarks == ()


def _names(plan: Plan) -> tuple[str, ...]:
    return tuple(contender.optimizer for contender in plan.contenders)


def running(state: State) -> Wish:
    return Stop(state.running[0][0].key.id)


def test_a_stopped_run_is_an_outcome_and_is_not_made_again(tmp_path: Path) -> None:
    driver, view, worker, store = raced_with(tmp_path, running, lambda state: Stop("0" * 20))
    lost = [record for record in driver.records.values() if not record.finished]
    assert [(record.status, record.message) for record in lost] == [(FAILED, STOPPED)]
    assert view.heard[0].startswith("stopped: adamw+one_cycle on line, lr 0.002, seed 0")
    assert view.heard[1] == "nothing to stop: that run is over"
    assert len(worker.made) == len(set(worker.made)) == 8
    assert store.load()[lost[0].id].message == STOPPED


def test_an_optimizer_that_joins_gets_the_trials_and_seeds_of_the_others(tmp_path: Path) -> None:
    driver, view, worker, _ = raced_with(tmp_path, lambda state: Add("lion"))
    assert _names(driver.plan) == ("adamw", "sgd_momentum", "lion")
    assert view.heard == ["added: lion+one_cycle; 4 more runs"]
    counts = {name: sum(run.key.optimizer == name for run in driver.records.values()) for name in _names(driver.plan)}
    assert set(counts.values()) == {4}
    assert len(worker.made) == len(set(worker.made))
    assert {run.key.seed for run in driver.records.values() if run.key.optimizer == "lion"} == {0, 1, 2}
    assert any("lion+one_cycle joined while the race was going on" in remark for remark in driver.plan.remarks)


def test_who_joins_during_a_timing_pass_waits_for_its_end(tmp_path: Path) -> None:
    plan, lanes, store = plan_for(trials=2, seeds=2, timing=1), Lanes(), Store(tmp_path / "race")
    with store.writing():
        for record in raced(plan, bowl)[0].values():
            if record.key.phase != TIME:
                store.add(record)
        driver = Driver(
            *(plan, store, Asking(), lanes, lambda: False),  # type: ignore[arg-type]
            enlarged=lambda plan, name: with_optimizer(SETTINGS, plan, name)[1],
        )
        driver._submit()
        driver._add(Add("lion"))
        driver._submit()
    assert driver.missing[0].key.optimizer == "lion"
    assert [job.key.phase for job in lanes.jobs] == [TIME]


@pytest.mark.parametrize(("name", "words"), [("lino", "did you mean lion"), ("adamw", "'adamw' is given twice")])
def test_who_cannot_join_is_told_why_and_the_race_goes_on(tmp_path: Path, name: str, words: str) -> None:
    driver, view, worker, _ = raced_with(tmp_path, lambda state: Add(name))
    assert _names(driver.plan) == ("adamw", "sgd_momentum")
    assert view.heard[0].startswith("not added: ")
    assert words in view.heard[0]
    assert len(worker.made) == 8


def test_who_joins_is_searched_as_if_there_from_the_start() -> None:
    """With a budget, the trials are those that were planned, not those that were asked for."""
    plan = plan_for(trials=12)
    settings, grown = with_optimizer(SETTINGS, plan, "lion")
    assert settings.optimizers == ("adamw", "sgd_momentum", "lion")
    assert grown.contenders == plan_for("adamw,sgd_momentum,lion", trials=12).contenders
    assert grown.contenders[:2] == plan.contenders
    assert json.loads(json.dumps(asdict(settings)))["optimizers"][-1] == "lion"
    with pytest.raises(ContenderError):
        with_optimizer(SETTINGS, plan, "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("piste race digits", "piste race digits --optimizers a,b"),
        ("piste race --optimizers a digits --seeds 2", "piste race digits --seeds 2 --optimizers a,b"),
        ("piste race --optimizers=a 'my task.py'", "piste race 'my task.py' --optimizers a,b"),
        ("piste race --script x.py -- --optimizers a", "piste race --script x.py --optimizers a,b -- --optimizers a"),
    ],
)
def test_the_command_of_the_report_repeats_what_was_raced_in_the_end(before: str, after: str) -> None:
    assert with_optimizers(before, ("a", "b")) == after


def test_the_race_holds_runs_that_somebody_stopped_against_itself() -> None:
    stop = only("adamw", lambda run: replace(run, status=FAILED, message=STOPPED))
    words = lints.stopped_early(evidence_of(change=lambda run: stop(complete(run))))
    assert "of adamw+one_cycle stopped by hand, which counts as lost" in words
