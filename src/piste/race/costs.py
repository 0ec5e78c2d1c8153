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
    """Wall times of the steps of one run that were timed, those with a refresh (roots, bases made anew) apart.

    Args:
        step: of whole steps, after the warm-up.
        optimizer: of what lies beyond one gradient evaluation in them.
        refresh_step: of whole steps with a refresh.
        refresh: of what lies beyond one gradient evaluation in those.
        warm_up: of the steps of the warm-up.
    """

    step: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    refresh_step: list[float] = field(default_factory=list)
    refresh: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)

    def add(self, number: int, step: float, optimizer: float, *, refreshed: bool) -> None:
        """Take note of a step."""
        if number <= WARM_UP_STEPS:
            self.warm_up.append(step)
        else:
            (self.refresh_step if refreshed else self.step).append(step)
            (self.refresh if refreshed else self.optimizer).append(optimizer)

    def times(self) -> dict[str, float]:
        """As a :class:`Cost` has them. Where every step refreshes, that is what an ordinary step does."""
        refresh = self.refresh if self.optimizer else []
        own = self.optimizer or self.refresh
        median = _median(self.step or self.refresh_step)
        slow = sum(max(0.0, seconds - median) for seconds in self.warm_up) if own else math.nan
        return {
            "step_seconds": median,
            "optimizer_seconds": _median(own),
            "refresh_seconds": _median(refresh),
            "refresh_share": len(refresh) / max(1, len(own) + len(refresh)),
            "worst_optimizer_seconds": max([*own, *refresh], default=math.nan),
            "compile_seconds": slow,
        }


#: what passes are medians of
_TIMES = ("step_seconds", "optimizer_seconds", "refresh_seconds", "refresh_share", "worst_optimizer_seconds")


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
        **{name: _median([getattr(cost, name) for cost in passes or [fastest]]) for name in _TIMES},
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
