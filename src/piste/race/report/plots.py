"""The pictures of a race: which of them there are, and in which order."""

from __future__ import annotations

from collections.abc import Iterable

from piste.race.analysis import Analysis
from piste.race.record import RunRecord
from piste.race.result import TaskResult

from .basin import basin
from .budget import budget
from .costs import breakdown, pareto
from .curves import curves
from .differences import differences
from .figure import Picture
from .palette import Look
from .reached import reached
from .stability import settings, stability


def pictures(
    task: TaskResult, records: Iterable[RunRecord], looks: dict[str, Look], identifier: str, found: Analysis
) -> list[Picture]:
    """The pictures of one task; ``records`` are the runs on it, ``found`` what was worked out from them."""
    runs = list(records)
    every = [
        curves(task, runs, looks, f"{identifier}-curves"),
        basin(task, runs, looks, f"{identifier}-basin"),
        differences(task, looks, f"{identifier}-differences"),
        reached(task, found, looks, f"{identifier}-reached"),
        budget(task, found, looks, f"{identifier}-budget"),
        pareto(task, looks, f"{identifier}-pareto"),
        breakdown(task, looks, f"{identifier}-breakdown"),
        stability(task, runs, looks, f"{identifier}-stability"),
        settings(task, runs, looks, f"{identifier}-settings"),
    ]
    return [picture for picture in every if picture is not None]
