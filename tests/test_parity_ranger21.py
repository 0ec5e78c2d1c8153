"""Ranger21: as released against the package, mended against the formula, its schedule, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from conformance.subjects import ENGINES
from oracles import live
from oracles.ranger21 import chebyshev, ranger21, rate
from oracles.replay import FEWER, GAPS, assert_same, by_formula, by_optimizer, random_problem, set_gradients

import piste

RTOL, ATOL = 1e-12, 1e-13  # the same operations in another order: a few roundings over forty steps
DENSE = random_problem(steps=40, seed=31)
GAPPY = random_problem(steps=40, seed=32, missing=GAPS)
# by whether an engine builds kernels, of which this rule has several for each rank and each combination of options
PROBLEMS = {
    "dense": {False: DENSE, True: random_problem(FEWER, steps=40, seed=31)},
    "gaps": {False: GAPPY, True: random_problem(FEWER, steps=40, seed=32, missing=GAPS)},
}

# ours -> theirs
NAMES = {
    "use_gc": "using_gc",
    "normalize": "using_normgc",
    "use_agc": "use_adaptive_gradient_clipping",
    "lookahead": "lookahead_active",
    "k": "lookahead_mergetime",
    "alpha": "lookahead_blending_alpha",
    "use_warmdown": "warmdown_active",
    "warmup_steps": "num_warmup_iterations",
    "agc_clip": "agc_clipping_value",
    "warmdown_start": "warmdown_start_pct",
    "warmup_fraction": "warmup_pct_default",
    "epochs": "num_epochs",
    "batches_per_epoch": "num_batches_per_epoch",
}
RELEASED: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "norm_loss": 0.05},
    {"use_warmup": False, "use_warmdown": False, "lookahead": False, "use_agc": False},
    {"use_gc": False, "normalize": False, "softplus": False, "eps": 1e-3},
    {"gc_conv_only": True, "beta_softplus": 10.0, "k": 3, "alpha": 0.8, "agc_clip": 0.5},
    {"warmup_steps": 6, "warmdown_start": 0.4, "warmdown_min_lr": 1e-3, "betas": (0.8, 0.95)},
    {"warmup_steps": 30, "warmdown_start": 0.5},
    {"use_madgrad": True, "weight_decay": 0.1},
    {"use_madgrad": True, "momentum": 0.0, "norm_loss": 0.05},
    {"use_madgrad": True, "softplus": False, "use_gc": False, "use_warmup": False},
]


def _theirs(settings: dict[str, Any]) -> dict[str, Any]:
    given = dict(settings)
    strength = given.pop("norm_loss", 1e-4)
    return {NAMES.get(k, k): v for k, v in given.items()} | {
        "normloss_active": strength > 0,
        "normloss_factor": strength,
    }


@pytest.mark.parametrize("gradients", PROBLEMS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("settings", RELEASED, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "defaults")
def test_as_released(settings: dict[str, Any], groups: int, gradients: str) -> None:
    """faithful=True against ranger21 0.1.0 in float64; runs outlast their schedule, into the bugs that follow it.

    The last weight of each group has a gradient at every step: the package decays it without one, too, we do not.
    """
    settings = {"lr": 2e-2, "epochs": 4, "batches_per_epoch": 9} | settings
    lrs = (2e-2, 1e-2, 5e-3)

    def split(params: list[torch.nn.Parameter]) -> Any:
        if groups == 1:
            return params
        return [
            {"params": part, "lr": lr, "weight_decay": decay}
            for part, lr, decay in zip((params[:1], params[1:5], params[5:]), lrs, (0.1, 0.0, 0.02), strict=True)
        ]

    # groups differ in numbers and in whose weight is the last, which make no kernels of their own: cpp, whose building
    # takes most of the time here, meets them all where there are three
    for engine in ENGINES if groups == 3 else [engine for engine in ENGINES if engine != "cpp"]:
        problem = PROBLEMS[gradients][engine == "cpp"]
        expected = by_optimizer(lambda p: live.ranger21(split(p), **_theirs(settings)), problem)
        actual = by_optimizer(
            lambda p, engine=engine: piste.Ranger21(split(p), faithful=True, engine=engine, **settings), problem
        )
        # the cube root of the package is x ** (1 / 3), whose exponent is no third: 1e-11
        assert_same(actual, expected, 1e-11 if settings.get("use_madgrad") else RTOL, ATOL)


SCHEDULES: list[dict[str, Any]] = [
    {"total_steps": 40},
    {"epochs": 5, "batches_per_epoch": 7, "use_cheb": True, "warmup_steps": 4},
    {"epochs": 8, "batches_per_epoch": 5, "use_cheb": True, "use_warmup": False},
    {"total_steps": 30, "warmup_steps": 25, "warmdown_start": 0.5},
    {"total_steps": 40, "use_warmup": False, "warmdown_min_lr": 0.5},
    {"total_steps": 36, "betas": (0.9, 0.8), "use_warmdown": False},
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_schedules(settings: dict[str, Any], engine: str) -> None:
    """Weights follow the formula through warm-up, Chebyshev's steps and warm-down, and past the end."""
    settings = {"lr": 2e-2} | settings
    actual = by_optimizer(lambda p: piste.Ranger21(p, engine=engine, **settings), GAPPY)
    assert_same(actual, by_formula(ranger21, GAPPY, settings), RTOL, ATOL)


def _optimizer(**settings: Any) -> tuple[torch.nn.Parameter, piste.Ranger21]:
    p = torch.nn.Parameter(torch.ones(4, 3))
    return p, piste.Ranger21([p], **settings)


def _step(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    p.grad = torch.arange(12.0).reshape(4, 3)
    optimizer.step()


def test_the_rate_of_a_default_run() -> None:
    """10,000 steps: 2,000 up, level to 7,200, down to 3e-5 with the last step (ranger21's README plots this)."""
    hp = {"lr": 1e-3, "total_steps": 10_000, "betas": (0.9, 0.999), "warmup_steps": None, "warmup_fraction": 0.22}
    hp |= {"use_warmup": True, "use_warmdown": True, "use_cheb": False, "warmdown_start": 0.72, "warmdown_min_lr": 3e-5}
    p, optimizer = _optimizer(lr=1e-3, total_steps=10_000)
    for position in (0, 999, 1999, 2000, 7198, 7199, 7200, 9998, 9999, 12_000):
        optimizer.param_groups[0]["schedule_step"] = position
        optimizer.param_groups[0]["base_lr"] = 1e-3
        _step(p, optimizer)
        assert optimizer.param_groups[0]["current_lr"] == pytest.approx(rate(hp, position + 1), rel=1e-14)
    assert rate(hp, 2000) == rate(hp, 7199) == 1e-3
    assert rate(hp, 10_000) == pytest.approx(3e-5)
    assert chebyshev(8, 1) == pytest.approx(1 / (0.55 - 0.45 * np.cos(np.pi / 16)))


def test_another_schedule_is_refused_and_changes_nothing() -> None:
    p, optimizer = _optimizer(lr=1e-2, total_steps=20)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    _step(p, optimizer)
    scheduler.step()
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"0\.005 was 0\.01.*schedule of its own"):
        _step(p, optimizer)
    assert torch.equal(p, before)
    assert optimizer.param_groups[0]["schedule_step"] == 1


def test_a_scheduler_that_warms_up_is_refused_at_once() -> None:
    p, optimizer = _optimizer(lr=1e-2, total_steps=20)
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
    with pytest.raises(ValueError, match="schedule of its own"):
        _step(p, optimizer)


@pytest.mark.parametrize("settings", [{}, {"total_steps": 9, "use_warmup": False, "use_warmdown": False}], ids=str)
def test_any_scheduler_without_the_inner_one(settings: dict[str, Any]) -> None:
    p, optimizer = _optimizer(lr=1e-2, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(6):
        _step(p, optimizer)
        assert optimizer.param_groups[0]["current_lr"] == optimizer.param_groups[0]["lr"]
        scheduler.step()


def test_the_position_is_saved() -> None:
    """In the middle of the warm-up and of a Lookahead period."""
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in DENSE.weights]
    straight = piste.Ranger21(weights, lr=1e-2, total_steps=40)
    for row in DENSE.gradients[:7]:
        set_gradients(weights, row)
        straight.step()
    again = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    resumed = piste.Ranger21(again, lr=1e-2, total_steps=40)
    resumed.load_state_dict(straight.state_dict())
    for row in DENSE.gradients[7:]:
        for params, optimizer in ((weights, straight), (again, resumed)):
            set_gradients(params, row)
            optimizer.step()
    assert resumed.param_groups[0]["schedule_step"] == 40
    for a, b in zip(weights, again, strict=True):
        assert torch.equal(a, b)


def test_begin_starts_the_schedule_anew_and_nothing_else() -> None:
    """For a second run with the same optimizer, of another length and at another rate."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = piste.Ranger21([p], lr=1.0, warmup_steps=4)
    optimizer.begin(total_steps=10)
    rates = []
    for run in (10, 20):
        for group in optimizer.param_groups:
            group["lr"] = 10.0 / run
        optimizer.begin(total_steps=run)
        for _ in range(run):
            p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
            optimizer.step()
            rates.append(optimizer.param_groups[0]["current_lr"])
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[10:14] == [0.125, 0.25, 0.375, 0.5]
    assert rates[9] == rates[29] == pytest.approx(3e-5)
    assert optimizer.state[p]["step"] == 30
    optimizer.begin()
    assert optimizer.param_groups[0]["total_steps"] is None
    with pytest.raises(ValueError, match="legal: total_steps alone"):
        optimizer.begin(10, epochs=2, batches_per_epoch=5)


def test_begin_where_weights_count_for_the_schedule() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = piste.Ranger21([p], faithful=True)
    optimizer.begin(total_steps=10)
    p.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(ValueError, match="faithful=True after the first step; legal: a new optimizer"):
        optimizer.begin(total_steps=10)


def test_a_step_without_gradients_is_none() -> None:
    p, optimizer = _optimizer(lr=1e-2, total_steps=20)
    optimizer.step()
    assert optimizer.param_groups[0]["schedule_step"] == 0
    _step(p, optimizer)
    assert optimizer.param_groups[0]["schedule_step"] == 1


def test_a_late_group_joins_the_schedule() -> None:
    p, optimizer = _optimizer(lr=1e-2, total_steps=20)
    for _ in range(3):
        _step(p, optimizer)
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 2e-2})
    late.grad = torch.ones(2)
    _step(p, optimizer)
    first, second = optimizer.param_groups
    assert second["schedule_step"] == first["schedule_step"] == 4
    assert second["current_lr"] == pytest.approx(2 * first["current_lr"])


def test_lr_zero_moves_nothing() -> None:
    p, optimizer = _optimizer(lr=0.0, total_steps=20)
    before = p.detach().clone()
    for _ in range(7):
        _step(p, optimizer)
    torch.testing.assert_close(p.detach(), before, rtol=3e-7, atol=0)  # Lookahead mixes two equal numbers


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"total_steps": 10, "epochs": 2}, "total_steps=10, epochs=2"),
    ({"epochs": 2}, "batches_per_epoch=None; legal: total_steps alone, epochs with batches_per_epoch"),
    ({"total_steps": 0}, "total_steps=0; legal: None or a whole number >= 1"),
    ({"use_cheb": True}, "use_cheb=True with epochs=None; legal: epochs >= 3"),
    ({"use_cheb": True, "epochs": 2, "batches_per_epoch": 5}, "epochs=2"),
    ({"faithful": True, "pnm": False}, "faithful=True with pnm=False; legal: True"),
    ({"faithful": True, "use_cheb": True, "epochs": 5, "batches_per_epoch": 5}, "use_cheb=True; legal: False"),
    ({"faithful": True, "decoupled_weight_decay": False}, "decoupled_weight_decay=False; legal: True"),
    ({"agc_clip": 0.0}, "agc_clip=0.0; legal: a finite number > 0"),
    ({"warmdown_start": 1.5}, "warmdown_start=1.5"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda x: str(x))
def test_refusals(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        _optimizer(**settings)


def test_state_is_what_the_flags_need() -> None:
    def kept(**settings: Any) -> set[str]:
        p, optimizer = _optimizer(**settings)
        for _ in range(5):
            _step(p, optimizer)
        return set(optimizer.state[p]) - {"step"}

    assert kept() == {"odd", "even", "v", "vmax", "slow"}
    assert kept(pnm=False, amsgrad=False, lookahead=False) == {"odd", "v"}
    assert kept(use_madgrad=True) == {"nu", "s", "x0", "v", "slow"}
