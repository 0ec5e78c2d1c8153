"""How many workers a machine has room for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

WORKER_BYTES = 400 * 2**20  # Python, torch and piste in one process, before any task
MARGIN = 1.25  # of the peak of a few steps, for what a whole run needs beyond it


def fitting(most: int, job_bytes: int, *, already: int = 0) -> int:
    """Number of workers, at least one.

    Args:
        most: no more than this.
        job_bytes: peak of the whole process of one at work; at least that of a worker without a task is taken.
        already: how many idle ones are in memory now.
    """
    free = available_bytes()
    if free is None:
        return max(1, most)
    each = max(WORKER_BYTES, int(job_bytes * MARGIN))
    return max(1, min(most, (free + already * WORKER_BYTES) // each))


def together(peaks: Sequence[int]) -> int:
    """The peak of a process that has come to hold all tasks, from the peaks of those that hold one."""
    return WORKER_BYTES + sum(max(0, peak - WORKER_BYTES) for peak in peaks)


def visible_gpus() -> list[str]:
    """The CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[:count] if names else [str(number) for number in range(count)]


def available_bytes(processes: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can be had without swapping, by the system and by the control group; None where that is unknown."""
    if sys.platform != "linux":
        return None
    lines = (processes / "meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_left_in_groups(processes, groups)], default=None)


def _left_in_groups(processes: Path, groups: Path) -> list[int]:
    """What the limits of the control group and those around it leave; version 2, or 1 as containers have it."""
    found = []
    try:
        lines = (processes / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [groups / own, *(groups / own).parents]
    for folder in folders[: folders.index(groups) + 1]:
        found.append(_left(folder / "memory.max", folder / "memory.current", folder / "memory.stat"))
    one = groups / "memory"
    found.append(_left(one / "memory.limit_in_bytes", one / "memory.usage_in_bytes", one / "memory.stat"))
    return [left for left in found if left is not None]


def _left(limit: Path, usage: Path, statistics: Path) -> int | None:
    """None where there is no limit. Pages of files that nobody uses count as free, as in ``MemAvailable``."""
    try:
        most, used = int(limit.read_text()), int(usage.read_text())
        lines = [line.split() for line in statistics.read_text().splitlines()]
    except (OSError, ValueError):  # "max" is no number
        return None
    idle = {name: int(value) for name, value in lines}
    return max(0, most - used + idle.get("total_inactive_file", idle.get("inactive_file", 0)))
