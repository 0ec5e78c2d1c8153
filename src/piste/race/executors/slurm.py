"""Every run a job of Slurm, through submitit; the folder of results lies on a file system that all nodes share."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from piste.race import environment
from piste.race.executors.base import MOST_LOSSES, Death, Event, ExecutorError, Losses, wanted_machine
from piste.race.executors.host import Told, once
from piste.race.executors.queue import Queue, end_orphans
from piste.race.words import single_line
from piste.race.worker import Job, Progress

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0
_RETRY_SECONDS = 30.0  # after Slurm took no more jobs
_PATIENCE_SECONDS = 600.0  # with a job that Slurm does not take, and none that it has taken
_LIMIT = "SBATCH_TIMELIMIT"
_MINUTES = 240  # of a job, unless that says something else


_OUT_OF_TIME = "timed-out"  # in the words of submitit, whose signal comes shortly before Slurm ends a job
_TIME_IS_UP = f"Slurm ended it: its time was up ({_LIMIT})"


@dataclass
class _Sent:
    """A job of the race and that of Slurm which makes it."""

    job: Job
    call: Any
    stopped: str = ""
    begun: bool = False  # it left the queue, and that was said


class Slurm:
    """Jobs of Slurm; see ``base.Executor``. How far a run is cannot be seen, only that it has left the queue.

    Args:
        workers: jobs that are queued or run at the same time.
        logs: folder for what they print, and for submitit's own files.
        device: ``"cpu"`` or ``"cuda:0"``; each job asks for one core, and one GPU.
        cluster: ``"slurm"``, or ``"local"`` for processes of this machine, which the tests take.

    Raises:
        ExecutorError: Slurm is not installed here, or its time limit is none.

    Where Slurm takes no more jobs (users may have so many of them), the next one waits here until it does.
    """

    def __init__(self, workers: int, logs: Path, device: str = "cpu", cluster: str = "slurm") -> None:
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ExecutorError("--on slurm needs sbatch, which is not installed here: start the race on a login node")
        self.logs, self.device, self.width = logs, device, workers
        self.folder = logs / "slurm"
        self.cluster = cluster
        self.minutes = minutes(os.environ.get(_LIMIT, ""))
        self.sent: list[_Sent] = []
        self.waiting: list[Job] = []  # Slurm did not take them yet
        self.spoken: list[Event] = []  # by this side, of jobs that Slurm never had
        self.refused = self.accepted = time.monotonic()
        self.losses = Losses()
        self.home: Told | None = None  # the first node that answered
        self.queue = Queue()
        if cluster == "slurm":
            end_orphans(self.folder)

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *exception: object) -> None:
        for sent in self.sent:
            sent.call.cancel(check=False)
        deadline = time.monotonic() + _STOP_SECONDS
        while self.cluster == "local" and time.monotonic() < deadline:
            if all(sent.call.done() for sent in self.sent):
                break
            time.sleep(_POLL_SECONDS)

    @property
    def machine(self) -> dict[str, str]:
        """The node that answered first; timing passes are made there."""
        if self.home is None:
            self.home = self._first()
        return self.home.started.machine

    @property
    def idle(self) -> int:
        """Number of jobs that may be sent."""
        return 0 if self.waiting else self.width - len(self.sent)

    @property
    def jobs(self) -> list[Job]:
        """What is queued or runs, or waits to be queued."""
        return [*(sent.job for sent in self.sent), *self.waiting]

    def fit(self, job_bytes: int) -> None:
        """Nothing: how much memory a job has is up to Slurm."""

    def submit(self, job: Job) -> None:
        """Hand a job to Slurm.

        Raises:
            RuntimeError: as many as may be are there.
            ExecutorError: Slurm takes none.
        """
        if not self.idle:
            raise RuntimeError("no worker is idle")
        self.waiting.append(job)
        self._send()

    def stop(self, job: Job, reason: str) -> None:
        """Cancel a job; nothing if it is over."""
        if any(each is job for each in self.waiting):
            self.waiting = [each for each in self.waiting if each is not job]
            self.spoken.append(Event(job, Death(reason, self._node())))
        for sent in self.sent:
            if sent.job is job:
                sent.stopped = reason
                sent.call.cancel(check=False)

    def events(self, timeout: float) -> Iterator[Event]:
        """What has begun or ended within ``timeout`` seconds.

        Raises:
            ExecutorError: a worker cannot start on a node, or Slurm takes no job for long.
        """
        yield from self.spoken
        self.spoken = []
        deadline = time.monotonic() + timeout
        while not (done := [sent for sent in self.sent if sent.call.done()]) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for sent in done:
            self.sent.remove(sent)
            event = self._heard(sent)
            if event is not None:
                yield event
        if self.waiting and (done or time.monotonic() - self.refused > _RETRY_SECONDS):
            self._send()
        for sent in list(self.sent):
            # Time in the queue is none of a run's; submitit asks Slurm for it now and then.
            if not sent.begun and sent.call.state == "RUNNING":
                sent.begun = True
                yield Event(sent.job, Progress(0))

    def _first(self) -> Told:
        """What a job says that has nothing to do."""
        call = None
        try:
            call = self._call(None)
            told: Told = call.result()
        except (FailedJobError, UncompletedJobError) as error:
            if call is not None:
                call.cancel(check=False)
            what = "Slurm takes no job" if call is None else "a worker cannot start on a node"
            raise ExecutorError(f"{what}: {_last_line(error)}") from error
        except BaseException:  # Ctrl-C while it waits in the queue
            if call is not None:
                call.cancel(check=False)
            raise
        return told

    def _send(self) -> None:
        """Hand to Slurm what waits, as far as it is taken."""
        while self.waiting:
            try:
                call = self._call(self.waiting[0])
            except FailedJobError as error:  # what sbatch said
                self.refused = time.monotonic()
                if not self.sent and (self.home is None or self.refused - self.accepted > _PATIENCE_SECONDS):
                    raise ExecutorError(f"Slurm takes no job: {_last_line(error)}") from error
                return
            self.accepted = time.monotonic()
            self.sent.append(_Sent(self.waiting.pop(0), call))

    def _call(self, job: Job | None) -> Any:
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        executor.update_parameters(
            name="piste",
            timeout_min=self.minutes,
            cpus_per_task=1,
            gpus_per_node=int(self.device.startswith("cuda")),
            slurm_additional_parameters={"nodelist": self.home.node} if self._at_home(job) and self.home else {},
        )
        call = executor.submit(once, job, self.device, environment.versions())
        if self.cluster == "slurm":
            call.watcher = self.queue  # type: ignore[assignment]
            self.queue.register_job(call.job_id)
        return call

    def _at_home(self, job: Job | None) -> bool:
        return job is not None and bool(wanted_machine(job))

    def _heard(self, sent: _Sent) -> Event | None:
        try:
            told: Told = sent.call.result()
        except FailedJobError as error:  # one of the other kind, to submitit
            if _OUT_OF_TIME in str(error):
                return Event(sent.job, Death(_TIME_IS_UP, self._node()))
            raise ExecutorError(f"a worker cannot start on a node: {_last_line(error)}") from error
        except UncompletedJobError as error:
            return self._lost(sent, error)
        self.home = self.home or told
        assert told.heard is not None
        if told.heard.printed:
            with (self.logs / f"slurm-{sent.call.job_id}.log").open("ab") as file:
                file.write(told.heard.printed)
        return Event(sent.job, told.heard.answer)

    def _lost(self, sent: _Sent, error: UncompletedJobError) -> Event | None:
        """Send the job again, unless it was to be stopped or was lost several times."""
        machine = self._node()
        if sent.stopped:
            return Event(sent.job, Death(sent.stopped, machine))
        if sent.call.state == "OUT_OF_MEMORY":
            return Event(sent.job, Death("Slurm ended it: it took more memory than its job has", machine, True))
        if sent.call.state == "TIMEOUT":
            return Event(sent.job, Death(_TIME_IS_UP, machine))
        if self.losses.again(sent.job):
            self.waiting.insert(0, sent.job)
            self._send()
            return None
        return Event(sent.job, Death(f"its worker was lost {MOST_LOSSES} times: {_last_line(error)}", machine))

    def _node(self) -> dict[str, str] | None:
        return self.home.started.machine if self.home else None


def minutes(limit: str) -> int:
    """A limit of time as Slurm writes it: ``90``, ``90:00``, ``1:30:00``, ``2-12``, ``2-12:30``, ``UNLIMITED``.

    submitit has to know it, too: it takes a job that is ended before its time for one that made room for another, and
    sends it again.

    Raises:
        ExecutorError: it is none of these.
    """
    if not limit:
        return _MINUTES
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return 365 * 24 * 60
    days = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", limit)
    clock = re.fullmatch(r"(?:(\d+):)?(\d+)(?::(\d+))?", limit)
    if days:
        day, hour, minute, second = (int(part or 0) for part in days.groups())
    elif clock:
        day = 0
        hour, minute, second = (int(part or 0) for part in clock.groups())
        if clock[1] and not clock[3]:  # two numbers are minutes and seconds
            hour, minute, second = 0, hour, minute
    else:
        raise ExecutorError(f"{_LIMIT}={limit!r} is not legal; legal: as Slurm takes it, such as 90 or 1:30:00")
    return max(1, math.ceil((day * 24 + hour) * 60 + minute + second / 60))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return single_line(lines[-1]) if lines else type(error).__name__
