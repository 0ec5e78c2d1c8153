"""Compiles C++ text with the compiler of the machine and loads it, from a private cache where it was compiled before.

Which flags a compiler takes, and whether its OpenMP code runs on the runtime that torch has loaded, is found out by
compiling and loading a small probe, once: the answer is kept in the cache like the libraries. A process that finds both
there starts no other process. Libraries are linked without an OpenMP runtime of their own, so that there is never a
second one beside torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import torch

from piste.engines import cpp_cache as cache
from piste.engines.cpp_cache import cache_folder

__all__ = ["BuildError", "Toolchain", "cache_folder", "library", "toolchain"]

_LOG = logging.getLogger("piste")

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-pipe"),
    # what a loop needs to be vectorised, while NaN and infinity keep their meaning
    *("-fno-math-errno", "-fno-trapping-math"),
    # the same result for every element, whether it falls into a vector or into the rest of a loop
    "-ffp-contract=off",
    # without these a parallel region refers to the C++ runtime
    *("-fno-exceptions", "-fno-rtti"),
)
_LINK = ("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared", "-Wl,--as-needed")
_NATIVE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
#: the second is how Apple's compiler takes it
_OPENMP = (("-fopenmp",), ("-Xclang", "-fopenmp"))
_SERIAL = (("-fopenmp-simd",), ())
#: one of these is what code compiled with -fopenmp calls
_ENTRIES = ("GOMP_parallel", "__kmpc_fork_call")

#: seconds: until a pause is explained, for a probe, for a library
_SILENT, _PROBE_LIMIT, _LIMIT = 1.0, 60.0, 120.0
_LONGEST = 4000

_PROBE = """
extern "C" float piste_probe(float* x, long n, int threads) {
    float sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (long i = 0; i < n; ++i) sum += x[i];
    return sum;
}
"""
_PROBE_OPENMP = """
#ifndef _OPENMP
#error "no OpenMP"
#endif
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
extern "C" int piste_threads(int threads) {
    int most = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < omp_get_num_threads(); ++i) {
#pragma omp atomic
            most += omp_get_thread_num();
        }
#pragma omp barrier
    }
    return most;
}
"""


class BuildError(RuntimeError):
    """Why there is no library: one line, then the compiler's own words where there are any."""


class Toolchain(NamedTuple):
    """A compiler that works here, with the flags that it takes."""

    #: what is called, for instance ("ccache", "g++")
    command: tuple[str, ...]
    flags: tuple[str, ...]
    #: whether parallel regions are parallel (on torch's OpenMP runtime); else ``_OPENMP`` is not defined
    openmp: bool
    #: everything about the machine and the compiler that built code depends on
    identity: str

    def key(self, source: str) -> str:
        """What a library of this source is called in the cache."""
        return cache.digest("\0".join((source, self.identity, *self.flags, *_LINK)).encode())


_FOUND: dict[tuple[str, str], Toolchain | BuildError] = {}
_LOADED: dict[str, ctypes.CDLL] = {}
_LOCKS: dict[str, threading.Lock] = {}
if hasattr(os, "register_at_fork"):
    # a lock that another thread held at the moment of the fork would never be released in the child
    os.register_at_fork(after_in_child=_LOCKS.clear)


def library(source: str, what: str = "") -> ctypes.CDLL:
    """The library compiled from `source`, self-contained C++ with ``extern "C"`` functions.

    The text includes nothing of torch or of the C++ library and declares what it uses of OpenMP itself, inside
    ``#ifdef _OPENMP``. `what` names it in messages. Raises :class:`BuildError` where there is no library to be had.
    """
    found = _LOADED.get(source)
    if found is None:
        with _LOCKS.setdefault(source, threading.Lock()):
            found = _LOADED.get(source)
            if found is None:
                found = _LOADED[source] = _named(what or "generated code", source)
    return found


def _named(what: str, source: str) -> ctypes.CDLL:
    try:
        return _load(source, what)
    except BuildError as error:
        raise BuildError(f"{what}: {error}") from error


def _load(source: str, what: str) -> ctypes.CDLL:
    chain = toolchain()
    key = chain.key(source)
    found = _from_cache(key)
    if found is not None:
        return found
    with cache.turn(key):
        found = _from_cache(key)
        if found is not None:
            return found
        cache.sweep()
        return _somewhere(lambda folder: _fresh(chain, source, what, folder))


def _fresh(chain: Toolchain, source: str, what: str, folder: Path) -> ctypes.CDLL:
    """Built in that folder, kept in the cache if it can be, and loaded from there if it was."""
    path = _build(chain, source, folder, _Pause(what, chain.command), _LIMIT)
    kept = cache.keep(chain.key(source), ".so", path.read_bytes())
    if kept is not None:
        with contextlib.suppress(OSError):  # kept where nothing may be run, or removed by somebody
            return ctypes.CDLL(str(kept))
    return _opened(path, chain.command)


def _opened(path: Path, command: tuple[str, ...]) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _RefusedError(f"what {shlex.join(command)} builds cannot be loaded: {error}") from error


def _from_cache(key: str) -> ctypes.CDLL | None:
    entry = cache.lookup(key, ".so")
    if entry is not None:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(entry.path))
    return None


def toolchain() -> Toolchain:
    """The compiler that works here; :class:`BuildError` says why none does.

    The environment variable ``CXX`` names it, with arguments if need be; else ``c++``, ``g++`` and ``clang++`` are
    looked for. The answer holds for the process.
    """
    asked = os.environ.get("CXX", "").strip(), os.environ.get("PATH", "")
    found = _FOUND.get(asked)
    if found is None:
        with _LOCKS.setdefault("\0toolchain", threading.Lock()):
            found = _FOUND.get(asked)
            if found is None:
                try:
                    found = _find(asked[0])
                except BuildError as error:
                    found = error
                _FOUND[asked] = found
    if isinstance(found, BuildError):
        raise BuildError(str(found))
    return found


def _find(named: str) -> Toolchain:
    if sys.platform == "win32":
        raise BuildError("the generated C++ engine does not run on Windows")
    offered = tuple(name for name in _ENTRIES if hasattr(ctypes.CDLL(None), name))
    candidates = _candidates(named)
    identities = [_identity(command, offered) for command in candidates]
    # what worked before first: a compiler that hangs must not be asked again in every process
    for command, identity in zip(candidates, identities, strict=True):
        known = _recall(command, identity)
        if known is not None:
            return known
    reasons = []
    for command, identity in zip(candidates, identities, strict=True):
        try:
            return _remember(_somewhere(partial(_probe, command, identity, offered)))
        except BuildError as error:
            reasons.append(str(error))
    raise BuildError("\n".join(reasons))


def _candidates(named: str) -> list[tuple[str, ...]]:
    """Commands that exist, each compiler once."""
    if named:
        try:
            command = tuple(shlex.split(named))
        except ValueError as error:
            raise BuildError(f"CXX={named!r} cannot be read: {error}") from error
        path = shutil.which(command[0])
        if path is None:
            raise BuildError(f"CXX={named!r}: {command[0]} is no program that can be run")
        # absolute, as it is started in another folder; links stay, since wrappers go by the name they are called by
        return [(os.path.abspath(path), *command[1:])]  # noqa: PTH100 (resolves links)
    here = [os.path.abspath(path) for path in map(shutil.which, reversed(_COMPILERS)) if path]  # noqa: PTH100
    paths = {os.path.realpath(path): (path,) for path in here}
    if not paths:
        raise BuildError(f"no C++ compiler is installed ({', '.join(_COMPILERS)}); CXX can name one")
    return list(reversed(paths.values()))


def _identity(command: tuple[str, ...], offered: tuple[str, ...]) -> str:
    """Told from files and never by asking the compiler, which would cost more than loading the library."""
    words = []
    for word in command:
        path = shutil.which(word)
        if path is None:
            words.append(word)
        else:
            info = Path(path).stat()
            words.append(f"{word} {os.path.realpath(path)} {info.st_size} {info.st_mtime_ns}")
    # the package that this file belongs to; importing it from here would run against the one-way rule
    version = sys.modules[__name__.partition(".")[0]].__version__
    return "\0".join((version, *words, *offered, _processor()))


def _processor() -> str:
    """What -march=native depends on: the first processor's description, without what changes by the minute."""
    told = ("vendor", "family", "model", "stepping", "flags", "Features", "CPU ", "cpu\t", "isa", "uarch")
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 14).partition("\n\n")[0].splitlines()
    except OSError:
        first = []
    here = os.uname()
    # on a Mac the version of the kernel names the chip
    lines = [line for line in first if line.startswith(told)] or [here.version]
    return "\n".join((here.sysname, here.machine, torch.backends.cpu.get_cpu_capability(), *lines))


def _record_key(identity: str) -> str:
    return cache.digest("\0".join((identity, *_FLAGS, *_LINK, _PROBE, _PROBE_OPENMP)).encode())


def _recall(command: tuple[str, ...], identity: str) -> Toolchain | None:
    entry = cache.lookup(_record_key(identity), ".json")
    if entry is None:
        return None
    record = json.loads(entry.content)
    return Toolchain(command, tuple(record["flags"]), record["openmp"], identity)


def _remember(chain: Toolchain) -> Toolchain:
    cache.keep(
        _record_key(chain.identity), ".json", json.dumps({"flags": chain.flags, "openmp": chain.openmp}).encode()
    )
    return chain


def _probe(command: tuple[str, ...], identity: str, offered: tuple[str, ...], folder: Path) -> Toolchain:
    """Tries the flags, best ones first, until something is built that can be loaded."""
    refused: BuildError | None = None
    pause = _Pause("a probe of the compiler", command)
    for native in ((_NATIVE,), ()):
        for extra in (*(_OPENMP if offered else ()), *_SERIAL):
            chain = Toolchain(command, (*_FLAGS, *native, *extra), extra in _OPENMP, identity)
            try:
                _opened(_build(chain, _PROBE + _PROBE_OPENMP * chain.openmp, folder, pause, _PROBE_LIMIT), command)
            except _RefusedError as error:
                refused = error
            else:
                return chain
    raise _RefusedError(str(refused))


class _RefusedError(BuildError):
    """No library came of it, but other flags or another disk may do better. All other failures are final."""


class _Pause:
    """Explains a pause once it lasts."""

    def __init__(self, what: str, command: tuple[str, ...]) -> None:
        folder = cache.usable_folder()
        self.message = f"compiling {what} with {shlex.join(command)}; " + (
            "it cannot be kept and will be compiled again next time" if folder is None else f"it is kept in {folder}"
        )
        self.moment: float | None = time.monotonic() + _SILENT

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the process has ended or the pause has been explained."""
        if self.moment is not None:
            try:
                process.wait(max(0.0, self.moment - time.monotonic()))
            except subprocess.TimeoutExpired:
                _LOG.warning(self.message)
                self.moment = None


_Result = TypeVar("_Result")


def _somewhere(work: Callable[[Path], _Result]) -> _Result:
    """Does the work in a temporary folder, or else next to the cache.

    The first disk may be full, or not allow to run what lies on it.
    """
    reasons = []
    for beside in dict.fromkeys((None, cache.usable_folder())):
        try:
            with cache.private_folder(beside) as folder:
                return work(folder)
        except _RefusedError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"there is no room to compile in: {error}")
    raise BuildError(reasons[0])


def _build(chain: Toolchain, source: str, folder: Path, pause: _Pause, limit: float) -> Path:
    """Compiles and links in two steps: told of OpenMP, the linker would add a runtime."""
    text, object_file, result = folder / "source.cpp", folder / "object.o", folder / "library.so"
    for old in (object_file, result):
        old.unlink(missing_ok=True)
    text.write_text(source, encoding="utf-8")
    _run((*chain.command, *chain.flags, "-c", str(text), "-o", str(object_file)), object_file, pause, limit)
    _run((*chain.command, *_LINK, str(object_file), "-o", str(result)), result, pause, limit)
    return result


def _run(command: tuple[str, ...], result: Path, pause: _Pause, limit: float) -> None:
    with _words() as output:
        process = _started(command, result.parent, output)
        status = _ended(process, command[0], pause, limit)
        # the file is looked for as well: where the program ignores the end of children, every status reads 0
        if status != 0 or not result.is_file():
            output.seek(0)
            words = output.read(_LONGEST).decode(errors="replace").strip()
            raise _RefusedError("\n".join(filter(None, (f"{command[0]} {_ending(status)}", words))))


def _words() -> IO[bytes]:
    """What the compiler says goes where it can be said on a full disk, too. A pipe might be kept open by a daemon."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("piste"), "w+b")
    return tempfile.TemporaryFile()


def _started(command: tuple[str, ...], folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},
            cwd=folder,
            # a session of its own, so that a wrapper's children can be ended with it
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error


def _ended(process: subprocess.Popen[bytes], name: str, pause: _Pause, limit: float) -> int:
    """The status of a process that ended by itself. Whatever else happens, it does not outlive this call."""
    try:
        pause.wait(process)
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} was stopped: it had not finished after {limit:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ending(status: int) -> str:
    if status >= 0:
        return f"failed with status {status}" if status else "left no file"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
