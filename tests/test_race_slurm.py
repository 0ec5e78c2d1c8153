"""Jobs of Slurm: what squeue says of them, a queue that takes no more, jobs that nobody waits for, and their ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("submitit")
from slurm_call import Call
from submitit.core.utils import FailedJobError, UncompletedJobError

from piste.race.executors import Death, ExecutorError, host
from piste.race.executors import queue as queues
from piste.race.executors import slurm as slurm_module
from piste.race.executors.queue import Queue, end_orphans
from piste.race.executors.slurm import Slurm, minutes
from piste.race.worker import Inspect, Job, Started

HERE = {"system": "here"}
TOLD = host.Told(Started(HERE, {}), "node7", host.Heard("card", b""))  # type: ignore[arg-type]
FULL = FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit")


def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *calls: Call | Exception, home: bool = True) -> Slurm:
    """An executor to which Slurm says this, one after the other."""
    left = list(calls)

    def call(self: Slurm, job: Job | None) -> Call:
        said = left.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(Slurm, "_call", call)
    executor = Slurm(4, tmp_path, cluster="local")
    executor.home = TOLD if home else None
    return executor


# What squeue says


def test_a_job_is_over_when_slurm_says_so_or_has_forgotten_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[tuple[str, str]] | None] = [
        [("1", "RUNNING"), ("2", "PENDING")],
        None,  # the controller is away
        [("1", "CANCELLED")],
        [],
    ]
    monkeypatch.setattr(queues, "listed", lambda *_: answers.pop(0))
    queue = Queue()
    queue.register_job("1")
    queue.register_job("2")
    assert queue.get_state("1", "cache") == "UNKNOWN"
    seen = [(queue.get_state("1", "force"), queue.get_state("2", "cache"), queue.is_done("1", "cache")) for _ in "1234"]
    assert seen == [
        ("RUNNING", "PENDING", False),
        ("RUNNING", "PENDING", False),
        ("CANCELLED", "PENDING", True),
        ("CANCELLED", "GONE", True),
    ]
    assert queue.is_done("2", "cache")


def test_slurm_is_asked_now_and_then_for_all_jobs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, []
    monkeypatch.setattr(queues.time, "monotonic", lambda: now)
    monkeypatch.setattr(queues, "listed", lambda *_: asked.append(now) or [("1", "RUNNING"), ("2", "RUNNING")])
    queue = Queue()
    queue.register_job("1")
    queue.register_job("2")
    for now in (0.0, 0.5, 1.0, 2.5, 600.0, 630.0, 661.0):  # noqa: B007 (the clock)
        queue.get_state("1")
        queue.get_state("2")
    assert asked == [0.0, 2.5, 600.0, 661.0]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm that say what ``squeue.txt`` holds, and note in ``said`` how they were called."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("squeue", "scancel"):
        (bin_ / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/said\ncat {tmp_path}/{name}.txt\n')
        (bin_ / name).chmod(0o755)
        (tmp_path / f"{name}.txt").touch()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_what_a_killed_race_left_in_the_queue_is_cancelled(commands: Path) -> None:
    folder = commands / "out" / "logs" / "slurm"
    lines = [f"11|{folder}/.submission_file_a.sh", "12|/elsewhere/slurm/.submission_file_b.sh", "13|(null)", ""]
    (commands / "squeue.txt").write_text("\n".join(lines))
    end_orphans(folder)
    assert "scancel 11\n" in (commands / "said").read_text()
    (commands / "said").unlink()
    (commands / "squeue.txt").write_text("\n".join(lines[1:]))
    end_orphans(folder)
    assert "scancel" not in (commands / "said").read_text()


def test_a_slurm_that_does_not_answer_is_no_empty_queue(commands: Path) -> None:
    (commands / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert queues.listed("%i|%T") is None
    end_orphans(commands)


# A queue that takes no more


def test_jobs_that_slurm_does_not_take_wait_for_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Call(TOLD, over=False)
    executor = slurm(tmp_path, monkeypatch, running, FULL, FULL, Call(TOLD))
    first, second = Inspect("digits", "cpu"), Inspect("cartpole", "cpu")
    with executor:
        executor.submit(first)
        assert executor.idle == 3
        executor.submit(second)
        assert (executor.idle, executor.jobs) == (0, [first, second])
        assert not list(executor.events(0))  # nothing has ended, and nothing is tried
        executor.refused -= 60
        assert not list(executor.events(0))  # tried, and refused again
        running.over = True
        assert [event.job for event in executor.events(0)] == [first]
        assert [event.job for event in executor.events(0)] == [second]
        assert executor.idle == 4


def test_a_job_that_waits_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm(tmp_path, monkeypatch, Call(TOLD, over=False), FULL)
    second = Inspect("cartpole", "cpu")
    with executor:
        executor.submit(Inspect("digits", "cpu"))
        executor.submit(second)
        executor.stop(second, "by hand")
        assert [(event.job, event.answer) for event in executor.events(0)] == [(second, Death("by hand", HERE))]
        assert executor.idle == 3


def test_a_slurm_that_never_takes_a_job_ends_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        slurm(tmp_path, monkeypatch, FULL, home=False) as executor,
        pytest.raises(ExecutorError, match="Slurm takes no job: sbatch: error: QOSMax"),
    ):
        executor.submit(Inspect("digits", "cpu"))
    with slurm(tmp_path, monkeypatch, FULL, FULL) as executor:
        executor.submit(Inspect("digits", "cpu"))  # others of this user may hold the places, for a while
        executor.accepted -= 2 * slurm_module._PATIENCE_SECONDS
        executor.refused -= 60
        with pytest.raises(ExecutorError, match="Slurm takes no job"):
            list(executor.events(0))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (FULL, "Slurm takes no job: sbatch: error"),
        (Call(FailedJobError("Traceback\nno module piste")), "a worker cannot start on a node: no module piste"),
        (Call(UncompletedJobError("the node failed")), "a worker cannot start on a node: the node failed"),
    ],
)
def test_the_first_job_says_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any, words: str
) -> None:
    with (
        slurm(tmp_path, monkeypatch, said, home=False) as executor,
        pytest.raises(ExecutorError, match=words),
    ):
        _ = executor.machine
    assert not isinstance(said, Call) or said.cancelled


# How jobs end


@pytest.mark.parametrize(
    ("error", "state", "words", "memory"),
    [
        (UncompletedJobError("no output"), "OUT_OF_MEMORY", "more memory than its job has", True),
        (UncompletedJobError("no output"), "TIMEOUT", "its time was up (SBATCH_TIMELIMIT)", False),
        (FailedJobError("Job not requeued because: timed-out and not checkpointable."), "FAILED", "time was up", False),
    ],
)
def test_an_end_by_slurms_limits_is_how_a_run_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str, words: str, memory: bool
) -> None:
    with slurm(tmp_path, monkeypatch, Call(error, state)) as executor:
        executor.submit(Inspect("digits", "cpu"))
        (event,) = executor.events(0)
    assert isinstance(event.answer, Death)
    assert words in event.answer.reason
    assert event.answer.out_of_memory is memory


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        *(("", 240), ("90", 90), ("90:00", 90), ("90:01", 91), ("0:30", 1), ("1:30:00", 90), ("2-12", 3600)),
        *(("2-12:30", 3630), ("0-1:30:30", 91), ("UNLIMITED", 365 * 24 * 60)),
    ],
)
def test_limits_of_time_are_read_as_slurm_reads_them(limit: str, expected: int) -> None:
    assert minutes(limit) == expected


@pytest.mark.parametrize("limit", ["soon", "1h", "-5", "1:2:3:4", "1-"])
def test_other_limits_of_time_are_refused(limit: str) -> None:
    with pytest.raises(ExecutorError, match=r"SBATCH_TIMELIMIT=.* is not legal"):
        minutes(limit)
