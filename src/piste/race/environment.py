"""What ran the race: versions, machine, memory peaks, time stamps."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

import piste
from piste.race.record import fingerprint

# How a run is driven and reported does not change how it goes; these do.
_DECISIVE = {
    *("race/attempt.py", "race/data.py", "race/packed.py", "race/seeds.py", "race/stack.py", "race/training.py"),
    "race/tasks/classification.py",  # no task's own file, and so in no task's hash
}


def versions() -> dict[str, str]:
    """What must be equal for two runs to be the same run."""
    return {"python": platform.python_version(), "torch": torch.__version__, "piste": _piste_version()}


def machine(device: str) -> dict[str, str]:
    """The machine in words; wall times are comparable only where these agree."""
    described = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(usable_cores()),
        "peak memory": "CUDA allocator" if device.startswith("cuda") else _peak_source(),
    }
    if device.startswith("cuda"):
        described["accelerator"] = torch.cuda.get_device_name(device)
    # Computed by readers, too; written down for those who have the file and not this code.
    described["fingerprint"] = fingerprint(described)
    return described


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def usable_cores() -> int:
    """Processor cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def node() -> str:
    """The name of this machine, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # "5" resets the high-water mark of resident memory (proc(5)). Some containers refuse it.
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def peak_bytes(device: torch.device) -> int:
    """Peak memory since ``reset_peak``: CUDA allocations, or resident memory of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _high_water_mark()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_source() -> str:
    if sys.platform == "win32":
        return "not measured"
    if sys.platform == "linux":
        return "resident memory of the whole worker process, peak of the run"
    return "resident memory of the whole worker process, peak since it started"


@cache
def _piste_version() -> str:
    """Version and a hash of the source, for a checkout's results change while its version stays."""
    package = Path(piste.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).as_posix()
        if relative.startswith("race/") and relative not in _DECISIVE:
            continue
        digest.update(relative.encode())
        digest.update(path.read_bytes())
    try:
        version = importlib.metadata.version("piste")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version}+{digest.hexdigest()[:8]}"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
