"""What the driver of a race knows of an executor: jobs go in, events come out, and workers may be lost on the way.

Two things end a job early, and they are not the same. When the process that works on it dies of itself (a crash in
native code), that is how the job went: the driver hears of a ``Death`` and writes down a failed run. When the worker is
lost (it was killed from outside, its machine went down, the scheduler took it away), the job says nothing yet: the
executor has it made again elsewhere, ``MOST_LOSSES`` times at most, and the driver hears nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from piste.race.worker import Answer, Job, Run

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_LOSSES = 3  # of the workers of one job; whatever it does, it may be the reason


class ExecutorError(RuntimeError):
    """Jobs cannot be worked on here: workers do not start, or there is no cluster."""


@dataclass(frozen=True)
class Death:
    """The worker died at its job, or was stopped.

    Args:
        reason: in words.
        machine: where, as ``environment.machine`` describes it; None for this one.
        out_of_memory: it, or what its task had started, took too much.
    """

    reason: str
    machine: dict[str, str] | None = None
    out_of_memory: bool = False


@dataclass(frozen=True)
class Event:
    """Something a worker has to say about a job."""

    job: Job
    answer: Answer | Death


class Executor(Protocol):
    """Workers for jobs, each on one thread. A context manager: leaving it ends them, and what they work on.

    Attributes:
        logs: folder for what workers print.
        device: that jobs compute on, ``"cpu"`` or ``"cuda:0"`` or another.
    """

    logs: Path
    device: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    @property
    def machine(self) -> dict[str, str]:
        """The one that timing passes are made on, in words; waits until there is one."""

    @property
    def width(self) -> int:
        """Number of jobs side by side, once all workers have started."""

    @property
    def idle(self) -> int:
        """Number of jobs that ``submit`` takes now."""

    @property
    def jobs(self) -> list[Job]:
        """What is being worked on, or waits for another worker after its own was lost."""

    def fit(self, job_bytes: int) -> None:
        """Leave only as many workers as memory has room for; all must be idle.

        Args:
            job_bytes: peak of the whole process of a worker at its job.
        """

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker; a run whose key names a machine goes to a worker there, always the same one.

        Raises:
            RuntimeError: none is idle.
        """

    def stop(self, job: Job, reason: str) -> None:
        """End a job in whatever state it is; ``events`` reports it as dead, for this reason. Nothing if it is over."""

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have to say within ``timeout`` seconds; an answer that ends a job makes its worker idle.

        Raises:
            ExecutorError: no worker can start, or none that may take a job is left.
        """


class Losses:
    """How often the workers of jobs were lost."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[Job, int]] = {}  # with the job, so that its number stays its own

    def again(self, job: Job) -> bool:
        """Count one loss; whether the job is to be made again."""
        count = self._counts.get(id(job), (job, 0))[1] + 1
        self._counts[id(job)] = job, count
        return count < MOST_LOSSES


def wanted_machine(job: Job) -> str:
    """The fingerprint of the machine that a job has to be made on; empty where any will do."""
    return job.key.machine if isinstance(job, Run) else ""
