"""Where built code is kept: a folder that belongs to the user alone, and files that prove their own content.

A file is called ``<key>-<sha256 of its content><suffix>``. The key says what was asked for, the second half that
nothing was cut off or changed since. Files are written under a temporary name and renamed, so that a reader sees a
whole file or none. Whatever is wrong with the folder (somebody else's, writable by others, read-only, full), nobody is
stopped: the answer is None, said once in the log, and the caller works in a private temporary folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

__all__ = ["Entry", "cache_folder", "digest", "keep", "lookup", "private_folder", "sweep", "turn", "usable_folder"]

_LOG = logging.getLogger("piste")
_SAID: set[str] = set()

_ENTRY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{64}\.\w+")
_TEMPORARY = ".piste-"
_PRIVATE = "piste-build-"

_DAY = 24 * 3600.0
#: an entry that nobody loaded for so long is removed; what a killed process left goes sooner
_UNUSED, _LEFT_OVER = 90 * _DAY, 1 * _DAY
#: how long to wait for another process that builds the same, before building it here as well
_TURN = 20.0
#: no library of ours comes near this; a larger file is not worth reading
_LARGEST = 1 << 26


class Entry(NamedTuple):
    """A file of the cache whose owner, mode and content were found right."""

    path: Path
    content: bytes


class _UnusableError(Exception):
    """Why a folder is not used."""


def cache_folder() -> Path:
    """The folder that ``PISTE_CACHE`` names, else ``piste`` in the user's cache directory. It need not exist."""
    named = os.environ.get("PISTE_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "piste"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "piste"
    named = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path is to be ignored: it would mean another folder in every working directory
    return (Path(named) if Path(named).is_absolute() else _home() / ".cache") / "piste"


def _home() -> Path:
    """The home folder; ``~`` itself where none is known."""
    return Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() raises where no home is known)


def usable_folder() -> Path | None:
    """The cache folder, made where it was missing, without links; None, said once in the log, where it is no good."""
    folder = cache_folder()
    try:
        return _private(folder)
    except _UnusableError as reason:
        _say(f"the cache folder {folder} is not used: {reason}; compiled code is not kept")
    except OSError as error:
        _say(f"the cache folder {folder} cannot be used ({error.strerror}); compiled code is not kept")
    return None


def _private(folder: Path) -> Path:
    """The real path of a folder that is ours alone. Links are followed once, here: what they lead to is what counts."""
    home = _home()
    if not folder.is_absolute():
        raise _UnusableError("no home folder is known; PISTE_CACHE can name a folder")
    if home in folder.parents and not home.is_dir():
        raise _UnusableError(f"the home folder {home} does not exist; PISTE_CACHE can name another")
    _make(folder)
    real = Path(os.path.realpath(folder, strict=True))  # Path.resolve() raises RuntimeError where links form a circle
    info = real.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise _UnusableError("it is not a folder")
    reason = _others_reach(info)
    if reason:
        raise _UnusableError(reason)
    for parent in real.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _UnusableError(f"{parent} above it is writable by everybody")
    return real


def _make(folder: Path) -> None:
    """With what is missing above it, all of it private whatever the umask."""
    if not folder.parent.exists():
        _make(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def _others_reach(info: os.stat_result) -> str:
    """Why what `info` describes could be changed by somebody else; empty where it could not."""
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}, this process to user {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(info.st_mode):04o}, at most 0755 is accepted)"
    return ""


def _say(message: str) -> None:
    """Once per process."""
    if message not in _SAID:
        _SAID.add(message)
        _LOG.warning(message)


def digest(content: bytes) -> str:
    """The hash that names and proves files."""
    return hashlib.sha256(content).hexdigest()


def lookup(key: str, suffix: str) -> Entry | None:
    """The entry of `key`, if there is one that can be trusted. Those that cannot are removed."""
    folder = usable_folder()
    if folder is None:
        return None
    try:
        names = [name for name in os.listdir(folder) if name.startswith(f"{key}-") and name.endswith(suffix)]  # noqa: PTH208
    except OSError:
        return None
    for name in names:
        path = folder / name
        content = _trusted(path, name[len(key) + 1 : -len(suffix)])
        if content is not None:
            _touch(path)
            return Entry(path, content)
        _remove(path)
    return None


def _trusted(path: Path, expected: str) -> bytes | None:
    """The content of a plain file that is ours alone and hashes to `expected`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST or _others_reach(info):
                return None
            content = file.read(_LARGEST)
    except OSError:
        return None
    return content if digest(content) == expected else None


def _touch(path: Path) -> None:
    """Notes that an entry was used, at most once a day: a load that writes nothing is a quick load."""
    with contextlib.suppress(OSError):
        if path.stat().st_mtime < time.time() - _DAY:
            os.utime(path)


def keep(key: str, suffix: str, content: bytes) -> Path | None:
    """Stores content under `key`; None, said once in the log, where that cannot be done."""
    folder = usable_folder()
    if folder is None:
        return None
    path, temporary = folder / f"{key}-{digest(content)}{suffix}", None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            _remove(Path(temporary))
        _say(f"compiled code cannot be kept in {folder} ({error.strerror}); the next process compiles again")
        return None
    return path


@contextlib.contextmanager
def turn(key: str) -> Iterator[None]:
    """One process at a time, so that eight ranks do not compile the same eight times.

    Only a courtesy: where locks do not work, or the other one takes too long, both build, which does no harm.
    """
    folder = usable_folder()
    path = None if folder is None else folder / f"{_TEMPORARY}{key}.lock"
    try:
        descriptor = -1 if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        descriptor = -1
    if path is None or descriptor < 0:
        yield
        return
    try:
        _wait_for(descriptor)
        yield
    finally:
        _remove(path)
        # said, not left to closing: a child forked meanwhile holds the same lock open
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    last = time.monotonic() + _TURN
    while time.monotonic() < last:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return
        else:
            return


@contextlib.contextmanager
def private_folder(beside: Path | None = None) -> Iterator[Path]:
    """A folder of mode 0700 that is gone afterwards, among the temporary ones or in a folder of ours.

    A library loaded from it stays mapped.
    """
    folder = tempfile.mkdtemp(prefix=_PRIVATE if beside is None else _TEMPORARY, dir=beside)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Removes entries that nobody used for long and what killed processes left. Nothing that is not ours is touched."""
    unused, left_over = time.time() - _UNUSED, time.time() - _LEFT_OVER
    folder = usable_folder()
    for path in [] if folder is None else _listed(folder):
        if _ENTRY.fullmatch(path.name):
            _remove_older(path, unused)
        elif path.name.startswith(_TEMPORARY):
            _remove_older(path, left_over)
    with contextlib.suppress(OSError):
        for path in _listed(Path(tempfile.gettempdir())):
            if path.name.startswith(_PRIVATE):
                _remove_older(path, left_over)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _remove_older(path: Path, moment: float) -> None:
    """Removes what is ours and was last changed before that moment."""
    with contextlib.suppress(OSError):
        info = path.lstat()
        if info.st_uid == os.geteuid() and info.st_mtime < moment:
            if stat.S_ISDIR(info.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
