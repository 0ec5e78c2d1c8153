"""A worker on another machine: its process, and the one beside it that tells how it fares.

The two are kept apart so that a crash of the task is told from the loss of the machine without reading error messages:
a crash ends the worker's process and is reported by this one; if this one is gone too, the worker is lost.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from piste.race import environment
from piste.race.executors.base import Death, ExecutorError
from piste.race.executors.files import Bundle, moved, unpack
from piste.race.executors.local import Local
from piste.race.inspection import TaskCard
from piste.race.worker import Answer, Job, Progress, Started

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 1.0  # a message over a network for every one
_LOG_BYTES = 2**16  # of what a worker printed, sent with an answer


@dataclass(frozen=True)
class Heard:
    """An answer, and the end of what the worker has printed since the one before."""

    answer: Answer | Death
    printed: bytes


class Host:
    """One worker for jobs from elsewhere.

    Args:
        device: that jobs will ask for.
        versions: of python, torch and piste where the race was started.

    Raises:
        ExecutorError: the process cannot start, or the versions are others here.
    """

    def __init__(self, device: str, versions: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="piste-"))
        self.local = Local(1, self.folder, device)
        self.read = 0  # of the log
        self.stopped: tuple[int, str] = -1, ""
        self.told = time.monotonic()
        self.started = self._wait(versions)

    def start(self) -> Started:
        """What the worker said when it was ready."""
        return self.started

    def work(self, number: int, job: Job, sent: Bundle | None, *, begin: bool = True) -> Heard:
        """Begin a job, or go on with it, until there is something to say of it.

        Args:
            number: of the job, for ``stop``.
            job: what to do.
            sent: its file; None where it needs none, or finds it in its place.
            begin: False to go on.
        """
        if begin:
            self.local.submit(self._placed(job, sent))
        while True:
            for event in self.local.events(_POLL_SECONDS):
                if not isinstance(event.answer, Progress):
                    return Heard(self._returned(event.answer, job), self._printed())
                if event.answer.step == 0 or time.monotonic() - self.told >= _PROGRESS_SECONDS:
                    self.told = time.monotonic()
                    return Heard(event.answer, b"")
            if self.stopped[0] == number:
                for own in self.local.jobs:
                    self.local.stop(own, self.stopped[1])

    def stop(self, number: int, reason: str) -> None:
        """End a job; called from another thread, while ``work`` waits."""
        self.stopped = number, reason

    def close(self) -> None:
        """End the worker."""
        self.local.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, versions: dict[str, str]) -> Started:
        while self.local.started is None:
            try:
                list(self.local.events(_POLL_SECONDS))
            except ExecutorError as error:
                printed = self._printed().decode(errors="replace").strip()
                self.close()
                raise ExecutorError(f"{error}:\n{printed}") from error
        here = self.local.started.versions
        if here != versions:
            other = [f"{name} {here[name]} and not {version}" for name, version in versions.items()]
            wrong = [words for words, name in zip(other, versions, strict=True) if here[name] != versions[name]]
            self.close()
            raise ExecutorError(f"a worker's machine has {', '.join(wrong)}: install the same there as here")
        return self.local.started

    def _placed(self, job: Job, sent: Bundle | None) -> Job:
        return job if sent is None else moved(job, sent.path, unpack(sent, self.folder / "task"))

    def _returned(self, answer: Answer | Death, job: Job) -> Answer | Death:
        """With what is true where the race was started."""
        if isinstance(answer, Death):
            return replace(answer, machine=self.started.machine)
        return replace(answer, reference=job.reference) if isinstance(answer, TaskCard) else answer

    def _printed(self) -> bytes:
        log = self.folder / "worker-0.log"
        if not log.exists():
            return b""
        with log.open("rb") as file:
            end = file.seek(0, 2)
            unread = self.read if self.read <= end else 0  # a log that grew too long begins anew
            file.seek(max(unread, end - _LOG_BYTES))
            self.read = end
            return file.read()


@dataclass(frozen=True)
class Told:
    """What a job of a batch system brings back."""

    started: Started
    node: str
    heard: Heard | None


def once(job: Job | None, device: str, versions: dict[str, str]) -> Told:
    """One job in a process of its own, and where that was; without a job, only that."""
    host = Host(device, versions)
    try:
        heard = None if job is None else _last_word(host, job)
        return Told(host.start(), environment.node(), heard)
    finally:
        host.close()


def _last_word(host: Host, job: Job) -> Heard:
    heard = host.work(0, job, None)
    while isinstance(heard.answer, Progress):
        heard = host.work(0, job, None, begin=False)
    return heard
