"""From runs to marks: pairs compared seed by seed, corrected over all the page's comparisons, and counted by claim."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from piste.race.record import CONFIRM
from piste.race.statistics import LEVEL, compare, holm, interval, paired_p_value
from scripts.sheet.claims import ALIKE, CLAIMS, KEEPS_UP, SOONER, Claim, Duel, Entry
from scripts.sheet.races import MAIN, Made

SUPPORTED, REFUTED, BEYOND = "supported", "refuted", "beyond these tasks"
AHEAD, BEHIND, NEITHER, EDGE = "ahead", "behind", "no difference found", "cut short"


@dataclass(frozen=True)
class Outcome:
    """A duel on one task.

    Args:
        difference: mean of (first minus second) over the seeds, in what is compared (the score, or steps).
        low, high: its paired bootstrap interval.
        p: of the paired t test, corrected by Holm's method over all comparisons of the page.
        found: whether the first is ahead or behind, or that no difference was found; or ``EDGE``: whoever is behind had
            its best learning rate at the edge of what was tried, so that the search may have lost, not the optimizer.
    """

    duel: Duel
    task: str
    difference: float
    low: float
    high: float
    p: float
    found: str


class Judgement:
    """Everything the page says, from the runs that were kept."""

    def __init__(
        self,
        runs: Sequence[Made],
        higher_is_better: Mapping[str, bool],
        edges: Collection[tuple[str, Entry]] = (),
        claims: Sequence[Claim] = CLAIMS,
    ) -> None:
        self.higher = dict(higher_is_better)
        self.edges = edges
        self.claims = claims
        self.confirmed: dict[tuple[str, Entry], dict[int, Made]] = {}
        self.raced = list(dict.fromkeys((run.task, run.optimizer) for run in runs if run.arm == MAIN))
        for run in runs:
            if run.phase == CONFIRM:
                self.confirmed.setdefault((run.task, Entry(run.optimizer, run.arm)), {})[run.seed] = run
        self.worst = {task: self._worst(task) for task in self.higher}

    @cached_property
    def outcomes(self) -> dict[tuple[Duel, str], Outcome]:
        """Every duel on every task that both contenders have been raced on."""
        asked = list(dict.fromkeys((duel, task) for duel, task in self._asked()))
        found = [(duel, task, self._differences(duel, task)) for duel, task in asked]
        p_values = holm([paired_p_value(differences, 0.0) for _, _, differences in found])
        return {
            (duel, task): self._outcome(duel, task, differences, p)
            for (duel, task, differences), p in zip(found, p_values, strict=True)
        }

    def mark(self, claim: Claim) -> str:
        """``supported``, ``refuted`` or ``beyond these tasks``: see ``verdict_of``."""
        if claim.measured or not claim.duels:
            return claim.measured or BEYOND
        counts = Counter(outcome.found for outcome in self.of(claim))
        (expected,) = {duel.expected for duel in claim.duels}
        return verdict_of(counts, expected)

    def of(self, claim: Claim) -> list[Outcome]:
        """The outcomes that a claim rests on."""
        keys = [(duel, task) for duel in claim.duels for task in duel.tasks]
        return [self.outcomes[key] for key in keys if key in self.outcomes]

    def standings(self, task: str) -> dict[str, tuple[float, bool]]:
        """Mean score of everyone in the main race, and whether no difference from the best was found; best first.

        Whoever lost all trials has nothing to confirm, and comes last with nan.
        """
        scores = {
            entry.optimizer: self._scores(task, entry)
            for where, entry in self.confirmed
            if where == task and entry.arm == MAIN
        }
        seeds = sorted(set.intersection(*(set(values) for values in scores.values())))
        columns = {name: [values[seed] for seed in seeds] for name, values in scores.items()}
        found = {name: (c.mean, c.tied) for name, c in compare(columns, self.higher[task]).items()}
        return found | {name: (math.nan, False) for where, name in self.raced if where == task and name not in found}

    def _asked(self) -> Iterator[tuple[Duel, str]]:
        for claim in self.claims:
            for duel in claim.duels:
                for task in duel.tasks:
                    if {(task, duel.first), (task, duel.second)} <= set(self.confirmed):
                        yield duel, task

    def _differences(self, duel: Duel, task: str) -> np.ndarray:
        first, second = (self._compared(duel, task, entry) for entry in (duel.first, duel.second))
        return np.array([first[seed] - second[seed] for seed in sorted(set(first) & set(second))])

    def _compared(self, duel: Duel, task: str, entry: Entry) -> dict[int, float]:
        if duel.expected != SOONER:
            return self._scores(task, entry)
        ends = [run.valid[-1] for run in self.confirmed[task, duel.second].values() if run.score is not None]
        target = float(np.median(ends))
        return {seed: float(self._steps_to(run, target)) for seed, run in self.confirmed[task, entry].items()}

    def _steps_to(self, run: Made, target: float) -> int:
        """Of the first evaluation that meets the target; all of them where none does."""
        sign = -1 if self.higher[run.task] else 1
        met = [step for step, value in zip(run.step, run.valid, strict=True) if sign * value <= sign * target]
        return met[0] if met else run.steps

    def _scores(self, task: str, entry: Entry) -> dict[int, float]:
        """By seed; a lost run counts as the worst seen on the task, as in every race."""
        runs = self.confirmed[task, entry]
        return {seed: self.worst[task] if run.score is None else run.score for seed, run in runs.items()}

    def _worst(self, task: str) -> float:
        own = [run for (where, _), runs in self.confirmed.items() if where == task for run in runs.values()]
        seen = [run.score for run in own if run.score is not None] + [run.valid[0] for run in own if run.valid]
        finite = [value for value in seen if math.isfinite(value)]
        return min(finite) if self.higher[task] else max(finite)

    def _outcome(self, duel: Duel, task: str, differences: np.ndarray, p: float) -> Outcome:
        low, high = interval(differences)
        found = NEITHER
        if p < 1 - LEVEL and (low > 0 or high < 0):
            less_is_better = duel.expected == SOONER or not self.higher[task]
            found = AHEAD if (differences.mean() < 0) == less_is_better else BEHIND
            if (task, duel.second if found == AHEAD else duel.first) in self.edges:
                found = EDGE
        return Outcome(duel, task, float(differences.mean()), low, high, p, found)


def verdict_of(counts: Mapping[str, int], expected: str) -> str:
    """The mark of a claim from how its comparisons came out.

    "Better" and "sooner" are supported where the first is ahead in at least half of them and more often than behind,
    refuted where it is behind at least once and no less often than ahead. "Keeps up" is supported where it is behind in
    less than half, "alike" where no difference was found in at least half; else they are refuted. What is neither these
    tasks cannot tell, and comparisons that were cut short tell nothing.
    """
    ahead, behind, neither = (counts.get(name, 0) for name in (AHEAD, BEHIND, NEITHER))
    total = ahead + behind + neither
    if total == 0:
        return BEYOND
    if expected == ALIKE:
        return SUPPORTED if 2 * neither >= total else REFUTED
    if expected == KEEPS_UP:
        return SUPPORTED if 2 * behind < total else REFUTED
    if ahead > behind and 2 * ahead >= total:
        return SUPPORTED
    return REFUTED if behind and behind >= ahead else BEYOND
