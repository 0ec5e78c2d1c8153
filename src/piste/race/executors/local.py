"""Worker processes on this machine, kept alive from run to run because starting one takes seconds.

A worker that dies (a crash in native code, the system short of memory) is an event like any other: its job is
reported as dead, a new process takes its place, and the other workers go on.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from piste.race import environment, worker
from piste.race.executors import sizing
from piste.race.executors.base import Death, Event, ExecutorError
from piste.race.worker import Answer, Job, Started

_STOP_SECONDS = 5.0


@dataclass
class _Lane:
    """One worker process, its pipe and its job."""

    process: SpawnProcess
    pipe: Connection[Job, Answer]
    job: Job | None = None
    started: Started | None = None
    stopped: str = ""  # why it was asked to end


class Local:
    """Worker processes of this machine; see ``base.Executor``.

    Args:
        workers: how many; each computes on one thread.
        logs: folder for what the workers print.
        device: that jobs compute on.
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them: each worker sees one of them, in turn. Empty: all see all.

    Use as a context manager: leaving it ends the processes.
    """

    def __init__(self, workers: int, logs: Path, device: str = "cpu", gpus: Sequence[str] = ()) -> None:
        self.logs, self.device, self.gpus = logs, device, gpus
        # "spawn": a forked process inherits torch's threads and locks in whatever state they are.
        self.context = multiprocessing.get_context("spawn")
        self.lanes = [self._start(number) for number in range(workers)]

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *exception: object) -> None:
        _end(self.lanes)

    @property
    def machine(self) -> dict[str, str]:
        """This one. A timing pass is alone, so it is the first worker that makes it."""
        return environment.machine(self.device)

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

    @property
    def started(self) -> Started | None:
        """What the first worker said when it was ready."""
        return self.lanes[0].started

    def fit(self, job_bytes: int) -> None:
        """Leave only as many workers as memory has room for."""
        count = sizing.fitting(len(self.lanes), job_bytes, already=len(self.lanes))
        _end(self.lanes[count:])
        del self.lanes[count:]

    def submit(self, job: Job) -> None:
        """Give a job to the first idle worker.

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
            if lane.started is None and not lane.stopped:
                # Another one would fare no better.
                raise ExecutorError(f"a worker process cannot start: {reason}; see {self._log(number)}") from None
            answer = Death(reason)
            self._replace(number)
        if isinstance(answer, Started):
            lane.started = answer
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
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
        arguments = (theirs, self._log(number), self.device, gpu)
        process = self.context.Process(target=worker.main, args=arguments, daemon=True, name=f"piste-{number}")
        with _interrupt_ignored():
            process.start()
        theirs.close()
        return _Lane(process, ours)


def _end(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        lane.process.terminate()
    for lane in lanes:
        lane.process.join(_STOP_SECONDS)
        if lane.process.is_alive():
            lane.process.kill()
            lane.process.join()
        lane.pipe.close()


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
