"""Workers on the nodes of a Ray cluster: actors of one CPU or GPU each.

Actors are never restarted by Ray: a lost one is replaced here, wherever the cluster has room then, and its job is
given to the next that is free.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from piste.race import environment
from piste.race.executors.base import MOST_LOSSES, Death, Event, ExecutorError, Losses, wanted_machine
from piste.race.executors.files import bundle, source_of
from piste.race.executors.host import Heard, Host
from piste.race.executors.sizing import MARGIN, WORKER_BYTES
from piste.race.record import fingerprint
from piste.race.words import single_line
from piste.race.worker import Job, Progress, Started

_PATIENCE_SECONDS = 600.0  # without any worker for a job that waits; clusters that grow take minutes
_SETTLE_SECONDS = 10.0  # for the rest of the workers, once the first is there
_CONNECT_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_MOST_FALSE_STARTS = 3


@dataclass
class _Lane:
    """One actor and what it was asked last."""

    number: int
    actor: Any
    call: Any  # the reference of an answer that is to come; None while idle
    machine: dict[str, str] | None = None  # None until it has started
    job: Job | None = None
    ticket: int = -1  # number of the job
    stopped: str = ""

    @property
    def free(self) -> bool:
        return self.machine is not None and self.job is None


class Ray:
    """Workers on a Ray cluster; see ``base.Executor``.

    Args:
        address: ``"auto"`` for the cluster that ``RAY_ADDRESS`` names or that runs here, or ``"ray://HOST:PORT"``.
        workers: how many; None for as many as the cluster has CPUs or GPUs, ``most`` at most.
        logs: folder for what the workers print.
        device: ``"cpu"``, ``"cuda:0"``, or ``"auto"``: GPUs where the cluster has some.
        most: jobs that there can be at the same time.

    Raises:
        ExecutorError: there is no such cluster, or it has no CPU or GPU.
    """

    def __init__(self, address: str, workers: int | None, logs: Path, device: str = "auto", most: int = 1) -> None:
        self.logs = logs
        self.own = not ray.is_initialized()
        if self.own:
            _connect(address)
        try:
            self.device, there = _device(device)
            self.job_bytes = WORKER_BYTES
            self.queue: list[Job] = []
            self.spoken: list[Event] = []  # by this side, of jobs that no worker has
            self.bundles: dict[str, Any] = {}
            self.losses, self.false_starts, self.tickets = Losses(), 0, 0
            self.waiting_since = time.monotonic()
            self.home: dict[str, str] | None = None
            self.lanes = [self._start(number) for number in range(workers or min(there, most))]
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *exception: object) -> None:
        _end(getattr(self, "lanes", ()))
        if self.own:
            ray.shutdown()

    @property
    def machine(self) -> dict[str, str]:
        """That of most workers when first asked; timing passes are made by the first worker on such a one."""
        if self.home is None:
            self._settle()
            machines = {fingerprint(lane.machine): lane.machine for lane in self.lanes if lane.machine}
            counts = Counter(fingerprint(lane.machine) for lane in self.lanes if lane.machine)
            self.home = machines[max(sorted(counts), key=lambda name: counts[name])]
        return self.home

    @property
    def width(self) -> int:
        """Number of workers, those that are still to start included."""
        return len(self.lanes)

    @property
    def idle(self) -> int:
        """Number of free workers, for which no job is waiting."""
        return max(0, sum(lane.free for lane in self.lanes) - len(self.queue))

    @property
    def jobs(self) -> list[Job]:
        """What is being worked on, or waits for another worker after its own was lost."""
        return [*(lane.job for lane in self.lanes if lane.job is not None), *self.queue]

    def fit(self, job_bytes: int) -> None:
        """Leave each node as many workers as its memory has room for."""
        self.job_bytes = max(WORKER_BYTES, int(job_bytes * MARGIN))
        # Ray counts what actors ask for, so asking anew is enough; most of the time the first guess was right.
        if self.job_bytes > 2 * WORKER_BYTES:
            _end(self.lanes)
            self.lanes = [self._start(lane.number) for lane in self.lanes]

    def submit(self, job: Job) -> None:
        """Give a job to a free worker.

        Raises:
            RuntimeError: none is free.
        """
        if not self.idle:
            raise RuntimeError("no worker is idle")
        self.queue.append(job)
        self._hand_out()

    def stop(self, job: Job, reason: str) -> None:
        """End a job in whatever state it is; nothing if it is over."""
        if any(each is job for each in self.queue):
            self.queue = [each for each in self.queue if each is not job]
            self.spoken.append(Event(job, Death(reason)))
        for lane in self.lanes:
            if lane.job is job:
                lane.stopped = reason
                lane.actor.stop.remote(lane.ticket, reason)

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have to say within ``timeout`` seconds.

        Raises:
            ExecutorError: workers cannot start, or none that may take a waiting job is there for ten minutes.
        """
        spoken, self.spoken = self.spoken, []
        yield from spoken
        calls = {lane.call: lane for lane in self.lanes if lane.call is not None}
        if calls:
            ray.wait(list(calls), timeout=0 if spoken else timeout)
            for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                event = self._heard(calls[call], call)
                if event is not None:
                    yield event
        elif not spoken:
            time.sleep(timeout)
        self._hand_out()
        self._lose_patience()

    def _settle(self) -> None:
        """Wait until the first worker is there, and a little for the others."""
        deadline = None
        while deadline is None or (any(lane.machine is None for lane in self.lanes) and time.monotonic() < deadline):
            heard = list(self.events(0.1))
            self.spoken = [*heard, *self.spoken]
            if deadline is None and any(lane.machine for lane in self.lanes):
                deadline = time.monotonic() + _SETTLE_SECONDS

    def _start(self, number: int) -> _Lane:
        wants: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(self.device.startswith("cuda"))}
        actors: Any = ray.remote(Host)  # a class that has what decorates it, which no type says
        made = actors.options(**wants, memory=self.job_bytes, max_restarts=0, max_concurrency=2)
        actor = made.remote(self.device, environment.versions())
        return _Lane(number, actor, actor.start.remote())

    def _heard(self, lane: _Lane, call: Any) -> Event | None:
        lane.call = None
        try:
            said: Started | Heard = ray.get(call)
        except RayTaskError as error:
            raise ExecutorError(single_line(str(error.cause))) from error
        except RayError as error:
            return self._lost(lane, error)
        if isinstance(said, Started):
            lane.machine, self.false_starts = said.machine, 0
            return None
        job = lane.job
        assert job is not None
        if isinstance(said.answer, Progress):
            lane.call = lane.actor.work.remote(lane.ticket, job, None, begin=False)
        else:
            lane.job, lane.stopped = None, ""
            self._write(lane, said.printed)
        return Event(job, said.answer)

    def _lost(self, lane: _Lane, error: RayError) -> Event | None:
        """Replace a lost worker. Its job is made again, unless it was to be stopped or has cost several workers."""
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise ExecutorError(f"a worker cannot start on a node of the cluster: {_last_line(error)}") from error
        if lane.machine is None:
            self.false_starts += 1
            if self.false_starts >= _MOST_FALSE_STARTS:
                raise ExecutorError(f"workers are lost as soon as they start: {_last_line(error)}") from error
        self._write(lane, f"{error}\n".encode())
        ray.kill(lane.actor)  # it may be out of reach only
        self.lanes[lane.number] = self._start(lane.number)
        job = lane.job
        if job is None:
            return None
        if lane.stopped:
            return Event(job, Death(lane.stopped, lane.machine))
        if self.losses.again(job):
            self.queue.append(job)
            return None
        return Event(job, Death(f"its worker was lost {MOST_LOSSES} times: {_last_line(error)}", lane.machine))

    def _hand_out(self) -> None:
        for job in list(self.queue):
            lane = self._lane_for(job)
            if lane is not None:
                self.queue.remove(job)
                self.tickets += 1
                lane.job, lane.ticket = job, self.tickets
                lane.call = lane.actor.work.remote(lane.ticket, job, self._sent(job))

    def _lane_for(self, job: Job) -> _Lane | None:
        wanted = wanted_machine(job)
        there = [lane for lane in self.lanes if lane.machine and wanted in ("", fingerprint(lane.machine))]
        if not there and all(lane.machine for lane in self.lanes):
            raise ExecutorError(
                "no worker is left on the machine that times the contenders; the same command goes on, and times "
                "all of them on another"
            )
        return next((lane for lane in there if lane.free), None)

    def _sent(self, job: Job) -> Any:
        """The file of a job, sent to the cluster once."""
        source = source_of(job)
        if source is None:
            return None
        if source not in self.bundles:
            self.bundles[source] = ray.put(bundle(source))
        return self.bundles[source]

    def _lose_patience(self) -> None:
        if (any(lane.machine for lane in self.lanes) and not self.queue) or any(lane.job for lane in self.lanes):
            self.waiting_since = time.monotonic()
        elif time.monotonic() - self.waiting_since > _PATIENCE_SECONDS:
            raise ExecutorError(
                f"the cluster gave no worker its place for {_PATIENCE_SECONDS / 60:.0f} minutes: each takes one "
                f"{'GPU' if self.device.startswith('cuda') else 'CPU'} and {self.job_bytes >> 20} MiB"
            )

    def _write(self, lane: _Lane, printed: bytes) -> None:
        if printed:
            with (self.logs / f"worker-{lane.number}.log").open("ab") as file:
                file.write(printed)


def _end(lanes: Sequence[_Lane]) -> None:
    """Let workers clear up, and end them in any case."""
    closed = [lane.actor.close.remote() for lane in lanes if lane.machine]
    if closed:
        ray.wait(closed, num_returns=len(closed), timeout=_CLOSE_SECONDS)
    for lane in lanes:
        ray.kill(lane.actor)


def _connect(address: str) -> None:
    where = os.environ.get("RAY_ADDRESS", "") or _last_started() if address == "auto" else address
    host, _, port = where.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            # Ray itself would try for minutes.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        with _signals_kept():
            _begin(where or "auto")
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        what = f"the Ray cluster {where} cannot be reached" if where else "no Ray cluster runs here"
        # What comes from a server is a traceback, whose last line tells.
        reason = _last_line(error) if isinstance(error, ConnectionAbortedError) else single_line(str(error).strip())
        raise ExecutorError(
            f"{what} ({reason[:200]}); start one with ray start --head, or name one: "
            "--on ray://HOST:PORT, or RAY_ADDRESS=HOST:PORT with --on ray"
        ) from error


def _begin(address: str) -> None:
    """Once more where the server of ``ray://`` could not start a process for us, as happens on busy machines."""
    for tries in range(1, _MOST_FALSE_STARTS + 1):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except ConnectionAbortedError:
            if tries == _MOST_FALSE_STARTS:
                raise


def _last_started() -> str:
    """The address of the cluster that was started here last, where Ray notes it; it may have ended since."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return note.read_text().strip()
    except OSError:
        return ""


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes the request to end for itself; here it is a wish that the driver looks at."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _device(asked: str) -> tuple[str, int]:
    """The device of workers, and for how many of them the cluster has room."""
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    device = asked if asked != "auto" else "cuda:0" if has.get("GPU", 0) >= 1 else "cpu"
    kind = "GPU" if device.startswith("cuda") else "CPU"
    there = int(has.get(kind, 0))
    if there < 1:
        raise ExecutorError(f"the Ray cluster has no {kind}")
    return device, there


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return single_line(lines[-1].strip()) if lines else type(error).__name__
