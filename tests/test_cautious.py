"""``cautious=True``: against timm where it has the option, against typed formulas, and as a property of every rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance.subjects import ENGINES
from oracles import live
from oracles.formulas import Array, State
from oracles.replay import FEWER, GAPS, assert_same, by_formula, by_optimizer, random_problem, set_gradients

import piste
from piste.registry import OPTIMIZERS

RTOL, ATOL = 1e-12, 1e-13
DENSE = random_problem(seed=51)
FEWER_DENSE = random_problem(FEWER, seed=51)
GAPPY = random_problem(seed=52, missing=GAPS)
WITHOUT = {
    "Adafactor",
    "Amos",
    "MADGRAD",
    "MirrorMADGRAD",
    "Prodigy",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
}  # updates: nothing that could be masked


def masked(d: Array, g: Array) -> Array:
    """Liang et al. 2024: the mask over its mean, which is a thousandth at least."""
    agree = (d * g > 0).astype(np.float64)
    return np.asarray(d * agree / max(float(agree.mean()), 1e-3))


def sgd(p: Array, g: Array, state: State, *, lr: float, momentum: float, weight_decay: float) -> Array:
    g = g + weight_decay * p
    state["b"] = momentum * state["b"] + g if "b" in state else g
    return p - lr * masked(state["b"], g)


def rmsprop(p: Array, g: Array, state: State, *, lr: float, momentum: float) -> Array:
    v = state["v"] = 0.99 * state.get("v", np.zeros_like(g)) + 0.01 * g * g
    state["b"] = momentum * state.get("b", np.zeros_like(g)) + g / (np.sqrt(v) + 1e-8)
    return p - lr * masked(state["b"], g)


def lamb(p: Array, g: Array, state: State, *, lr: float, weight_decay: float) -> Array:
    """The decay comes after the mask, the trust ratio after both."""
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", np.zeros_like(g)) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", np.zeros_like(g)) + 0.001 * g * g
    d = masked(m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6), g) + weight_decay * p
    length = np.sqrt((d * d).sum())
    return np.asarray(p - lr * d * (np.sqrt((p * p).sum()) / length if length > 0 else 1.0))


TYPED: list[tuple[str, Any, dict[str, Any]]] = [
    ("SGD", sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    ("RMSprop", rmsprop, {"lr": 0.02, "momentum": 0.9}),
    ("Lamb", lamb, {"lr": 0.02, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "formula", "settings"), TYPED, ids=[name for name, _, _ in TYPED])
def test_typed_formulas(name: str, formula: Any, settings: dict[str, Any], engine: str) -> None:
    actual = by_optimizer(lambda p: getattr(piste, name)(p, cautious=True, engine=engine, **settings), GAPPY)
    assert_same(actual, by_formula(formula, GAPPY, settings), RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("name", "module", "theirs"), [("AdamW", "adamw", "AdamWLegacy"), ("Lion", "lion", "Lion")])
def test_timm(name: str, module: str, theirs: str, weight_decay: float, engine: str) -> None:
    settings = {"lr": 0.02, "weight_decay": weight_decay}
    oracle = getattr(live.timm_module(module), theirs)
    expected = by_optimizer(lambda p: oracle(p, caution=True, foreach=False, **settings), DENSE)
    actual = by_optimizer(lambda p: getattr(piste, name)(p, cautious=True, engine=engine, **settings), DENSE)
    assert_same(actual, expected, RTOL, ATOL)


def _settings(name: str) -> dict[str, Any]:
    """No centralization, no Lookahead, no decay: what is left of a step is its direction."""
    extra = {"Ranger21": {"norm_loss": 0.0, "lookahead": False}}.get(name, {})
    many = {"k": 1000} if name in ("Ranger", "RangerAdaBelief", "RangerLars", "LookaheadAdam") else {}
    return {"lr": 0.05, "weight_decay": 0.0, "use_gc": False} | extra | many


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", sorted({info.name for info in OPTIMIZERS} - WITHOUT))
def test_no_weight_moves_against_its_gradient(name: str, engine: str) -> None:
    """And without the option some do, so the test can fail."""

    def uphill(**options: Any) -> int:
        problem = FEWER_DENSE if engine == "cpp" else DENSE
        params = [torch.nn.Parameter(torch.tensor(w)) for w in problem.weights]
        optimizer = getattr(piste, name)(params, engine=engine, **_settings(name), **options)
        against = 0
        for row in problem.gradients:
            before = [p.detach().clone() for p in params]
            set_gradients(params, row)
            optimizer.step()
            against += sum(int(((p - b) * p.grad > 0).sum()) for p, b in zip(params, before, strict=True))
        return against

    assert uphill(cautious=True) == 0
    assert name in ("RMSprop", "SGD", "SM3") or uphill() > 0  # those have no momentum by default


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_updates_refuse(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} got cautious=True; legal: False"):
        getattr(piste, name)([torch.nn.Parameter(torch.ones(2))], cautious=True)


def test_refused_where_the_step_is_momentum() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"cautious=True with tf=True; legal: lr_in_momentum=False"):
        piste.RMSprop([p], momentum=0.9, tf=True, cautious=True)
    with pytest.raises(ValueError, match="Ranger21 with use_madgrad=True got cautious=True"):
        piste.Ranger21([p], use_madgrad=True, cautious=True)
    with pytest.raises(ValueError, match="cautious"):
        piste.AdamW([p], cautious="yes")  # type: ignore[arg-type]


def test_a_direction_that_agrees_nowhere_is_no_step() -> None:
    """Zero over a thousandth, not zero over zero."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = piste.SGD([p], lr=0.1, momentum=0.9, cautious=True)
    p.grad = torch.full((4,), 1.0)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.full((4,), -0.5)  # the buffer is 0.9 - 0.5 > 0
    optimizer.step()
    assert torch.equal(p.detach(), before)
