"""A worker process: trains what it is told, one run at a time, on one thread.

It answers over a pipe and never writes to the terminal or to the store; what a task prints goes to a log file.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

import torch

from piste.race import environment, script
from piste.race.contenders import Contender
from piste.race.data import Splits
from piste.race.inspection import TaskCard, inspect_task, load_data, task_hash
from piste.race.packed import run_pack
from piste.race.record import RunKey, RunRecord, fingerprint
from piste.race.script import Script
from piste.race.seeds import seed_everything
from piste.race.task import Task, TaskError, load_task
from piste.race.training import run

_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Inspect:
    """Load a task, try its parts, answer with a ``TaskCard``."""

    reference: str
    device: str
    pack: bool = False  # find out, too, whether its trials can be trained together


@dataclass(frozen=True)
class Run:
    """Make one run, answer with its ``RunRecord``."""

    reference: str
    contender: Contender
    key: RunKey
    script: Script | None = None


@dataclass(frozen=True)
class Pack:
    """Make runs of one contender on one task together, answer with ``Packed``, or ``Apart``."""

    reference: str
    contender: Contender
    keys: tuple[RunKey, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The same, one by one."""
        return tuple(Run(self.reference, self.contender, key) for key in self.keys)


@dataclass(frozen=True)
class Packed:
    """The records of the runs of a ``Pack``, in their order."""

    records: tuple[RunRecord, ...]


@dataclass(frozen=True)
class Apart:
    """Trained together, the runs of a ``Pack`` come to no end; the traceback is in the worker's log."""


@dataclass(frozen=True)
class Started:
    """Sent once, when the process is ready for its first job.

    Args:
        machine: where it runs, in words.
        versions: of python, torch and piste there.
    """

    machine: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Progress:
    """Sent when a job begins, with no step made, and now and then during a run."""

    step: int


@dataclass(frozen=True)
class Refusal:
    """Sent instead of an answer: the task cannot be used."""

    message: str
    traceback: str


Job = Inspect | Run | Pack
Answer = Started | TaskCard | RunRecord | Packed | Apart | Progress | Refusal


def main(pipe: Connection[Answer, Job], log: Path, device: str, gpu: str | None, variables: Mapping[str, str]) -> None:
    """Serve jobs until the other end of the pipe is closed, as it is when the driver dies, however it dies.

    Args:
        pipe: to the driver.
        log: file for all that is printed here.
        device: that jobs will ask for.
        gpu: the one that is to be seen here, as ``CUDA_VISIBLE_DEVICES`` names it; None for all.
        variables: the driver's environment. This process may be the fork of one that was started with an earlier one.
    """
    os.environ.clear()
    os.environ.update(variables)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used, which is later
    # Ctrl-C goes to the whole process group; the driver decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()  # so that whatever a task starts can be ended with its worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _write_output_to(log)
    torch.set_num_threads(1)
    worker = _Worker(pipe)
    pipe.send(Started(environment.machine(device), environment.versions()))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            _end()
        worker.serve(job)


@dataclass(frozen=True)
class _Ready:
    """A task, its data and the hash of both."""

    task: Task
    splits: Splits
    task_hash: str


class _Worker:
    def __init__(self, pipe: Connection[Answer, Job]) -> None:
        self.pipe = pipe
        self.tasks: dict[str, _Ready] = {}

    def serve(self, job: Job) -> None:
        self._send(Progress(0))
        try:
            answer = self._answer(job)
        except TaskError as error:
            self._send(Refusal(str(error), "".join(traceback.format_exception(error))))
        else:
            self._send(answer)
        sys.stdout.flush()
        sys.stderr.flush()

    def _answer(self, job: Job) -> Answer:
        if isinstance(job, Inspect):
            return self._inspect(job)
        return self._pack(job) if isinstance(job, Pack) else self._run(job)

    def _inspect(self, job: Inspect) -> TaskCard:
        ready = self._ready(job.reference)
        device = torch.device(job.device)
        return inspect_task(job.reference, ready.task, ready.task_hash, ready.splits, device, pack=job.pack)

    def _run(self, job: Run) -> RunRecord:
        if job.key.machine not in ("", fingerprint(environment.machine(job.key.device))):
            raise TaskError("a timing pass came to another machine than its own; start the race again")
        if job.script is not None:
            return script.run(job.script, job.contender, job.key, self._progress())
        ready = self._unchanged(job.reference, job.key)
        made = run(ready.task, ready.splits, job.contender, job.key, self._progress())
        _release()
        return made

    def _pack(self, job: Pack) -> Packed | Apart:
        ready = self._unchanged(job.reference, job.keys[0])
        try:
            return Packed(tuple(run_pack(ready.task, ready.splits, job.contender, job.keys, self._progress())))
        except (Exception, SystemExit):
            traceback.print_exc()
            return Apart()
        finally:
            _release()

    def _unchanged(self, reference: str, key: RunKey) -> _Ready:
        """The task of a run, as it was when the race was planned."""
        ready = self._ready(reference)
        if ready.task_hash != key.task_hash:
            raise TaskError(
                f"task {key.task} changed while it was raced (or gives other data each time it is loaded); "
                "start the race again"
            )
        return ready

    def _progress(self) -> Callable[[int], None]:
        """Sends the number of steps on, now and then."""
        sent = time.monotonic()

        def progress(step: int) -> None:
            nonlocal sent
            if time.monotonic() - sent >= _PROGRESS_SECONDS:
                sent = time.monotonic()
                self._send(Progress(step))

        return progress

    def _ready(self, reference: str) -> _Ready:
        """The task, loaded once a process."""
        if reference not in self.tasks:
            seed_everything(0)
            loaded = load_task(reference)
            splits = load_data(loaded.task)
            self.tasks[reference] = _Ready(loaded.task, splits, task_hash(loaded, splits))
        return self.tasks[reference]

    def _send(self, answer: Answer) -> None:
        try:
            self.pipe.send(answer)
        except OSError:
            # The driver is gone. Nobody waits for the result, and an exit that waits for anything could hang.
            _end()


def _end_with_parent() -> None:
    """Whatever the task does meanwhile: nobody is there to stop it any more."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _end()


def _end() -> NoReturn:
    """At once, with all that the task has started."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _release() -> None:
    """What torch keeps of a device's memory is for the other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_output_to(log: Path) -> None:
    """Send stdout and stderr, those of C libraries included, to a file: the terminal belongs to the live table."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
