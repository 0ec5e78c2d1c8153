"""Keeps worker processes busy until no run of a race is missing.

It never runs a task's code itself; that happens in worker processes, so that whatever a task does ends a run and
not the race.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from piste.race import record
from piste.race.attempt import new_record
from piste.race.contenders import ContenderError
from piste.race.executors import Death, Executor
from piste.race.limits import Limits, too_long
from piste.race.packing import jobs, runs_of
from piste.race.progress import Clock, Ledger, Row, duration, part_of
from piste.race.protocol import Plan
from piste.race.record import RunKey, RunRecord
from piste.race.result import StudyResult
from piste.race.script import Script
from piste.race.store import Store
from piste.race.task import TaskError
from piste.race.wishes import STOPPED, Add, Stop, Wish
from piste.race.words import count
from piste.race.worker import Apart, Job, Pack, Packed, Progress, Refusal, Run

_POLL_SECONDS = 0.1
# After a wish to stop, runs are waited for that are over in so many seconds, or in such a part of what they have taken.
_GRACE_SECONDS = 10.0
_GRACE_PART = 0.1


class InterruptedRaceError(Exception):
    """The race was asked to stop; all finished runs are kept, and ``result`` is what they say, if there are any."""

    def __init__(self, result: StudyResult | None = None) -> None:
        super().__init__("the race was asked to stop")
        self.result = result


@dataclass
class State:
    """A race as it stands, for whoever shows it."""

    plan: Plan
    rows: list[Row]
    running: list[tuple[Run, int]]
    started: float
    seconds_left: float

    @property
    def made(self) -> int:
        """Runs that are there."""
        return sum(row.trials_made + row.confirmed + row.timed for row in self.rows)

    @property
    def total(self) -> int:
        """Runs there will be, as far as is known."""
        return sum(row.trials + row.seeds + row.timings for row in self.rows)


class View(Protocol):
    """Shows a race while it goes."""

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""

    def measuring(self, words: str) -> None:
        """Something is measured for the budget, such as ``a few steps of 3 contenders``."""

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""

    def tick(self, state: State) -> None:
        """Time has passed."""

    def wishes(self) -> Sequence[Wish]:
        """What people have asked for since the last call."""

    def said(self, words: str) -> None:
        """What became of a wish."""

    def end(self) -> None:
        """No more runs, for whatever reason."""


class Driver:
    """Keeps the workers busy until no run is missing.

    Args:
        plan: the race.
        store: where its runs are kept.
        view: shows it, and brings people's wishes.
        executor: the workers.
        stopped: whether it was asked to end.
        script: what is raced in the place of tasks.
        limits: what a run may take.
        enlarged: the plan with one more optimizer, which is kept for ``--resume``; raises ``ContenderError``.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        view: View,
        executor: Executor,
        stopped: Callable[[], bool],
        script: Script | None = None,
        limits: Limits | None = None,
        enlarged: Callable[[Plan, str], Plan] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.plan = plan
        self.enlarged = enlarged
        self.script = script
        self.store = store
        self.view = view
        self.executor = executor
        self.stopped = stopped
        self.records: dict[str, RunRecord] = store.load()
        self.clock = Clock(executor.width)
        self.started = time.monotonic()
        self.since: dict[str, float] = {}
        self.begun: set[str] = set()
        self.step: dict[str, int] = {}
        self.alone: set[str] = set()  # runs that are made alone now, whatever their keys say
        self.unwanted: set[str] = set()  # runs that were asked to be stopped
        self._look()

    def run(self) -> None:
        try:
            self.view.begin(self._state(), self.store.damaged)
            while self._submit():
                self._hear()
                self._end_overdue()
                for wish in self.view.wishes():
                    self.view.said(self._stop(wish) if isinstance(wish, Stop) else self._add(wish))
                self.view.tick(self._state())
                if self.stopped():
                    self._wind_down()
                    raise InterruptedRaceError
        finally:
            self.view.end()

    def _submit(self) -> bool:
        """Give idle workers what is missing; whether anything is being worked on."""
        running = self._running()
        timed = any(run.key.phase == record.TIME for run in running)
        busy = {run.key.id for run in running}
        for job in jobs(self.missing, busy, self.alone, self.executor.width):
            runs = runs_of(job)
            times = runs[0].key.phase == record.TIME
            if not self.executor.idle or timed or (times and busy):  # a timing pass is alone
                break
            timed = times
            self.executor.submit(job)
            for run in runs:
                self.since[run.key.id] = time.monotonic()
                self.step[run.key.id] = 0
                self.begun.discard(run.key.id)
                busy.add(run.key.id)
        return bool(busy or self.missing)  # without a worker for them, they wait for one

    def _hear(self) -> None:
        for event in self.executor.events(_POLL_SECONDS):
            assert isinstance(event.job, (Run, Pack))
            self._handle(event.job, event.answer)

    def _end_overdue(self) -> None:
        for job in self.executor.jobs:
            runs = runs_of(job)
            first = runs[0].key.id
            # One after the other they may take so long; a pack that takes longer is made again one by one.
            longest = len(runs) * self.limits.longest(self._expected(runs[0]))
            if first in self.begun and time.monotonic() - self.since[first] > longest:
                self.executor.stop(job, too_long(longest))

    def _wind_down(self) -> None:
        """Start nothing more, and wait for runs that are nearly over; the others will be made again."""
        nearly = [job for job in self.executor.jobs if self._is_nearly_over(job)]
        awaited = {run.key.id: self._seconds_to_go(job) for job in nearly for run in runs_of(job)}
        deadline = time.monotonic() + max(_GRACE_SECONDS, 2 * max(awaited.values(), default=0.0))
        self.view.said(_winding_down(list(awaited.values()), len(self._running()) - len(awaited)))
        while time.monotonic() < deadline and any(run.key.id in awaited for run in self._running()):
            self._hear()
            self.view.tick(self._state())

    def _is_nearly_over(self, job: Job) -> bool:
        """Whether breaking it off would lose more than waiting costs."""
        gone = time.monotonic() - self.since[runs_of(job)[0].key.id]
        return self._seconds_to_go(job) < max(_GRACE_SECONDS, _GRACE_PART * gone)

    def _running(self) -> list[Run]:
        return [run for job in self.executor.jobs for run in runs_of(job)]

    def _expected(self, run: Run) -> float | None:
        """Seconds of a run as its like have taken; None where nothing is known of them."""
        same = (row for row in self.rows if (row.card.name, row.contender.name) == (run.key.task, run.key.contender))
        return self.clock.expected(next(same), run.key.steps) or None

    def _seconds_to_go(self, job: Job) -> float:
        runs = runs_of(job)
        key = runs[0].key
        gone = time.monotonic() - self.since[key.id]
        done = part_of(self.step[key.id], key.steps)
        if done:
            return gone / done - gone
        expected = self._expected(runs[0])
        return math.inf if expected is None else max(0.0, len(runs) * expected - gone)

    def _handle(self, job: Run | Pack, answer: object) -> None:
        runs = runs_of(job)
        if isinstance(answer, Progress):
            for run in runs:
                self._note(run.key.id, answer.step)
        elif isinstance(answer, Refusal):
            raise TaskError(answer.message)
        elif isinstance(answer, Packed):
            for made in answer.records:
                self._keep(made, share=len(runs))
        elif isinstance(job, Pack):
            self._take_apart(runs, answer)
        elif isinstance(answer, Death):
            self._keep(lost(job, answer))
        else:
            assert isinstance(answer, RunRecord)
            self._keep(answer)

    def _note(self, run: str, step: int) -> None:
        if not step or run not in self.begun:
            self.since[run] = time.monotonic()
            self.begun.add(run)
        self.step[run] = step

    def _take_apart(self, runs: Sequence[Run], answer: object) -> None:
        """A pack came to nothing: one that was to be stopped stays so, and the others are made again.

        Where it ended by itself, or took too long, they are made one by one, which shows which of them it was.
        """
        assert isinstance(answer, (Apart, Death))
        unwanted = [run for run in runs if run.key.id in self.unwanted]
        if isinstance(answer, Apart) or not unwanted:
            self.alone.update(run.key.id for run in runs)
        death = Death(STOPPED, answer.machine if isinstance(answer, Death) else None)
        for run in unwanted:
            self._keep(lost(run, death), share=len(runs))

    def _keep(self, made: RunRecord, share: int = 1) -> None:
        """Store a record, of a run that shared its worker with so many."""
        key = made.key
        self.store.add(made)
        self.records[key.id] = made
        if key.phase in (record.TUNE, record.CONFIRM):
            self.clock.add(key.task, key.contender, (time.monotonic() - self.since[key.id]) / share)
        self._look(key)
        self.view.finished(self._state(), made)

    def _stop(self, wish: Stop) -> str:
        for job in self.executor.jobs:
            for run in runs_of(job):
                if run.key.id == wish.run:
                    self.unwanted.add(run.key.id)
                    self.executor.stop(job, STOPPED)
                    return f"stopped: {run.key.contender} on {run.key.task}, lr {run.key.lr:g}, seed {run.key.seed}"
        return "nothing to stop: that run is over"

    def _add(self, wish: Add) -> str:
        if self.enlarged is None:
            return "this race cannot grow"
        before, known = self._state().total, len(self.plan.contenders)
        try:
            self.plan = self.enlarged(self.plan, wish.optimizer)
        except ContenderError as error:
            return f"not added: {error}"
        self._look()
        names = " and ".join(contender.name for contender in self.plan.contenders[known:])
        return f"added: {names}; {self._state().total - before} more runs"

    def _look(self, changed: RunKey | None = None) -> None:
        """What is there and what is missing, after a new record of this run or, without one, anew."""
        if changed is None:
            self.ledger = Ledger(self.plan, self.records)
        else:
            self.ledger.changed(changed)
        self.rows = self.ledger.rows
        self.missing = [Run(card.reference, who, key, self.script) for card, who, key in self.ledger.next_runs()]

    def _state(self) -> State:
        running = [(run, self.step[run.key.id]) for run in self._running()]
        done: dict[tuple[str, str], float] = {}
        for run, step in running:
            place = run.key.task, run.key.contender
            done[place] = done.get(place, 0.0) + part_of(step, run.key.steps)
        return State(self.plan, self.rows, running, self.started, self.clock.left(self.plan, self.rows, done))


def lost(run: Run, death: Death) -> RunRecord:
    """What is written down of a run that ended with its worker."""
    status = record.OUT_OF_MEMORY if death.out_of_memory else record.FAILED
    return new_record(run.key, status, death.reason, machine=death.machine)


def _winding_down(awaited: Sequence[float], others: int) -> str:
    """What becomes of the runs that are going on, in one line."""
    again = [f"{count(others, 'run')} will be made again when the race goes on"] if others else []
    if not awaited:
        return "; ".join(["stopping", *again])
    nearly = f"stopping, once {count(len(awaited), 'run')} nearly over {'is' if len(awaited) == 1 else 'are'} finished"
    return "; ".join([f"{nearly} (about {duration(max(awaited))})", *again, "Ctrl-C again stops at once"])


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or request to end) into a wish that the driver looks at; a second one acts at once."""
    wished = threading.Event()

    def wish(number: int, frame: FrameType | None) -> None:
        if wished.is_set():
            raise KeyboardInterrupt
        wished.set()

    if threading.current_thread() is not threading.main_thread():
        yield wished.is_set
        return
    before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wished.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
