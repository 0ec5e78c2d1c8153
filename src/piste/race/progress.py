"""How far a race is and how long it will still take, from its plan, its records and the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.protocol import TIMED_STEPS, Plan, Records, best_trial, confirmations, timings, tuning
from piste.race.record import RunKey, RunRecord

# Runs side by side slow each other down, and the probe of the task ran almost alone.
_CROWDING = 1.3


@dataclass(frozen=True)
class Row:
    """One contender on one task.

    Args:
        card, contender: which.
        trials_made, trials: learning rates tried, and to be tried as far as is known.
        confirmed, seeds: confirmation runs made, and to be made (0 if no trial survived).
        lr: the best so far; None before a trial has finished.
        score: mean on the report split over the confirmed seeds, else the best on the validation split; nan if none.
        lost: runs that did not finish.
        timed, timings: timing passes made, and to be made (0 while nothing is chosen).
    """

    card: TaskCard
    contender: Contender
    trials_made: int
    trials: int
    confirmed: int
    seeds: int
    lr: float | None
    score: float
    lost: int
    timed: int = 0
    timings: int = 0

    @property
    def missing(self) -> int:
        """Runs still to be made, but for timing passes."""
        return self.trials - self.trials_made + self.seeds - self.confirmed


@dataclass
class Clock:
    """What runs have taken in this session, for the estimate of what is left.

    Args:
        workers: processes side by side.
        run_seconds: wall times of finished runs, for each task and contender.
    """

    workers: int
    run_seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, task: str, contender: str, seconds: float) -> None:
        """Take note of a finished run."""
        self.run_seconds.setdefault((task, contender), []).append(seconds)

    def expected(self, row: Row, steps: int) -> float:
        """Seconds of a run: as its like have taken, or as the probe of the task suggests."""
        own = self.run_seconds.get((row.card.name, row.contender.name))
        if own:
            return statistics.fmean(own)
        return row.card.run_seconds(steps) * (_CROWDING if self.workers > 1 else 1.0)

    def left(self, plan: Plan, rows: list[Row], started: Mapping[tuple[str, str], float]) -> float:
        """Seconds until the race is over.

        Args:
            plan: of the race.
            rows: as far as it is.
            started: for each task and contender, what is made of the runs that go on, in runs.
        """
        total = longest = alone = 0.0
        for row in rows:
            runs = max(0.0, row.missing - started.get((row.card.name, row.contender.name), 0.0))
            seconds = self.expected(row, plan.steps_of(row.card))
            total += runs * seconds
            longest = max(longest, min(runs, 1.0) * seconds)
            alone += (row.timings - row.timed) * row.card.run_seconds(min(TIMED_STEPS, plan.steps_of(row.card)))
        # The last run of a race keeps only one worker busy, and a timing pass is alone.
        return max(total / self.workers, longest) + alone


def rows(plan: Plan, records: Records) -> list[Row]:
    """The state of every contender on every task."""
    return [_row(plan, card, contender, records) for card in plan.cards for contender in plan.contenders]


def _row(plan: Plan, card: TaskCard, contender: Contender, records: Records) -> Row:
    state = tuning(plan, card, contender, records)
    trials = [records[key.id] for key in state.runs if key.id in records]
    confirmed: list[RunRecord] = []
    keys: list[RunKey] = []
    passes: list[RunKey] = []
    if state.best is not None:
        keys = confirmations(plan, card, contender, state.best.key.hyperparameters)
        passes = timings(plan, card, contender, state.best.key.hyperparameters)
        confirmed = [records[key.id] for key in keys if key.id in records]
    best = state.best or best_trial(card, trials)
    scores = [run.test_metric for run in confirmed if run.finished and run.test_metric is not None]
    return Row(
        card=card,
        contender=contender,
        trials_made=len(trials),
        trials=len(state.runs) + state.unknown,
        confirmed=len(confirmed),
        seeds=plan.seeds if state.missing or state.unknown else len(keys),
        lr=None if best is None else best.key.lr,
        score=statistics.fmean(scores) if scores else math.nan if best is None else best.curve.valid_metric[-1],
        lost=sum(not run.finished for run in (*trials, *confirmed)),
        timed=sum(key.id in records for key in passes),
        timings=len(passes),
    )


def part_of(step: int, steps: int) -> float:
    """How far a run is, from 0 to 1; 0 where nobody knows its length (a script's)."""
    return step / steps if steps else 0.0


def duration(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:07:30``."""
    whole = max(0, math.ceil(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
