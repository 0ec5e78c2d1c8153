"""Where runs are kept: one file a run, named by its content address, written once and whole.

    DIR/study.json          what was asked for last, for `--resume` and `piste report`
    DIR/runs/<id>.json      one record a finished run
    DIR/report.html         the last report
    DIR/logs/               what the worker processes printed
    DIR/lock                held while a race writes here; the system frees it when the process ends, however it ends

A file is written beside its place, synced to the disk and renamed, so that a process killed at any moment leaves the
old content or the new, never half of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from piste.race.record import RecordError, RunRecord

_TEMPORARY = ".tmp"
_DAMAGED = ".damaged"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HINT = "; free some space and repeat the command"


class StoreError(Exception):
    """The directory of a race cannot be used; the message says why and that nothing was lost."""


class Store:
    """The directory of a race.

    Args:
        path: the directory; made on opening for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.logs = path / "logs"
        self.study = path / "study.json"
        self.report = path / "report.html"
        self.damaged: list[str] = []

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Make the directory, see that it can be written and keep other races out of it.

        Raises:
            StoreError: it cannot be made or written, is full, or another race is using it.
        """
        with self._explained("cannot be used"):
            self.runs.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            lock = (self.path / "lock").open("a+")
        with lock:
            self._take(lock)
            with self._explained("cannot be written"):
                for leftover in self.path.rglob(f"*{_TEMPORARY}"):
                    leftover.unlink()
                # A trial the size of many records: better to learn now than after the first run.
                _write(self.path / "trial", " " * 2**18)
                (self.path / "trial").unlink()
            yield self

    def load(self, set_aside: bool = True) -> dict[str, RunRecord]:
        """All runs kept here, by id.

        Args:
            set_aside: rename a damaged file, so that its run is made again. Either way it is not among the runs and
                is named in ``damaged``.

        Raises:
            StoreError: the files cannot be read.
        """
        found = {}
        with self._explained("cannot be read"):
            for name in sorted(path.name for path in self.runs.glob("*.json")):
                path = self.runs / name
                try:
                    record = RunRecord.from_json(path.read_bytes().decode())
                    if record.id != path.stem:
                        raise RecordError("its name is not its id")
                except (RecordError, UnicodeDecodeError) as error:
                    self.damaged.append(f"{path} is damaged: {error}")
                    if set_aside:
                        path.replace(path.with_name(path.name + _DAMAGED))
                else:
                    found[record.id] = record
        return found

    def add(self, record: RunRecord) -> None:
        """Keep a run; not one that ended for want of space, which says nothing about it: it is to be made again.

        Raises:
            StoreError: it cannot be written, or is such a run.
        """
        if any(f"[Errno {number}]" in record.message for number in _FULL[:2]):
            raise StoreError(f"a run of the race in {self.path} could not write: {record.message}{_HINT}{self._kept()}")
        with self._explained("can no longer be written"):
            _write(self.runs / f"{record.id}.json", record.to_json())

    def write_study(self, study: dict[str, Any]) -> None:
        """Keep what was asked for.

        Raises:
            StoreError: it cannot be written.
        """
        with self._explained("cannot be written"):
            _write(self.study, json.dumps(study, indent=1) + "\n")

    def read_study(self) -> dict[str, Any]:
        """What was asked for last.

        Raises:
            StoreError: there is no study here, or its file is damaged.
        """
        if not self.study.is_file():
            raise StoreError(f"there is no race in {self.path} (no {self.study.name})")
        with self._explained("cannot be read"):
            text = self.study.read_text(encoding="utf-8", errors="replace")
        try:
            study = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{self.study} is damaged ({error}); repeat the command that started the race") from error
        if not isinstance(study, dict):
            raise StoreError(f"{self.study} does not hold a race; repeat the command that started it")
        return study

    @contextmanager
    def explained(self) -> Iterator[None]:
        """For others who write here (the report): turn the system's errors into a ``StoreError``."""
        with self._explained("can no longer be written"):
            yield

    def _take(self, lock: IO[str]) -> None:
        if not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            by = f" (process {holder})" if holder else ""
            raise StoreError(
                f"another race is using {self.path}{by}; wait for it, or give this one its own directory with --out"
            )
        with self._explained("cannot be written"):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            hint = _HINT if error.errno in _FULL else ""
            raise StoreError(f"the directory {self.path} {what}: {reason}{hint}{self._kept()}") from error

    def _kept(self) -> str:
        kept = len(list(self.runs.glob("*.json"))) if self.runs.is_dir() else 0
        return f"; the {kept} finished runs in it are kept" if kept else ""


def _write(path: Path, text: str) -> None:
    """Put a whole file in place at once and make sure of it. Only the holder of the lock writes here."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make the rename itself survive a power cut, where directories can be synced."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network and user-space file systems cannot do this; the record itself is synced there all the same.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _locked(file: IO[str]) -> bool:
    """Take the operating system's lock on an open file; it is released when the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
