"""Worker processes on this machine, kept alive from run to run because starting one takes seconds.

A worker that dies of itself (a crash in native code) is an event like any other: its job is reported as dead, a new
process takes its place, and the other workers go on. One that was killed from outside says nothing of its job, which is
made again; only where that happens again and again, the job itself is taken for the reason (as where the system is
short of memory). Whatever a task has started ends with its worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

from piste.race import environment, worker
from piste.race.executors import sizing
from piste.race.executors.base import MOST_LOSSES, Death, Event, ExecutorError
from piste.race.executors.guard import Guard, trim
from piste.race.worker import Answer, Job, Started

_STOP_SECONDS = 30.0  # until a process has ended whose pipe has; the system may be writing down its memory
_MOST_STARTS = 5  # of workers that are killed before any is ready
_LOST = 255  # multiprocessing's exit code of one whose death nobody saw: the process that forked it was killed

Worker = ForkServerProcess | SpawnProcess


@dataclass
class _Lane:
    """One worker process, its pipe and its job."""

    process: Worker
    pipe: Connection[Job, Answer]
    job: Job | None = None
    started: Started | None = None
    stopped: str = ""  # why it was asked to end
    starved: bool = False  # for taking too much memory
    losses: int = 0  # of workers before it that had its job
    settled: int = 0  # bytes in memory after its first job


class Local:
    """Worker processes of this machine; see ``base.Executor``.

    Args:
        workers: how many; each computes on one thread.
        logs: folder for what the workers print.
        device: that jobs compute on.
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them: each worker sees one of them, in turn. Empty: all see all.
        memory: bytes that a worker may take, with all that its task starts; None for its share when there is no more.

    Use as a context manager: leaving it ends the processes.
    """

    def __init__(
        self, workers: int, logs: Path, device: str = "cpu", gpus: Sequence[str] = (), memory: int | None = None
    ) -> None:
        self.logs, self.device, self.gpus = logs, device, gpus
        self.guard = Guard(memory)
        self.false_starts = 0
        self.context = _context(device)
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
                _give(lane, job)
                return
        raise RuntimeError("no worker is idle")

    def stop(self, job: Job, reason: str) -> None:
        """End a job in whatever state it is; ``events`` reports it as dead, for this reason. Nothing if it is over."""
        for lane in self.lanes:
            if lane.job is job:
                lane.stopped = reason
                _kill(lane.process)

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have to say within ``timeout`` seconds; an answer that ends a job makes its worker idle.

        Raises:
            ExecutorError: a process ended before it was ready for any job.
        """
        sources = {lane.pipe: number for number, lane in enumerate(self.lanes)}
        ready = {sources[source] for source in wait(list(sources), timeout)}  # type: ignore[index]
        # What a task has forked holds the pipe open, beyond the death of its worker.
        ready |= {number for number, lane in enumerate(self.lanes) if lane.process.exitcode is not None}
        for number in sorted(ready):
            event = self._read(number)
            if event is not None:
                yield event
        self._look()

    def _look(self) -> None:
        for number in range(len(self.lanes)):
            trim(self._log(number))
        busy = {lane.process.pid: lane for lane in self.lanes if lane.job is not None and lane.process.pid is not None}
        for process, reason in self.guard.look(busy).items():
            busy[process].stopped, busy[process].starved = reason, True
            _kill(busy[process].process)

    def _read(self, number: int) -> Event | None:
        lane = self.lanes[number]
        job = lane.job
        try:
            if not lane.pipe.poll():
                raise EOFError
            answer: Answer | Death = lane.pipe.recv()
        except (EOFError, OSError):
            lane.process.join(_STOP_SECONDS)
            _kill(lane.process)
            reason = lane.stopped or _reason(lane.process.exitcode)
            self._replace(number)
            if lane.started is None and not lane.stopped:
                self._count_false_start(lane.process.exitcode, f"{reason}; see {self._log(number)}")
            if job is None:
                return None  # nobody waits for an answer
            if _was_killed(lane) and lane.losses + 1 < MOST_LOSSES:
                self.lanes[number].losses = lane.losses + (lane.started is not None)
                _give(self.lanes[number], job)
                return None
            return Event(job, Death(reason, out_of_memory=lane.starved))
        if isinstance(answer, Started):
            lane.started, self.false_starts = answer, 0
            return None
        if not isinstance(answer, worker.Progress):
            lane.job, lane.losses = None, 0
            if lane.stopped or self._is_bloated(lane):
                self._replace(number)  # stopped too late: it had answered, and takes no other job
        return None if job is None else Event(job, answer)

    def _count_false_start(self, code: int | None, reason: str) -> None:
        self.false_starts += 1
        # Of one that ended by itself, another would fare no better.
        by_itself = code is None or (code >= 0 and code != _LOST)
        if by_itself or self.false_starts == _MOST_STARTS:
            raise ExecutorError(f"a worker process cannot start: {reason}")

    def _is_bloated(self, lane: _Lane) -> bool:
        if lane.process.pid is None:
            return False
        held = self.guard.held(lane.process.pid)
        lane.settled = lane.settled or held
        return self.guard.is_bloated(held, lane.settled, len(self.lanes))

    def _replace(self, number: int) -> None:
        lane = self.lanes[number]
        _kill(lane.process)
        lane.process.join()
        lane.pipe.close()
        self.lanes[number] = self._start(number)

    def _log(self, number: int) -> Path:
        return self.logs / f"worker-{number}.log"

    def _start(self, number: int) -> _Lane:
        ours, theirs = self.context.Pipe()
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
        arguments = (theirs, self._log(number), self.device, gpu, dict(os.environ))
        process = self.context.Process(target=worker.main, args=arguments, daemon=True, name=f"piste-{number}")
        with _interrupt_ignored():
            _begin(process)
        theirs.close()
        return _Lane(process, ours)


def _context(device: str) -> ForkServerContext | SpawnContext:
    """How workers begin: as forks of a process that has imported what they need and done nothing, so in no time.

    Not as forks of this one, whose threads and locks they would inherit in whatever state they are. Where a fork may
    not work, each imports for itself: with the libraries of other systems, and of devices.
    """
    if sys.platform != "linux" or device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__, "torch._dynamo"])  # every optimizer of torch imports the latter
    return context


def _end(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        _kill(lane.process)
    for lane in lanes:
        lane.process.join()
        lane.pipe.close()


def _begin(process: Worker) -> None:
    """Start a process, though the one that forks it be killed meanwhile: the next try begins another."""
    for tries in range(1, _MOST_STARTS + 1):
        try:
            process.start()
            return
        except (EOFError, OSError):
            if tries == _MOST_STARTS:
                raise


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


def _give(lane: _Lane, job: Job) -> None:
    lane.job = job
    # A worker that has just died is noticed by `events`.
    with contextlib.suppress(OSError):
        lane.pipe.send(job)


def _kill(process: Worker) -> None:
    """End a worker and all that its task has started: they are its group, once it has begun to work."""
    if process.pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _was_killed(lane: _Lane) -> bool:
    """From outside, and not from here."""
    return not lane.stopped and lane.process.exitcode in (-signal.SIGKILL, -signal.SIGTERM, _LOST)


def _reason(code: int | None) -> str:
    """Why a process ended, in words."""
    if code is None:
        return "the worker process stopped answering"
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the worker process was killed by {name}{hint}"
    return f"the worker process ended with exit code {code}"
