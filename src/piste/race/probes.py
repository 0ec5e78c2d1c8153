"""Before a race: every task is tried, and contenders are measured where a budget has to be met."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from piste.race import record
from piste.race.budget import BudgetError, Pace
from piste.race.driver import InterruptedRaceError, lost
from piste.race.executors import Death, Event, Executor
from piste.race.inspection import TaskCard
from piste.race.limits import Limits, too_long
from piste.race.protocol import TUNE_SEED, Plan, tuning
from piste.race.record import RunRecord
from piste.race.script import Script
from piste.race.task import TaskError
from piste.race.worker import Inspect, Job, Progress, Refusal, Run

_POLL_SECONDS = 0.1
_PROBE_STEPS = 12  # of which the first five are warm-up


class WorkerError(Exception):
    """Carries the traceback of a worker process, shown with ``--debug``."""


def inspect_tasks(
    references: Sequence[str],
    device: str,
    executor: Executor,
    stopped: Callable[[], bool],
    limits: Limits | None = None,
    *,
    pack: bool = False,
) -> tuple[TaskCard, ...]:
    """Have the workers load and try every task, and where ``pack`` says so, whether its trials can be packed."""
    cards: dict[str, TaskCard] = {}
    longest = (limits or Limits()).longest(0.0)
    looks = [Inspect(reference, device, pack) for reference in references]
    for event, _ in _answers(looks, executor, stopped, longest):
        if isinstance(event.answer, Refusal):
            raise TaskError(event.answer.message) from WorkerError(event.answer.traceback)
        if isinstance(event.answer, Death):
            raise TaskError(
                f"{event.job.reference}: {event.answer.reason} while the task was tried; what it printed is in "
                f"{executor.logs}"
            )
        if isinstance(event.answer, TaskCard):
            cards[event.job.reference] = event.answer
    found = tuple(cards[reference] for reference in references)
    for card in found:
        same = [other.reference for other in found if other.name == card.name]
        if len(same) > 1:
            raise TaskError(f"tasks of one race need names of their own; {' and '.join(same)} are both {card.name!r}")
    return found


def measured_paces(
    plan: Plan, executor: Executor, stopped: Callable[[], bool], limits: Limits | None = None
) -> dict[tuple[str, str], Pace]:
    """A few steps of every contender on every task, side by side as the runs will be."""
    probes = [
        Run(
            card.reference,
            contender,
            # Of no machine: unlike timing passes, these are made everywhere.
            replace(
                plan.key(card, contender, {"lr": contender.lr_center}, TUNE_SEED, record.TIME, _PROBE_STEPS), machine=""
            ),
        )
        for card in plan.cards
        for contender in plan.contenders
    ]
    cards = {card.reference: card for card in plan.cards}
    paces: dict[tuple[str, str], Pace] = {}
    for event, _ in _answers(probes, executor, stopped, (limits or Limits()).longest(0.0)):
        if isinstance(event.answer, Refusal):
            raise TaskError(event.answer.message)
        if isinstance(event.answer, (RunRecord, Death)) and isinstance(event.job, Run):
            card = cards[event.job.reference]
            paces[card.reference, event.job.contender.name] = _pace(event.answer, card)
    return paces


def first_runs(
    plan: Plan,
    script: Script,
    executor: Executor,
    stopped: Callable[[], bool],
    limits: Limits,
    left: float,
    keep: Callable[[RunRecord], None],
) -> list[tuple[RunRecord, float]]:
    """The first trial of every contender, and its seconds: how long runs of a script are, only a run can tell.

    Args:
        plan: of the race; its first trials are these, however many trials it has.
        script: what is run.
        executor: the workers.
        stopped: whether the race was asked to end.
        limits: what a run may take.
        left: seconds of the budget.
        keep: called with each of them.

    Raises:
        BudgetError: they take longer than that.
    """
    (card,) = plan.cards
    runs = [Run(card.reference, who, tuning(plan, card, who, {}).runs[0], script) for who in plan.contenders]
    made: list[tuple[RunRecord, float]] = []
    deadline = time.monotonic() + left

    def over() -> bool:
        if time.monotonic() > deadline:
            raise BudgetError(
                f"the first runs of {card.name} did not end within the budget ({len(made)} of {len(runs)} did): "
                "allow more time, name fewer optimizers, or let the script do less"
            )
        return stopped()

    for event, seconds in _answers(runs, executor, over, limits.longest(None)):
        if isinstance(event.answer, Refusal):
            raise TaskError(event.answer.message)
        if isinstance(event.job, Run) and isinstance(event.answer, (RunRecord, Death)):
            run = event.answer if isinstance(event.answer, RunRecord) else lost(event.job, event.answer)
            keep(run)
            made.append((run, seconds))
    return made


def _answers(
    jobs: Sequence[Job], executor: Executor, stopped: Callable[[], bool], longest: float
) -> Iterator[tuple[Event, float]]:
    """Have all these jobs done, each in ``longest`` seconds; what ends each of them, and its seconds."""
    waiting, unanswered = list(jobs), len(jobs)
    overdue = _Overdue(executor, longest)
    while unanswered:
        while waiting and executor.idle:
            executor.submit(waiting.pop(0))
        for event in executor.events(_POLL_SECONDS):
            seconds = overdue.note(event)
            if not isinstance(event.answer, Progress):
                unanswered -= 1
                yield event, seconds
        overdue.end()
        if stopped():
            raise InterruptedRaceError


class _Overdue:
    """Ends what takes too long before the race: a task may hang where it is only tried."""

    def __init__(self, executor: Executor, longest: float) -> None:
        self.executor = executor
        self.longest = longest
        self.since: dict[int, float] = {}

    def note(self, event: Event) -> float:
        """Seconds since the job began."""
        now = time.monotonic()
        if not isinstance(event.answer, Progress):
            return now - self.since.pop(id(event.job), now)
        if not event.answer.step or id(event.job) not in self.since:
            self.since[id(event.job)] = now
        return now - self.since[id(event.job)]

    def end(self) -> None:
        for job in self.executor.jobs:
            if time.monotonic() - self.since.get(id(job), math.inf) > self.longest:
                self.executor.stop(job, too_long(self.longest))


def _pace(answer: RunRecord | Death, card: TaskCard) -> Pace:
    """Of a probe; where it was lost, as its runs will be, what the probe of the task says."""
    if isinstance(answer, Death) or math.isnan(answer.cost.mean_step_seconds):
        return Pace(0.0, card.step_seconds)
    return Pace(answer.cost.compile_seconds, answer.cost.mean_step_seconds)
