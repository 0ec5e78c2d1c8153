"""What was recorded along runs and can be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from piste.race import words
from piste.race.record import Curve, RunRecord
from piste.race.result import TaskResult

from .figure import rounded

# A diverging run would squeeze all others into one line, so the loss axis ends at this many times the first loss.
BLOW_UP: Final = 2.0


@dataclass(frozen=True)
class Measure:
    """Something recorded along a run.

    Args:
        name: ready for a picture.
        read: gets it from a curve.
        worst: plus or minus infinity.
        is_loss: drawn on a log scale where it can be.
        ceiling: what lies above is cut off, infinity for nothing.
    """

    name: str
    read: Callable[[Curve], list[float]]
    worst: float
    is_loss: bool
    ceiling: float


def measures(task: TaskResult, runs: list[RunRecord]) -> list[Measure]:
    """What can be drawn against steps: the losses, and the metric where it is more than the loss."""
    found = [
        _measure("Validation loss", lambda curve: curve.valid_loss, runs),
        _measure("Training loss", lambda curve: curve.train_loss, runs),
    ]
    if any(_differ(run.curve.valid_loss, run.curve.valid_metric) for run in runs):
        worst = -math.inf if task.higher_is_better else math.inf
        name = words.label(f"Validation {task.metric_name}")
        found.append(_measure(name, lambda curve: curve.valid_metric, runs, worst, is_loss=False))
    return found


def _measure(
    name: str,
    read: Callable[[Curve], list[float]],
    runs: list[RunRecord],
    worst: float = math.inf,
    *,
    is_loss: bool = True,
) -> Measure:
    starts = [values[0] for run in runs if (values := read(run.curve))]
    highest = max((value for value in starts if math.isfinite(value) and value > 0), default=math.inf)
    return Measure(name, read, worst, is_loss, BLOW_UP * highest if worst > 0 else math.inf)


def is_logarithmic(measure: Measure, finite: list[float]) -> bool:
    return measure.is_loss and bool(finite) and min(finite) > 0


def value_axis(logarithmic: bool, finite: list[float]) -> dict[str, Any]:
    """Kind of the axis, and few enough tick labels for a log scale not to crowd them below the powers of ten."""
    decades = math.log10(max(finite) / min(finite)) if logarithmic and finite else 0.0
    return {"type": "log" if logarithmic else "linear", "nticks": 3 if decades >= 0.9 else 0}


def final(run: RunRecord, measure: Measure) -> float | None:
    """The value at the end of a run that finished; None if it did not, or ended at nan."""
    values = measure.read(run.curve)
    return rounded(values[-1]) if run.finished and values else None


def _differ(one: list[float], other: list[float]) -> bool:
    return any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=False))
