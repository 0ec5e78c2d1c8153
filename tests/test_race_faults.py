"""What goes wrong in long races, with real processes: kills, hangs, leaks, output, children, disks, clocks, Ctrl-C."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import commands
import pytest
from test_race_end_to_end import command, contents, race, records, write

import piste.race
from piste.race import environment
from piste.race.contenders import make_contenders
from piste.race.executors import Death, Local
from piste.race.executors import guard as guard_module
from piste.race.executors.guard import KEPT_LOG, MOST_LOG, Guard, trim
from piste.race.inspection import TaskCard
from piste.race.limits import FACTOR, LEAST_SECONDS, Limits
from piste.race.protocol import TUNE_SEED, Plan
from piste.race.record import FAILED, TUNE, RunRecord
from piste.race.worker import Inspect, Progress, Run

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
SMALL = ("--optimizers", "sgd,adamw", "--trials", "2", "--seeds", "2", "--timing", "0")
DEADLINE = 300.0  # seconds for what takes a few; nothing waits for it but a failing test


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of it until somebody asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_in(folder: Path) -> set[int]:
    """Living processes that were started in a folder."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").readlink() == folder and is_alive(int(process.name)):
                found.add(int(process.name))
        except OSError:
            continue
    return found


# One worker and one task with a fault


class Bench:
    """One worker, and runs of one task for it."""

    def __init__(self, folder: Path, trouble: str, memory: int | None = None) -> None:
        self.task = write(folder, trouble)
        self.executor = Local(1, folder, memory=memory)
        self.lane = self.executor.lanes[0]

    def inspect(self) -> TaskCard:
        answer = self.answer(Inspect(str(self.task), "cpu"))
        assert isinstance(answer, TaskCard), answer
        return answer

    def run(self, card: TaskCard, lr: float = 0.01) -> Run:
        (contender,) = make_contenders(("sgd",), ())
        plan = Plan((card,), (contender,), None, 1, 1, "cpu", environment.versions())
        return Run(card.reference, contender, plan.key(card, contender, {"lr": lr}, TUNE_SEED, TUNE))

    def answer(self, job: Inspect | Run) -> object:
        self.executor.submit(job)
        found: list[object] = []

        def is_over() -> bool:
            found.extend(e.answer for e in self.executor.events(0.1) if not isinstance(e.answer, Progress))
            return bool(found)

        until(is_over, "no answer")
        return found[0]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(trouble: str, memory: int | None = None) -> Bench:
        made.append(Bench(tmp_path, trouble, memory))
        return made[-1]

    yield make
    for each in made:
        each.executor.__exit__()


# In some fifteen steps. Once there is as much as {1} of them, it waits for whoever minds.
LEAK = (
    "if calls > 12: kept = globals().setdefault('kept', []); kept.append(torch.ones({0} * 2**18)); "
    "time.sleep(0.05 if len(kept) < {1} else 600)"
)


@linux
@pytest.mark.slow
def test_a_run_that_leaks_ends_and_not_the_machine(bench: Callable[..., Bench]) -> None:
    """64 MB in every step."""
    worker = bench(LEAK.format(64, 14), memory=2**30)
    answer = worker.answer(worker.run(worker.inspect()))
    assert isinstance(answer, Death)
    assert answer.out_of_memory
    assert "its process came to hold" in answer.reason
    assert "(--memory)" in answer.reason


@linux
@pytest.mark.slow
def test_a_run_that_leaves_much_behind_is_the_last_of_its_worker(bench: Callable[..., Bench]) -> None:
    """28 MB in every step: the run may end, the next one is made by another process."""
    worker = bench(LEAK.format(28, 99), memory=2**30)
    card = worker.inspect()
    before = worker.executor.lanes[0].process.pid
    assert isinstance(worker.answer(worker.run(card)), RunRecord)
    assert worker.executor.lanes[0].process.pid != before
    assert isinstance(worker.answer(worker.run(card, 0.02)), RunRecord)


@linux
@pytest.mark.slow
def test_what_a_task_starts_ends_with_its_worker(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork that holds the worker's pipe open, and a program; then the worker dies of itself."""
    monkeypatch.chdir(tmp_path)  # where no other test starts anything
    fork = "os.fork() or time.sleep(600)"
    trouble = f"if calls == 9: import subprocess; subprocess.Popen(['sleep', '600']); {fork}; os.kill(os.getpid(), 11)"
    worker = bench(trouble)
    answer = worker.answer(worker.run(worker.inspect()))
    assert isinstance(answer, Death)
    assert "SIGSEGV" in answer.reason
    next_worker = worker.executor.lanes[0].process.pid
    until(lambda: processes_in(tmp_path) <= {os.getpid(), next_worker}, "children are left")


DRIVER = """
import sys
from pathlib import Path
from piste.race.executors import Local
from piste.race.worker import Inspect
if __name__ == "__main__":
    with Local(1, Path(".")) as executor:
        executor.submit(Inspect(sys.argv[1], "cpu"))
        while True:
            list(executor.events(1.0))
"""


@linux
@pytest.mark.slow
def test_a_task_that_hangs_ends_with_a_killed_driver(tmp_path: Path) -> None:
    task = write(tmp_path, "import subprocess; subprocess.Popen(['sleep', '600']); open('hangs', 'w'); time.sleep(600)")
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, "driver.py", str(task)], cwd=tmp_path)
    try:
        until((tmp_path / "hangs").exists, "the task was never tried")
        assert len(processes_in(tmp_path)) >= 3
    finally:
        driver.kill()
        driver.wait()
    until(lambda: not processes_in(tmp_path), "processes are left")


@linux
@pytest.mark.slow
def test_a_worker_that_is_killed_says_nothing_of_its_run(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Twice it is made again; a run that has lost three workers may be the reason, as where memory runs out."""
    worker = bench("if calls > 8 and not os.path.exists('{0}'): time.sleep(600)".replace("{0}", str(tmp_path / "go")))
    card = worker.inspect()
    worker.executor.submit(worker.run(card))
    answers: list[object] = []
    for number in range(3):
        before = worker.executor.lanes[0]
        until(lambda: _begins(worker, answers), "the run never begins")
        os.kill(before.process.pid or 0, signal.SIGKILL)
        until(lambda: _takes(worker, answers) or worker.executor.lanes[0] is not before, "its death is not noticed")  # noqa: B023
        assert bool(answers) == (number == 2)
    assert isinstance(answers[0], Death)
    assert "SIGKILL" in answers[0].reason


def _begins(worker: Bench, answers: list[object]) -> bool:
    return any(isinstance(event.answer, Progress) for event in worker.executor.events(0.1))


def _takes(worker: Bench, answers: list[object]) -> bool:
    answers += [event.answer for event in worker.executor.events(0.1) if not isinstance(event.answer, Progress)]
    return bool(answers)


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_and_the_race_goes_on(tmp_path: Path) -> None:
    task = write(tmp_path, "os.path.exists('out/study.json') and hang_once()")
    task.write_text(task.read_text() + HANG_ONCE)
    output = race(tmp_path, str(task), *SMALL, "--timeout", "30s")
    failed = [made for made in records(tmp_path).values() if made["status"] == FAILED]
    assert [made["message"] for made in failed] == ["took longer than 0:30 (--timeout)"]
    assert "report: " in output


HANG_ONCE = """
def hang_once():
    try:
        os.mkdir("hung")  # of two workers that come here at the same moment, one can
    except FileExistsError:
        return
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_task_that_hangs_where_it_is_tried_is_refused(tmp_path: Path) -> None:
    output = race(tmp_path, str(write(tmp_path, "time.sleep(600)")), *SMALL, "--timeout", "5s", status=2)
    assert "took longer than 0:05 (--timeout) while the task was tried" in " ".join(output.split())


def test_a_limit_of_time_is_generous_and_follows_what_is_known() -> None:
    assert Limits().longest(1.0) == LEAST_SECONDS == 600
    assert Limits().longest(3600.0) == FACTOR * 3600
    assert Limits().longest() == float("inf")
    assert Limits(seconds=5.0).longest(3600.0) == 5.0


# Memory and output, without processes


def test_memory_is_shared_out_only_once_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 1000
    monkeypatch.setattr(guard_module, "available_bytes", lambda: left)
    monkeypatch.setattr(guard_module, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(guard_module, "resident_bytes", lambda: {1: 700, 2: 200})
    guard = Guard()
    assert guard.look([1, 2]) == {}
    left = 90
    assert list(guard.look([1, 2])) == [1]
    assert guard.look([1]) == {}  # it alone may have it all
    assert list(Guard(most=100).look([1, 2])) == [1, 2]


def test_a_worker_that_holds_on_to_memory_is_replaced_between_runs() -> None:
    guard = Guard(most=1000)
    assert not guard.is_bloated(held=400, settled=100, workers=2)  # there is room
    assert not guard.is_bloated(held=800, settled=700, workers=2)  # the task needs so much
    assert guard.is_bloated(held=800, settled=400, workers=2)


def test_output_is_cut_from_its_beginning_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab", buffering=0) as writer:  # as workers write
        writer.write(b"short\n")
        trim(log)
        assert log.read_bytes() == b"short\n"
        for number in range(MOST_LOG // 8):
            writer.write(b"%08d\n" % number) if number % 4096 else writer.write(b"x" * 4096 + b"\n")
        writer.write(b"end\n")
        trim(log)
        assert log.stat().st_size <= KEPT_LOG + 100
        writer.write(b"more\n")
    text = log.read_bytes()
    assert text.startswith(b"[earlier output was cut off]\n")
    assert text.endswith(b"end\nmore\n")


@pytest.mark.slow
def test_a_task_that_prints_megabytes_does_not_fill_the_disk(bench: Callable[..., Bench], tmp_path: Path) -> None:
    worker = bench("print('x' * 2**21)")
    card = worker.inspect()
    for number in range(3):  # some 60 MB each
        assert isinstance(worker.answer(worker.run(card, 0.01 + number / 1000)), RunRecord)
        list(worker.executor.events(0.0))
        assert (tmp_path / "worker-0.log").stat().st_size <= MOST_LOG


# Disk, clock, two at once


@pytest.mark.slow
def test_a_full_disk_stops_the_race_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A file system of one megabyte, which something else fills once the race has written two runs."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system of our own can be mounted here; test_race_store cuts a file off instead")
    task = write(tmp_path, "os.path.isdir('out/runs') and fill()")
    task.write_text(task.read_text() + FILL)
    (tmp_path / "out").mkdir()
    # Through the shell, because the file system is gone with the namespace.
    script = """
        mount -t tmpfs -o size=1m none out || exit 99
        "$@"; echo "first: $?"; ls out/runs | wc -l; rm out/ballast; cp -r out/runs kept
        mount -o remount,size=64m out
        "$@"; echo "second: $?"; cp -r out/runs after
    """
    arguments = ["unshare", "-rm", "sh", "-c", script, "sh", *command(tmp_path, str(task), *SMALL)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    if done.returncode == 99:
        pytest.skip("no file system of our own can be mounted here; test_race_store cuts a file off instead")
    said = " ".join((done.stdout + done.stderr).split())
    assert "first: 1" in said
    assert "No space left on device; free some space and repeat the command; the" in said
    assert "second: 0" in said
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()}
    assert len(kept) >= 2
    assert kept.items() < after.items()
    assert all(json.loads(text)["status"] == "finished" for text in after.values())


FILL = """
def fill():
    whole = [name for name in os.listdir("out/runs") if name.endswith(".json")]  # and none that is being written
    if len(whole) < 2 or os.path.exists("full"):
        return
    open("full", "w").close()
    with open("out/ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 1024)
        except OSError:
            pass
"""


def test_durations_are_never_taken_from_the_wall_clock() -> None:
    """It is asked in one place, for the date that people read; whatever it says, nothing else can change."""
    asked = []
    for path in sorted(Path(piste.race.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (
                (node.attr in ("time", "time_ns", "localtime", "gmtime") and ast.unparse(node.value) == "time")
                or (node.attr in ("now", "utcnow", "today") and "date" in ast.unparse(node.value))
            ):
                asked.append(f"{path.name}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                asked.append(f"{path.name}: {ast.unparse(node)}")
    assert asked == ["environment.py: datetime.now"]


@pytest.mark.slow
def test_a_race_whose_clock_jumps_resumes_and_says_the_same(tmp_path: Path) -> None:
    task = str(write(tmp_path))
    race(tmp_path, task, *SMALL)
    said = _reported(tmp_path)
    draw = random.Random(0)
    for path in (tmp_path / "out" / "runs").iterdir():
        made = RunRecord.from_json(path.read_text())
        path.write_text(replace(made, created=f"{draw.randint(1970, 2100)}-01-01T00:00:00Z").to_json())
        os.utime(path, (draw.randint(0, 2**32),) * 2)
    before = contents(tmp_path)
    assert "8 of them are there already" in race(tmp_path, task, *SMALL)
    assert contents(tmp_path) == before
    assert _reported(tmp_path) == said


def _reported(folder: Path) -> str:
    """The standings and the verdict."""
    done = commands.run(["report", "out", "--format", "md"], folder)
    assert "wrote" in done.stdout
    text = next((folder / "out").glob("*.md")).read_text()
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", text)  # when the race was last asked for


@linux
@pytest.mark.slow
def test_a_second_race_is_refused_and_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    task = str(write(tmp_path, "os.path.exists('out/study.json') and time.sleep(600)"))
    first = commands.Command(["race", task, *SMALL, "--out", "out"], tmp_path)
    try:
        until((tmp_path / "out" / "study.json").exists, "the first race never begins")
        output = race(tmp_path, task, *SMALL, status=1)
        assert f"another race is using out (process {first.pid})" in " ".join(output.split()).replace(
            f"{tmp_path}/", ""
        )
    finally:
        first.kill()
        first.wait()
    write(tmp_path)
    assert "report: " in race(tmp_path, task, *SMALL)
    until(lambda: not processes_in(tmp_path), "processes are left")


# Ctrl-C


@pytest.mark.slow
def test_ctrl_c_once_reports_and_twice_stops_at_once(tmp_path: Path) -> None:
    """Runs of six seconds: once waits for them and reports, twice does neither; kept runs are kept."""
    task = str(write(tmp_path, "time.sleep(0.06)", steps=100))
    kept: dict[str, str] = {}
    for presses in (2, 1):
        output = tmp_path / f"{presses} presses"
        process = commands.Command(["race", task, *SMALL, "--out", "out"], tmp_path, output)
        have = len(kept)
        until(lambda: len(contents(tmp_path)) > have, "no run ends")  # noqa: B023
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        until(lambda: "stopping, once" in output.read_text(), "Ctrl-C is not heard")  # noqa: B023
        if presses == 2:
            process.send_signal(signal.SIGINT)
        process.wait(DEADLINE)
        said = output.read_text()
        assert process.returncode == 130
        assert "Traceback" not in said
        assert "all finished runs are kept. Go on with: piste race --resume --out" in said
        assert ("report: " in said) == (presses == 1)
        now = contents(tmp_path)
        assert kept.items() < now.items()
        kept = now
    assert (tmp_path / "out" / "report.html").exists()
    write(tmp_path, "time.sleep(0.06)", steps=100)
    assert all(made["status"] == "finished" for made in records(tmp_path).values())


# Fifty kills


# One that loses its worker three times would be; some of fifty kills may well be of the same run.
GIVE_UP_NO_RUN = "import piste.race.executors.local as local; local.MOST_LOSSES = 99"


@linux
@pytest.mark.slow
def test_fifty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """kill -9 of drivers and workers at random moments; the race then says to the bit what an undisturbed one does."""
    task = str(write(tmp_path, "time.sleep(0.03)"))
    draw = random.Random(8)
    victims = ["driver"] * 8 + ["worker"] * 42
    draw.shuffle(victims)
    trials = 24
    kept: dict[str, str] = {}
    driver = None
    while victims:
        if driver is None or driver.poll() is not None:
            assert driver is None or driver.returncode in (0, -signal.SIGKILL)
            if driver is not None and driver.returncode == 0:
                trials += 8  # all is made: more, for which every run so far counts
            driver = commands.Command(_larger(task, trials), tmp_path, before=GIVE_UP_NO_RUN)
            time.sleep(draw.uniform(0.0, 2.0))  # also while it starts
        else:
            time.sleep(draw.uniform(0.0, 1.0))
        workers = sorted(processes_in(tmp_path) - {driver.pid})
        if victims[-1] == "worker" and not workers:
            continue
        victim = draw.choice(workers) if victims.pop() == "worker" else driver.pid
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(victim, signal.SIGKILL)
        if victim == driver.pid:
            driver.wait()
        now = contents(tmp_path)
        assert kept.items() <= now.items()
        kept = now
    assert driver is not None
    driver.wait(timeout=3 * DEADLINE)
    done = commands.run(_larger(task, trials), tmp_path)
    assert done.returncode == 0, done.stdout
    assert "is damaged" not in done.stdout
    assert kept.items() <= contents(tmp_path).items()
    until(lambda: not processes_in(tmp_path), "processes are left")
    disturbed = {name: _quality(text) for name, text in contents(tmp_path).items()}
    shutil.rmtree(tmp_path / "out")
    for size in range(24, trials + 1, 8):  # with more trials others are confirmed, and those of before are kept
        assert commands.run(_larger(task, size), tmp_path).returncode == 0
    assert {name: _quality(text) for name, text in contents(tmp_path).items()} == disturbed


def _larger(task: str, trials: int) -> list[str]:
    several = ("--optimizers", "sgd,adamw", "--trials", str(trials), "--seeds", "4", "--timing", "0")
    return ["race", task, *several, "--out", "out"]


def _quality(text: str) -> dict[str, object]:
    """All of a record but times, memory and dates."""
    made = json.loads(text)
    del made["curve"]["train_seconds"]
    return {name: made[name] for name in ("key", "status", "message", "curve", "test_loss", "test_metric")}
