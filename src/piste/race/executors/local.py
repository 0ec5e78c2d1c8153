"""Worker processes on this machine, kept alive from run to run because starting one takes seconds.

A worker that dies (a crash in native code, the system short of memory) is an event like any other: its job is
reported as dead, a new process takes its place, and the other workers go on.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from piste.race import worker
from piste.race.worker import Answer, Job

_STOP_SECONDS = 5.0


class ExecutorError(RuntimeError):
    """Worker processes cannot be started here."""


@dataclass(frozen=True)
class Death:
    """The worker died at its job."""

    reason: str


@dataclass(frozen=True)
class Event:
    """Something a worker has to say about a job."""

    job: Job
    answer: Answer | Death


@dataclass
class _Lane:
    """One worker process, its pipe and its job."""

    process: SpawnProcess
    pipe: Connection[Job, Answer]
    job: Job | None = None
    started: bool = False
    stopped: str = ""  # why it was asked to end


class Executor:
    """A fixed number of worker processes.

    Args:
        workers: how many; each computes on one thread.
        logs: folder for what the workers print.

    Use as a context manager: leaving it ends the processes.
    """

    def __init__(self, workers: int, logs: Path) -> None:
        self.logs = logs
        # "spawn": a forked process inherits torch's threads and locks in whatever state they are.
        self.context = multiprocessing.get_context("spawn")
        self.lanes = [self._start(number) for number in range(workers)]

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exception: object) -> None:
        for lane in self.lanes:
            lane.process.terminate()
        for lane in self.lanes:
            lane.process.join(_STOP_SECONDS)
            if lane.process.is_alive():
                lane.process.kill()
                lane.process.join()
            lane.pipe.close()

    @property
    def width(self) -> int:
        """Number of jobs side by side."""
        return len(self.lanes)

    @property
    def idle(self) -> int:
        """Number of workers without a job."""
        return sum(lane.job is None for lane in self.lanes)

    @property
    def jobs(self) -> list[Job]:
        """What is being worked on."""
        return [lane.job for lane in self.lanes if lane.job is not None]

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker.

        Raises:
            RuntimeError: none is idle.
        """
        for lane in self.lanes:
            if lane.job is None:
                lane.job = job
                # A worker that has just died is noticed by `events`, which reports this job as dead.
                with _dead_reader_ignored():
                    lane.pipe.send(job)
                return
        raise RuntimeError("no worker is idle")

    def stop(self, job: Job, reason: str) -> None:
        """End a job in whatever state it is; ``events`` reports it as dead, for this reason. Nothing if it is over."""
        for lane in self.lanes:
            if lane.job is job:
                lane.stopped = reason
                lane.process.kill()

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have to say within ``timeout`` seconds; an answer that ends a job makes its worker idle.

        Raises:
            ExecutorError: a process ended before it was ready for any job.
        """
        sources = {lane.pipe: number for number, lane in enumerate(self.lanes)}
        for source in wait(list(sources), timeout):
            number = sources[source]  # type: ignore[index]
            event = self._read(number)
            if event is not None:
                yield event

    def _read(self, number: int) -> Event | None:
        lane = self.lanes[number]
        job = lane.job
        try:
            answer: Answer | Death = lane.pipe.recv()
        except (EOFError, OSError):
            lane.process.join(_STOP_SECONDS)
            lane.process.kill()
            reason = lane.stopped or _reason(lane.process.exitcode)
            if not lane.started and not lane.stopped:
                # Another one would fare no better.
                raise ExecutorError(f"a worker process cannot start: {reason}; see {self._log(number)}") from None
            answer = Death(reason)
            self._replace(number)
        if isinstance(answer, worker.Started):
            lane.started = True
            return None
        if not isinstance(answer, worker.Progress):
            lane.job = None
            if lane.stopped and not isinstance(answer, Death):
                self._replace(number)  # stopped too late: it had answered, and takes no other job
        # A worker without a job can die too; nobody waits for an answer then.
        return None if job is None else Event(job, answer)

    def _replace(self, number: int) -> None:
        self.lanes[number].process.join()
        self.lanes[number].pipe.close()
        self.lanes[number] = self._start(number)

    def _log(self, number: int) -> Path:
        return self.logs / f"worker-{number}.log"

    def _start(self, number: int) -> _Lane:
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self._log(number))
        process = self.context.Process(target=worker.main, args=arguments, daemon=True, name=f"piste-{number}")
        with _interrupt_ignored():
            process.start()
        theirs.close()
        return _Lane(process, ours)


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Let a process started here ignore Ctrl-C from its first instruction on, before it can say so itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _dead_reader_ignored() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def _reason(code: int | None) -> str:
    """Why a process ended, in words."""
    if code is None:
        return "the worker process stopped answering"
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the worker process was killed by {name}{hint}"
    return f"the worker process ended with exit code {code}"
