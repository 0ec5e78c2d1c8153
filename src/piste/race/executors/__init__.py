"""Who makes the runs of a race, behind one face: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from piste.race import environment
from piste.race.executors import sizing
from piste.race.executors.base import Death as Death
from piste.race.executors.base import Event as Event
from piste.race.executors.base import Executor as Executor
from piste.race.executors.base import ExecutorError as ExecutorError
from piste.race.executors.local import Local as Local

LOCAL = "local"
RAY = "ray"
SLURM = "slurm"
PLACES = f"{LOCAL}, {RAY}, ray://HOST:PORT or {SLURM}"
_MOST_QUEUED = 64  # jobs of one race in a queue that others wait in, too


def is_place(on: str) -> bool:
    """Whether ``--on`` may be this."""
    host, _, port = on.removeprefix("ray://").rpartition(":")
    return on in (LOCAL, RAY, SLURM) or (on.startswith("ray://") and bool(host) and port.isdigit())


def make_executor(
    on: str, workers: int | None, logs: Path, device: str, spread: bool, most: int, memory: int | None = None
) -> Executor:
    """Workers in one of the places.

    Args:
        on: which place.
        workers: how many; None for what the place has room for.
        logs: folder for what they print.
        device: as the place takes it; here one that exists.
        spread: over all GPUs of this machine, one worker each, where the device is one.
        most: jobs that there can be at the same time; more workers are started only when asked for.
        memory: bytes that a worker of this machine may take; see ``Local``. Clusters have limits of their own.

    Raises:
        ExecutorError: what the place needs is not installed, or it cannot be reached.
    """
    if on == SLURM:
        _need("submitit", SLURM)
        from piste.race.executors.slurm import Slurm

        return Slurm(workers or min(most, _MOST_QUEUED), logs, "cpu" if device == "auto" else device)
    if on != LOCAL:
        _need("ray", RAY)
        from piste.race.executors.ray import Ray

        return Ray("auto" if on == RAY else on, workers, logs, device, most)
    gpus = sizing.visible_gpus() if spread and device.startswith("cuda") else []
    if workers is None:
        cores = sizing.fitting(environment.usable_cores(), sizing.WORKER_BYTES)
        workers = min(most, cores if device == "cpu" else max(1, len(gpus)))
    return Local(workers, logs, device, gpus, memory)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ExecutorError(f"--on {extra} needs {package}, which is not installed: pip install 'piste[{extra}]'")
