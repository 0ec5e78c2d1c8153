"""What Slurm says of the jobs of a race, asked by ``squeue``, which every Slurm has.

submitit itself asks ``sacct``, which knows nothing where a cluster keeps no accounts: jobs that were cancelled there
would be waited for without end.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

_SOON_SECONDS, _LATE_SECONDS = 2.0, 60.0  # between two questions, shortly after a job was sent and long after
_GONE = "GONE"
_UNKNOWN = "UNKNOWN"
_OVER = {
    *(_GONE, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED"),
    *("SPECIAL_EXIT", "TIMEOUT"),
}


class Queue:
    """The states of this user's jobs; stands in the place of a watcher of submitit, for all jobs of a race at once."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.missed: dict[str, int] = {}  # answers in a row without this job
        self.asked = -float("inf")
        self.changed = 0.0  # when the last job was sent

    def register_job(self, job_id: str) -> None:
        """Watch this one, too."""
        self.states[job_id] = _UNKNOWN
        self.changed = time.monotonic()

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """As Slurm names it, ``UNKNOWN``, or ``GONE`` once Slurm has forgotten the job.

        Args:
            job_id: of a registered one.
            mode: ``"cache"`` to ask nobody, ``"force"`` to ask in any case, ``"standard"`` to ask where it is time to.
        """
        now = time.monotonic()
        between = min(_LATE_SECONDS, max(_SOON_SECONDS, (now - self.changed) / 2))
        if mode == "force" or (mode == "standard" and now - self.asked > between):
            self._ask()
        return self.states[job_id]

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether it will not run any more."""
        return self.get_state(job_id, mode) in _OVER

    def _ask(self) -> None:
        self.asked = time.monotonic()
        told = listed("%i|%T", "--states=all")
        if told is None:  # the controller is away for a while
            return
        found = dict(told)
        for job_id, state in self.states.items():
            if state not in _OVER:
                self.missed[job_id] = 0 if job_id in found else self.missed.get(job_id, 0) + 1
                self.states[job_id] = found.get(job_id, _GONE if self.missed[job_id] > 1 else state)


def end_orphans(folder: Path) -> None:
    """Cancel what a race that was killed has left in the queue: nobody waits for it.

    Args:
        folder: of the files of its jobs, which is no other race's.
    """
    orphans = [job_id for job_id, script in listed("%i|%o") or () if Path(script).parent == folder.resolve()]
    if orphans:
        subprocess.run(["scancel", *orphans], capture_output=True, check=False)


def listed(fields: str, *options: str) -> list[tuple[str, str]] | None:
    """Two fields of every job of this user, None where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", f"--format={fields}", *options]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        return None
    lines = [line.strip().partition("|") for line in told.stdout.splitlines() if line.strip()]
    return [(first, second) for first, _, second in lines]
