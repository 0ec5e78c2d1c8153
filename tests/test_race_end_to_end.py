"""Whole races through the real command, on a task of a few milliseconds: outcomes, interruption, repetition."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import commands
import pytest

from piste.race.starter import STARTER

pytestmark = pytest.mark.slow

TASK = """
import os, time
import torch
from piste.race import Splits, Task

def data():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return Splits(train=(x[:120], y[:120]), valid=(x[120:160], y[120:160]), report=(x[160:], y[160:]))

calls = 0

def loss(model, batch):
    global calls
    calls += 1
    {trouble}
    x, y = batch
    return (model(x) - y).square().mean()

task = Task(name="linear", model=lambda: torch.nn.Linear(4, 1), data=data, loss=loss, steps={steps}, batch_size=16)
"""


def write(folder: Path, trouble: str = "pass", steps: int = 12) -> Path:
    path = folder / "linear.py"
    path.write_text(TASK.replace("{trouble}", trouble).replace("{steps}", str(steps)))
    return path


def command(folder: Path, *arguments: str) -> list[str]:
    main = "from piste.cli import main; main()"
    return [sys.executable, "-c", main, "race", *arguments, "--out", str(folder / "out")]


def race(folder: Path, *arguments: str, status: int | None = 0) -> str:
    done = commands.run(["race", *arguments, "--out", str(folder / "out")], folder)
    assert done.returncode in ((0, 1) if status is None else (status,)), done.stdout
    return done.stdout


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out" / "runs").glob("*.json")}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "out" / "runs").glob("*.json")}


SMALL = ("--optimizers", "sgd,adamw", "--trials", "2", "--seeds", "2")


def test_the_same_command_repeats_nothing_and_a_new_optimizer_reuses_the_rest(tmp_path: Path) -> None:
    task = str(write(tmp_path))
    output = race(tmp_path, task, *SMALL)
    assert "report: " in output
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000
    first = contents(tmp_path)
    assert len(first) >= 8
    again = race(tmp_path, task, *SMALL)
    assert f"{len(first)} of them are there already" in again
    assert contents(tmp_path) == first
    race(tmp_path, task, "--optimizers", "sgd,adamw,ranger", "--trials", "2", "--seeds", "2")
    more = contents(tmp_path)
    assert first.items() < more.items()
    new = [record for name, record in records(tmp_path).items() if f"{name}.json" not in first]
    assert {record["key"]["optimizer"] for record in new} == {"ranger"}


def test_contenders_start_alike(tmp_path: Path) -> None:
    """Equal initial weights and batches: before the first step, and in its loss, all contenders of a seed agree."""
    race(tmp_path, str(write(tmp_path)), *SMALL)
    starts: dict[int, set[tuple[float, float]]] = {}
    for record in records(tmp_path).values():
        if record["key"]["phase"] == "time":  # it evaluates nothing
            continue
        curve = record["curve"]
        starts.setdefault(record["key"]["seed"], set()).add((curve["valid_loss"][0], curve["train_loss"][0]))
    assert len(starts) == 3  # one seed to tune, two to confirm
    assert all(len(values) == 1 for values in starts.values())
    assert len(set.union(*starts.values())) == 3


def test_schedules_cross_and_the_verdict_names_pairs(tmp_path: Path) -> None:
    output = race(
        tmp_path, str(write(tmp_path)), "--optimizers", "ranger", "--schedules", "one_cycle,flat_cosine",
        "--trials", "1", "--seeds", "2",
    )  # fmt: skip
    assert "ranger+one_cycle" in output
    assert "ranger+flat_cosine" in output
    made = {record["key"]["schedule"] for record in records(tmp_path).values()}
    assert made == {"one_cycle", "flat_cosine"}


@pytest.mark.parametrize(
    ("trouble", "status", "message"),
    [
        ("if calls > 25: raise RuntimeError('no more')", "failed", "RuntimeError: no more"),
        ("if calls > 25: raise MemoryError('full')", "out_of_memory", "full"),
        ("if calls > 25: os._exit(7)", "failed", "7"),
        ("if calls > 25: os.kill(os.getpid(), 11)", "failed", "SIGSEGV"),
        ("if calls > 25: return model(batch[0]).sum() * float('nan')", "diverged", ""),
    ],
)
def test_a_run_that_goes_wrong_is_an_outcome(tmp_path: Path, trouble: str, status: str, message: str) -> None:
    """The task breaks down in every worker after some steps; what ran before counts, and the race reports."""
    output = race(tmp_path, str(write(tmp_path, trouble)), *SMALL, status=None)
    made = list(records(tmp_path).values())
    assert {record["status"] for record in made} >= {status}
    assert any(message in record["message"] for record in made if record["status"] == status)
    assert "Traceback" not in output
    assert "report: " in output


def test_kill_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """kill -9 of the driver again and again; the finished runs stay as they are, and the race comes to its end."""
    task = str(write(tmp_path, "time.sleep(0.002)", steps=40))
    generator = random.Random(0)
    kept: dict[str, str] = {}
    for _ in range(5):
        process = commands.Command(["race", task, *SMALL, "--out", "out"], tmp_path)
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "runs").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(generator.uniform(0.0, 8.0))
        process.kill()  # the driver alone: its workers have to notice
        process.wait()
        now = contents(tmp_path)
        assert kept.items() <= now.items()
        kept = now
    output = race(tmp_path, task, *SMALL)
    assert "is damaged" not in output
    assert kept.items() <= contents(tmp_path).items()
    ids = [record["key"] for record in records(tmp_path).values()]
    assert len(ids) == len({json.dumps(key, sort_keys=True) for key in ids})


def test_ctrl_c_keeps_runs_and_resume_goes_on(tmp_path: Path) -> None:
    # From the second record on, a run takes a minute, until there is a file called "go".
    slowly = "time.sleep(0.01 if len(os.listdir('out/runs')) < 2 or os.path.exists('go') else 1.0)"
    task = str(write(tmp_path, slowly, steps=60))
    said = tmp_path / "said"
    process = commands.Command(["race", task, *SMALL, "--out", str(tmp_path / "out")], tmp_path, said)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("runs/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(300)
    output = said.read_text()
    assert process.returncode == 130
    assert "all finished runs are kept. Go on with: piste race --resume --out" in output
    assert "Traceback" not in output
    kept = contents(tmp_path)
    assert len(kept) >= 2
    (tmp_path / "go").touch()
    changed = race(tmp_path, task, "--trials", "3", "--resume", status=2)
    assert "there trials is 2, not 3" in " ".join(changed.split())
    assert kept == contents(tmp_path)
    resumed = race(tmp_path, task, *SMALL, "--resume")  # saying it all again is no change
    assert re.search(r"[1-9]\d* of them are there already", resumed)
    assert kept.items() <= contents(tmp_path).items()


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    task = str(write(tmp_path))
    race(tmp_path, task, *SMALL)
    victim = sorted((tmp_path / "out" / "runs").glob("*.json"))[0]
    before = json.loads(victim.read_text())
    victim.write_text(victim.read_text()[:-40])
    output = race(tmp_path, task, *SMALL)
    assert f"{victim.name} is damaged" in output.replace("\n", "")
    after = json.loads(victim.read_text())
    assert after["key"] == before["key"]
    assert after["curve"]["valid_loss"] == before["curve"]["valid_loss"]


def test_the_starter_races_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(STARTER.replace("{file}", "my_task.py").replace("{name}", "my_task"))
    output = race(tmp_path, "my_task.py", "--trials", "1", "--seeds", "2", "--steps", "30")
    assert "my_task: accuracy, higher is better" in output
    assert "report: " in commands.run(["report", str(tmp_path / "out")], tmp_path).stdout


def test_a_budget_is_measured_said_and_kept(tmp_path: Path) -> None:
    arguments = (str(write(tmp_path)), *SMALL, "--timing", "0", "--budget", "1h")
    output = race(tmp_path, *arguments)
    assert "measuring a few steps of 2 contenders" in output
    assert "Budget 60 min: nothing had to be given up for it." in output
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert study["plan"]["remarks"][0].startswith("Budget 60 min")
    again = race(tmp_path, *arguments)
    assert "measuring" not in again
    assert json.loads((tmp_path / "out" / "study.json").read_text())["plan"] == study["plan"]
    assert "too short" in race(tmp_path, str(tmp_path / "linear.py"), *SMALL, "--budget", "0.01s", status=2)


DIES_IN_A_PACK = """
    try:
        float(next(model.parameters()).detach().flatten()[0])
    except RuntimeError:  # these are the weights of several models
        if calls > 20:
            os._exit(3)
"""


@pytest.mark.parametrize("trouble", ["pass", DIES_IN_A_PACK.strip()], ids=["well", "dying"])
def test_packed_trials_and_confirmations_alone(tmp_path: Path, trouble: str) -> None:
    """Where a pack takes its worker with it, its trials are made one by one."""
    output = race(tmp_path, str(write(tmp_path, trouble)), *SMALL, "--timing", "0", "--pack")
    assert "trained together" in output
    made = list(records(tmp_path).values())
    assert {record["status"] for record in made} == {"finished"}
    assert {record["key"]["phase"] for record in made if record["key"].get("packed")} == {"tune"}
    assert {record["key"]["phase"] for record in made if not record["key"].get("packed")} == {"confirm"}
