"""Steps of several optimizers in one launch: bit for bit those of each, and not tried where they would mix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piste
from piste import execution

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
STEPS = 12  # past RAdam's switch and two of Lookahead's
SETTINGS = [(1e-3, 0.9, 0.0), (1e-2, 0.8, 0.1), (3e-2, 0.95, 0.01)]  # lr, beta1 or momentum, weight decay


def models() -> list[list[nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6,), (6, 6), (3, 6)]
    return [[nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes] for _ in SETTINGS]


def optimizers(make: Make, weights: Sequence[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """One for each model, each with numbers of its own, two groups, and a schedule to be made for it."""
    made = []
    for own, (lr, beta, decay) in zip(weights, SETTINGS, strict=True):
        groups = [{"params": own[::2], "weight_decay": decay}, {"params": own[1::2], "weight_decay": 0.0}]
        optimizer = make(groups)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if "betas" in group:
                group["betas"] = (beta, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = beta
        made.append(optimizer)
    return made


def give_gradients(weights: Sequence[list[nn.Parameter]], step: int, broken: int | None = None) -> None:
    draw = torch.Generator().manual_seed(step)
    for model, own in enumerate(weights):
        for p in own:
            p.grad = torch.randn(p.shape, generator=draw)
            if model == broken and step > 3:
                p.grad.fill_(torch.nan)


def trained(make: Make, *, joint: bool, broken: int | None = None) -> tuple[list[list[Tensor]], list[dict[str, Any]]]:
    """Weights and states after some steps under schedules."""
    weights = models()
    made = optimizers(make, weights)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9 - 0.1 * i) for i, each in enumerate(made)]
    together = piste.JointStep(made)
    for step in range(STEPS):
        give_gradients(weights, step, broken)
        if joint:
            together.step()
        else:
            for optimizer in made:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
    return [[p.detach() for p in own] for own in weights], [optimizer.state_dict() for optimizer in made]


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that a step was run: of how many weights."""
    seen: list[int] = []
    run = execution.run

    def noting(buckets: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(sum(map(len, buckets)))
        return run(buckets, *arguments, **named)

    monkeypatch.setattr(execution, "run", noting)
    return seen


class Cooling(piste.SGD):
    """Its groups carry a number of their own from step to step."""

    def advance(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum": 0.9 * group["momentum"]}


WITHIN_A_WEIGHT: dict[str, Make] = {
    "adamw": piste.AdamW,
    "sgd": partial(piste.SGD, lr=0.1, momentum=0.9),
    "radam": piste.RAdam,
    "ranger": piste.Ranger,  # centralises gradients, and has a Lookahead of its own
    "lamb": piste.Lamb,
    "adafactor": piste.Adafactor,
    "adan": piste.Adan,
    "muon": piste.Muon,
    "soap": piste.SOAP,
    "shampoo": piste.Shampoo,
    "carries": partial(Cooling, lr=0.1, momentum=0.9),
}
GLOBAL: dict[str, Make] = {
    "prodigy": piste.Prodigy,
    "clip_norm": partial(piste.AdamW, clip_norm=0.5),
    "ranger21": piste.Ranger21,
    "lookahead": lambda groups: piste.Lookahead(piste.AdamW(groups)),
    "skip": partial(piste.AdamW, nonfinite="skip"),
    "8bit": partial(piste.AdamW, state="8bit"),
    "torch": torch.optim.AdamW,
}


@pytest.mark.parametrize("broken", [None, 1], ids=["all well", "one diverges"])
@pytest.mark.parametrize("name", WITHIN_A_WEIGHT)
def test_one_launch_is_as_many_steps(name: str, broken: int | None, launches: list[int]) -> None:
    make = WITHIN_A_WEIGHT[name]
    found, states = trained(make, joint=True, broken=broken)
    assert launches == STEPS * [12]
    wanted, expected = trained(make, joint=False, broken=broken)
    for model in {0, 1, 2} - {broken}:
        assert_equal(found[model], wanted[model])
        assert_equal(states[model], expected[model])
        assert all(torch.isfinite(p).all() for p in found[model])


@pytest.mark.parametrize("name", GLOBAL)
def test_what_concerns_a_whole_model_stays_within_it(name: str, launches: list[int]) -> None:
    found, states = trained(GLOBAL[name], joint=True)
    assert 12 not in launches
    wanted, expected = trained(GLOBAL[name], joint=False)
    assert_equal(found, wanted)
    assert_equal(states, expected)


def test_different_kinds_step_by_themselves(launches: list[int]) -> None:
    weights = models()[:2]
    give_gradients(weights, 0)
    piste.JointStep([piste.AdamW(weights[0]), piste.SGD(weights[1], lr=0.1)]).step()
    assert launches == [4, 4]


def test_one_may_leave_and_step_by_itself(launches: list[int]) -> None:
    """Whoever goes on has the steps that it would have had, together or not."""

    def weights_after(*, joint: bool) -> list[list[Tensor]]:
        weights = models()
        made = optimizers(piste.AdamW, weights)
        for step, going in enumerate(([0, 1, 2], [0, 1, 2], [0, 2], [0, 2])):
            give_gradients(weights, step)
            if joint and step != 1:
                piste.JointStep([made[i] for i in going]).step()
            else:
                for i in going:
                    made[i].step()
        return [[p.detach() for p in own] for own in weights]

    assert_equal(weights_after(joint=True), weights_after(joint=False))
    assert launches[:6] == [12, 4, 4, 4, 8, 8]


def test_without_a_gradient_no_step_is_taken() -> None:
    weights = models()
    made = [piste.AdamW(own) for own in weights]
    give_gradients(weights, 0)
    for p in weights[1]:
        p.grad = None
    before = [p.detach().clone() for p in weights[1]]
    piste.JointStep(made).step()
    assert_equal([p.detach() for p in weights[1]], before)
    assert not any(made[1].state.values())
    assert [made[i].state[weights[i][0]]["step"] for i in (0, 2)] == [1, 1]


def test_hooks_and_schedules_see_their_steps() -> None:
    weights = models()
    made = [piste.AdamW(own) for own in weights]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in made]
    joint = piste.JointStep(made)
    give_gradients(weights, 0)
    untold = [each.last_step for each in made]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a schedule that steps before its optimizer
        joint.step()
        for schedule in schedules:
            schedule.step()
    assert not any(each.last_step is before for each, before in zip(made, untold, strict=True))
    called: list[torch.optim.Optimizer] = []
    made[1].register_step_post_hook(lambda optimizer, *_: called.append(optimizer))
    joint.step()
    assert called == [made[1]]
    assert all(each.last_step.gradient_norm > 0 for each in made)
