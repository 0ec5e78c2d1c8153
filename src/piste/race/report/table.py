"""The full table of a task, and how many digits its numbers have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from piste.race import words
from piste.race.result import Standing, TaskResult

from .card import each_weight
from .palette import Look


@dataclass(frozen=True)
class Row:
    """A contender in the full table."""

    name: str
    look: Look
    lr: str
    edge: str
    score: str
    score_interval: str
    difference: str
    difference_interval: str
    tied: str
    tied_group: bool
    taken: bool
    step_time: str
    optimizer_share: str
    state: str
    state_each: str
    peak: str
    gradient_evaluations: str
    trials: str
    diverged: bool
    failures: list[str]


def row_of(
    standing: Standing,
    choice: Standing | None,
    look: Look,
    places: int,
    difference_places: int,
    task: TaskResult,
) -> Row:
    """The words and numbers of one contender."""
    cost = standing.cost
    leader = standing is task.standings[0]
    known = math.isfinite(standing.difference) and not leader
    share = cost.mean_optimizer_seconds / cost.mean_step_seconds if cost.mean_step_seconds > 0 else math.nan
    measured = bool(cost.parameters)
    return Row(
        name=standing.contender,
        look=look,
        lr=words.short(standing.best_hyperparameters.get("lr"), 4),
        edge={"low": "lowest tried", "high": "highest tried"}.get(standing.edge, standing.edge),
        score=words.fixed(standing.mean, places),
        score_interval=words.interval(standing.low, standing.high, places),
        difference=words.fixed(standing.difference, difference_places, signed=True) if known else words.UNKNOWN,
        difference_interval=words.interval(
            standing.difference_low, standing.difference_high, difference_places, signed=True
        )
        if known
        else "",
        tied=_tied_word(standing, leader=leader),
        tied_group=standing.tied,
        taken=standing is choice,
        step_time=words.duration(cost.mean_step_seconds),
        optimizer_share=words.percent(share),
        state=words.size(cost.state_bytes) if measured else words.UNKNOWN,
        state_each=each_weight(cost.state_bytes, cost.parameters).replace(" bytes a ", " B/"),
        peak=words.size(cost.peak_bytes) if cost.peak_bytes else words.UNKNOWN,
        gradient_evaluations=f"{cost.gradient_evaluations:,}" if cost.gradient_evaluations else words.UNKNOWN,
        trials=f"{standing.diverged_trials} of {standing.trials}",
        diverged=standing.diverged_trials > 0,
        failures=standing.failures,
    )


def _tied_word(standing: Standing, *, leader: bool) -> str:
    if not standing.scores:
        return words.no_result(is_open=standing.is_open)
    if leader:
        return "leader"
    if len(standing.scores) == 1:
        return "unknown"
    return "tied" if standing.tied else "no"


def score_places(standings: list[Standing]) -> int:
    """Digits after the point that scores are worth."""
    widths = [s.high - s.low for s in standings if s.high > s.low]
    return words.places_for(widths) if widths else _places_of_size([s.mean for s in standings])


def difference_places(standings: list[Standing]) -> int:
    """Digits after the point that differences are worth."""
    return words.places_for([s.difference_high - s.difference_low for s in standings])


def _places_of_size(values: list[float]) -> int:
    """Places that show three significant digits of the smallest value; for scores without a useful interval."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    return min(6, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 3
