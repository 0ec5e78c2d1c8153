"""Keeps workers from harming the machine: their memory, and what they print.

Memory is watched from outside and not limited by the system: limits of address space count what is never touched
(CUDA reserves terabytes of it), and a run's peak is resident memory as well. Linux alone tells enough; elsewhere
nothing is watched. Device memory has limits of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from piste.race.executors.sizing import available_bytes
from piste.race.words import size

MOST_LOG = 4 * 2**20  # bytes of one worker's output, of which this much is kept when it is full:
KEPT_LOG = 2**18
_CUT = b"[earlier output was cut off]\n"
_LOOK_SECONDS = 0.25
# Memory counts as short when less than this part is left of what was free at the start.
_SHORT = 0.1
_BLOATED = 1.5

_PROCESSES = Path("/proc")


class Guard:
    """Watches workers, each of which leads a session of its own that holds whatever it starts.

    Args:
        most: bytes that a worker may have in memory with all it has started; None for as long as there is enough for
            all, and when it becomes short, its equal share.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.room = available_bytes()
        self.looked = 0.0

    def share(self, workers: int) -> int | None:
        """Bytes that are fair for each of so many workers; None where nobody knows how many there are."""
        if self.most is not None:
            return self.most
        return None if self.room is None else int(self.room * (1 - _SHORT)) // workers

    def look(self, workers: Collection[int]) -> dict[int, str]:
        """Those process ids of workers that take too much, each with the reason why it has to end."""
        share = self.share(max(1, len(workers)))
        if share is None or time.monotonic() - self.looked < _LOOK_SECONDS:
            return {}
        self.looked = time.monotonic()
        if self.most is None and not self._is_short():
            return {}
        held = resident_bytes()
        why = "--memory" if self.most is not None else f"an equal share for {len(workers)} workers, and memory is short"
        return {
            worker: f"its process came to hold {size(held[worker])} of memory; the limit is {size(share)} ({why})"
            for worker in workers
            if held[worker] > share
        }

    def held(self, worker: int) -> int:
        """Bytes that a worker has in memory; 0 where the system does not tell."""
        return resident_bytes()[worker]

    def is_bloated(self, held: int, settled: int, workers: int) -> bool:
        """Whether a worker between two runs should make room: it holds much, and far more than after its first run."""
        share = self.share(workers)
        return share is not None and held > max(share / 2, _BLOATED * settled)

    def _is_short(self) -> bool:
        left = available_bytes()
        return left is not None and self.room is not None and left < _SHORT * self.room


def resident_bytes() -> Counter[int]:
    """Bytes in memory of all processes of a session, by its leader; empty where the system does not tell."""
    held: Counter[int] = Counter()
    if sys.platform != "linux":
        return held
    page = os.sysconf("SC_PAGE_SIZE")
    for process in _PROCESSES.iterdir():
        if process.name.isdigit():
            try:
                # Behind the name, which may hold anything: state, parent, group, session; the 22nd is resident pages.
                fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            held[int(fields[3])] += int(fields[21]) * page
    return held


def trim(log: Path) -> None:
    """Cut a log that has become too long, from its beginning. Whoever writes there appends, and is not disturbed."""
    try:
        if log.stat().st_size <= MOST_LOG:
            return
        with log.open("r+b") as file:
            file.seek(-KEPT_LOG, os.SEEK_END)
            kept = file.read()
            file.truncate(0)
        with log.open("ab") as file:
            file.write(_CUT + kept.partition(b"\n")[2])
    except OSError:  # on a full disk the cut alone is what matters
        return
