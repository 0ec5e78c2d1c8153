"""Which of the missing runs a worker is given together."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from piste.race.worker import Job, Pack, Run

MOST = 32  # runs of a pack: beyond it nothing is gained, and more is lost where a worker dies


def runs_of(job: Job) -> tuple[Run, ...]:
    """The runs that a job makes; none where it looks at a task."""
    if isinstance(job, Pack):
        return job.runs
    return (job,) if isinstance(job, Run) else ()


def jobs(missing: Sequence[Run], busy: Collection[str], alone: Collection[str], workers: int) -> list[Run | Pack]:
    """What can be given to workers, in order: runs that may be trained together as one job, at the place of the first.

    A pack has trials of one contender on one task, at most so many that no worker is left without.

    Args:
        missing: all runs that can be made now, those that are being made included.
        busy: ids of these.
        alone: ids of runs that are to be made alone, whatever their key says.
        workers: processes side by side.
    """
    lanes: dict[tuple[object, ...], list[Run]] = {}
    packed = 0
    for run in missing:
        key = run.key
        together = key.packed and key.id not in alone
        packed += together
        if key.id not in busy:
            lane = (run.reference, key.contender, key.phase, key.steps, key.seed) if together else (key.id,)
            lanes.setdefault(lane, []).append(run)
    most = max(1, min(MOST, math.ceil(packed / workers)))
    found: list[Run | Pack] = []
    for lane, runs in lanes.items():
        parts = [tuple(runs[start : start + most]) for start in range(0, len(runs), most)]
        found += [Pack(part) for part in parts] if len(lane) > 1 else runs
    return found
