"""Task files: every way to get one wrong ends in one message that names the file and the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piste.race import Splits, Task, TaskError, load_task
from piste.race.inspection import inspect_task, load_data, task_hash
from piste.race.starter import STARTER
from piste.race.task import BUILT_IN

GOOD = """
import torch
from piste.race import Splits, Task

def data():
    x = torch.linspace(-1, 1, 60)[:, None]
    return Splits(train=(x[:40], x[:40]), valid=(x[40:50], x[40:50]), report=(x[50:], x[50:]))

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def make(**changes):
    settings = dict(name="line", model=lambda: torch.nn.Linear(1, 1), data=data, loss=loss, steps=5, batch_size=8)
    return Task(**{**settings, **changes})
"""


def write(folder: Path, text: str) -> str:
    path = folder / "my_task.py"
    path.write_text(text)
    return str(path)


def inspect(reference: str) -> Any:
    loaded = load_task(reference)
    splits = load_data(loaded.task)
    return inspect_task(reference, loaded.task, task_hash(loaded, splits), splits, torch.device("cpu"))


def test_a_task_is_found_alone_by_name_and_through_a_function(tmp_path: Path) -> None:
    reference = write(tmp_path, GOOD + "task = make()\ndef other():\n    return make(name='other')\n")
    assert load_task(reference).task.name == "line"
    assert load_task(f"{reference}:task").task.name == "line"
    assert load_task(f"{reference}:other").task.name == "other"
    assert inspect(reference).parameters == 2


def test_the_starter_and_the_built_in_tasks_pass_inspection(tmp_path: Path) -> None:
    starter = write(tmp_path, STARTER.replace("{file}", "my_task.py").replace("{name}", "my_task"))
    for reference in (starter, *BUILT_IN):
        card = inspect(reference)
        assert card.parameters > 0
        assert card.step_seconds > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = (", r"my_task.py:1 raises SyntaxError"),
        ("\n\n1 / 0", r"my_task.py:3 raises ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "raises SystemExit: 3"),
        ("x = 1", "holds no piste.race.Task"),
        (GOOD + "a, b = make(), make(name='b')", r"holds several tasks; name one: .*:a, .*:b"),
        (GOOD + "task = make(name='a b')", "name must be letters"),
        (GOOD + "task = make(model=torch.nn.Linear(1, 1))", "write model=lambda"),
        (GOOD + "task = make(data=3)", "data must be a function, not 3"),
        (GOOD + "task = make(steps=0)", "steps must be a whole number >= 1, not 0"),
        (GOOD + "task = make(metric_name='accuracy')", "metric is None"),
        (GOOD + "task = make(data=lambda: 3)", r"data\(\) must return piste.race.Splits, not int"),
        (GOOD + "task = make(data=lambda: 1 / 0)", "ZeroDivisionError"),
        (GOOD + "task = make(batch_size=41)", "batch_size is 41, but there are 40 training examples"),
        (GOOD + "task = make(model=lambda: 3)", "task line: .*int"),
        (GOOD + "task = make(loss=lambda model, batch: 3.0)", "task line: .*loss"),
        (GOOD + "task = make(loss=lambda model, batch: model(batch[0]))", "task line: .*loss.*scalar"),
        (GOOD + "task = make(loss=lambda model, batch: torch.tensor(1.0))", "task line: .*loss"),
        (GOOD + "task = make(loss=lambda model, batch: batch[7])", "IndexError"),
        (GOOD + "task = make(metric=lambda model, batch: 'high', metric_name='m')", "task line: .*metric"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    reference = write(tmp_path, text)
    with pytest.raises(TaskError, match=message) as caught:
        inspect(reference)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"there is no file .*nothing.py \(piste race --new"):
        load_task(str(tmp_path / "nothing.py"))
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(TaskError, match="is not a file"):
        load_task(str(tmp_path / "folder.py"))
    with pytest.raises(TaskError, match="did you mean digits"):
        load_task("digit")
    with pytest.raises(TaskError, match="has no 'missing'; its tasks are: task"):
        load_task(write(tmp_path, GOOD + "task = make()") + ":missing")


def test_the_hash_follows_source_settings_and_data(tmp_path: Path) -> None:
    def hash_of(text: str) -> str:
        loaded = load_task(write(tmp_path, text))
        return task_hash(loaded, load_data(loaded.task))

    base = hash_of(GOOD + "task = make()")
    assert hash_of(GOOD + "task = make()") == base
    assert hash_of(GOOD + "task = make()  # changed") != base
    assert hash_of(GOOD + "task = make(version='2')") != base


def test_splits_refuse_nonsense() -> None:
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="report"):
        Splits(train=(x, x), valid=(x, x), report=(x, x[:2]))


def test_a_task_is_a_value() -> None:
    task = Task("a", torch.nn.Identity, lambda: Splits(x, x, x), lambda m, b: b)
    x = torch.zeros(3)
    with pytest.raises(AttributeError):
        task.steps = 3  # type: ignore[misc]
