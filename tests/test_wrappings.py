"""Wrappers by name: what "sam+adamw" makes, which names lead to it, and what a race counts of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import piste
from piste.race import Splits
from piste.race.command import command
from piste.race.contenders import ContenderError, make_contenders
from piste.race.record import FINISHED, TUNE, RunKey
from piste.race.task import Task
from piste.race.training import run

EVERY = list(piste.WRAPPINGS)
ENOUGH: dict[str, dict[str, Any]] = {"saf": {"samples": 8, "classes": 2}}  # what has no default


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", EVERY)
def test_every_wrapper_goes_round_a_preset(name: str) -> None:
    model = net()
    optimizer: Any = piste.create(f"{name}+adamw_no_decay", model, lr=3e-4, **ENOUGH.get(name, {}))
    assert type(optimizer) is piste.WRAPPINGS[name].wrapper
    assert type(optimizer.optimizer) is piste.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for argument, value in piste.WRAPPINGS[name].settings.items():
        assert getattr(optimizer, argument, "relative") in (value, "relative")
    if isinstance(optimizer, piste.SAM):
        assert optimizer.model is model, "running statistics would move twice"


def test_spelling_does_not_matter() -> None:
    optimizer: Any = piste.create("Efficient SAM+SGD-Nesterov", net(), k=3)
    assert (type(optimizer), optimizer.k) == (piste.LookSAM, 3)
    adaptive: Any = piste.create("Adaptive_SAM+sgd", net())
    assert (adaptive.adaptive, adaptive.rho) == ("asam", 0.5)
    deep: Any = piste.create("sam+lookahead+sgd", net(), rho=0.2, alpha=0.3)
    assert (deep.rho, deep.optimizer.alpha, type(deep.optimizer.optimizer)) == (0.2, 0.3, piste.SGD)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("smm+sgd", {}, "no wrapper 'smm' .did you mean 'sam'"),
        ("sam+adamv", {}, "no optimizer 'adamv' .did you mean 'adam'"),
        ("sam+adamw", {"roh": 1}, "unknown option 'roh' .did you mean 'rho'"),
        ("sam+adamw", {"rho": -1.0}, "rho=-1.0"),
        ("saf+sgd", {}, r"needs samples= and classes=, for saf"),
        ("lookahead+ranger", {"k": 3}, r"k=3, which lookahead and what is inside both take.*piste.Lookahead\("),
        ("esam (2205.14083)+sgd", {}, "no wrapper"),
    ],
)
def test_what_a_name_cannot_mean_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        piste.create(name, net(), **settings)


def test_mesa_needs_the_model() -> None:
    with pytest.raises(ValueError, match="the model itself"):
        piste.create("mesa+sgd", list(net().parameters()))


def test_presets_of_pairs() -> None:
    pair = piste.presets["gsam+ranger"]
    assert (pair.name, pair.gradient_evaluations, pair.wrappings) == ("gsam+ranger", 2, ("gsam",))
    assert pair.schedule == piste.presets["ranger"].schedule
    assert "2203.08065" in pair.source
    with pytest.raises(KeyError, match="no wrapper 'gsm'"):
        piste.presets["gsm+ranger"]
    assert "gsam+ranger" not in list(piste.presets)
    renamed = dataclasses.replace(piste.presets["sgd"], name="mine", wrappings=("sam",))
    assert type(piste.create(renamed, net())) is piste.SAM


@pytest.mark.parametrize(
    ("pattern", "wrappers"),
    [
        ("2010.01412", ["sam"]),
        ("2102.11600", ["asam"]),
        ("2203.08065", ["gsam"]),
        ("2203.02714", ["looksam", "looklayersam"]),
        ("2110.03141", ["esam"]),
        ("2205.14083", ["saf", "mesa"]),
        ("ESAM", ["esam"]),
        ("efficient sam", ["looksam"]),
        ("adaptive-sam", ["asam"]),
        ("Look*", ["looksam", "looklayersam", "lookahead"]),
        ("2205", []),
        ("nothing", []),
    ],
)
def test_wrappers_are_found(pattern: str, wrappers: list[str]) -> None:
    assert piste.list_wrappers(pattern) == wrappers


def test_presets_are_found_by_paper_and_pairs_by_pattern() -> None:
    assert piste.list_optimizers("2208.06677") == ["adan"]
    assert piste.list_optimizers("g?am+*nesterov") == ["gsam+sgd_nesterov"]
    assert piste.list_optimizers("nothing+sgd") == []


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_list_and_show_lead_to_the_right_paper() -> None:
    assert "looksam+… LookSAM 8 1.2" in shown("list", "efficient sam")
    both = shown("list", "2205.14083")
    assert "saf+… SAF - 1" in both
    assert "mesa+… MESA - 1" in both
    esam = shown("show", "esam")
    assert "arXiv 2110.03141" in esam
    assert "saf (Du et al. 2022, arXiv 2205.14083), which some lists call “esam”" in esam
    assert "needs logits and the index of each sample" in shown("show", "2205.14083")
    pair = shown("show", "sam+adamw")
    assert "2 a step" in pair
    assert "sam+ piste show sam" in pair
    assert "sam+…" in shown("list")


def test_state_of_wrappers_is_measured() -> None:
    """SAM's copy of the weights is not saved, and takes memory all the same."""
    assert piste.state_bytes("sam+sgd") == 4
    assert piste.state_bytes("looksam+adamw") == 16
    assert piste.state_bytes("lookahead+sgd_momentum") == 8
    with pytest.raises(ValueError, match="needs samples= and classes="):
        piste.state_bytes("saf+sgd")


def test_schedules_come_along() -> None:
    optimizer, schedule = piste.create_with_schedule("sam+ranger21", net(), 50, lr=1e-2)
    assert optimizer.param_groups[0]["total_steps"] == 50
    assert schedule.get_last_lr() == [1e-2, 1e-2]
    _, other = piste.create_with_schedule("ranger", net(), 50, schedule="one_cycle")
    assert other.get_last_lr()[0] < piste.presets["ranger"].lr_prior.center
    with pytest.raises(ValueError, match="flat_cosin"):
        piste.create_with_schedule("ranger", net(), 50, schedule="flat_cosin")


def a_task() -> Task:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).square().mean()

    def data() -> Splits:
        return Splits(*[(torch.randn(16, 3), torch.zeros(16))] * 3)

    return Task(name="tiny", model=net, data=data, loss=loss, steps=10, batch_size=8)


@pytest.mark.parametrize(("optimizer", "passes"), [("sgd", 10), ("sam+sgd", 20), ("looksam+sgd", 12)])
def test_a_race_charges_every_pass(optimizer: str, passes: int) -> None:
    task = a_task()
    (contender,) = make_contenders([optimizer], ["constant"])
    key = RunKey("tiny", "f00d", contender.name, optimizer, "constant", {"lr": 0.1}, 10, 0, TUNE, "cpu", {})
    found = run(task, task.data(), contender, key, lambda steps: None)
    assert (found.status, found.cost.gradient_evaluations) == (FINISHED, passes)
    copies = {"sgd": 0, "sam+sgd": 1, "looksam+sgd": 2}[optimizer]
    assert found.cost.state_bytes == 4 * copies * found.cost.parameters


def test_what_a_task_cannot_give_does_not_race() -> None:
    with pytest.raises(ContenderError, match="esam needs a loss for each sample of a batch"):
        make_contenders(["esam+sgd"], [])
    with pytest.raises(ContenderError, match="no wrapper 'sma', did you mean sam"):
        make_contenders(["sma+sgd"], [])


def test_a_race_of_unequal_steps_says_so(tmp_path: Path) -> None:
    arguments = ["race", "digits", "--optimizers", "sgd,sam+sgd", "--steps", "4", "--trials", "1", "--seeds", "1"]
    text = shown(*arguments, "--out", str(tmp_path / "out"))
    assert "Gradient evaluations a step: sam+sgd+one_cycle 2, the others 1." in text
