"""How far a race is and how long it will still take, from its plan, its records and the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.protocol import TIMED_STEPS, Asked, Lane, Plan, Records, best_trial, lane, lanes, next_of
from piste.race.record import RunKey

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
    return Ledger(plan, records).rows


class Ledger:
    """How far a race is, kept from run to run: what one says concerns one contender on one task.

    Args:
        plan: of the race.
        records: by id; whoever adds one says so by ``changed``.
    """

    def __init__(self, plan: Plan, records: Records) -> None:
        self.plan, self.records = plan, records
        self.lanes = {(each.card.name, each.contender.name): each for each in lanes(plan, records)}
        self._rows = {place: _row(plan, each, records) for place, each in self.lanes.items()}

    @property
    def rows(self) -> list[Row]:
        """The state of every contender on every task."""
        return list(self._rows.values())

    def next_runs(self) -> list[Asked]:
        """The runs that can be made now, in the order to make them."""
        return next_of(self.lanes.values(), self.records)

    def changed(self, key: RunKey) -> None:
        """A record of this run has come."""
        place = key.task, key.contender
        old = self.lanes[place]
        self.lanes[place] = lane(self.plan, old.card, old.contender, self.records)
        self._rows[place] = _row(self.plan, self.lanes[place], self.records)


def _row(plan: Plan, known: Lane, records: Records) -> Row:
    state, card = known.search, known.card
    trials = [records[key.id] for key in state.runs if key.id in records]
    confirmed = [records[key.id] for key in known.confirmations if key.id in records]
    best = state.best or best_trial(card, trials)
    scores = [run.test_metric for run in confirmed if run.finished and run.test_metric is not None]
    return Row(
        card=card,
        contender=known.contender,
        trials_made=len(trials),
        trials=len(state.runs) + state.unknown,
        confirmed=len(confirmed),
        seeds=plan.seeds if state.missing or state.unknown else len(known.confirmations),
        lr=None if best is None else best.key.lr,
        score=statistics.fmean(scores) if scores else math.nan if best is None else best.curve.valid_metric[-1],
        lost=sum(not run.finished for run in (*trials, *confirmed)),
        timed=sum(key.id in records for key in known.timings),
        timings=len(known.timings),
    )


def part_of(step: int, steps: int) -> float:
    """How far a run is, from 0 to 1; 0 where nobody knows its length (a script's)."""
    return step / steps if steps else 0.0


def duration(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:07:30``."""
    whole = max(0, math.ceil(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
