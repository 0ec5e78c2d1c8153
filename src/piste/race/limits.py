"""What a run may take before it is ended: an outcome like any other, and the race goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from piste.race.progress import duration

# Nobody's run is ended because a machine is busy: what hangs, hangs for ever.
LEAST_SECONDS = 600.0
FACTOR = 20.0


@dataclass(frozen=True)
class Limits:
    """Of every run of a race; they change nothing of runs that keep to them.

    Args:
        seconds: of a run, and of the trial of a task before the race; None for twenty times what a run is expected to
            take and at least ten minutes. A script's first runs, of which nothing is known, are not limited then.
        memory: bytes of its process and all that it starts; None for an equal share, once memory is short.
    """

    seconds: float | None = None
    memory: int | None = None

    def longest(self, expected: float | None = None) -> float:
        """Seconds that a run may take which is expected to take so many; None where that is unknown."""
        if self.seconds is not None:
            return self.seconds
        return math.inf if expected is None else max(LEAST_SECONDS, FACTOR * expected)


def too_long(longest: float) -> str:
    """Why a run was ended, in words."""
    return f"took longer than {duration(longest)} (--timeout)"
