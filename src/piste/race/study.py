"""The driver of a race: looks at the tasks, makes the runs that are missing, keeps each, and reports.

It never runs a task's code itself; that happens in worker processes, so that whatever a task does ends a run and
not the race.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from piste.race import environment, progress, record
from piste.race.contenders import make_contenders
from piste.race.executor import Death, Executor
from piste.race.inspection import TaskCard
from piste.race.progress import Clock, Row
from piste.race.protocol import Plan, next_runs
from piste.race.record import RunRecord, StudyResult
from piste.race.standings import study_result
from piste.race.store import Store, StoreError
from piste.race.task import BUILT_IN, TaskError, split_reference
from piste.race.training import new_record
from piste.race.worker import Inspect, Progress, Refusal, Run

# Each worker process holds its own Python and torch, some 300 MB; more of them only when asked for.
MOST_WORKERS = 16
_POLL_SECONDS = 0.1


class InterruptedRaceError(Exception):
    """The race was asked to stop; all finished runs are kept."""


class DeviceError(ValueError):
    """The device does not exist here."""


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Args:
        tasks: built-in names, or ``FILE.py`` or ``FILE.py:name``.
        optimizers: presets, or ``torch.AdamW`` for a class of ``torch.optim``.
        schedules: crossed with the optimizers; empty for each preset's own.
        steps: of a run; None for each task's own.
        trials: learning rates tried for each contender.
        seeds: confirmation runs for each contender.
        device: ``"auto"``, ``"cpu"``, ``"cuda:0"``, …
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    schedules: tuple[str, ...]
    steps: int | None
    trials: int
    seeds: int
    device: str

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """Back from plain data."""
        lists = {name: tuple(content[name]) for name in ("tasks", "optimizers", "schedules")}
        return cls(**{**content, **lists})


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
        return sum(row.trials_made + row.confirmed for row in self.rows)

    @property
    def total(self) -> int:
        """Runs there will be, as far as is known."""
        return sum(row.trials + row.seeds for row in self.rows)


class View(Protocol):
    """Shows a race while it goes."""

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""

    def tick(self, state: State) -> None:
        """Time has passed."""

    def end(self) -> None:
        """No more runs, for whatever reason."""


def race(settings: Settings, store: Store, view: View, command: str, workers: int | None = None) -> StudyResult:
    """Make all runs of a race that the store does not hold yet.

    Args:
        settings: what to race.
        store: where runs are kept; held for the time of the race.
        view: shows the race.
        command: what repeats this race, for the report.
        workers: processes side by side; None for one a core on the CPU, one on an accelerator.

    Raises:
        ContenderError, TaskError, DeviceError: a setting is wrong; nothing has been written.
        StoreError: the store cannot be used, or no longer; finished runs are kept.
        ExecutorError: worker processes cannot be started here.
        InterruptedRaceError: Ctrl-C or a signal to end; finished runs are kept.
    """
    contenders = make_contenders(settings.optimizers, settings.schedules)
    device = resolve_device(settings.device)
    references = [_absolute(task) for task in settings.tasks]
    workers = workers or _default_workers(device)
    with _stop_signals() as stopped, store.writing(), Executor(workers, store.logs) as executor:
        view.looking(settings.tasks)
        cards = _inspect(references, device, executor, stopped)
        plan = Plan(cards, contenders, settings.steps, settings.trials, settings.seeds, device, environment.versions())
        created = environment.now()
        kept = {"settings": asdict(settings), "plan": plan.to_json()}
        about = {
            "title": title(plan),
            "created": created,
            "command": command,
            "workers": workers,
            "machine": environment.machine(device),
        }
        store.write_study({**kept, **about})
        driver = _Driver(plan, store, view, executor, stopped)
        driver.run()
    return study_result(plan, driver.records, **about)  # type: ignore[arg-type]


def stored_settings(store: Store) -> Settings:
    """What the last race in a directory was asked for.

    Raises:
        StoreError: there is none, or its file is damaged.
    """
    study = store.read_study()
    with _taken_apart(store):
        return Settings.from_json(study["settings"])


def stored_result(store: Store) -> StudyResult:
    """The result of the last race in a directory, from what is kept there.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    study = store.read_study()
    with _taken_apart(store):
        about = {name: study[name] for name in ("title", "created", "command", "workers", "machine")}
        plan = Plan.from_json(study["plan"])
    return study_result(plan, store.load(set_aside=False), **about)


@contextmanager
def _taken_apart(store: Store) -> Iterator[None]:
    """Turn what goes wrong with a study of another shape into one message."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.study} does not hold a race as this version writes it ({type(error).__name__}: {error}); "
            "repeat the command that started the race"
        ) from error


def resolve_device(name: str) -> str:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        DeviceError: there is no such device here.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a number comes back: "meta" can make tensors, but knows no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise DeviceError(f"device {name!r} cannot be used here: {reason}") from error
    return {"cuda": "cuda:0", "cpu:0": "cpu"}.get(str(device), str(device))


def title(plan: Plan) -> str:
    """``4 contenders on char_transformer and digits``."""
    names = " and ".join(card.name for card in plan.cards)
    count = len(plan.contenders)
    return f"{count} contender{'s' * (count != 1)} on {names}"


class _Driver:
    """Keeps the workers busy until no run is missing."""

    def __init__(self, plan: Plan, store: Store, view: View, executor: Executor, stopped: Callable[[], bool]) -> None:
        self.plan = plan
        self.store = store
        self.view = view
        self.executor = executor
        self.stopped = stopped
        self.records: dict[str, RunRecord] = store.load()
        self.clock = Clock(len(executor.lanes))
        self.started = time.monotonic()
        self.since: dict[str, float] = {}
        self.step: dict[str, int] = {}
        self._look()

    def run(self) -> None:
        self.view.begin(self._state(), self.store.damaged)
        try:
            while self._submit():
                for event in self.executor.events(_POLL_SECONDS):
                    assert isinstance(event.job, Run)
                    self._handle(event.job, event.answer)
                self.view.tick(self._state())
                if self.stopped():
                    raise InterruptedRaceError
        finally:
            self.view.end()

    def _submit(self) -> bool:
        """Give idle workers what is missing; whether anything is being worked on."""
        busy = {job.key.id for job in self.executor.jobs if isinstance(job, Run)}
        for run in self.missing:
            if not self.executor.idle:
                break
            if run.key.id not in busy:
                self.executor.submit(run)
                self.since[run.key.id] = time.monotonic()
                self.step[run.key.id] = 0
                busy.add(run.key.id)
        return bool(busy)

    def _handle(self, job: Run, answer: object) -> None:
        key = job.key
        if isinstance(answer, Progress):
            self.step[key.id] = answer.step
            return
        if isinstance(answer, Refusal):
            raise TaskError(answer.message)
        if isinstance(answer, Death):
            answer = new_record(key, record.FAILED, answer.reason)
        assert isinstance(answer, RunRecord)
        self.store.add(answer)
        self.records[key.id] = answer
        self.clock.add(key.task, key.contender, time.monotonic() - self.since[key.id])
        self._look()
        self.view.finished(self._state(), answer)

    def _look(self) -> None:
        """Derive from the records what is there and what is missing; only a new record changes either."""
        self.rows = progress.rows(self.plan, self.records)
        self.missing = [Run(card.reference, who, key) for card, who, key in next_runs(self.plan, self.records)]

    def _state(self) -> State:
        running = [(job, self.step[job.key.id]) for job in self.executor.jobs if isinstance(job, Run)]
        done = {(job.key.task, job.key.contender): step / job.key.steps for job, step in running}
        return State(self.plan, self.rows, running, self.started, self.clock.left(self.plan, self.rows, done))


def _inspect(
    references: Sequence[str], device: str, executor: Executor, stopped: Callable[[], bool]
) -> tuple[TaskCard, ...]:
    """Have the workers load and try every task."""
    waiting = [Inspect(reference, device) for reference in references]
    cards: dict[str, TaskCard] = {}
    while len(cards) < len(references):
        while waiting and executor.idle:
            executor.submit(waiting.pop(0))
        for event in executor.events(_POLL_SECONDS):
            if isinstance(event.answer, Refusal):
                raise TaskError(event.answer.message) from WorkerError(event.answer.traceback)
            if isinstance(event.answer, Death):
                raise TaskError(
                    f"{event.job.reference}: {event.answer.reason} while the task was tried; what it printed is in "
                    f"{executor.logs}"
                )
            if isinstance(event.answer, TaskCard):
                cards[event.job.reference] = event.answer
        if stopped():
            raise InterruptedRaceError
    found = tuple(cards[reference] for reference in references)
    for card in found:
        same = [other.reference for other in found if other.name == card.name]
        if len(same) > 1:
            raise TaskError(f"tasks of one race need names of their own; {' and '.join(same)} are both {card.name!r}")
    return found


class WorkerError(Exception):
    """Carries the traceback of a worker process, shown with ``--debug``."""


def _absolute(task: str) -> str:
    """A task's reference, valid in every directory."""
    if task in BUILT_IN:
        return task
    path, name = split_reference(task)
    return f"{Path(path).resolve()}{':' + name if name else ''}"


def _default_workers(device: str) -> int:
    return min(environment.usable_cores(), MOST_WORKERS) if device == "cpu" else 1


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
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
