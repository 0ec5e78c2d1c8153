"""Executors: processes here, a Ray cluster, jobs through submitit. Equal results, nothing lost, nothing left."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from click.testing import CliRunner
from ray_cluster import ENVIRONMENT, running
from rich.console import Console
from slurm_call import Call
from test_race_faults import is_alive, until

from piste.race import environment, study
from piste.race.command import command
from piste.race.contenders import make_contenders
from piste.race.executors import Death, ExecutorError, Local, files, host, is_place, make_executor, sizing
from piste.race.executors.base import MOST_LOSSES, Losses
from piste.race.inspection import TaskCard
from piste.race.record import CONFIRM, TIME, TUNE, RunKey, RunRecord, fingerprint
from piste.race.settings import Settings
from piste.race.store import Store
from piste.race.terminal import PlainView
from piste.race.worker import Inspect, Job, Pack, Packed, Progress, Refusal, Run, Started

TASK = """
import os, time
from pathlib import Path
import torch
from piste.race import Splits, Task

def data():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return Splits(train=(x[:120], y[:120]), valid=(x[120:160], y[120:160]), report=(x[160:], y[160:]))

def model():
    with Path("{marks}").open("a") as file:
        file.write("model\\n")
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))

def loss(model, batch):
    {trouble}
    x, y = batch
    return (model(x) - y).square().mean()

task = Task(name="linear", model=model, data=data, loss=loss, steps=40, batch_size=16)
"""


def write(folder: Path, trouble: str = "pass", name: str = "linear.py") -> Path:
    path = folder / name
    path.write_text(TASK.replace("{trouble}", trouble).replace("{marks}", str(folder / "marks")))
    return path


def run_of(reference: str, phase: str = CONFIRM, machine: str = "", task_hash: str = "") -> Run:
    (contender,) = make_contenders(("adamw",), ())
    key = RunKey(
        *("linear", task_hash, contender.name, "adamw", contender.schedule, {"lr": 0.01}, 40, 1, phase, "cpu"),
        environment.versions(),
        machine,
    )
    return Run(reference, contender, key)


def outcome(executor: Local, job: Job, *, until: type = object) -> Any:
    """The first answer to a job that is of a kind, progress apart."""
    while True:
        for event in executor.events(1.0):
            assert event.job is job
            if isinstance(event.answer, until) and (until is Progress or not isinstance(event.answer, Progress)):
                return event.answer


# Processes of this machine


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with Local(1, tmp_path_factory.mktemp("logs")) as executor:
        yield executor


def test_a_stopped_job_is_dead_for_the_reason_given_and_the_next_one_runs(local: Local, tmp_path: Path) -> None:
    hanging = Inspect(str(write(tmp_path, "time.sleep(1000)")), "cpu")
    local.submit(hanging)
    while not (tmp_path / "marks").exists():  # it is at work
        list(local.events(0.05))
    local.stop(hanging, "it took too long")
    assert outcome(local, hanging) == Death("it took too long")
    assert local.idle == local.width == 1
    local.stop(hanging, "again")  # nothing happens
    again = Inspect(str(write(tmp_path, name="good.py")), "cpu")
    local.submit(again)
    assert outcome(local, again).name == "linear"


def test_a_job_that_was_stopped_too_late_has_its_answer(local: Local, tmp_path: Path) -> None:
    job = Inspect(str(write(tmp_path)), "cpu")
    local.submit(job)
    while local.lanes[0].started is None:
        list(local.events(0.05))
    assert local.lanes[0].pipe.poll(120)
    assert isinstance(local.lanes[0].pipe.recv(), Progress)  # it has begun
    assert local.lanes[0].pipe.poll(120)
    local.stop(job, "it took too long")
    card = outcome(local, job)
    assert isinstance(card, TaskCard)
    assert card.peak_bytes > 10**8
    assert local.idle == 1
    # its process is gone, and another one has its place
    wrong = run_of(job.reference, TIME, "f00d", card.task_hash)
    local.submit(wrong)
    refusal = outcome(local, wrong)
    assert isinstance(refusal, Refusal)
    assert "another machine" in refusal.message


def test_a_worker_has_the_environment_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is now; what forks workers may have been started with another one, as in a notebook."""
    monkeypatch.setenv("PISTE_TEST_FIRST", "1")
    with Local(1, tmp_path) as executor:
        outcome_of(executor, write(tmp_path, "assert 'PISTE_TEST_FIRST' in os.environ", "first.py"))
    monkeypatch.delenv("PISTE_TEST_FIRST")
    monkeypatch.setenv("PISTE_TEST_SECOND", "2")
    asked = "assert os.environ.get('PISTE_TEST_FIRST', '') + os.environ['PISTE_TEST_SECOND'] == '2'"
    with Local(1, tmp_path) as executor:
        outcome_of(executor, write(tmp_path, asked, "second.py"))


def outcome_of(executor: Local, task: Path) -> None:
    """Nothing, where a worker finds the task well."""
    job = Inspect(str(task), "cpu")
    executor.submit(job)
    answer = outcome(executor, job)
    assert isinstance(answer, TaskCard), answer


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_a_job_outlives_what_has_forked_its_worker(tmp_path: Path) -> None:
    with Local(1, tmp_path) as executor:
        job = Inspect(
            str(write(tmp_path, f"time.sleep(0 if os.path.exists({str(tmp_path / 'go')!r}) else 600)")), "cpu"
        )
        executor.submit(job)
        while not (tmp_path / "marks").exists():  # it is at work
            list(executor.events(0.05))
        (tmp_path / "go").touch()
        before = executor.lanes[0].process.pid
        os.kill(parent_of(before), signal.SIGKILL)
        assert isinstance(outcome(executor, job), TaskCard)
        assert executor.lanes[0].process.pid != before
    until(lambda: not is_alive(before), "the worker is left")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_a_worker_whose_forker_is_killed_while_it_starts_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    os.mkfifo(log)  # which nobody reads, so that the worker stands still before it is ready
    with Local(1, tmp_path) as executor:
        process = executor.lanes[0].process
        os.kill(parent_of(process.pid), signal.SIGKILL)
        until(lambda: process.exitcode is not None, "nothing tells of the death")
        log.unlink()
        outcome_of(executor, write(tmp_path))


def parent_of(process: int | None) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# Room


def tree(folder: Path, content: Mapping[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the memory that is free is not known")
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 8000 << 10),
        ({"cgroup/memory.max": "max", "cgroup/memory.current": "5", "cgroup/memory.stat": ""}, 8000 << 10),
        (
            {
                "cgroup/a/memory.max": "1000",
                "cgroup/a/memory.current": "700",
                "cgroup/a/memory.stat": "inactive_file 9",
            },
            309,
        ),
        ({"cgroup/memory.max": "600", "cgroup/memory.current": "700", "cgroup/memory.stat": "inactive_file 9"}, 0),
        (
            {
                "cgroup/memory/memory.limit_in_bytes": "1000",
                "cgroup/memory/memory.usage_in_bytes": "100",
                "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 7",
            },
            907,
        ),
    ],
)
def test_free_memory_is_that_of_the_system_and_of_all_groups(
    tmp_path: Path, group: dict[str, str], expected: int
) -> None:
    tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n",
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/cgroup.procs": "",
            **group,
        },
    )
    assert sizing.available_bytes(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_workers_are_as_many_as_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 2**30
    monkeypatch.setattr(sizing, "available_bytes", lambda: 10 * gigabyte)
    assert sizing.fitting(64, 2 * gigabyte) == 4  # with a quarter more for each
    assert sizing.fitting(3, 2 * gigabyte) == 3
    assert sizing.fitting(64, 20 * gigabyte) == 1
    assert sizing.fitting(64, 0) == 10 * gigabyte // sizing.WORKER_BYTES
    assert sizing.fitting(64, 2 * gigabyte, already=8) == 5
    assert sizing.together([gigabyte, 0, gigabyte]) == 2 * gigabyte - sizing.WORKER_BYTES
    monkeypatch.setattr(sizing, "available_bytes", lambda: None)
    assert sizing.fitting(7, 20 * gigabyte) == 7


def test_workers_are_let_go_where_memory_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_bytes", lambda: 0)
    with Local(2, tmp_path) as executor:
        processes = [lane.process for lane in executor.lanes]
        executor.fit(2 * sizing.WORKER_BYTES)
        assert executor.width == executor.idle == 1
        assert [process.is_alive() for process in processes] == [True, False]


def test_each_worker_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sizing.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f")
    assert sizing.visible_gpus() == ["3", "GPU-5f"]
    begun: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Local, "_start", lambda self, number: begun.append((number, self.device, *self.gpus)))
    make_executor("local", None, tmp_path, "cuda:0", spread=True, most=9)
    assert begun == [(0, "cuda:0", "3", "GPU-5f"), (1, "cuda:0", "3", "GPU-5f")]
    begun.clear()
    make_executor("local", None, tmp_path, "cuda:1", spread=False, most=9)
    assert begun == [(0, "cuda:1")]


# Places


def test_a_place_is_one_of_four() -> None:
    assert all(map(is_place, ("local", "ray", "slurm", "ray://host:10001", "ray://[::1]:10001")))
    assert not any(map(is_place, ("", "Local", "ray://", "ray://host", "ray://:1", "ray:6379", "http://host:1")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--on", "mars"), "'mars' is not legal; legal: local, ray, ray://HOST:PORT or slurm"),
        (("--on", "ray", "--device", "cuda:3"), "device 'cuda:3' is not legal with --on ray; legal: auto, cpu, cuda"),
        (("--on", "ray"), "--on ray needs ray, which is not installed: pip install 'piste[ray]'"),
        (("--on", "slurm"), "--on slurm needs submitit, which is not installed: pip install 'piste[slurm]'"),
    ],
)
def test_what_a_place_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(command, ["race", str(write(tmp_path)), *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code in (1, 2)
    assert words in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("failures", [2, 3])
def test_a_ray_server_is_asked_again(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """Where it could not start the process that would serve us."""
    ray = pytest.importorskip("ray")
    from piste.race.executors.ray import _connect

    asked: list[str] = []

    def init(address: str, **options: object) -> None:
        asked.append(address)
        if len(asked) <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback:\nRuntimeError: no process\n")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    if failures == 2:
        _connect("auto")
    else:
        with pytest.raises(ExecutorError, match=r"somewhere cannot be reached \(RuntimeError: no process\)"):
            _connect("auto")
    assert asked == ["somewhere"] * 3


def test_slurm_without_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExecutorError, match="sbatch, which is not installed here"):
        make_executor("slurm", None, tmp_path, "cpu", spread=False, most=9)


def test_a_race_goes_on_in_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--resume``, where other options may not change."""
    store = Store(tmp_path / "out")
    settings = Settings((str(write(tmp_path)),), ("adamw",), (), None, 1, 1, "cpu", on="ray", workers=9)
    asked: list[Settings] = []

    def race(settings: Settings, *rest: object, **others: object) -> None:
        asked.append(settings)
        raise study.InterruptedRaceError

    monkeypatch.setattr("piste.race.command.race", race)
    with store.writing():
        store.write_study({"settings": study.asdict(settings), "command": "piste race"})
    for place in ("slurm", "ray"):
        CliRunner().invoke(command, ["race", "--resume", "--out", str(store.path), "--on", place])
    assert [(each.on, each.workers) for each in asked] == [("slurm", 9), ("ray", 9)]


# Losses


def test_a_job_is_made_again_a_few_times() -> None:
    losses, job, other = Losses(), Inspect("a.py", "cpu"), Inspect("a.py", "cpu")
    assert [losses.again(job) for _ in range(MOST_LOSSES)] == [True] * (MOST_LOSSES - 1) + [False]
    assert losses.again(other)


class Actor:
    """What an actor is asked, and what it answers when the test says so."""

    def __init__(self, wants: dict[str, Any]) -> None:
        self.wants = wants
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def remote(*arguments: Any, **options: Any) -> tuple[int, int]:
            self.asked.append((name, arguments))
            return id(self), len(self.asked)

        return type("Method", (), {"remote": staticmethod(remote)})


class Cluster:
    """In the place of the module ``ray``: actors that live in this process."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.actors: list[Actor] = []
        self.said: dict[tuple[int, int], Any] = {}
        self.killed: list[Actor] = []

    def remote(self, kind: type) -> Any:
        def options(**wants: Any) -> Any:
            def make(*arguments: Any) -> Actor:
                self.actors.append(Actor(wants))
                return self.actors[-1]

            return type("Made", (), {"remote": staticmethod(make)})

        return type("Kind", (), {"options": staticmethod(options)})

    def say(self, actor: Actor, answer: Any) -> None:
        """What an actor answers to what it was asked last."""
        self.said[id(actor), len(actor.asked)] = answer

    def wait(self, calls: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        return [call for call in calls if call in self.said], []

    def get(self, call: Any) -> Any:
        said = self.said.pop(call)
        if isinstance(said, Exception):
            raise said
        return said

    def put(self, content: Any) -> Any:
        return content

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}


HERE, THERE = {"cores": "2"}, {"cores": "64"}


def on_cluster(monkeypatch: pytest.MonkeyPatch, folder: Path, *machines: dict[str, str]) -> tuple[Any, Cluster]:
    """An executor whose workers have started, one on each of these machines."""
    pytest.importorskip("ray")
    from piste.race.executors import ray as module

    cluster = Cluster(len(machines))
    monkeypatch.setattr(module, "ray", cluster)
    executor = module.Ray("auto", None, folder, most=99)
    for actor, machine in zip(cluster.actors, machines, strict=True):
        cluster.say(actor, Started(machine, {}))
    assert not list(executor.events(0))
    assert executor.idle == executor.width == len(machines)
    return executor, cluster


def lost() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_a_lost_worker_is_replaced_and_its_job_given_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, cluster = on_cluster(monkeypatch, tmp_path, HERE, HERE)
    first, second = Inspect("linear_autoencoder", "cpu"), Inspect("cartpole", "cpu")
    executor.submit(first)
    executor.submit(second)
    with pytest.raises(RuntimeError, match="no worker is idle"):
        executor.submit(Inspect("digits", "cpu"))
    victim, other = cluster.actors
    cluster.say(victim, lost())
    assert not list(executor.events(0))
    assert cluster.killed == [victim]
    assert executor.jobs == [second, first]
    assert executor.idle == 0
    cluster.say(other, host.Heard("card", b"words"))
    assert [(event.job, event.answer) for event in executor.events(0)] == [(second, "card")]
    assert other.asked[-1][1][1] is first  # the next that is free has it, not the one that has yet to start
    assert (tmp_path / "worker-1.log").read_bytes() == b"words"
    cluster.say(other, host.Heard(Progress(7), b""))
    assert [event.answer for event in executor.events(0)] == [Progress(7)]
    cluster.say(other, lost())
    assert not list(executor.events(0))
    cluster.say(cluster.actors[2], Started(HERE, {}))
    assert not list(executor.events(0))
    cluster.say(cluster.actors[2], lost())
    (event,) = executor.events(0)
    assert event.job is first
    assert event.answer.machine == HERE
    assert event.answer.reason.startswith("its worker was lost 3 times")
    assert executor.jobs == []


def test_a_stopped_job_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, cluster = on_cluster(monkeypatch, tmp_path, HERE)
    job = Inspect("digits", "cpu")
    executor.submit(job)
    executor.stop(job, "too long")
    assert cluster.actors[0].asked[-1] == ("stop", (1, "too long"))
    cluster.said[id(cluster.actors[0]), 2] = lost()  # before it could do so
    assert [event.answer for event in executor.events(0)] == [Death("too long", HERE)]
    cluster.say(cluster.actors[1], Started(HERE, {}))
    assert not list(executor.events(0))
    executor.submit(job)
    cluster.say(cluster.actors[1], lost())
    assert not list(executor.events(0))
    executor.stop(job, "nobody has it")
    assert [event.answer for event in executor.events(0)] == [Death("nobody has it")]


def test_a_timing_pass_goes_to_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, cluster = on_cluster(monkeypatch, tmp_path, HERE, THERE, THERE)
    assert executor.machine == THERE  # as most are
    for number in range(2):
        job = run_of("digits", TIME, fingerprint(THERE))
        executor.submit(job)
        assert cluster.actors[1].asked[-1][1][:2] == (number + 1, job)
        cluster.say(cluster.actors[1], host.Heard("record", b""))
        assert [event.answer for event in executor.events(0)] == ["record"]
    executor.lanes[2].machine = HERE  # others come and go
    executor.lanes[0].machine = HERE
    assert executor.machine == THERE
    with pytest.raises(ExecutorError, match="the same command goes on, and times all of them on another"):
        executor.submit(run_of("digits", TIME, "f00d"))


def test_workers_that_are_always_lost_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, cluster = on_cluster(monkeypatch, tmp_path, HERE)
    executor.submit(Inspect("digits", "cpu"))
    for _ in range(3):
        cluster.say(cluster.actors[-1], lost())
        assert not list(executor.events(0))
    cluster.say(cluster.actors[-1], lost())
    with pytest.raises(ExecutorError, match="workers are lost as soon as they start"):
        list(executor.events(0))


class Queued(Call):
    """One that waits for three looks before it runs."""

    def __init__(self) -> None:
        super().__init__(None)
        self.states = ["PENDING", "PENDING", "RUNNING"]

    def done(self) -> bool:
        self.state = self.states.pop(0) if self.states else self.state
        return False


def test_time_in_slurms_queue_is_not_that_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from piste.race.executors.slurm import Slurm

    monkeypatch.setattr(Slurm, "_call", lambda self, job: Queued())
    with Slurm(1, tmp_path, cluster="local") as executor:
        executor.submit(Inspect("digits", "cpu"))
        heard = [[event.answer for event in executor.events(0)] for _ in range(6)]
        executor.sent.clear()
    assert heard == [[], [], [Progress(0)], [], [], []]


def test_a_lost_job_of_slurm_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from submitit.core.utils import FailedJobError, UncompletedJobError

    from piste.race.executors.slurm import Slurm

    told = host.Told(Started(HERE, {}), "node7", host.Heard("card", b"words"))
    gone = UncompletedJobError("the node failed")
    results = [gone, told, gone, gone, gone, gone, FailedJobError("Traceback\nno module piste")]
    monkeypatch.setattr(Slurm, "_call", lambda self, job: Call(results.pop(0)))
    with Slurm(1, tmp_path, cluster="local") as executor:
        job, other = Inspect("digits", "cpu"), Inspect("cartpole", "cpu")
        executor.submit(job)
        assert not list(executor.events(0))
        assert [event.answer for event in executor.events(0)] == ["card"]
        assert executor.machine == HERE
        assert (tmp_path / "slurm-7.log").read_bytes() == b"words"
        executor.submit(other)
        events = [event for _ in range(MOST_LOSSES) for event in executor.events(0)]
        assert [event.answer for event in events] == [Death("its worker was lost 3 times: the node failed", HERE)]
        executor.submit(other)
        executor.stop(other, "too long")
        assert executor.sent[0].call.cancelled
        assert [event.answer for event in executor.events(0)] == [Death("too long", HERE)]
        executor.submit(other)
        with pytest.raises(ExecutorError, match="a worker cannot start on a node: no module piste"):
            list(executor.events(0))


# Machines without the task's file


def test_what_stands_beside_a_task_is_sent(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    content = {"task.py": "1", "other.py": "2", "package/__init__.py": "3", "package/deep/x.py": "4"}
    tree(home, {**content, "data.csv": "5", "folder/y.py": "6"})
    sent = files.bundle(str(home / "task.py"))
    assert {name: text.decode() for name, text in sent.files.items()} == content
    assert files.unpack(sent, away) == str(home / "task.py")  # all is there, as on a shared file system
    assert not away.exists()
    (home / "other.py").write_text("changed")
    assert files.unpack(sent, away) == str(away / "task.py")
    assert (away / "package" / "deep" / "x.py").read_text() == "4"
    (home / "big.py").write_bytes(bytes(files.MOST_BYTES))
    with pytest.raises(ExecutorError, match="more than 16 MiB"):
        files.bundle(str(home / "task.py"))


def test_a_host_runs_a_task_that_its_machine_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, "print('step')")
    sent, reference = files.bundle(str(path)), f"{path}:task"
    path.unlink()
    away = host.Host("cpu", environment.versions())
    try:
        assert away.start().versions == environment.versions()
        begun = away.work(1, Inspect(reference, "cpu"), sent)
        assert begun.answer == Progress(0)
        card = away.work(1, Inspect(reference, "cpu"), sent, begin=False)
        assert isinstance(card.answer, TaskCard)
        assert card.answer.reference == reference  # as the race knows it
        assert b"step" in card.printed
        run = run_of(reference, TUNE, task_hash=card.answer.task_hash)
        keys = tuple(replace(run.key, hyperparameters={"lr": lr}, packed=True) for lr in (0.01, 0.02))
        packed = away.work(0, Pack(reference, run.contender, keys), sent)
        while isinstance(packed.answer, Progress):
            packed = away.work(0, Pack(reference, run.contender, keys), sent, begin=False)
        assert isinstance(packed.answer, Packed)
        assert [(made.key, made.status) for made in packed.answer.records] == [(key, "finished") for key in keys]
        away.stop(2, "enough")  # comes before the job is begun, or while it runs
        again = run_of(reference, task_hash=card.answer.task_hash)
        stopped = away.work(2, again, sent)
        while isinstance(stopped.answer, Progress):
            stopped = away.work(2, again, sent, begin=False)
        assert stopped.answer == Death("enough", away.start().machine) or isinstance(stopped.answer, RunRecord)
    finally:
        away.close()
    assert not away.folder.exists()


def test_a_machine_with_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.versions()

    class Ready:
        started = Started({}, here)

        def __init__(self, *arguments: object) -> None: ...

        def __exit__(self, *exception: object) -> None: ...

    monkeypatch.setattr(host, "Local", Ready)
    assert host.Host("cpu", here).start() is Ready.started
    with pytest.raises(ExecutorError, match=r"a worker's machine has torch .* and not 1\.0: install the same"):
        host.Host("cpu", {**here, "torch": "1.0"})


# Whole races


RACE = (sys.executable, "-c", "from piste.cli import main; main()", "race")
SMALL = ("--optimizers", "lion,adamw", "--trials", "1", "--seeds", "1", "--timing", "1")
WALL = ("seconds", "share", "bytes")  # of costs


def called(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    return subprocess.run(
        [*RACE, *arguments, "--out", str(folder)], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, **ENVIRONMENT, **variables},
    )  # fmt: skip


def raced(folder: Path, *arguments: str, **variables: str) -> dict[str, RunRecord]:
    """The records of a race."""
    done = called(folder, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return Store(folder).load()


def qualities(records: Mapping[str, RunRecord]) -> dict[tuple[Any, ...], Any]:
    """All of a race that does not depend on a clock or on who made it, as text: every bit counts."""
    found = {}
    for made in records.values():
        content = json.loads(made.to_json())
        for name in ("id", "machine", "created", "checksum"):
            del content[name]
        del content["key"]["machine"], content["curve"]["train_seconds"]
        for name in [name for name in content["cost"] if any(part in name for part in WALL)]:
            del content["cost"][name]
        found[made.key.contender, made.key.phase, made.key.seed, made.key.lr] = json.dumps(content)
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[Any, ...], Any]]:
    folder = tmp_path_factory.mktemp("reference")
    task = write(folder)
    done = commands.run(["race", str(task), *SMALL, "--out", "out"], folder)
    assert done.returncode == 0, done.stdout
    made = Store(folder / "out").load()
    assert {record.status for record in made.values()} == {"finished"}
    return task, qualities(made)


def left_over(mark: str) -> list[str]:
    """Processes whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def mark() -> Iterator[dict[str, str]]:
    """An environment that marks processes; in the end none may be left."""
    name = f"piste-{uuid.uuid4().hex}"
    yield {"PISTE_TEST_MARK": name}
    deadline = time.monotonic() + 300
    while left_over(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_over(name)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.mark.slow
@needs_proc
def test_a_ray_cluster_gives_the_same_bits(
    tmp_path: Path, reference: tuple[Path, dict[tuple[Any, ...], Any]], mark: dict[str, str]
) -> None:
    """On nodes of which one has another number of cores: times are those of one machine."""
    pytest.importorskip("ray")
    task, expected = reference
    with running("add", "narrow", environment=mark) as cluster:
        made = raced(tmp_path / "out", str(task), *SMALL, "--on", "ray", RAY_ADDRESS=cluster.address, **mark)
        assert qualities(made) == expected
        machine = json.loads((tmp_path / "out" / "study.json").read_text())["machine"]["fingerprint"]
        timed = [record for record in made.values() if record.key.phase == TIME]
        assert {record.fingerprint for record in timed} == {machine} == {record.key.machine for record in timed}
        through_client = raced(tmp_path / "client", str(task), *SMALL, "--on", cluster.client, **mark)
        assert qualities(through_client) == expected
        # A task that breaks its process is told from a lost node.
        broken = write(tmp_path, "import os; os.abort()", "broken.py")
        done = called(tmp_path / "broken", str(broken), *SMALL, "--on", "ray", RAY_ADDRESS=cluster.address, **mark)
        assert "killed by SIGABRT while the task was tried" in " ".join(done.stderr.split())


@pytest.mark.slow
@needs_proc
def test_a_killed_ray_node_loses_and_repeats_nothing(tmp_path: Path, mark: dict[str, str]) -> None:
    pytest.importorskip("ray")
    task = write(tmp_path, "time.sleep(0.01)")
    out, moments = tmp_path / "out", random.Random(0)
    arguments = ("--optimizers", "lion,adamw", "--trials", "3", "--seeds", "3", "--timing", "0")
    with running("add", "add", environment=mark) as cluster:
        process = subprocess.Popen(
            [*RACE, str(task), *arguments, "--on", "ray", "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **ENVIRONMENT, **mark, "RAY_ADDRESS": cluster.address},
        )  # fmt: skip
        while process.poll() is None and len(list(out.glob("runs/*.json"))) < 1:
            time.sleep(0.05)
        kept: dict[str, str] = {}
        for victim in (0, 1):
            cluster.tell("add")
            time.sleep(moments.uniform(0.0, 1.0))
            cluster.tell(f"kill {victim}")
            now = {path.name: path.read_text() for path in out.glob("runs/*.json")}
            assert kept.items() <= now.items()
            kept = now
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    made = Store(out).load()
    assert kept.items() <= {path.name: path.read_text() for path in out.glob("runs/*.json")}.items()
    assert {record.status for record in made.values()} == {"finished"}
    # Every run makes one model, the look at the task makes four; what was lost is made again, and nothing else.
    again = len((tmp_path / "marks").read_text().splitlines()) - 4 - len(made)
    assert 0 <= again <= 2


@pytest.mark.slow
@needs_proc
def test_jobs_of_submitit_give_the_same_bits(
    tmp_path: Path, reference: tuple[Path, dict[tuple[Any, ...], Any]], mark: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("submitit")
    from piste.race.executors.slurm import Slurm

    for name, value in mark.items():
        monkeypatch.setenv(name, value)
    task, expected = reference
    monkeypatch.setattr(study, "make_executor", lambda on, workers, logs, *rest: Slurm(2, logs, "cpu", cluster="local"))
    settings = Settings((str(task),), ("lion", "adamw"), (), None, 1, 1, "cpu", timing=1, on="slurm")
    store = Store(tmp_path / "out")
    study.race(settings, store, PlainView(Console(file=io.StringIO())), "")
    assert qualities(store.load()) == expected
