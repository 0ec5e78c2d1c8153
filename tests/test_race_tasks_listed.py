"""``piste race --list-tasks``, and that what is listed keeps its promises."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from piste.race import Task, load_task
from piste.race.command import command
from piste.race.contenders import make_contenders, make_optimizer
from piste.race.task import BUILT_IN

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
MODULES = sorted(set(BUILT_IN.values()))


def test_all_tasks_are_listed() -> None:
    done = CliRunner().invoke(command, ["race", "--list-tasks"])
    assert done.exit_code == 0, done.output
    for name in BUILT_IN:
        task = load_task(name).task
        assert re.search(rf"^{name} +{task.steps} +{task.metric_name}, ", done.output, re.MULTILINE), name
        assert task.description in " ".join(done.output.split())
        assert task.name == name


@pytest.mark.parametrize("module", MODULES)
def test_every_file_of_tasks_says_where_from_what_is_known_and_what_it_costs(module: str) -> None:
    text = importlib.import_module(module).__doc__ or ""
    for promise in (r"^Sources?: ", r"^Known results?: ", r"^Cost: "):
        assert re.search(promise, text, re.MULTILINE), f"{module} does not say {promise}"


def test_the_page_has_every_task() -> None:
    short = {name: "_" + name.rpartition("_")[2] for name in BUILT_IN}
    missing = [name for name in BUILT_IN if f"`{name}`" not in PAGE and f"`{short[name]}`" not in PAGE]
    assert not missing


def make(**settings: object) -> Task:
    import torch

    return Task("t", torch.nn.Identity, list, max, settings=settings)  # type: ignore[arg-type]


def test_settings_reach_every_optimizer_that_has_them() -> None:
    import torch

    for optimizer in ("adamw", "sgd_momentum", "torch.SGD", "muon", "lookahead+adamw"):
        contender = make_contenders((optimizer,), ())[0]
        task = make(weight_decay=0.5, heads=())
        made, _ = make_optimizer(contender, torch.nn.Linear(3, 2), 0.1, 10, task.domain, fixed=task.settings)
        groups = made.param_groups
        decays = {group["weight_decay"] for group in groups if any(p.ndim > 1 for p in group["params"])}
        assert decays == {0.5}, optimizer
        if optimizer == "muon":  # no head: its one matrix is Muon's
            assert [group["rule"] for group in groups if any(p.ndim > 1 for p in group["params"])] == ["muon"]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="settings must not hold lr"):
        make(lr=0.1)
    with pytest.raises(ValueError, match="settings must be a dict of arguments by name, not 3"):
        Task("t", list, list, max, settings=3)  # type: ignore[arg-type]
