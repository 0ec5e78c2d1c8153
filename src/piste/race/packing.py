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
        workers: processes side by side; none while all are lost.
    """
    lanes: dict[tuple[object, ...], list[Run]] = {}
    packed = 0
    for run in missing:
        key = run.key
        together = key.packed and key.id not in alone
        packed += together
        if key.id not in busy:
            lane: tuple[object, ...] = (key.id,)
            if together:
                lane = (run.reference, key.contender, key.phase, key.steps, key.seed)
            lanes.setdefault(lane, []).append(run)
    most = max(1, min(MOST, math.ceil(packed / max(1, workers))))
    found: list[Run | Pack] = []
    for runs in lanes.values():
        parts = [tuple(runs[start : start + most]) for start in range(0, len(runs), most)]
        found += [part[0] if len(part) == 1 else _pack(part) for part in parts]
    return found


def _pack(runs: Sequence[Run]) -> Pack:
    return Pack(runs[0].reference, runs[0].contender, tuple(run.key for run in runs))
