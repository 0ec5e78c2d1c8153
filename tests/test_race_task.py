"""Task files: every way to get one wrong ends in one message that names the file and the fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from piste.race import Splits, Task, TaskError, load_task
from piste.race.attempt import one_line
from piste.race.contenders import make_contenders
from piste.race.inspection import inspect_task, load_data, task_hash
from piste.race.record import DIVERGED, TUNE, RunKey
from piste.race.starter import STARTER
from piste.race.task import BUILT_IN
from piste.race.training import run

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
        ("# a task\n\n1 / 0", r"my_task.py:3 raises ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)  # no task", "raises SystemExit: 3"),
        ("x = 1", "holds no piste.race.Task .* and is not run to look for one"),
        ("x = 'task'", "holds no piste.race.Task; give it one"),
        ("import piste\n1 / 0  # of a task\npiste.race_optimizer(model)", "piste race --script .* races it"),
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
        ("raise ValueError('first\\nsecond')  # task", "my_task.py:1 raises ValueError: first second"),
        (GOOD + "task = make(name=3)", "name must be letters"),
        (GOOD + "task = make(name='')", "name must be letters"),
        (GOOD + "task = make(loss=None)", "loss must be a function, not None"),
        (GOOD + "task = make(metric='accuracy')", "metric must be a function or None, not 'accuracy'"),
        (GOOD + "task = make(steps=2.5)", "steps must be a whole number >= 1, not 2.5"),
        (GOOD + "task = make(steps=True)", "steps must be a whole number >= 1, not True"),
        (GOOD + "task = make(batch_size=-8)", "batch_size must be a whole number >= 1, not -8"),
        (GOOD + "task = make(version=object())", "version must be text, not <object"),
        (GOOD + "task = make(description=7)", "description must be text, not 7"),
        (GOOD + "task = make(metric=loss, metric_name=None)", "metric_name must be text, not None"),
        (GOOD + "task = make(metric=loss, higher_is_better='no')", "higher_is_better must be True or False, not 'no'"),
        (GOOD + "task = make(epochs=3)", "TypeError: .*epochs"),
        (
            GOOD + "def broken():\n    raise KeyError('w')\ntask = make(model=broken)",
            r"model\(\) .*'w' \(my_task.py:17\)",
        ),
        (GOOD + "one = torch.nn.Linear(1, 1)\ntask = make(model=lambda: one)", "the same one twice"),
        (GOOD + "task = make(model=lambda: torch.nn.Identity())", "the model has no weights to train"),
        (GOOD + "task = make(model=lambda: (torch.seed(), torch.nn.Linear(1, 1))[1])", "other initial weights"),
        (
            GOOD + "def broken():\n    return open('gone')\ntask = make(data=broken)",
            r"data\(\) raises .*gone.*my_task.py:17",
        ),
        (GOOD + "x = torch.ones(9, 1)\ntask = make(data=lambda: Splits((x, x[1:]), (x, x), (x, x)))", "equal lengths"),
        (
            GOOD + "x = torch.ones(9, 1)\ntask = make(data=lambda: Splits((x, x), (x[:0], x[:0]), (x, x)))",
            "valid is empty",
        ),
        (GOOD + "task = make(data=lambda: Splits('a', 'b', 'c'))", "train must be a tuple of tensors, .* not str"),
        (GOOD + "task = make(loss=lambda model, batch: loss(model, batch) * float('nan'))", "untrained model is nan"),
        (
            GOOD + "def broken(model):\n    return 1\ntask = make(loss=broken)",
            r"loss\(model, batch\) raises TypeError.*broken",
        ),
        (
            GOOD + "task = make(metric=lambda model, batch: batch[0], metric_name='m')",
            r"metric\(model, batch\) .*one number",
        ),
        (GOOD + "task = make(metric=lambda m, b: float('inf'), metric_name='m')", "untrained model's m is not finite"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    reference = write(tmp_path, text)
    with pytest.raises(TaskError, match=message) as caught:
        inspect(reference)
    assert "\n" not in str(caught.value)


def test_labels_are_wrong_in_training_alone() -> None:
    clean, noisy = (load_data(load_task(name).task) for name in ("digits", "digits_noise"))
    assert torch.equal(clean.train[0], noisy.train[0])
    wrong = (clean.train[1] != noisy.train[1]).float().mean()
    assert 0.35 < wrong < 0.45
    assert set(noisy.train[1].tolist()) == set(range(10))
    for split in ("valid", "report"):
        assert torch.equal(getattr(clean, split)[1], getattr(noisy, split)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other = 3", r"my_task.py: other must be a piste.race.Task, not int"),
        ("def other():\n    return 3", r"my_task.py: other\(\) must be a piste.race.Task, not int"),
        ("def other():\n    return 1 / 0", r"my_task.py: other\(\) raises ZeroDivisionError: division by zero"),
        ("def other(size):\n    return size", r"my_task.py: other\(\) raises TypeError: .*size"),
    ],
)
def test_a_named_thing_that_is_no_task(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(write(tmp_path, text) + ":other")


def test_an_error_in_a_file_beside_the_task_is_placed_where_the_task_imports_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_race_task.py").write_text("\n" * 40 + "x = (")
    reference = write(tmp_path, "\n\nimport beside_the_race_task")
    with pytest.raises(TaskError, match=r"my_task.py:3 raises SyntaxError: .*beside_the_race_task.py, line 41"):
        load_task(reference)


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


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("metric", "the validation accuracy became nan at step 5 of 5"),
        ("loss", "the validation loss became nan at step 5 of 5"),
    ],
)
def test_a_number_that_becomes_nan_is_called_by_its_name(tmp_path: Path, part: str, message: str) -> None:
    """Of a model that went astray in its last step, seen in evaluation alone."""
    reference = write(tmp_path, GOOD + "task = make(metric=loss, metric_name='accuracy')")
    task = load_task(reference).task
    sound, evaluations = task.loss, 0

    def strange(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal evaluations
        evaluations += not model.training
        # At step 0 and after each of the 5 steps.
        return sound(model, batch) * (float("nan") if evaluations == 6 and not model.training else 1.0)

    task = replace(task, **{part: strange})
    contender = make_contenders(("sgd",), ())[0]
    key = RunKey("line", "f00d", contender.name, "sgd", "one_cycle", {"lr": 0.01}, 5, 0, TUNE, "cpu", {})
    made = run(task, load_data(task), contender, key, lambda step: None)
    assert (made.status, made.message) == (DIVERGED, message)


def test_an_error_is_one_line_that_no_terminal_obeys(tmp_path: Path) -> None:
    error = ValueError("red \x1b[31m\tand \x07 loud\nsecond line")
    assert one_line(error) == "ValueError: red [31m and loud"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999))) == 200
    with pytest.raises(TaskError, match=r"raises RuntimeError: a \[31m b c$"):
        load_task(write(tmp_path, "raise RuntimeError('a \\x1b[31m b\\nc')  # task"))


def test_splits_refuse_nonsense() -> None:
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="report"):
        Splits(train=(x, x), valid=(x, x), report=(x, x[:2]))


def test_a_task_is_a_value() -> None:
    task = Task("a", torch.nn.Identity, lambda: Splits(x, x, x), lambda m, b: b)
    x = torch.zeros(3)
    with pytest.raises(AttributeError):
        task.steps = 3  # type: ignore[misc]


def test_a_run_times_refreshes_apart(tmp_path: Path) -> None:
    """SOAP renews its bases in steps 11, 21 and 31 of 36, and the first five are warm-up."""
    made = load_task(write(tmp_path, GOOD + "task = make()")).task
    (contender,) = make_contenders(["soap"], ["constant"])
    key = RunKey("line", "f00d", contender.name, "soap", "constant", {"lr": 1e-3}, 36, 0, TUNE, "cpu", {})
    cost = run(made, load_data(made), contender, key, lambda step: None).cost
    assert cost.refresh_share == pytest.approx(3 / 31)
    assert cost.worst_optimizer_seconds >= cost.refresh_seconds > 0
