"""``piste advise``: what it reads from a task file, prints, and exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from piste.advise import SEVERITIES
from piste.race.command import command

TASK = """
import torch
from torch import nn
from piste.race import Splits, Task

def data():
    x = torch.linspace(-3, 3, 96)[:, None]
    return Splits(train=(x[0::3], x[0::3]), valid=(x[1::3], x[1::3]), report=(x[2::3], x[2::3]))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def model():
    return nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 1))

task = Task(name="line", model=model, data=data, loss=loss, steps=6000)
"""


@pytest.fixture
def advised(tmp_path: Path):
    def run(training: str = "", *options: str) -> Result:
        path = tmp_path / "my task.py"
        path.write_text(TASK + training)
        return CliRunner().invoke(command, ["advise", str(path), *options])

    return run


GOOD = """
import piste
def training(model):
    return piste.create_with_schedule("ranger", model, 6000)
"""
BAD = """
def training(model):
    return torch.optim.AdamW(model[0].parameters(), lr=1e-3)
"""
TOLD = """
def training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return dict(optimizer=optimizer, scheduler=schedule, schedule_steps=100, precision="fp16", scaler=False)
"""


def test_silent_where_all_is_well(advised) -> None:
    done = advised(GOOD)
    assert done.exit_code == 0, done.output
    assert "nothing to mend" in done.output
    line = (TASK + GOOD).splitlines().index("def training(model):") + 1
    assert f"my task.py:{line} training(model)" in done.output


def test_errors_are_the_exit_status(advised) -> None:
    done = advised(BAD)
    assert done.exit_code == 1, done.output
    assert "Weights that are trained are missing from the optimizer" in done.output
    assert "1 error, 1 warning" in done.output


def test_a_file_may_tell_everything(advised) -> None:
    done = advised(TOLD, "--json")
    assert done.exit_code == 1, done.output
    rules = {finding["rule"] for finding in json.loads(done.output)["findings"]}
    assert "float16-unscaled" in rules
    assert "schedule-length" not in rules


def test_a_preset_instead(advised) -> None:
    done = advised(BAD, "--optimizer", "lion", "--lr", "0.01", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert record["task"] == "line"
    assert record["counts"] == {"error": 0, "warning": 1, "note": 1, "suggestion": 0}
    assert [finding["rule"] for finding in record["findings"]] == ["lion-lr", "lion-batch"]
    assert set(record["counts"]) == set(SEVERITIES)


def test_commands_name_the_task() -> None:
    done = CliRunner().invoke(command, ["advise", "digits", "--optimizer", "adam", "--json"])
    assert done.exit_code == 0, done.output
    fixes = [finding["fix"] for finding in json.loads(done.output)["findings"]]
    assert "piste race digits --optimizers sgd_nesterov,rmsprop,adam" in fixes


@pytest.mark.parametrize(
    ("training", "options", "words"),
    [
        ("", (), "does not say what trains its model"),
        ("def training(model): return 3\n", (), "returns int; legal: an optimizer"),
        ("def training(model): return dict(optimiser=3)\n", (), "returns dict; legal"),
        ("def training(model): 1 / 0\n", (), "training(model) raises ZeroDivisionError"),
        (GOOD, ("--lr", "1"), "--lr and --schedule belong to --optimizer"),
        ("", ("--optimizer", "adamx"), "no optimizer 'adamx'"),
        ("", ("--optimizer", "adamw", "--memory", "much"), "'much' is not legal"),
        ("raise ValueError\n", (), "raises ValueError"),
    ],
)
def test_what_cannot_be_read_is_explained(advised, training: str, options: tuple[str, ...], words: str) -> None:
    done = advised(training, *options)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    assert "Traceback" not in done.output
