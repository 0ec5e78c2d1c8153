"""A task file on its way to machines that do not have it: the file, and the Python files that it may import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from piste.race.executors.base import ExecutorError
from piste.race.task import BUILT_IN, split_reference
from piste.race.worker import Job, Run

MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A Python file, the others in its folder, and the packages there.

    Args:
        path: of the file, where the race was started.
        files: contents, by their names within the folder.
    """

    path: str
    files: dict[str, bytes]


def source_of(job: Job) -> str | None:
    """The file that a job needs; None where piste has all of it."""
    if isinstance(job, Run) and job.script is not None:
        return job.script.path
    return None if job.reference in BUILT_IN else str(split_reference(job.reference)[0])


def bundle(path: str) -> Bundle:
    """Read a file and what stands beside it.

    Raises:
        ExecutorError: that is more than the 16 MiB which are sent.
    """
    folder = Path(path).parent
    packages = [each.parent for each in folder.glob("*/__init__.py")]
    paths = [*folder.glob("*.py"), *(each for package in packages for each in package.rglob("*.py"))]
    if sum(each.stat().st_size for each in paths) > MOST_BYTES:
        raise ExecutorError(
            f"the Python files beside {path} are sent along, and hold more than {MOST_BYTES >> 20} MiB; "
            "give it a folder of its own"
        )
    return Bundle(path, {each.relative_to(folder).as_posix(): each.read_bytes() for each in paths})


def unpack(sent: Bundle, folder: Path) -> str:
    """Where the file lies on this machine: in its own place where all is there already, else written into a folder."""
    home = Path(sent.path).parent
    if all(_holds(home / name, content) for name, content in sent.files.items()):
        return sent.path
    for name, content in sent.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return str(folder / Path(sent.path).name)


def moved(job: Job, old: str, new: str) -> Job:
    """The job with its file in another place."""
    job = replace(job, reference=new + job.reference.removeprefix(old))
    if isinstance(job, Run) and job.script is not None:
        return replace(job, script=replace(job.script, path=new))
    return job


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
