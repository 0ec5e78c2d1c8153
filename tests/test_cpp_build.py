"""Building and caching of generated C++: real compilers, real processes, real signals, disks and owners."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import piste
from piste.engines import cpp_build as build
from piste.engines import cpp_cache as cache

REAL = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="not served on Windows"),
    pytest.mark.skipif(REAL is None, reason="no C++ compiler"),
]
ROOT = os.geteuid() == 0
SILENT = build._SILENT
PATIENCE = 300.0  # seconds, for what takes one or two; nothing waits for it but a failing test


def text(number: int = 42) -> str:
    return f'extern "C" int answer(int x) {{ return x + {number}; }}\n'


def answer(number: int = 42) -> int:
    """What the library says for 0: `number`, if it is the right one."""
    return int(build.library(text(number), "the answer").answer(0))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that does not exist yet, temporary files in a place of their own, nothing remembered."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("PISTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "_SILENT", PATIENCE)  # on a busy machine any pause would be long enough to be explained
    forget(monkeypatch)
    yield tmp_path / "cache"
    assert not list(temporary.glob("piste-*")), "a private folder was left behind"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process knows nothing yet."""
    monkeypatch.setattr(build, "_FOUND", {})
    monkeypatch.setattr(build, "_LOADED", {})
    monkeypatch.setattr(cache, "_SAID", set())


class Child:
    """A forked process that knows nothing yet, works, and hands back a result or an error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other threads are running: they are waited for by nobody here
            self.pid = os.fork()
        if not self.pid:
            os.close(self.reading)
            os.setpgid(0, 0)
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # ignored in jobs that a script put into the background
            build._FOUND.clear()
            build._LOADED.clear()
            cache._SAID.clear()
            try:
                result = True, work()
            except BaseException as error:
                result = False, f"{type(error).__name__}: {error}"
            with os.fdopen(writing, "wb") as file:
                pickle.dump(result, file)
            os._exit(0)
        os.close(writing)

    def result(self) -> Any:
        alarm = threading.Timer(PATIENCE, os.kill, (self.pid, signal.SIGKILL))
        alarm.start()
        with os.fdopen(self.reading, "rb") as file:
            told = file.read()
        os.waitpid(self.pid, 0)
        alarm.cancel()
        assert told, "the child died or hung"
        fine, result = pickle.loads(told)
        assert fine, result
        return result

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reading)


def elsewhere(work: Callable[[], Any]) -> Any:
    return Child(work).result()


def wrapper(path: Path, lines: str) -> str:
    """A compiler made of a few lines of shell; "$@" are its arguments, $REAL is the real compiler."""
    path.write_text(f"#!/bin/sh\nREAL={REAL}\n{textwrap.dedent(lines)}\n")
    path.chmod(0o755)
    return str(path)


def ended(pid: int) -> bool:
    """Whether a process has ended, or ends soon (a machine may be busy); it counts although nobody has asked for its
    status yet."""
    last = time.monotonic() + PATIENCE
    while time.monotonic() < last:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except ProcessLookupError:
            return True
        except FileNotFoundError:
            pass  # just gone, or a system without /proc: asked again
        time.sleep(0.01)
    return False


def appears(path: Path) -> None:
    """Wait for a file that says that something has begun."""
    last = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < last, f"{path} never appears"
        time.sleep(0.01)


def counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, company: int = 1, seconds: float = 3.0
) -> Callable[[], int]:
    """Puts a compiler in place that writes down what it compiles, and waits until so many are at it, but no longer than
    so many seconds; how many sources that were, probes apart."""
    log = tmp_path / "compiled"
    log.touch()
    wait = f"for i in $(seq {10 * seconds:.0f}); do test $(wc -l < {log}) -ge {company} && break; sleep 0.1; done"
    noting = f"grep -q answer source.cpp && echo once >> {log} && {wait}"
    lines = f'case "$*" in *" -c "*) {noting};; esac\nexec $REAL "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "counting", lines))
    return lambda: len(log.read_text().split())


def entries(folder: Path, suffix: str = ".so") -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


# ---------------------------------------------------------------------------------------------------------------------
# What is built


def test_a_library_is_built_called_and_remembered() -> None:
    assert answer(7) == 7
    assert build.library(text(7)) is build.library(text(7))
    assert answer(8) == 8


def test_built_code_keeps_nan_infinity_and_every_rounding() -> None:
    library = build.library("""
        extern "C" void look(const float* x, float* isnan, float* isinf, float* rest, int n) {
            for (int i = 0; i < n; ++i) {
                isnan[i] = x[i] != x[i];
                isinf[i] = (x[i] - x[i]) != (x[i] - x[i]) && x[i] == x[i];
                rest[i] = x[i] * x[i] - 1.0f;
            }
        }
    """)
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0] + [1 + 2.0**-12 + k * 2.0**-23 for k in range(37)]
    )
    nan, inf, rest = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    library.look(*(ctypes.c_void_p(t.data_ptr()) for t in (x, nan, inf, rest)), len(x))
    assert torch.equal(nan.bool(), x.isnan())
    assert torch.equal(inf.bool(), x.isinf())
    square = x * x  # rounded before the subtraction; one fused operation would keep the digits below
    assert torch.equal(rest[4:], (square - 1)[4:])
    assert not torch.equal(rest[4:].double(), x[4:].double() ** 2 - 1)


def test_the_flags_asked_for_are_taken() -> None:
    flags = build.toolchain().flags
    assert {
        "-std=c++17",
        "-O2",
        "-ftree-vectorize",
        "-fPIC",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
    } <= set(flags)
    assert not {"-ffast-math", "-Ofast", "-ffinite-math-only"} & set(flags)


PARALLEL = """
    #ifdef _OPENMP
    extern "C" int omp_get_thread_num(void);
    #else
    static int omp_get_thread_num(void) { return 0; }
    #endif
    extern "C" void who(int* seen, int threads) {
        #pragma omp parallel num_threads(threads)
        seen[omp_get_thread_num()] += 1;
    }
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_parallel_regions_run_on_the_one_runtime_that_torch_has_loaded() -> None:
    script = f"""
        import ctypes, torch
        def runtimes():
            lines = open("/proc/self/maps").read().splitlines()
            return {{l.split()[-1] for l in lines if any(n in l.split("/")[-1] for n in ("gomp", "iomp", "libomp"))}}
        from piste.engines import cpp_build
        torch.set_num_threads(2)
        torch.rand(1 << 20).mul(2).sum()
        before = runtimes()
        seen = (ctypes.c_int * 2)()
        cpp_build.library({PARALLEL!r}).who(seen, 2)
        torch.rand(1 << 20).mul(2).sum()
        print(cpp_build.toolchain().openmp, list(seen), len(before), before == runtimes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True [1, 1] 1 True"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_no_runtime_is_needed_by_the_file(folder: Path) -> None:
    build.library(PARALLEL)
    (file,) = entries(folder)
    needed = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    assert "SYMTAB" in needed
    assert not [name for name in ("gomp", "omp", "stdc++") if name in needed]


def test_without_a_runtime_in_the_process_regions_are_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_ENTRIES", ("no_such_entry",))
    chain = build.toolchain()
    assert not chain.openmp
    assert "-fopenmp-simd" in chain.flags
    assert "-fopenmp" not in chain.flags
    seen = (ctypes.c_int * 2)()
    build.library(PARALLEL).who(seen, 2)
    assert list(seen) == [1, 0]


def test_a_runtime_that_cannot_be_linked_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What -fopenmp code calls is missing, whatever the process seemed to offer: noticed when the probe is loaded."""
    lines = (
        'case " $* " in *" -fopenmp "*) exec $REAL "$@" -Domp_get_thread_num=nobody_offers_this;; esac\nexec $REAL "$@"'
    )
    monkeypatch.setenv("CXX", wrapper(tmp_path / "other", lines))
    assert not build.toolchain().openmp
    assert answer() == 42


def test_flags_for_this_processor_are_dropped_where_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = 'case "$*" in *=native*) echo "error: bad value native" >&2; exit 1;; esac\nexec $REAL "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "old", lines))
    chain = build.toolchain()
    assert not [flag for flag in chain.flags if "native" in flag]
    assert chain.openmp == ("-fopenmp" in chain.flags)
    assert answer() == 42


def test_cxx_may_carry_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {REAL} -DNOTHING")
    assert build.toolchain().command == (shutil.which("env"), REAL, "-DNOTHING")
    assert answer() == 42


def test_cxx_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper(tmp_path / "compiler", 'exec $REAL "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./compiler")
    assert answer() == 42


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_later_processes_start_no_compiler(folder: Path) -> None:
    assert answer() == 42
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]

    def work() -> int:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a process was started")

        subprocess.Popen = refuse  # type: ignore[misc,assignment]
        return answer()

    assert elsewhere(work) == 42
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())] == before


def test_a_long_pause_is_explained_in_one_line(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = 'grep -q answer source.cpp && case "$*" in *" -c "*) sleep 0.4;; *) sleep 0.2;; esac\nexec $REAL "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "slow", lines))
    build.toolchain()
    monkeypatch.setattr(build, "_SILENT", 0.2)
    answer()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("piste", logging.WARNING)
    assert "the answer" in record.message
    assert str(folder) in record.message
    assert "\n" not in record.message


def test_a_long_probe_is_explained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(
        "CXX", wrapper(tmp_path / "slow", 'grep -q piste_probe source.cpp && sleep 0.3\nexec $REAL "$@"')
    )
    monkeypatch.setattr(build, "_SILENT", 0.2)
    build.toolchain()
    (record,) = caplog.records
    assert "probe of the compiler" in record.message


def test_a_short_pause_is_not(caplog: pytest.LogCaptureFixture) -> None:
    assert SILENT == 1.0
    answer()  # which takes less than the fixture puts in its place
    assert not caplog.records


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("/home/someone")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    monkeypatch.setenv("LOCALAPPDATA", "/users/local")
    monkeypatch.setenv("PISTE_CACHE", "~/mine")
    assert build.cache_folder() == home / "mine"
    monkeypatch.setenv("PISTE_CACHE", "")
    for platform, expected in {
        "linux": Path("/fast/cache/piste"),
        "darwin": home / "Library/Caches/piste",
        "win32": Path("/users/local/piste"),
    }.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert build.cache_folder() == expected
    monkeypatch.setattr(sys, "platform", "linux")
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert build.cache_folder() == home / ".cache/piste"


def test_what_is_made_is_private(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_CACHE", str(folder / "deeper" / "still"))
    old = os.umask(0)
    try:
        answer()
    finally:
        os.umask(old)
    made = folder / "deeper" / "still"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    names = list(made.iterdir())
    assert sorted(path.suffix for path in names) == [".json", ".so"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in names} == {0o600}


def test_a_key_stands_for_all_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Path(wrapper(tmp_path / "compiler", 'exec $REAL "$@"'))
    monkeypatch.setenv("CXX", str(compiler))

    def key(source: str = "int x;") -> str:
        forget(monkeypatch)
        return build.toolchain().key(source)

    keys = [key(), key("int y;")]
    os.utime(compiler, ns=(0, compiler.stat().st_mtime_ns + 1))
    keys.append(key())
    compiler.write_text(compiler.read_text() + "\n")
    keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(piste, "__version__", "0.0.0")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(build, "_ENTRIES", ("no_such_entry",))
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "abacus")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == key()


# ---------------------------------------------------------------------------------------------------------------------
# A folder that must not be used


def contents(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def refused(folder: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The library works all the same, nothing enters the folder, and the log says why, once."""
    before = contents(folder)
    assert answer(1) == 1
    assert answer(2) == 2
    assert contents(folder) == before
    (message,) = [record.message for record in caplog.records]
    assert reason in message


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to(folder: Path, caplog: pytest.LogCaptureFixture, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    refused(folder, caplog, "others may write")


def test_a_folder_that_others_may_read_is_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    answer()
    assert entries(folder)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another user: really where we may, else by becoming somebody else in our own eyes."""
    if ROOT:
        os.chown(path, 4321, 4321)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


def test_a_folder_of_another_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(3)
    forget(monkeypatch)
    give_away(folder, monkeypatch)
    refused(folder, caplog, "belongs to user")


def test_a_folder_under_one_that_everybody_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    monkeypatch.setenv("PISTE_CACHE", str(open_to_all / "cache"))
    open_to_all.chmod(0o777)
    refused(open_to_all / "cache", caplog, "writable by everybody")
    open_to_all.chmod(0o1777)  # as /tmp: nobody can take another's folder away
    assert elsewhere(answer) == 42
    assert entries(open_to_all / "cache")


def test_a_link_counts_as_what_it_leads_to(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    folder.symlink_to(target)
    assert elsewhere(answer) == 42
    assert entries(target)
    target.chmod(0o777)
    refused(target, caplog, "others may write")
    target.chmod(0o700)
    forget(monkeypatch)
    caplog.clear()
    give_away(target, monkeypatch)
    refused(target, caplog, "belongs to user")


@pytest.mark.parametrize("target", ["nowhere", "cache"])
def test_a_link_to_nowhere(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, target: str) -> None:
    folder.symlink_to(tmp_path / target)
    refused(folder, caplog, "cannot be used")


def test_a_file_in_place_of_the_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("not a folder")
    refused(folder, caplog, "not a folder")
    assert folder.read_text() == "not a folder"


def test_a_file_in_place_of_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PISTE_CACHE", str(tmp_path / "file" / "cache"))
    refused(tmp_path / "file" / "cache", caplog, "cannot be used")


@pytest.mark.parametrize("home", ["missing", "unknown"])
def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str) -> None:
    monkeypatch.delenv("PISTE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    if home == "missing":
        monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
        refused(tmp_path / "nobody", caplog, "does not exist")
    else:
        import pwd

        def nobody(_: int) -> None:
            raise KeyError

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", nobody)
        refused(tmp_path / "~", caplog, "no home folder is known")


# ---------------------------------------------------------------------------------------------------------------------
# A file that must not be used


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def group_may_write(file: Path) -> None:
    file.chmod(0o660)


def linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


SPOILS = [truncated, emptied, flipped, group_may_write, linked, a_folder, a_pipe]


@pytest.mark.parametrize(
    ("suffix", "spoil"),
    [*((".so", spoil) for spoil in SPOILS), (".json", truncated), (".json", group_may_write)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_spoilt_file_is_built_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, spoil: Callable[[Path], None]
) -> None:
    compiled = counting(tmp_path, monkeypatch)
    assert elsewhere(answer) == 42
    (file,) = entries(folder, suffix)
    content = file.read_bytes()
    spoil(file)
    assert elsewhere(answer) == 42
    assert compiled() == (2 if suffix == ".so" else 1)
    if spoil is not a_folder:  # nobody but its maker removes that, and the library is built in every process
        assert file.read_bytes() == content
        assert elsewhere(answer) == 42
        assert compiled() == (2 if suffix == ".so" else 1)


def test_a_file_of_another_user_is_built_again(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ROOT:
        pytest.skip("only root can give files away")
    compiled = counting(tmp_path, monkeypatch)
    assert elsewhere(answer) == 42
    os.chown(entries(folder)[0], 4321, 4321)
    assert elsewhere(answer) == 42
    assert compiled() == 2
    assert entries(folder)[0].stat().st_uid == 0


def test_another_library_under_this_name_is_not_loaded(folder: Path) -> None:
    elsewhere(lambda: answer(1))
    (first,) = entries(folder)
    elsewhere(lambda: answer(2))
    (second,) = set(entries(folder)) - {first}
    first.write_bytes(second.read_bytes())
    assert elsewhere(lambda: answer(1)) == 1


def test_what_cannot_be_trusted_is_removed(folder: Path) -> None:
    elsewhere(answer)
    (file,) = entries(folder)
    wrong = file.with_name(file.name.replace(file.stem.split("-")[1], "0" * 64))
    file.rename(wrong)
    assert elsewhere(answer) == 42
    assert entries(folder) == [file]


def test_an_entry_that_vanishes_while_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(answer)
    found = cache.lookup

    def removed(key: str, suffix: str) -> cache.Entry | None:
        entry = found(key, suffix)
        if entry is not None and suffix == ".so":
            entry.path.unlink()
        return entry

    monkeypatch.setattr(cache, "lookup", removed)
    assert answer() == 42


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, threads and children


@pytest.mark.parametrize("patience", [PATIENCE, 0.0], ids=["in turn", "all at once"])
def test_processes_that_build_the_same(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    # In turn, nobody comes to keep the first one company, and it gives up; else somebody comes sooner or later.
    compiled = counting(tmp_path, monkeypatch, company=2, seconds=3.0 if patience else PATIENCE / 2)
    monkeypatch.setattr(cache, "_TURN", patience)
    elsewhere(build.toolchain)
    assert [child.result() for child in [Child(answer) for _ in range(4)]] == [42] * 4
    assert compiled() == 1 if patience else compiled() > 1
    assert elsewhere(answer) == 42
    assert len(entries(folder)) == 1, "equal sources give equal libraries"
    assert not list(folder.glob(".*"))


def test_a_process_killed_while_it_builds(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "first"
    lines = f"""
        if grep -q answer source.cpp && ! test -e {first}; then
            echo $$ > {first}.new; echo cut > object.o; mv {first}.new {first}; sleep 600
        fi
        exec $REAL "$@"
    """
    monkeypatch.setenv("CXX", wrapper(tmp_path / "sleepy", lines))
    child = Child(answer)
    appears(first)
    child.kill()
    os.killpg(int(first.read_text()), signal.SIGKILL)
    temporary = Path(tempfile.gettempdir())
    left = [*temporary.glob("piste-build-*"), *folder.glob(".piste-*")]
    assert len(left) == 2, "a folder and a lock"

    monkeypatch.setattr(cache, "_TURN", 2 * PATIENCE)
    assert elsewhere(answer) == 42  # whom a dead process would hold up does not come to this
    for path in filter(Path.exists, left):
        os.utime(path, (time.time() - 2 * cache._DAY,) * 2)
    assert elsewhere(lambda: answer(1)) == 1
    assert not [path for path in left if path.exists()]


def test_an_interrupt_ends_the_compiler(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    lines = (
        f'grep -q answer source.cpp && {{ echo $$ > {begun}.new; mv {begun}.new {begun}; sleep 600; }}\nexec $REAL "$@"'
    )
    monkeypatch.setenv("CXX", wrapper(tmp_path / "sleepy", lines))
    child = Child(answer)
    appears(begun)
    os.kill(child.pid, signal.SIGINT)
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        child.result()
    assert ended(int(begun.read_text()))
    assert not list(folder.glob(".piste-*"))


def test_threads_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = counting(tmp_path, monkeypatch)
    start, found = threading.Barrier(8), {}

    def work(number: int) -> None:
        start.wait()
        found[number] = build.library(text(number % 2))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled() == 2
    assert [found[number].answer(0) for number in range(8)] == [0, 1] * 4
    assert all(found[number] is found[number % 2] for number in range(8))


def test_a_child_forked_while_a_thread_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child inherits a lock that is held, by a thread that does not exist in it."""
    lines = f'grep -q answer source.cpp && touch {tmp_path}/begun && sleep 0.5\nexec $REAL "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "slow", lines))
    thread = threading.Thread(target=answer)
    thread.start()
    appears(tmp_path / "begun")
    assert elsewhere(answer) == 42
    thread.join()
    assert answer() == 42


def test_a_child_uses_and_builds_libraries() -> None:
    assert answer(1) == 1
    assert elsewhere(lambda: (answer(1), answer(2))) == (1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def with_disk(place: Path, options: str, flags: int = 0) -> None:
    """In a child: a small disk of its own at `place`, seen by nobody else."""
    library = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    uid, gid = os.geteuid(), os.getegid()
    place.mkdir(exist_ok=True)
    if library.unshare(new_user | new_mounts):
        raise PermissionError("unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    mount(place, options, flags)


def mount(place: Path, options: str, flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(place), b"tmpfs", flags, options.encode()):
        raise PermissionError(f"mount: {os.strerror(ctypes.get_errno())}")


def disks_can_be_made() -> bool:
    place = Path(tempfile.mkdtemp())
    try:
        elsewhere(lambda: with_disk(place, "mode=0700"))
    except AssertionError:
        return False
    finally:
        place.rmdir()
    return True


@pytest.fixture(scope="module")
def disks() -> None:
    if not sys.platform.startswith("linux") or not disks_can_be_made():
        pytest.skip("this user may not mount")


READ_ONLY, NO_EXEC, REMOUNT = 1, 8, 32


def messages_of(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """In a child: a result and what was logged."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logging.getLogger("piste").addHandler(Listener())
    return work(), told


@pytest.mark.usefixtures("disks")
def test_a_full_disk_under_the_cache(folder: Path) -> None:
    def work() -> Any:
        with_disk(folder, "mode=0700,size=16k")
        (folder / "ballast").write_bytes(b"x" * 8192)
        result = messages_of(lambda: (answer(1), answer(2)))
        return *result, [path.name for path in folder.iterdir() if path.suffix != ".json"]

    numbers, told, files = elsewhere(work)
    assert numbers == (1, 2)
    assert len(told) == 1
    assert "No space left" in told[0]
    assert files == ["ballast"]


@pytest.mark.usefixtures("disks")
def test_a_full_disk_under_temporary_files(folder: Path) -> None:
    def work() -> Any:
        place = Path(tempfile.gettempdir())
        with_disk(place, "mode=0700,size=8k")
        return answer(), len(entries(folder)), list(place.iterdir()), list(folder.glob(".*"))

    assert elsewhere(work) == (42, 1, [], [])


@pytest.mark.usefixtures("disks")
def test_full_disks_everywhere(folder: Path) -> None:
    def work() -> Any:
        with_disk(folder, "mode=0700,size=8k")
        mount(Path(tempfile.gettempdir()), "mode=0700,size=8k", 0)
        with pytest.raises(build.BuildError, match="No space left on device"):
            answer()
        return list(folder.iterdir())

    assert elsewhere(work) == []


@pytest.mark.usefixtures("disks")
def test_a_read_only_disk(folder: Path) -> None:
    def work() -> Any:
        with_disk(folder, "mode=0700")
        before = answer(1)
        mount(folder, "mode=0700", REMOUNT | READ_ONLY)
        return before, messages_of(lambda: (answer(2), answer(3))), elsewhere(lambda: answer(1))

    before, (numbers, told), after = elsewhere(work)
    assert (before, numbers, after) == (1, (2, 3), 1)
    assert len(told) == 1
    assert "Read-only" in told[0]


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize("which", ["cache", "temporary"])
def test_a_disk_from_which_nothing_may_be_run(folder: Path, which: str) -> None:
    def work() -> int:
        with_disk(folder if which == "cache" else Path(tempfile.gettempdir()), "mode=0700", NO_EXEC)
        return answer() + elsewhere(answer)

    assert elsewhere(work) == 84


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A place of a user whom modes stop, and how a child becomes that user: tests may run as root."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    place = Path(tempfile.mkdtemp())
    user = 4321 if ROOT else os.geteuid()
    (place / "temporary").mkdir()
    (place / "cache").mkdir(mode=0o500)
    for path in (place, *place.iterdir()):
        os.chown(path, user, -1)
    monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))
    monkeypatch.setenv("PISTE_CACHE", str(place / "cache"))

    def become() -> None:
        if ROOT:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)

    yield place, become
    (place / "cache").chmod(0o700)
    shutil.rmtree(place)


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission(ordinary: tuple[Path, Callable[[], None]], mode: int) -> None:
    place, become = ordinary
    (place / "cache").chmod(mode)

    def work() -> Any:
        become()
        return messages_of(lambda: (answer(1), answer(2)))

    numbers, told = elsewhere(work)
    assert numbers == (1, 2)
    assert len(told) == 1
    assert "Permission denied" in told[0]
    (place / "cache").chmod(0o700)
    assert not list((place / "cache").iterdir())
    assert not list((place / "temporary").iterdir())


def test_a_limit_on_the_size_of_files() -> None:
    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(build.BuildError) as caught:
            answer()
        return str(caught.value)

    reason = elsewhere(work)
    assert "SIGXFSZ" in reason or "File too large" in reason or "file size limit" in reason.lower()


def test_a_limit_met_when_storing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit, set between building and storing: nothing is kept, nothing is left, the library works."""
    keep = cache.keep

    def limited(key: str, suffix: str, content: bytes) -> Path | None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            return keep(key, suffix, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(cache, "keep", limited)
    number, told = elsewhere(lambda: messages_of(answer))
    assert number == 42
    assert len(told) == 1
    assert "File too large" in told[0]
    assert [path.suffix for path in folder.iterdir()] == [".json"]


# ---------------------------------------------------------------------------------------------------------------------
# Compilers that do not work


def reason_of(monkeypatch: pytest.MonkeyPatch, compiler: str) -> str:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.BuildError) as caught:
        build.toolchain()
    with pytest.raises(build.BuildError):
        answer()
    return str(caught.value)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler is installed"):
        build.toolchain()


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CXX='no-such-compiler'" in reason_of(monkeypatch, "no-such-compiler")
    assert "cannot be read" in reason_of(monkeypatch, "'g++")


def test_a_compiler_that_may_not_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(wrapper(tmp_path / "compiler", 'exec $REAL "$@"'))
    path.chmod(0o644)
    assert "no program that can be run" in reason_of(monkeypatch, str(path))


def test_a_compiler_that_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compiler"
    path.write_bytes(b"\x00\x01\x02")
    path.chmod(0o755)
    assert "cannot be run: Exec format error" in reason_of(monkeypatch, str(path))


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = reason_of(monkeypatch, wrapper(tmp_path / "broken", "echo no licence >&2; exit 3")).splitlines()
    assert reason == [f"{tmp_path}/broken failed with status 3", "no licence"]


def test_a_compiler_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "was ended by SIGKILL" in reason_of(monkeypatch, wrapper(tmp_path / "dying", "kill -9 $$"))


def test_a_compiler_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "left no file" in reason_of(monkeypatch, wrapper(tmp_path / "lazy", "exit 0"))


def test_a_compiler_that_writes_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = 'for last; do :; done; echo rubbish > "$last"'
    assert "cannot be loaded" in reason_of(monkeypatch, wrapper(tmp_path / "rubbish", lines))


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended with its children, and asked once."""
    assert 60 <= build._LIMIT <= 180
    monkeypatch.setattr(build, "_PROBE_LIMIT", 0.1)
    pids, hangs = tmp_path / "pids", tmp_path / "hangs"
    monkeypatch.setattr(build._Pause, "wait", lambda pause, process: appears(hangs))  # and then comes the limit
    compiler = wrapper(tmp_path / "hanging", f"sleep 600 & echo $! >> {pids}; touch {hangs}; wait")
    assert "had not finished after" in reason_of(monkeypatch, compiler)
    (pid,) = pids.read_text().split()
    assert ended(int(pid))


def test_a_compiler_that_hangs_over_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LIMIT", 0.3)
    monkeypatch.setattr(build, "_SILENT", 0.1)
    lines = 'grep -q answer source.cpp && sleep 600\nexec $REAL "$@"'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "hanging", lines))
    with pytest.raises(build.BuildError, match=r"the answer: .* had not finished after"):
        answer()


def test_a_source_that_is_refused(folder: Path) -> None:
    with pytest.raises(build.BuildError) as caught:
        build.library("this is no C++;", "AdamW step")
    first, rest = str(caught.value).split("\n", 1)
    assert first.startswith("AdamW step: ")
    assert "failed with status" in first
    assert "error:" in rest
    assert not entries(folder)


def test_the_next_compiler_is_tried_and_then_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    wrapper(tools / "c++", f"echo x >> {asked}; exit 1")
    wrapper(tools / "g++", 'PATH=/usr/local/bin:/usr/bin:/bin exec $REAL "$@"')
    monkeypatch.setenv("PATH", str(tools))
    assert build.toolchain().command == (str(tools / "g++"),)
    before = asked.read_text()
    assert elsewhere(answer) == 42
    assert asked.read_text() == before


# ---------------------------------------------------------------------------------------------------------------------
# Sweeping


def test_old_entries_go_and_nothing_else(folder: Path) -> None:
    elsewhere(lambda: (answer(1), answer(2)))
    files = entries(folder)
    others = [folder / name for name in ("notes.so", f"{'a' * 64}.so", "piste-build-x")]
    for path in others:
        path.write_text("mine")
    (folder / ".piste-abc").write_text("left over")
    (folder / ".piste-young").write_text("in use")
    (folder / ".piste-folder").mkdir()
    (folder / ".piste-folder" / "source.cpp").touch()
    now = time.time()
    for path in (files[0], *others, folder / ".piste-abc", folder / ".piste-folder"):
        os.utime(path, (now - 100 * cache._DAY,) * 2)
    os.utime(files[1], (now - 80 * cache._DAY,) * 2)
    cache.sweep()
    assert not files[0].exists()
    assert files[1].exists()
    assert all(path.exists() for path in others)
    assert [path.name for path in folder.glob(".piste-*")] == [".piste-young"]


def test_a_load_counts_as_use(folder: Path) -> None:
    elsewhere(answer)
    (file,) = entries(folder)
    os.utime(file, (time.time() - 89 * cache._DAY,) * 2)
    assert elsewhere(answer) == 42
    assert time.time() - file.stat().st_mtime < cache._DAY
