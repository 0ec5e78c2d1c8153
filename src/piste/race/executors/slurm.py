"""Every run a job of Slurm, through submitit; the folder of results lies on a file system that all nodes share."""

from __future__ import annotations

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
from piste.race.words import single_line
from piste.race.worker import Job, Progress

_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0
_MINUTES = 240  # of a job, unless SBATCH_TIMELIMIT says something else


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
        ExecutorError: Slurm is not installed here.
    """

    def __init__(self, workers: int, logs: Path, device: str = "cpu", cluster: str = "slurm") -> None:
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ExecutorError("--on slurm needs sbatch, which is not installed here: start the race on a login node")
        self.logs, self.device, self.width = logs, device, workers
        self.folder = logs / "slurm"
        self.cluster = cluster
        self.sent: list[_Sent] = []
        self.losses = Losses()
        self.home: Told | None = None  # the first node that answered

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
            self.home = self._call(None).result()
        return self.home.started.machine

    @property
    def idle(self) -> int:
        """Number of jobs that may be sent."""
        return self.width - len(self.sent)

    @property
    def jobs(self) -> list[Job]:
        """What is queued or runs."""
        return [sent.job for sent in self.sent]

    def fit(self, job_bytes: int) -> None:
        """Nothing: how much memory a job has is up to Slurm."""

    def submit(self, job: Job) -> None:
        """Hand a job to Slurm.

        Raises:
            RuntimeError: as many as may be are there.
        """
        if not self.idle:
            raise RuntimeError("no worker is idle")
        self.sent.append(_Sent(job, self._call(job)))

    def stop(self, job: Job, reason: str) -> None:
        """Cancel a job; nothing if it is over."""
        for sent in self.sent:
            if sent.job is job:
                sent.stopped = reason
                sent.call.cancel(check=False)

    def events(self, timeout: float) -> Iterator[Event]:
        """What has begun or ended within ``timeout`` seconds.

        Raises:
            ExecutorError: a worker cannot start on a node.
        """
        deadline = time.monotonic() + timeout
        while not (done := [sent for sent in self.sent if sent.call.done()]) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for sent in done:
            self.sent.remove(sent)
            event = self._heard(sent)
            if event is not None:
                yield event
        for sent in list(self.sent):
            # Time in the queue is none of a run's; submitit asks Slurm for it now and then.
            if not sent.begun and sent.call.state == "RUNNING":
                sent.begun = True
                yield Event(sent.job, Progress(0))

    def _call(self, job: Job | None) -> Any:
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        executor.update_parameters(
            name="piste",
            timeout_min=_MINUTES,
            cpus_per_task=1,
            gpus_per_node=int(self.device.startswith("cuda")),
            slurm_additional_parameters={"nodelist": self.home.node} if self._at_home(job) and self.home else {},
        )
        return executor.submit(once, job, self.device, environment.versions())

    def _at_home(self, job: Job | None) -> bool:
        return job is not None and bool(wanted_machine(job))

    def _heard(self, sent: _Sent) -> Event | None:
        try:
            told: Told = sent.call.result()
        except FailedJobError as error:  # one of the other kind, to submitit
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
        machine = self.home.started.machine if self.home else None
        if sent.stopped:
            return Event(sent.job, Death(sent.stopped, machine))
        if self.losses.again(sent.job):
            self.submit(sent.job)
            return None
        return Event(sent.job, Death(f"its worker was lost {MOST_LOSSES} times: {_last_line(error)}", machine))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return single_line(lines[-1]) if lines else type(error).__name__
