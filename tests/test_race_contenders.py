"""Who races: names and patterns, priors, and the optimizer that a contender makes."""

from __future__ import annotations

import math
import re

import pytest
import torch

import piste
from piste.race import Task
from piste.race.contenders import ContenderError, make_contenders, make_optimizer


@pytest.mark.parametrize("name", ["sam+sam+adamw", "gsam+asam+sgd", "lookahead+sam+adamw"])
def test_two_passes_inside_of_another_wrapper_are_refused(name: str) -> None:
    with pytest.raises(ContenderError, match=re.escape(f"{name} cannot race: ")):
        make_contenders([name], ())
    assert make_contenders(["sam+lookahead+adamw"], ())


def test_each_preset_keeps_its_companion_unless_schedules_are_named() -> None:
    assert [contender.name for contender in make_contenders(["ranger", "adamw"], [])] == [
        "ranger+flat_cosine",
        "adamw+one_cycle",
    ]
    crossed = make_contenders(["ranger", "adamw"], ["constant", "one_cycle"])
    assert [contender.name for contender in crossed] == [
        "ranger+constant",
        "ranger+one_cycle",
        "adamw+constant",
        "adamw+one_cycle",
    ]


def test_patterns_and_spellings_mean_presets() -> None:
    assert [contender.optimizer for contender in make_contenders(["ranger*"], [])] == piste.list_optimizers("ranger*")
    assert make_contenders(["SGD-Momentum"], []) == make_contenders(["sgd_momentum"], [])
    with pytest.raises(ContenderError, match="'sgd' is given twice"):
        make_contenders(["sgd", "sgd*"], [])


def test_the_cheat_sheet_is_a_group_and_all_of_it_can_race() -> None:
    """Every optimizer that it names and that makes do with one loss a batch."""
    contenders = make_contenders(["cheatsheet", "torch.AdamW"], [])
    names = {contender.optimizer for contender in contenders}
    named = "sgd_momentum rmsprop lamb adamw ranger ranger21 rangeradabelief shampoo sam+adamw asam+adamw looksam+adamw"
    assert names >= {*named.split(), "gsam+adamw", "adan", "amos", "adafactor", "novograd", "sm3", "lookahead+adamw"}
    for contender in contenders:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
        optimizer, _ = make_optimizer(contender, model, contender.lr_center, 10)
        assert optimizer.param_groups[0]["lr"] > 0


@pytest.mark.parametrize("name", ["torch.LBFGS", "torch.Optimizer", "torch.Nothing", "torch.lr_scheduler"])
def test_classes_of_torch_that_cannot_race(name: str) -> None:
    with pytest.raises(ContenderError, match=name):
        make_contenders([name], [])


def test_a_class_of_torch_races_around_its_own_default() -> None:
    (contender,) = make_contenders(["torch.AdamW"], [])
    assert contender.lr_at(0.5) == pytest.approx(1e-3)
    model = torch.nn.Linear(2, 1)
    optimizer, _ = make_optimizer(contender, model, 0.25, 10)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_positions_are_even_in_the_logarithm() -> None:
    (contender,) = make_contenders(["adamw"], [])
    prior = piste.presets["adamw"].lr_prior
    logs = [math.log10(contender.lr_at(position)) for position in (0.0, 0.25, 0.5, 0.75, 1.0)]
    low = math.log10(prior.center) - prior.decades_below
    width = prior.decades_below + prior.decades_above
    assert logs == pytest.approx([low + width * position for position in (0.0, 0.25, 0.5, 0.75, 1.0)], abs=1e-3)


@pytest.mark.parametrize(("domain", "eps"), [("vision", 1e-8), ("nlp", 1e-16), ("rl", 1e-12), ("", 1e-12)])
def test_the_task_says_the_field_and_the_preset_its_eps(domain: str, eps: float) -> None:
    (contender,) = make_contenders(["rangeradabelief"], [])
    optimizer, schedule = make_optimizer(contender, torch.nn.Linear(2, 1), 0.01, 10, domain)
    assert optimizer.param_groups[0]["eps"] == eps
    assert schedule.optimizer is optimizer


def test_a_field_is_no_matter_to_presets_without_one() -> None:
    (contender,) = make_contenders(["adamw"], [])
    optimizer, _ = make_optimizer(contender, torch.nn.Linear(2, 1), 0.01, 10, "vision")
    assert optimizer.param_groups[0]["eps"] == 1e-8


def test_a_field_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="domain must be one of '', 'vision', 'nlp', 'rl', not 'cv'"):
        Task(name="t", model=torch.nn.Identity, data=list, loss=max, domain="cv")  # type: ignore[arg-type]
