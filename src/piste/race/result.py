"""What a race comes to: where every contender ended, the verdict, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from piste.race.record import Cost, RunRecord


@dataclass(frozen=True)
class Standing:
    """Where one contender ended on one task.

    Args:
        contender: such as ``"ranger+flat_cosine"``.
        optimizer: the preset's name.
        schedule: the schedule's name.
        best_hyperparameters: chosen by the validation split of the tune runs; empty if no trial survived.
        edge: ``"low"`` or ``"high"`` if the best lr is the lowest or highest that was tried, else ``""``.
        trials: settings tried.
        diverged_trials: how many of them did not finish (diverged, failed or out of memory).
        seeds: number of confirmation runs.
        scores: one a confirmation seed, in seed order, on the report split; a run that did not finish counts as the
            worst score seen on the task. Empty if no trial survived.
        mean: mean of the scores; nan if there are none.
        low: lower end of its bootstrap interval.
        high: upper end.
        difference: mean of (this contender's score minus the leader's) over common seeds; 0 for the leader itself.
        difference_low: lower end of its paired bootstrap interval.
        difference_high: upper end.
        tied: in the leader's group: no difference from the leader was found. True for the leader itself.
        cost: times of the run with the shortest steps; the rest are maxima over its runs.
        failures: one line for each run that did not finish, tune and confirm.
    """

    contender: str
    optimizer: str
    schedule: str
    best_hyperparameters: dict[str, float]
    edge: str
    trials: int
    diverged_trials: int
    seeds: int
    scores: list[float]
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    tied: bool
    cost: Cost
    failures: list[str]

    @property
    def is_open(self) -> bool:
        """Whether there is no score and one may still come: not all of its trials were lost."""
        return not self.scores and not 0 < self.trials <= self.diverged_trials


@dataclass(frozen=True)
class TaskResult:
    """All contenders on one task, best first, the verdict in one or two sentences, and what limits it (``caveats``).

    ``target`` is the validation score that was asked for, whose first passing is timed; None where none was.
    """

    task: str
    metric_name: str
    higher_is_better: bool
    standings: list[Standing]
    verdict: str
    target: float | None = None
    caveats: list[str] = field(default_factory=list)


COMMITTED: Final = "committed"
CLEAR: Final = "clear"
EXCLUDED: Final = "ruled out by construction"


@dataclass(frozen=True)
class Finding:
    """What a race has to say of one sin of comparisons.

    Args:
        sin: its name.
        state: ``"committed"``, ``"clear"`` (looked for and not found) or ``"ruled out by construction"``.
        words: what was found, or why it cannot happen; empty where clear.
    """

    sin: str
    state: str
    words: str


@dataclass(frozen=True)
class StudyResult:
    """A whole race, ready to be reported.

    Args:
        title: one line.
        created: UTC time, ISO 8601.
        results: one a task.
        records: every run the results rest on.
        notes: what the race holds against itself (few seeds, best lr at an edge, timings taken side by side, …).
        machine: what ran it.
        command: the command that repeats it.
        findings: one for each sin of comparisons, committed or not.
    """

    title: str
    created: str
    results: list[TaskResult]
    records: list[RunRecord]
    notes: list[str]
    machine: dict[str, str]
    command: str
    findings: list[Finding] = field(default_factory=list)
