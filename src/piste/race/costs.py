"""What a run costs: the stopwatch of one run, and the cost of a contender from many runs of one machine."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from piste.race.record import TIME, Cost, RunRecord

WARM_UP_STEPS = 5  # left out of medians: compilation, tracing, caches


@dataclass
class Stopwatch:
    """Wall times of the steps of one run that were timed.

    Args:
        step: of whole steps, after the warm-up.
        optimizer: of what lies beyond one gradient evaluation in them.
        warm_up: of the steps of the warm-up.
    """

    step: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)

    def add(self, number: int, step: float, optimizer: float) -> None:
        """Take note of a step."""
        if number <= WARM_UP_STEPS:
            self.warm_up.append(step)
        else:
            self.step.append(step)
            self.optimizer.append(optimizer)

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return _median(self.step)

    @property
    def optimizer_seconds(self) -> float:
        """The median of what lies beyond a gradient evaluation."""
        return _median(self.optimizer)

    @property
    def compile_seconds(self) -> float:
        """By how much the warm-up took longer than as many median steps."""
        return sum(max(0.0, seconds - self.step_seconds) for seconds in self.warm_up) if self.step else math.nan


def home(records: Sequence[RunRecord]) -> str:
    """The fingerprint of the machine whose times count: that of timing passes, else of most runs."""
    timed = [record.fingerprint for record in records if record.key.phase == TIME]
    return next(iter(dict(Counter(timed or [record.fingerprint for record in records]).most_common(1))), "")


def pooled(records: Sequence[RunRecord], machine: str) -> Cost:
    """The cost of a contender from its runs.

    Times are the medians over its timing passes, which ran alone; without any, those of the run with the shortest
    steps, because other work on the machine only ever lengthens a step, and it does not fall on all contenders alike.
    Either way they come from one machine: without a run there, they are unknown. The rest are maxima.

    Args:
        records: of one contender on one task.
        machine: the fingerprint of the machine whose times count.
    """
    training = [record for record in records if record.key.phase != TIME]
    runs = [record.cost for record in training if record.finished] or [record.cost for record in training]
    if not runs:
        return Cost.unknown()
    here = [record for record in records if record.fingerprint == machine]
    here = [record for record in here if record.finished] or here
    passes = [record.cost for record in here if record.key.phase == TIME and not math.isnan(record.cost.step_seconds)]
    timed = [record.cost for record in here if not math.isnan(record.cost.step_seconds)]
    fastest = min(timed, key=lambda cost: cost.step_seconds, default=Cost.unknown())
    return Cost(
        step_seconds=_median([cost.step_seconds for cost in passes]) if passes else fastest.step_seconds,
        optimizer_seconds=_median([cost.optimizer_seconds for cost in passes]) if passes else fastest.optimizer_seconds,
        state_bytes=max(cost.state_bytes for cost in runs),
        peak_bytes=max(cost.peak_bytes for cost in runs),
        gradient_evaluations=max(cost.gradient_evaluations for cost in runs),
        parameters=max(cost.parameters for cost in runs),
        steps=max(cost.steps for cost in runs),
        examples=max(cost.examples for cost in runs),
        compile_seconds=max((cost.compile_seconds for cost in timed if cost.compile_seconds >= 0), default=math.nan),
    )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
