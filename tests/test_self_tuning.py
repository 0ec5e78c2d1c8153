"""Schedule-Free and Prodigy: against their authors' packages, and what their classes add to a step."""

from __future__ import annotations

import copy
import io
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from conformance.subjects import ENGINES
from oracles.replay import assert_same, by_optimizer, parameters, random_problem, set_gradients

import piste
from piste.race.training import evaluating

RTOL, ATOL = 1e-12, 1e-13
PROBLEM = random_problem(steps=20, seed=61)

PACKAGES: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("ScheduleFreeSGD", schedulefree.SGDScheduleFree, {"lr": 0.3}, {}),
    (
        "ScheduleFreeSGD",
        schedulefree.SGDScheduleFree,
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2, "warmup_steps": 6, "r": 1.0, "weight_lr_power": 1.0},
        {},
    ),
    ("ScheduleFreeAdamW", schedulefree.AdamWScheduleFree, {"lr": 0.05}, {}),
    (
        "ScheduleFreeAdamW",
        schedulefree.AdamWScheduleFree,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "warmup_steps": 6, "r": 0.5},
        {},
    ),
    ("ScheduleFreeRAdam", schedulefree.RAdamScheduleFree, {"lr": 0.05, "weight_decay": 0.2}, {}),
    ("ScheduleFreeRAdam", schedulefree.RAdamScheduleFree, {"lr": 0.05, "silent_sgd_phase": False, "r": 1.0}, {}),
    ("Prodigy", prodigyopt.Prodigy, {}, {}),
    ("Prodigy", prodigyopt.Prodigy, {"weight_decay": 0.2, "d0": 1e-3, "beta3": 0.9, "betas": (0.8, 0.95)}, {}),
    (
        "Prodigy",
        prodigyopt.Prodigy,
        {"safeguard_warmup": True, "growth_rate": 1.5, "d_coef": 2.0, "eps": 1e-3, "betas": (0.5, 0.9)},
        {},
    ),
    (
        "Prodigy",
        prodigyopt.Prodigy,
        {"weight_decay": 0.2, "bias_correction": True, "decoupled_weight_decay": False, "d0": 1e-2},
        {"weight_decay": 0.2, "use_bias_correction": True, "decouple": False, "d0": 1e-2},
    ),
]


def _theirs(make: Any, params: list[torch.nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = make(params, **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "make", "ours", "theirs"), PACKAGES, ids=[f"{p[0]}-{p[2]}" for p in PACKAGES])
def test_the_authors_package(
    name: str,
    make: Any,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    engine: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twenty steps with every gradient: the packages count steps per group."""
    expected = by_optimizer(lambda p: _theirs(make, p, theirs or ours), PROBLEM)
    actual = by_optimizer(lambda p: getattr(piste, name)(p, engine=engine, **ours), PROBLEM)
    assert_same(actual, expected, RTOL, ATOL)


FREE = ["ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"]
THEIRS = dict(zip(FREE, (schedulefree.SGDScheduleFree, *(p[1] for p in PACKAGES[2:5:2])), strict=True))


def _trained(name: str, steps: int = 8, dtype: torch.dtype = torch.float64) -> tuple[list[torch.nn.Parameter], Any]:
    params = parameters(PROBLEM, dtype)
    optimizer = getattr(piste, name)(params, lr=0.1)
    for row in PROBLEM.gradients[:steps]:
        set_gradients(params, row)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", FREE)
def test_eval_gives_the_average_and_train_takes_it_back(name: str) -> None:
    """The average as the package has it; back to rounding; nothing happens the second time."""
    params, optimizer = _trained(name)
    others = parameters(PROBLEM)
    package = THEIRS[name](others, lr=0.1)
    package.train()
    for row in PROBLEM.gradients[:8]:
        set_gradients(others, row)
        package.step()
    package.eval()
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        optimizer.eval()
        for p, other in zip(params, others, strict=True):
            torch.testing.assert_close(p, other, rtol=RTOL, atol=ATOL)
    assert any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for _ in range(2):
        optimizer.train()
        for p, b in zip(params, before, strict=True):
            torch.testing.assert_close(p.detach(), b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", FREE)
def test_a_step_in_evaluation_mode_is_refused(name: str) -> None:
    params, optimizer = _trained(name)
    optimizer.eval()
    before, position = [p.detach().clone() for p in params], optimizer.param_groups[0]["schedule_step"]
    with pytest.raises(RuntimeError, match=r"evaluation mode; call optimizer.train\(\)"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["schedule_step"] == position


@pytest.mark.parametrize("name", FREE)
def test_saved_in_evaluation_mode(name: str) -> None:
    """Weights and optimizer saved after eval(), loaded elsewhere, and trained on."""
    params, optimizer = _trained(name)
    optimizer.eval()
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(w.clone()) for w in saved["weights"]]
    resumed = getattr(piste, name)(again, lr=0.1)
    resumed.load_state_dict(saved["optimizer"])
    with pytest.raises(RuntimeError, match="evaluation mode"):
        resumed.step()
    for weights, one in ((params, optimizer), (again, resumed)):
        one.train()
        for row in PROBLEM.gradients[8:]:
            set_gradients(weights, row)
            one.step()
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_weights_average_in_float32() -> None:
    params, optimizer = _trained("ScheduleFreeAdamW", dtype=torch.bfloat16)
    assert all(state["z"].dtype == torch.float32 for state in optimizer.state.values())
    optimizer.eval()
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in params)


def test_the_average_cannot_be_found_without_momentum() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"momentum=0\.0; legal: above 0"):
        piste.ScheduleFreeSGD([p], momentum=0.0)
    with pytest.raises(ValueError, match=r"betas=\(0\.0, 0\.9\); legal: above 0"):
        piste.ScheduleFreeAdamW([p], betas=(0.0, 0.9))


def test_the_race_evaluates_the_average() -> None:
    params, optimizer = _trained("ScheduleFreeSGD")
    before = params[0].detach().clone()
    with evaluating(optimizer):
        assert not optimizer.param_groups[0]["train_mode"]
    assert optimizer.param_groups[0]["train_mode"]
    torch.testing.assert_close(params[0].detach(), before, rtol=1e-14, atol=1e-14)
    with evaluating(torch.optim.SGD(params, lr=0.1)):
        pass


def test_prodigy_keeps_its_estimate_in_the_groups() -> None:
    """One number for all groups; a group that joins late takes it over; a skipped step does not change it."""
    params = parameters(PROBLEM)
    optimizer = piste.Prodigy([{"params": params[:3]}, {"params": params[3:5]}], d0=1e-3, nonfinite="skip")
    for row in PROBLEM.gradients[:6]:
        set_gradients(params, row)
        optimizer.step()
    first, second = optimizer.param_groups
    estimate = copy.deepcopy({name: first[name] for name in ("d", "d_max", "d_numerator")})
    assert estimate["d"] > 1e-3
    assert estimate == {name: second[name] for name in estimate}
    optimizer.add_param_group({"params": params[5:]})
    assert estimate == {name: optimizer.param_groups[2][name] for name in estimate}
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    assert estimate == {name: first[name] for name in estimate}


def test_prodigy_leaves_resting_groups_out() -> None:
    """A group with lr=0 neither moves nor counts: the others move as without it."""
    together, alone = parameters(PROBLEM), parameters(PROBLEM)
    both = piste.Prodigy([{"params": together[:3]}, {"params": together[3:], "lr": 0.0}])
    one = piste.Prodigy(alone[:3])
    for row in PROBLEM.gradients:
        set_gradients(together, row)
        set_gradients(alone, row)
        both.step()
        one.step()
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL, msg=f"weight {i}")
