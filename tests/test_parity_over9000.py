"""What Ralamb, RangerLars, LookaheadAdam and SM3 promise beyond `tests/test_parity.py`: history, packages, memory.

over9000 is no package and optax needs JAX, so their formulas are typed: `oracles/over9000.py`, and optax's here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import live
from oracles.formulas import Array
from oracles.over9000 import sm3
from oracles.replay import Problem, assert_same, by_formula, by_optimizer, random_problem

import piste

RTOL, ATOL = 1e-12, 1e-13  # as in tests/test_parity.py
ENGINES = ("reference", "foreach", "cpp")
DENSE = random_problem(seed=51)


def _one_step(weight: torch.Tensor, engine: str, **settings: Any) -> float:
    """How long one step without momentum is, divided by the learning rate."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = piste.Ralamb([p], lr=1e-6, engine=engine, **settings)
    p.grad = torch.ones_like(weight)
    optimizer.step()
    return float((p.detach() - weight).norm()) / 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("factor", "trust"), [(0.01, 1.0), (1.0, 0.2), (100.0, 0.002)])
def test_the_released_trust_ratio_is_ten_over_the_norm_of_the_weights(factor: float, trust: float, engine: str) -> None:
    """Its denominator is the norm of the new weights: nothing of the update is in it."""
    weight = torch.full((50, 50), factor, dtype=torch.float64)  # norms 0.5, 50 and 5,000; the gradient's is 50
    assert _one_step(weight, engine, trust_denominator="weights") == pytest.approx(50 * trust, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("bound", [None, 10.0])
def test_the_right_trust_ratio_makes_steps_as_long_as_the_weights(
    factor: float, bound: float | None, engine: str
) -> None:
    weight = torch.full((50, 50), factor, dtype=torch.float64)
    expected = 50 * factor if bound is None else min(50 * factor, bound)
    assert _one_step(weight, engine, max_weight_norm=bound) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("denominator", ["update", "weights"])
def test_rangerlars_is_ralamb_in_lookahead(denominator: str) -> None:
    shared: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "trust_denominator": denominator}
    whole = by_optimizer(lambda p: piste.RangerLars(p, k=5, alpha=0.3, **shared), DENSE)
    wrapped = by_optimizer(lambda p: piste.Lookahead(piste.Ralamb(p, **shared), k=5, alpha=0.3), DENSE)
    assert_same(whole, wrapped, RTOL, ATOL)
    late = by_optimizer(lambda p: piste.RangerLars(p, k=5, alpha=0.3, late_start=True, **shared), DENSE)
    lazy = by_optimizer(lambda p: live.lazy_lookahead(piste.Ralamb(p, **shared), k=5, alpha=0.3), DENSE)
    assert_same(late, lazy, RTOL, ATOL)


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "weight_decay": 0.3, "betas": (0.8, 0.5)}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_lookahead_adam_is_torchs_adam_in_published_lookaheads(settings: dict[str, Any], engine: str) -> None:
    """Slow weights from the start: pytorch_optimizer's; from the first synchronisation on: timm's."""

    def ours(late_start: bool) -> Any:
        return by_optimizer(
            lambda p: piste.LookaheadAdam(p, lr=0.05, engine=engine, late_start=late_start, **settings), DENSE
        )

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.05, **settings)

    eager = by_optimizer(lambda p: live.eager_lookahead(adam(p), k=6, alpha=0.5), DENSE)
    lazy = by_optimizer(lambda p: live.lazy_lookahead(adam(p), k=6, alpha=0.5), DENSE)
    assert_same(ours(late_start=False), eager, RTOL, ATOL)
    assert_same(ours(late_start=True), lazy, RTOL, ATOL)


def test_late_slow_weights_take_no_memory_before_they_begin() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = piste.LookaheadAdam([p], k=3, late_start=True)
    kept = []
    for _ in range(4):
        p.grad = torch.ones(3)
        optimizer.step()
        kept.append("slow" in optimizer.state[p])
    assert kept == [False, False, True, True]


# --- SM3 ----------------------------------------------------------------------------------------------------------


def _optax_sm3(p: Array, g: Array, state: dict[str, Any], *, lr: float, b1: float, b2: float, eps: float) -> Array:
    """optax 0.2.8, `scale_by_sm3` with the learning rate: one vector per axis, least of them, momentum of steps.

    Typed in float64, without JAX.
    """
    vectors = state.setdefault("mu", [np.zeros(n) for n in g.shape])
    least = np.full(g.shape, np.inf)
    for axis, vector in enumerate(vectors):
        least = np.minimum(least, vector.reshape([-1 if i == axis else 1 for i in range(g.ndim)]))
    share = 1.0 if b2 == 1.0 else 1.0 - b2
    total = share * g**2 + b2 * least
    with np.errstate(divide="ignore"):
        scaled = g * np.where(total > 0, 1 / np.sqrt(total + eps), 0.0)
    state["nu"] = (1 - b1) * scaled + b1 * state.get("nu", 0.0)
    state["mu"] = [np.moveaxis(total, axis, 0).reshape(n, -1).max(axis=1) for axis, n in enumerate(g.shape)]
    return p - lr * state["nu"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("numbers", [(0.9, 1.0, 1e-8), (0.9, 0.99, 1e-8), (0.5, 0.5, 1e-2), (0.0, 1.0, 0.0)], ids=str)
def test_sm3_follows_optax(numbers: tuple[float, float, float], engine: str) -> None:
    """Rank 1 to 5; optax has no scalars."""
    b1, b2, eps = numbers
    problem = Problem(DENSE.weights[1:], [row[1:] for row in DENSE.gradients])
    expected = by_formula(_optax_sm3, problem, {"lr": 0.1, "b1": b1, "b2": b2, "eps": eps})
    ours: dict[str, Any] = {"lr": 0.1, "momentum": b1, "beta": b2, "eps": eps}
    assert_same(by_formula(sm3, problem, ours), expected, RTOL, ATOL)
    assert_same(by_optimizer(lambda p: piste.SM3(p, engine=engine, **ours), problem), expected, RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_accumulators_bound_what_they_stand_for_and_can_shrink(beta: float, engine: str) -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    optimizer = piste.SM3([p], lr=0.1, beta=beta, engine=engine)
    exact = torch.zeros(4, 5, dtype=torch.float64)
    largest = []
    for step in range(40):
        p.grad = torch.randn(4, 5, generator=generator, dtype=torch.float64) * (1.0 if step < 10 else 0.01)
        optimizer.step()
        exact = exact + p.grad**2 if beta == 1 else beta * exact + (1 - beta) * p.grad**2
        rows, columns = optimizer.state[p]["acc0"], optimizer.state[p]["acc1"]
        assert rows.shape == (4, 1)
        assert columns.shape == (1, 5)
        assert bool((torch.minimum(rows, columns) >= exact * (1 - 1e-12)).all())
        largest.append(float(rows.max()))
    assert (largest[-1] < 0.1 * largest[9]) == (beta < 1)


@pytest.mark.parametrize(
    ("shape", "momentum", "numbers"),
    [
        ((64, 64), 0.0, 64 + 64),
        ((64, 64), 0.9, 64 + 64 + 64 * 64),
        ((8, 4, 3, 3), 0.0, 8 + 4 + 3 + 3),
        ((64,), 0.0, 64),
        ((), 0.0, 1),
    ],
)
def test_sm3_keeps_a_number_for_each_slice(shape: tuple[int, ...], momentum: float, numbers: int) -> None:
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = piste.SM3([p], momentum=momentum)
    for _ in range(3):
        p.grad = torch.ones(shape)
        optimizer.step()
    kept = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in kept) == numbers
    assert {x.element_size() for x in kept} == {4}


@pytest.mark.parametrize("engine", ENGINES)
def test_sm3_of_more_axes_than_it_has_accumulators_for(engine: str) -> None:
    """Nine axes: the first eight still cover every element."""
    shape = (2, 1, 1, 1, 1, 1, 1, 2, 3)
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = piste.SM3([p], lr=0.1, momentum=0.0, engine=engine)
    p.grad = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(shape)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full(shape, 0.9, dtype=torch.float64), rtol=1e-12, atol=0)
    assert "acc8" not in optimizer.state[p]


# --- what they refuse, and the preset --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Ralamb", {"trust_denominator": "norm"}, "trust_denominator='norm'; legal: 'update' or 'weights'"),
        ("RangerLars", {"max_weight_norm": 0.0}, "max_weight_norm=0.0; legal: None or a finite number > 0"),
        ("LookaheadAdam", {"late_start": "yes"}, "late_start='yes'; legal: True or False"),
        ("SM3", {"beta": 1.1}, r"beta=1.1; legal: a number in \[0, 1\]"),
        ("SM3", {"momentum": 1.0}, r"momentum=1.0; legal: a number in \[0, 1\)"),
    ],
)
def test_refusals(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(piste, name)([torch.nn.Parameter(torch.zeros(2))], **settings)


def test_the_preset_over9000_is_the_released_code() -> None:
    optimizer = piste.create("over9000", torch.nn.Linear(2, 2))
    assert isinstance(optimizer, piste.RangerLars)
    group = optimizer.param_groups[0]
    assert (group["trust_denominator"], group["late_start"], group["k"], group["alpha"]) == ("weights", True, 6, 0.5)


# --- Lamb's clipping ----------------------------------------------------------------------------------------------


def test_lambs_clip_norm_is_timms_but_for_its_small_constant() -> None:
    """timm divides by the larger of 1 and norm / limit; `clip_norm` adds 1e-6 to the norm, as torch does."""
    shared: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.3}
    timms = live.timm_module("lamb").Lamb
    expected = by_optimizer(lambda p: timms(p, max_grad_norm=1.0, **shared), DENSE)
    # gradients, not steps, change by 1e-7 here: the ratio of the two averages takes it up again almost wholly
    assert_same(by_optimizer(lambda p: piste.Lamb(p, clip_norm=1.0, **shared), DENSE), expected, 1e-6, 1e-8)
