"""All that is worked out from the records of one task beside its standings: for the report and its exports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from piste.race.lints import BASELINES
from piste.race.record import CONFIRM, TUNE, RunRecord
from piste.race.result import TaskResult
from piste.race.search import BudgetCurve, Sensitivity, budget_curve, counted, sensitivity
from piste.race.statistics import Pair, pairs
from piste.race.targets import EVALUATIONS, SECONDS, STEPS, Reach, SpeedUp, median_reaches, reach, speed_up, targets


@dataclass(frozen=True)
class Target:
    """A score of the validation split whose first passing is timed, and where it comes from, in words."""

    value: float
    source: str


@dataclass(frozen=True)
class Analysis:
    """What the records of a task say beside its standings.

    Args:
        target: what was to be reached; None if nothing was trained.
        targets: from easy to hard.
        needed: by currency (``STEPS``, ``EVALUATIONS``, ``SECONDS`` where one machine timed all), then by contender:
            the median over seeds of what each of ``targets`` takes, inf where too few seeds met it.
        at_target: by currency, then by contender: what each seed needs for ``target``.
        pairs: by two contenders: how surely the first beats the second.
        budgets: by contender: the best of 1, 2, … trials.
        sensitivities: by contender: what a wrong learning rate costs.
    """

    target: Target | None
    targets: list[float]
    needed: dict[str, dict[str, list[float]]]
    at_target: dict[str, dict[str, list[Reach]]]
    pairs: dict[tuple[str, str], Pair]
    budgets: dict[str, BudgetCurve]
    sensitivities: dict[str, Sensitivity]


def analyse(task: TaskResult, runs: Sequence[RunRecord]) -> Analysis:
    """Work everything out.

    Args:
        task: the standings.
        runs: all runs on this task.
    """
    higher = task.higher_is_better
    names = [standing.contender for standing in task.standings]
    confirmed = {name: sorted(group, key=lambda run: run.key.seed) for name, group in _of(runs, names, CONFIRM).items()}
    made = [run for group in confirmed.values() for run in group]
    currencies = [STEPS, EVALUATIONS, *([SECONDS] if same_machine(made) else [])]
    goals = targets(made, higher)
    target = target_of(task, confirmed)
    scores = {standing.contender: standing.scores for standing in task.standings if standing.scores}
    return Analysis(
        target=target,
        targets=goals,
        needed={
            what: {name: median_reaches(group, goals, higher, what) for name, group in confirmed.items()}
            for what in currencies
        },
        at_target={}
        if target is None
        else {
            what: {name: [reach(run, target.value, higher, what) for run in group] for name, group in confirmed.items()}
            for what in currencies
        },
        pairs=pairs(scores, higher) if len({len(own) for own in scores.values()}) == 1 else {},
        **_searches(task, runs, names),
    )


def target_of(task: TaskResult, confirmed: dict[str, list[RunRecord]]) -> Target | None:
    """What tuned baselines reach in the median of their seeds, or else what half of the contenders reach.

    A median and not the best, so that one lucky seed sets no target that nobody reaches (Dahl et al. 2023).
    """
    if task.target is not None:
        return Target(task.target, "as asked for")
    ends = {
        name: statistics.median(run.curve.valid_metric[-1] for run in group if run.finished)
        for name, group in confirmed.items()
        if any(run.finished for run in group)
    }
    if not ends:
        return None
    optimizers = {standing.contender: standing.optimizer for standing in task.standings}
    best = max if task.higher_is_better else min
    anchors = [name for name in ends if optimizers[name] in BASELINES]
    if anchors:
        anchor = best(anchors, key=lambda name: ends[name])
        return Target(ends[anchor], f"where {anchor} ends")
    median = statistics.median_high if task.higher_is_better else statistics.median_low
    return Target(median(ends.values()), "what half of the contenders reach")


def speed_up_to_common(
    runs: Sequence[RunRecord], first: str, second: str, higher_is_better: bool, what: str = STEPS
) -> tuple[float, SpeedUp] | None:
    """The level that both reach in the median of seeds, and how many times less the first needs for it.

    Args:
        runs: all runs on the task.
        first, second: contenders.
        higher_is_better: direction of the metric.
        what: the currency.

    Returns:
        None where one of them has no finished run, or they have been run on different numbers of seeds.
    """
    both = _of(runs, (first, second), CONFIRM)
    groups = [sorted(both.get(name, []), key=lambda run: run.key.seed) for name in (first, second)]
    ends = [[run.curve.valid_metric[-1] for run in group if run.finished] for group in groups]
    if not all(ends) or len(groups[0]) != len(groups[1]):
        return None
    worse = min if higher_is_better else max
    level = worse(map(statistics.median, ends))
    return level, speed_up(*([reach(run, level, higher_is_better, what) for run in group] for group in groups))


def same_machine(runs: Sequence[RunRecord]) -> bool:
    """Whether the times of these runs may be compared."""
    return len({run.fingerprint for run in runs}) == 1


def equal_trials(task: TaskResult, runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The trials that every contender was given, in the order of the search and without extensions."""
    tuned = _of(runs, [standing.contender for standing in task.standings], TUNE)
    fewest = min(map(len, tuned.values()), default=0)
    return {name: group[:fewest] for name, group in tuned.items()}


def final_scores(trials: Sequence[RunRecord], worst: float) -> list[float]:
    """Validation scores at the end of trials, ``worst`` for those that did not finish."""
    return counted([run.curve.valid_metric[-1] if run.finished else math.nan for run in trials], worst)


def untrained_score(runs: Sequence[RunRecord], higher_is_better: bool) -> float:
    """The worst validation score of a model before training; nan where none was recorded."""
    starts = [run.curve.valid_metric[0] for run in runs if run.curve.valid_metric]
    worst = min if higher_is_better else max
    return worst((start for start in starts if math.isfinite(start)), default=math.nan)


def _searches(task: TaskResult, runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    higher = task.higher_is_better
    worst = untrained_score(runs, higher)
    if math.isnan(worst):
        return {"budgets": {}, "sensitivities": {}}
    tuned = _of(runs, names, TUNE).items()
    varied = {name: group for name, group in tuned if len({run.key.lr for run in group}) > 1}
    return {
        "budgets": {
            name: budget_curve(final_scores(group, worst), higher) for name, group in equal_trials(task, runs).items()
        },
        "sensitivities": {
            name: sensitivity([run.key.lr for run in group], final_scores(group, worst), worst, higher)
            for name, group in varied.items()
        },
    }


def _of(runs: Sequence[RunRecord], names: Sequence[str], phase: str) -> dict[str, list[RunRecord]]:
    """The runs of these contenders in one phase; without those that have none."""
    found: dict[str, list[RunRecord]] = {name: [] for name in names}
    for run in runs:
        if run.key.phase == phase and run.key.contender in found:
            found[run.key.contender].append(run)
    return {name: group for name, group in found.items() if group}
