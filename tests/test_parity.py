"""piste's optimizers against two independent expectations: typed formulas, and other people's packages.

Everything runs in float64, for at least fourteen steps, so the trajectories cross RAdam's switch (t = 5 to 6) and two
Lookahead syncs (6 and 12). `tests/test_formulas.py` proves the formulas themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import formulas, live
from oracles.replay import (
    FEWER,
    GAPS,
    Problem,
    Trajectory,
    assert_same,
    by_formula,
    by_optimizer,
    parameters,
    random_problem,
    set_gradients,
    snapshot,
)
from oracles.table import FORMULAS

import piste

# The same float64 operations in another order: some tens of ulps (1e-16 each) after fourteen steps. A hundred times
# that is allowed, which is far below what any misplaced eps, decay or bias correction does.
RTOL, ATOL = 1e-12, 1e-13

ENGINES = ("reference", "foreach", "cpp")

DENSE = random_problem(seed=11)
GAPPY = random_problem(seed=12, missing=GAPS)
FEWER_GAPPY = random_problem(FEWER, seed=12, missing=GAPS)

Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of hyper-parameters, and the package that defines its numbers, where there is one."""

    name: str
    ours: Hyperparameters = field(default_factory=dict)
    oracle: Callable[..., torch.optim.Optimizer] | None = None
    theirs: Hyperparameters | None = None

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.ours.items())])

    def make(self, params: Any, engine: str) -> torch.optim.Optimizer:
        return getattr(piste, self.name)(params, engine=engine, **self.ours)

    def make_oracle(self, params: Any) -> torch.optim.Optimizer:
        assert self.oracle is not None
        return self.oracle(params, **(self.ours if self.theirs is None else self.theirs))


def _sgd() -> list[Case]:
    sgd, momentum = torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}
    return [
        Case("SGD", {"lr": 0.1}, sgd),
        Case("SGD", {"lr": 0.1, "weight_decay": 0.05}, sgd),
        Case("SGD", momentum, sgd),
        Case("SGD", momentum | {"nesterov": True, "weight_decay": 0.05}, sgd),
        Case("SGD", momentum | {"dampening": 0.3, "maximize": True, "weight_decay": 0.05}, sgd),
        Case("SGD", momentum | {"decoupled_weight_decay": True, "weight_decay": 0.5}),
        Case("SGD", momentum | {"use_gc": True, "weight_decay": 0.5}),
        Case("SGD", momentum | {"use_gc": True, "gc_conv_only": True, "nesterov": True}),
    ]


def _rmsprop() -> list[Case]:
    rmsprop, tf = torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-3}
    return [
        Case("RMSprop", {}, rmsprop),
        Case("RMSprop", {"centered": True, "weight_decay": 0.05, "eps": 1e-2}, rmsprop),
        Case("RMSprop", {"momentum": 0.9, "centered": True, "maximize": True, "alpha": 0.9}, rmsprop),
        Case("RMSprop", {"momentum": 0.9, "decoupled_weight_decay": True, "weight_decay": 0.5}),
        Case("RMSprop", {"momentum": 0.9, "use_gc": True, "weight_decay": 0.5}),
        Case("RMSprop", tf | {"tf": True}, live.rmsprop_tf, tf),
        Case("RMSprop", tf | {"tf": True, "centered": True}, live.rmsprop_tf, tf | {"centered": True}),
        Case("RMSprop", tf | {"tf": True, "momentum": 0.9}, live.rmsprop_tf, tf | {"momentum": 0.9}),
        Case(
            "RMSprop",
            tf | {"tf": True, "momentum": 0.9, "centered": True, "lr_in_momentum": False, "weight_decay": 0.05},
            live.rmsprop_tf,
            tf | {"momentum": 0.9, "centered": True, "lr_in_momentum": False, "weight_decay": 0.05},
        ),
        Case(
            "RMSprop",
            tf | {"tf": True, "momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True},
            live.rmsprop_tf,
            tf | {"momentum": 0.9, "weight_decay": 0.3, "decoupled_decay": True},
        ),
    ]


def _adam() -> list[Case]:
    adam, adamw, decayed = torch.optim.Adam, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.3}
    return [
        Case("Adam", {"lr": 0.02}, adam),
        Case("Adam", decayed | {"eps": 1e-2, "betas": (0.8, 0.99)}, adam),
        Case("Adam", {"lr": 0.02, "amsgrad": True, "betas": (0.8, 0.5), "maximize": True}, adam),
        Case("Adam", decayed | {"decoupled_weight_decay": True}, adam),
        Case("Adam", decayed | {"use_gc": True}),
        Case("AdamW", {"lr": 0.02}, adamw),
        Case("AdamW", decayed | {"amsgrad": True, "betas": (0.8, 0.5)}, adamw),
        Case("AdamW", decayed | {"decoupled_weight_decay": False}, adam),
        Case("AdamW", decayed | {"use_gc": True, "gc_conv_only": True}),
    ]


def _radam() -> list[Case]:
    radam, decayed = torch.optim.RAdam, {"lr": 0.02, "weight_decay": 0.3}
    return [
        Case("RAdam", {"lr": 0.02, "eps": 1e-2}, radam),
        Case("RAdam", decayed, radam),
        Case("RAdam", decayed | {"decoupled_weight_decay": True, "betas": (0.8, 0.95), "maximize": True}, radam),
        Case("RAdam", decayed | {"degenerated_to_sgd": False, "decoupled_weight_decay": True}),
        Case("RAdam", decayed | {"degenerated_to_sgd": False}),
        Case("RAdam", decayed | {"use_gc": True}),
    ]


def _adabelief() -> list[Case]:
    cases = [Case("AdaBelief", {"lr": 0.02}, live.adabelief)]
    for decoupled in (True, False):
        for extra in (
            {"rectify": False},
            {"rectify": False, "eps": 1e-8, "fixed_decay": True},
            {"rectify": False, "eps": 1e-4, "amsgrad": True, "betas": (0.8, 0.5)},
            {"eps": 1e-4, "amsgrad": True, "betas": (0.8, 0.95)},
            {"degenerated_to_sgd": False, "eps": 1e-8},
        ):
            shared = {"lr": 0.02, "weight_decay": 0.05} | extra
            ours = shared | {"decoupled_weight_decay": decoupled}
            cases.append(Case("AdaBelief", ours, live.adabelief, shared | {"weight_decouple": decoupled}))
    cases.append(Case("AdaBelief", {"lr": 0.02, "weight_decay": 0.3, "use_gc": True}))
    return cases


def _rangers() -> list[Case]:
    decayed = {"lr": 0.05, "weight_decay": 0.3}
    cases = [
        Case("RangerAdaBelief", {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-5}, live.ranger_adabelief),
        Case(
            "RangerAdaBelief", {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-12, "use_gc": False}, live.ranger_adabelief
        ),
        Case(
            "RangerAdaBelief",
            {"weight_decay": 0.0, "eps": 1e-8, "gc_conv_only": True, "k": 5, "alpha": 0.8},
            live.ranger_adabelief,
        ),
    ]
    for name in ("Ranger", "RangerAdaBelief"):
        cases += [
            Case(name),
            Case(name, decayed | {"k": 4, "alpha": 0.8}),
            Case(name, decayed | {"gc_loc": False}),
            Case(name, decayed | {"gc_loc": False, "gc_conv_only": True}),
            Case(name, decayed | {"use_gc": False, "eps": 1e-8, "betas": (0.9, 0.95)}),
            Case(name, decayed | {"decoupled_weight_decay": False, "maximize": True}),
        ]
    return cases


def _dual_averaging() -> list[Case]:
    cases: list[Case] = []
    for name in ("MADGRAD", "MirrorMADGRAD"):
        oracle = live.madgrad if name == "MADGRAD" else None
        decayed = {"lr": 0.05, "weight_decay": 0.3}
        cases += [
            Case(name, {"lr": 0.05}, oracle),
            Case(name, decayed | {"eps": 1e-3, "momentum": 0.5}, oracle),
            Case(name, {"lr": 0.05, "momentum": 0.0, "maximize": True}),
            Case(name, decayed | {"decoupled_weight_decay": True}),
            Case(name, decayed | {"decoupled_weight_decay": True, "momentum": 0.0}),
            Case(name, {"lr": 0.0}),
            Case(name, {"lr": 0.05, "eps": 0.0}),
            Case(name, decayed | {"use_gc": True}),
        ]
    return cases


def _novograd() -> list[Case]:
    decayed = {"lr": 0.02, "weight_decay": 0.3}
    return [
        Case("NovoGrad", {"lr": 0.02}, live.novograd),
        Case("NovoGrad", decayed | {"eps": 1e-2, "betas": (0.9, 0.0)}, live.novograd),
        Case("NovoGrad", decayed | {"amsgrad": True, "grad_averaging": True}, live.novograd),
        Case(
            "NovoGrad",
            decayed | {"decoupled_weight_decay": True},
            live.novograd,
            decayed | {"decoupled_decay": True},
        ),
        Case("NovoGrad", decayed | {"use_gc": True, "maximize": True, "grad_averaging": True}),
    ]


def _positive_negative() -> list[Case]:
    decayed = {"weight_decay": 0.3}
    return [
        Case("PNM", {"lr": 0.1}),
        Case("PNM", decayed | {"momentum": 0.8, "beta0": 0.5}),
        Case("PNM", decayed | {"decoupled_weight_decay": True, "maximize": True, "use_gc": True}),
        Case("AdaPNM", {"lr": 0.02}),
        Case("AdaPNM", decayed | {"lr": 0.02, "betas": (0.8, 0.5), "eps": 1e-2}),
        Case("AdaPNM", decayed | {"amsgrad": False, "decoupled_weight_decay": False, "beta0": 0.5}),
        Case("AdaPNM", decayed | {"use_gc": True, "maximize": True}),
    ]


def _modern() -> list[Case]:
    decayed = {"lr": 0.02, "weight_decay": 0.3}
    return [
        Case("Lamb", {"lr": 0.02}),
        Case("Lamb", decayed | {"bias_correction": False, "max_weight_norm": 1.0, "eps": 1e-2}),
        Case("Lamb", {"lr": 0.02, "weight_decay": 0.0, "always_adapt": False}),
        Case("Lamb", decayed | {"always_adapt": False, "trust_clip": True, "use_gc": True, "betas": (0.8, 0.95)}),
        Case("Lamb", decayed | {"decoupled_weight_decay": False, "maximize": True}),
        Case("Adan", {"lr": 0.02}),
        Case("Adan", decayed | {"eps": 1e-2, "betas": (0.9, 0.8, 0.95)}),
        Case("Adan", decayed | {"no_prox": True, "maximize": True}),
        Case("Adan", decayed | {"decoupled_weight_decay": False, "use_gc": True}),
        Case("LaProp", {"lr": 0.02, "eps": 1e-8}, live.laprop),
        Case("LaProp", decayed | {"betas": (0.8, 0.5), "eps": 1e-2, "use_gc": True}),
        Case("ADOPT", {"lr": 0.02}, live.adopt),
        Case("ADOPT", decayed | {"betas": (0.8, 0.95), "clip_exponent": 0.5, "maximize": True}),
        Case("ADOPT", decayed | {"decoupled_weight_decay": False, "use_gc": True, "eps": 1e-2}),
        Case("NAdamW", decayed, live.nadam, decayed | {"decoupled_weight_decay": True}),
        Case("NAdamW", decayed | {"momentum_decay": 0.1, "betas": (0.8, 0.9), "use_gc": True}),
        Case("StableAdamW", {"lr": 0.02}),
        Case("StableAdamW", decayed | {"betas": (0.8, 0.5), "eps": 1e-2, "maximize": True}),
        Case("StableAdamW", decayed | {"decoupled_weight_decay": False, "use_gc": True}),
        Case("AdEMAMix", {"lr": 0.02}),
        Case("AdEMAMix", decayed | {"warmup_steps": 6, "betas": (0.8, 0.95, 0.99), "alpha": 2.0}),
        Case("AdEMAMix", decayed | {"decoupled_weight_decay": False, "warmup_steps": 100, "use_gc": True}),
        Case("Lion", {"lr": 0.02}, live.lion),
        Case("Lion", decayed | {"betas": (0.95, 0.98)}, live.lion),
        Case("Lion", decayed | {"decoupled_weight_decay": False, "use_gc": True, "maximize": True}),
    ]


def _over9000() -> list[Case]:
    decayed = {"lr": 0.02, "weight_decay": 0.3}
    released = {"trust_denominator": "weights"}
    cases: list[Case] = []
    for name in ("Ralamb", "RangerLars"):
        cases += [
            Case(name, {"lr": 0.02}),
            Case(name, decayed | {"betas": (0.8, 0.95), "eps": 1e-2, "max_weight_norm": 1.0}),
            Case(name, decayed | {"decoupled_weight_decay": False, "max_weight_norm": None, "maximize": True}),
            Case(name, decayed | released | {"use_gc": True, "max_weight_norm": 1.0}),
            Case(name, decayed | released | {"decoupled_weight_decay": False}),
        ]
    return [
        *cases,
        Case("RangerLars", decayed | released | {"late_start": True, "k": 4, "alpha": 0.3}),
        Case("LookaheadAdam", {"lr": 0.02}),
        Case("LookaheadAdam", decayed | {"late_start": True, "amsgrad": True, "betas": (0.8, 0.5)}),
        Case("LookaheadAdam", decayed | {"decoupled_weight_decay": True, "k": 4, "alpha": 0.8, "use_gc": True}),
    ]


def _sm3() -> list[Case]:
    decayed = {"lr": 0.05, "weight_decay": 0.3}
    return [
        Case("SM3", {"lr": 0.05}),
        Case("SM3", {"lr": 0.05, "momentum": 0.0, "beta": 0.8}),
        Case("SM3", decayed | {"beta": 0.95, "eps": 1e-3, "maximize": True}),
        Case("SM3", decayed | {"momentum": 0.5, "decoupled_weight_decay": False, "use_gc": True}),
        Case("SM3", decayed | {"momentum": 0.0, "beta": 0.0, "eps": 0.0}),
    ]


CASES = [
    *_modern(),
    *_over9000(),
    *_sm3(),
    *_dual_averaging(),
    *_novograd(),
    *_positive_negative(),
    *_sgd(),
    *_rmsprop(),
    *_adam(),
    *_radam(),
    *_adabelief(),
    *_rangers(),
]


def cases(chosen: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.id) for case in chosen]


def trajectory(case: Case, problem: Problem, engine: str) -> Trajectory:
    return by_optimizer(lambda params: case.make(params, engine), problem)


def gappy(engine: str) -> Problem:
    """For what is no matter of ranks."""
    return FEWER_GAPPY if engine == "cpp" else GAPPY


# --- trajectories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", cases(CASES))
def test_follows_the_formula(case: Case, engine: str) -> None:
    """Every rank from 0 to 5; weights that wake late, sleep in between, or miss the step of a sync."""
    expected = by_formula(FORMULAS[case.name], GAPPY, case.ours)
    assert_same(trajectory(case, GAPPY, engine), expected, RTOL, ATOL)


@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
@pytest.mark.parametrize("case", cases([case for case in CASES if case.oracle is not None]))
def test_follows_the_published_code(case: Case, problem: Problem, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine is `auto`: what a user gets."""
    expected = by_optimizer(case.make_oracle, problem)
    assert_same(trajectory(case, problem, "auto"), expected, RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_ranger_follows_pytorch_optimizer(weight_decay: float, engine: str) -> None:
    """Dense only: pytorch_optimizer counts steps per group, not per weight."""
    ours = Case("Ranger", {"lr": 0.05, "weight_decay": weight_decay})
    expected = by_optimizer(lambda params: live.ranger(params, **ours.ours), DENSE)
    assert_same(trajectory(ours, DENSE, engine), expected, RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranger_adabelief_decay_follows_the_package_once_rectified(engine: str) -> None:
    """While the average is short (steps 1 to 5) the package writes the decay into its momentum buffer; piste does not.

    So the decay is switched on for both at the sixth step.
    """
    ours = {"lr": 0.05, "eps": 1e-8}

    def change(step: int) -> Hyperparameters:
        return {"weight_decay": 0.0 if step < 5 else 0.3}

    expected = by_optimizer(lambda params: live.ranger_adabelief(params, **ours), DENSE, change=change)
    actual = by_optimizer(lambda params: piste.RangerAdaBelief(params, engine=engine, **ours), DENSE, change=change)
    assert_same(actual, expected, RTOL, ATOL)


def test_ranger_adabelief_keeps_decay_out_of_its_momentum() -> None:
    """The alias of the released code, seen from outside: zero gradients with decay must decay and nothing else.

    The direction is wd * p and the short-average scale 1/c1, so the first step multiplies by 1 - lr*wd/(1-beta1) and
    the second by 1 - lr*wd/(1-beta1^2): with a polluted momentum the second would be larger.
    """
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = piste.RangerAdaBelief([p], lr=0.1, weight_decay=0.1, betas=(0.95, 0.999))
    expected = p.detach().clone()
    for t in (1, 2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.1 / (1 - 0.95**t))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)  # three roundings


# --- groups, clipping, changing hyper-parameters ------------------------------------------------------------------

# Rules of matrices have tests of their own, on problems whose singular values and eigenvectors are well determined.
ELEMENTWISE = [name for name in FORMULAS if name not in ("Muon", "NorMuon", "PSGDKron", "Shampoo", "SOAP")]

TWO_GROUPS = {
    "SGD": ({"momentum": 0.9, "lr": 0.1}, {"momentum": 0.5, "lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": ({"momentum": 0.9, "lr": 0.1}, {"alpha": 0.9, "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "Adam": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "AdamW": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "RAdam": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "AdaBelief": ({"lr": 0.1, "eps": 1e-8}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "ADOPT": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "AdEMAMix": ({"lr": 0.1}, {"betas": (0.8, 0.95, 0.99), "warmup_steps": 8, "lr": 0.01, "alpha": 2.0}),
    "LaProp": ({"lr": 0.1, "eps": 1e-8}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "NAdamW": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "momentum_decay": 0.1}),
    "StableAdamW": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "Adan": ({"lr": 0.1}, {"betas": (0.9, 0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "Lamb": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "Lion": ({"lr": 0.1}, {"betas": (0.8, 0.95), "lr": 0.01, "weight_decay": 0.1}),
    "LookaheadAdam": ({"lr": 0.1}, {"betas": (0.8, 0.95), "k": 4, "alpha": 0.8, "lr": 0.01, "late_start": True}),
    "Ralamb": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "trust_denominator": "weights"}),
    "RangerLars": ({"lr": 0.1}, {"betas": (0.8, 0.95), "k": 4, "lr": 0.01, "trust_denominator": "weights"}),
    "Adafactor": (
        {"lr": 0.1},
        {"lr": None, "beta1": 0.5, "clip_threshold": 0.5, "weight_decay": 0.1, "factor": "last"},
    ),
    "Amos": ({"lr": 0.1}, {"lr": 0.01, "beta": 0.9, "scale": 0.5, "momentum": 0.5, "weight_decay": 0.01}),
    "Prodigy": ({"lr": 1.0}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "d_coef": 2.0}),
    "ScheduleFreeAdamW": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "warmup_steps": 5, "r": 1.0}),
    "ScheduleFreeRAdam": ({"lr": 0.1}, {"betas": (0.8, 0.95), "lr": 0.01, "silent_sgd_phase": False}),
    "ScheduleFreeSGD": ({"lr": 0.1}, {"momentum": 0.5, "lr": 0.01, "warmup_steps": 5, "weight_decay": 0.1}),
    "SM3": ({"lr": 0.1}, {"momentum": 0.5, "beta": 0.9, "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "MADGRAD": ({"lr": 0.1}, {"momentum": 0.5, "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "MirrorMADGRAD": ({"lr": 0.1}, {"momentum": 0.5, "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "NovoGrad": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1}),
    "PNM": ({"lr": 0.1}, {"momentum": 0.5, "beta0": 0.5, "lr": 0.01, "weight_decay": 0.1}),
    "AdaPNM": ({"lr": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1, "amsgrad": False}),
    "Ranger": ({"lr": 0.1}, {"betas": (0.8, 0.95), "k": 4, "alpha": 0.8, "lr": 0.01, "weight_decay": 0.1}),
    "Ranger21": (
        {"lr": 0.1},
        {"betas": (0.8, 0.95), "k": 4, "eps": 1e-3, "lr": 0.01, "weight_decay": 0.1, "pnm": False},
    ),
    "RangerAdaBelief": ({"lr": 0.1}, {"betas": (0.8, 0.95), "k": 4, "alpha": 0.8, "lr": 0.01, "use_gc": False}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_two_groups_keep_their_own_numbers(name: str, engine: str) -> None:
    """Other lr, betas and decay in each group: several published codes share RAdam's table between groups."""
    first, second = TWO_GROUPS[name]
    problem = gappy(engine)
    half = len(problem.weights) // 2

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": params[:half], **first}, {"params": params[half:], **second}]
        return getattr(piste, name)(groups, engine=engine)

    each = [first if i < half else second for i in range(len(problem.weights))]
    assert_same(by_optimizer(make, problem), by_formula(FORMULAS[name], problem, each), RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("limit", [0.5, 1e3], ids=["bites", "slack"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_clip_norm_is_clip_grad_norm(name: str, limit: float, engine: str) -> None:
    """The joint norm of all groups, before L2 and centralization, like torch's function called before the step."""
    shared = {"lr": 0.05, "weight_decay": 0.1}
    problem = gappy(engine)

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
        return getattr(piste, name)(groups, engine=engine, clip_norm=limit, **shared)

    each = [shared | {"clip_norm": limit} | ({} if i < 2 else {"lr": 0.01}) for i in range(len(problem.weights))]
    assert_same(by_optimizer(make, problem), by_formula(FORMULAS[name], problem, each), RTOL, ATOL)


def _swing(name: str, step: int) -> Hyperparameters:
    """Every number of the group moves at every step, as under one-cycle with extras."""
    swing = 1.0 + 0.5 * np.sin(step + 1.0)
    numbers: Hyperparameters = {"lr": 0.02 * swing, "weight_decay": 0.1 * swing}
    others = {
        "momentum": 0.9 - 0.1 * swing,
        "betas": (0.95 - 0.1 * swing, 0.999 - 1e-4 * swing),
        "eps": 1e-4 * swing,
        "beta0": swing,
    }
    if name in ("Adan", "AdEMAMix"):
        others["betas"] = (0.98 - 0.1 * swing, 0.92 - 0.1 * swing, 0.99 - 1e-3 * swing)
    known = inspect.signature(getattr(piste, name)).parameters
    return numbers | {key: value for key, value in others.items() if key in known}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_hyperparameters_may_change_at_every_step(name: str, engine: str) -> None:
    def change(step: int) -> Hyperparameters:
        return _swing(name, step)

    start, problem = change(0), gappy(engine)
    actual = by_optimizer(lambda p: getattr(piste, name)(p, engine=engine, **start), problem, change=change)
    assert_same(actual, by_formula(FORMULAS[name], problem, start, change=change), RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_momentum_may_begin_later(name: str, engine: str) -> None:
    """A schedule may raise momentum from 0: the buffer starts at that step as it would have at the first."""

    def change(step: int) -> Hyperparameters:
        return {"momentum": 0.0 if step < 3 else 0.9}

    actual = by_optimizer(lambda p: getattr(piste, name)(p, engine=engine, lr=0.1), GAPPY, change=change)
    assert_same(actual, by_formula(FORMULAS[name], GAPPY, {"lr": 0.1}, change=change), RTOL, ATOL)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_zero_gradients_show_the_decay_alone(name: str, weight_decay: float, engine: str) -> None:
    """Zero from the first step on: no NaN anywhere (0/0 in a rule), and no motion at all without decay."""
    weights = gappy(engine).weights
    problem = Problem(weights, [[np.zeros(w.shape) for w in weights] for _ in range(14)])
    alone = {"norm_loss": 0.0} if name == "Ranger21" else {}  # that one moves weights, too
    case = Case(name, {"lr": 0.05, "weight_decay": weight_decay} | alone)
    actual = trajectory(case, problem, engine)
    assert_same(actual, by_formula(FORMULAS[name], problem, case.ours), RTOL, ATOL)
    if not weight_decay:
        # A mixture of two equal numbers (Lookahead) may round, so one ulp each sync instead of equality.
        assert_same(actual[-1:], [problem.weights], rtol=5e-16, atol=0)


# --- the wrapper --------------------------------------------------------------------------------------------------

K, ALPHA = 6, 0.3


@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_lookahead_wraps_every_class(name: str, problem: Problem) -> None:
    """One count for the model, every weight synced (the authors' code), slow weights from before the first step."""
    case = Case(name, {"lr": 0.05})
    actual = by_optimizer(lambda p: piste.Lookahead(case.make(p, "auto"), k=K, alpha=ALPHA), problem)
    expected = by_formula(FORMULAS[name], problem, case.ours, lookahead={"k": K, "alpha": ALPHA})
    assert_same(actual, expected, RTOL, ATOL)


def test_lookahead_wraps_torchs_own() -> None:
    def inner(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.05)

    actual = by_optimizer(lambda p: piste.Lookahead(inner(p), k=K, alpha=ALPHA), DENSE)
    expected = by_formula(formulas.adam, DENSE, {"lr": 0.05}, lookahead={"k": K, "alpha": ALPHA})
    assert_same(actual, expected, RTOL, ATOL)
    assert_same(actual, by_optimizer(lambda p: live.eager_lookahead(inner(p), k=K, alpha=ALPHA), DENSE), RTOL, ATOL)


def test_lookahead_differs_from_timms_by_its_start_alone() -> None:
    """timm makes its slow weights at the first sync, out of weights that have moved: that sync changes nothing there.

    Give timm the initial weights beforehand and the two are the same; leave it alone and they part at step k.
    """

    def momentum(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def seeded(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = momentum(params)
        for p in params:
            optimizer.state[p]["lookahead_slow_buff"] = p.detach().clone()
        return live.lazy_lookahead(optimizer, k=K, alpha=ALPHA)

    ours = by_optimizer(lambda p: piste.Lookahead(momentum(p), k=K, alpha=ALPHA), DENSE)
    lazy = by_optimizer(lambda p: live.lazy_lookahead(momentum(p), k=K, alpha=ALPHA), DENSE)
    plain = by_optimizer(momentum, DENSE)
    assert_same(ours, by_optimizer(seeded, DENSE), RTOL, ATOL)
    assert_same(ours[: K - 1], lazy[: K - 1], RTOL, ATOL)
    assert_same(lazy[:K], plain[:K], RTOL, ATOL)
    for a, b in zip(ours[K - 1], lazy[K - 1], strict=True):
        assert np.abs(a - b).max() > 1e-3  # 70 % of six steps of about 0.05: far above rounding


def test_ranger_is_radam_with_wrapped_lookahead() -> None:
    """Two routes to one algorithm, where every weight has every gradient: integrated and wrapped Lookahead agree."""
    shared = {"lr": 0.05, "betas": (0.95, 0.999), "eps": 1e-5, "weight_decay": 0.3, "use_gc": True}
    integrated = by_optimizer(lambda p: piste.Ranger(p, k=K, alpha=ALPHA, **shared), DENSE)
    radam = {"decoupled_weight_decay": True} | shared
    wrapped = by_optimizer(lambda p: piste.Lookahead(piste.RAdam(p, **radam), k=K, alpha=ALPHA), DENSE)
    assert_same(integrated, wrapped, RTOL, ATOL)


# --- figures and defaults -----------------------------------------------------------------------------------------

# Printed in the reference sheet (section 23): two weights at one, torch.manual_seed(3), g = torch.randn(2) each step,
# lr 1e-2, eight steps. Ranger there is lessw2020's, whose decay is 0. Five or six digits are printed, so half of the
# last printed digit is the tolerance.
PRINTED = [
    ("RAdam", {}, (0.98313, 1.00751), 5e-6),
    ("AdaBelief", {"eps": 1e-8, "rectify": False}, (0.970249, 0.992692), 5e-7),
    ("AdaBelief", {"eps": 1e-16, "rectify": True}, (0.983136, 1.007481), 5e-7),
    ("Ranger", {"weight_decay": 0.0}, (0.991188, 1.003748), 5e-7),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "settings_", "figures", "digit"), PRINTED)
def test_printed_figures(
    name: str, settings_: Hyperparameters, figures: tuple[float, float], digit: float, engine: str
) -> None:
    """In float32, as printed: the sum of eight float32 roundings near one (6e-8 each) is added to the tolerance."""
    torch.manual_seed(3)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(piste, name)([p], lr=1e-2, engine=engine, **settings_)
    for _ in range(8):
        p.grad = torch.randn(2)
        optimizer.step()
    np.testing.assert_allclose(snapshot([p])[0], figures, rtol=0, atol=digit + 5e-7)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_defaults_are_the_documented_ones(name: str) -> None:
    """The signature, against the defaults typed with the formula; options common to all classes are not in it."""
    cls = getattr(piste, name)
    ours = {k: v.default for k, v in inspect.signature(cls).parameters.items()}
    formula = formulas.adam if name == "AdamW" else FORMULAS[name]
    typed = {k: v.default for k, v in inspect.signature(formula).parameters.items() if v.kind is v.KEYWORD_ONLY}
    if name == "AdamW":
        typed |= {"weight_decay": 1e-2, "decoupled_weight_decay": True}
    common = {"decoupled_weight_decay", "use_gc", "gc_conv_only"} - set(ours)
    assert {k: v for k, v in ours.items() if k in typed} == {k: v for k, v in typed.items() if k not in common}
    group = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {k: group[k] for k in common} == {k: typed[k] for k in common}


# --- drawn problems -----------------------------------------------------------------------------------------------

rates = st.floats(1e-3, 0.2)
decays = st.sampled_from([0.0, 0.05, 0.3])
epsilons = st.sampled_from([1e-10, 1e-6, 1e-3])
betas = st.tuples(st.floats(0.5, 0.97), st.floats(0.5, 0.9995))
flags = st.booleans()
warm_ups = st.sampled_from([None, 1, 4])
denominators = st.sampled_from(["update", "weights"])
bounds = st.sampled_from([None, 0.5, 10.0])

COMMON = {"lr": rates, "weight_decay": decays, "decoupled_weight_decay": flags, "use_gc": flags, "gc_conv_only": flags}
LOOKAHEAD = {"k": st.integers(1, 5), "alpha": st.floats(0.1, 1.0), "gc_loc": flags}
DRAWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SGD": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "dampening": st.sampled_from([0.0, 0.4])},
    "RMSprop": {
        "alpha": st.floats(0.5, 0.99),
        "eps": epsilons,
        "momentum": st.sampled_from([0.0, 0.9]),
        "centered": flags,
        "tf": flags,
        "lr_in_momentum": flags,
    },
    "Adam": {"betas": betas, "eps": epsilons, "amsgrad": flags},
    "AdamW": {"betas": betas, "eps": epsilons, "amsgrad": flags},
    "RAdam": {"betas": betas, "eps": epsilons, "degenerated_to_sgd": flags},
    "AdaBelief": {
        "betas": betas,
        "eps": epsilons,
        "amsgrad": flags,
        "rectify": flags,
        "degenerated_to_sgd": flags,
        "fixed_decay": flags,
    },
    "Adan": {
        "betas": st.tuples(st.floats(0.5, 0.97), st.floats(0.1, 0.97), st.floats(0.5, 0.999)),
        "eps": epsilons,
        "no_prox": flags,
    },
    "Lamb": {
        "betas": betas,
        "eps": epsilons,
        "bias_correction": flags,
        "always_adapt": flags,
        "trust_clip": flags,
        "max_weight_norm": st.sampled_from([None, 0.5, 10.0]),
    },
    "ADOPT": {"betas": betas, "eps": epsilons, "clip_exponent": st.floats(0.1, 0.5)},
    "AdEMAMix": {
        "betas": st.tuples(st.floats(0.5, 0.97), st.floats(0.5, 0.999), st.floats(0.9, 0.9999)),
        "eps": epsilons,
        "alpha": st.floats(0.0, 10.0),
        "warmup_steps": st.sampled_from([None, 1, 5, 100]),
    },
    "LaProp": {"betas": betas, "eps": epsilons},
    "NAdamW": {"betas": betas, "eps": epsilons, "momentum_decay": st.floats(0.0, 0.5)},
    "StableAdamW": {"betas": betas, "eps": epsilons},
    "Lion": {"betas": betas},
    "LookaheadAdam": {
        "betas": betas,
        "eps": epsilons,
        "amsgrad": flags,
        "k": st.integers(1, 5),
        "alpha": st.floats(0.1, 1.0),
        "late_start": flags,
    },
    "Ralamb": {"betas": betas, "eps": epsilons, "trust_denominator": denominators, "max_weight_norm": bounds},
    "RangerLars": {
        "betas": betas,
        "eps": epsilons,
        "trust_denominator": denominators,
        "max_weight_norm": bounds,
        "k": st.integers(1, 5),
        "alpha": st.floats(0.1, 1.0),
        "late_start": flags,
    },
    "Adafactor": {
        "clip_threshold": st.sampled_from([0.5, 1.0]),
        "decay_rate": st.floats(-1.0, -0.3),
        "beta1": st.sampled_from([None, 0.0, 0.9]),
        "scale_parameter": flags,
        "factor": st.sampled_from(["matrix", "last"]),
    },
    "Amos": {
        "beta": st.floats(0.5, 0.9995),
        "scale": st.floats(0.1, 2.0),
        "momentum": st.sampled_from([0.0, 0.9]),
        "clip_value": st.sampled_from([None, 0.5]),
        "transposed": flags,
    },
    "Prodigy": {
        "lr": st.floats(0.1, 2.0),
        "betas": betas,
        "eps": epsilons,
        "beta3": st.sampled_from([None, 0.9]),
        "bias_correction": flags,
        "safeguard_warmup": flags,
        "d0": st.sampled_from([1e-6, 1e-3]),
        "growth_rate": st.sampled_from([1.5, float("inf")]),
    },
    "ScheduleFreeAdamW": {"betas": betas, "eps": epsilons, "r": st.floats(0.0, 2.0), "warmup_steps": warm_ups},
    "ScheduleFreeRAdam": {"betas": betas, "eps": epsilons, "r": st.floats(0.0, 2.0), "silent_sgd_phase": flags},
    "ScheduleFreeSGD": {"momentum": st.floats(0.1, 0.95), "warmup_steps": warm_ups, "weight_lr_power": st.floats(0, 3)},
    "SM3": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "beta": st.sampled_from([0.0, 0.9, 1.0]), "eps": epsilons},
    "MADGRAD": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "eps": epsilons},
    "MirrorMADGRAD": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "eps": epsilons},
    "NovoGrad": {"betas": betas, "eps": epsilons, "amsgrad": flags, "grad_averaging": flags},
    "PNM": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "beta0": st.floats(0.0, 2.0)},
    "AdaPNM": {"betas": betas, "eps": epsilons, "amsgrad": flags, "beta0": st.floats(0.0, 2.0)},
    "Ranger": {"betas": betas, "eps": epsilons, **LOOKAHEAD},
    "Ranger21": {
        "betas": betas,
        "eps": epsilons,
        "k": st.integers(1, 5),
        "alpha": st.floats(0.1, 1.0),
        "beta0": st.floats(0.0, 2.0),
        "norm_loss": st.sampled_from([0.0, 1e-4, 0.1]),
        "agc_clip": st.sampled_from([1e-2, 1.0]),
        "total_steps": st.sampled_from([None, 4, 9]),
        "warmup_steps": st.sampled_from([None, 1, 3]),
        "momentum": st.sampled_from([0.0, 0.9]),
        **dict.fromkeys(("use_agc", "normalize", "pnm", "amsgrad", "softplus", "stable_decay", "lookahead"), flags),
        **dict.fromkeys(("use_warmup", "use_warmdown", "use_madgrad"), flags),
    },
    "RangerAdaBelief": {"betas": betas, "eps": epsilons, **LOOKAHEAD},
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One to three weights of rank 0 to 4, up to nine steps, any pattern of missing gradients, six decades of scale."""
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1, max_size=3))
    steps = draw(st.integers(1, 9))
    cells = [(step, i) for step in range(steps) for i in range(len(shapes))]
    missing = draw(st.lists(st.sampled_from(cells), unique=True, max_size=len(cells)))
    problem = random_problem(shapes, steps, draw(st.integers(0, 10_000)), missing)
    scale = 10.0 ** draw(st.integers(-3, 3))
    return Problem(problem.weights, [[None if g is None else scale * g for g in row] for row in problem.gradients])


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=25)
@given(data=st.data())
def test_any_problem_any_numbers(name: str, data: st.DataObject) -> None:
    """The engines against the formula on whatever Hypothesis draws; one problem in four goes to the cpp engine as well.

    Nearly every one is a kernel of its own, which takes longer to compile than all else here. It is written from the
    same plan, and the options that are drawn stand one by one, with every rank, in the cases above.

    1e-9 instead of 1e-12: centred RMSprop and AdaBelief subtract nearly equal numbers, and drawn scales let such a
    cancellation cost three digits. The absolute part follows the size of the numbers for the same reason.
    """
    problem = data.draw(problems())
    numbers = data.draw(st.fixed_dictionaries(COMMON | DRAWN[name]))
    expected = by_formula(FORMULAS[name], problem, numbers)
    size = max(float(np.abs(w).max()) for row in expected for w in row)
    built = data.draw(st.sampled_from([True, False, False, False]))
    for engine in ENGINES if built else ENGINES[:2]:
        actual = by_optimizer(lambda p, engine=engine: getattr(piste, name)(p, engine=engine, **numbers), problem)
        assert_same(actual, expected, rtol=1e-9, atol=1e-11 * max(size, 1.0))


def test_the_harness_hands_out_copies() -> None:
    """Guards the harness itself: gradients handed to two runs are copies, so neither can disturb the other."""
    params = parameters(DENSE)
    set_gradients(params, DENSE.gradients[0])
    first = DENSE.gradients[0][1]
    assert first is not None
    before = first.copy()
    assert params[1].grad is not None
    params[1].grad.mul_(2.0)
    np.testing.assert_array_equal(first, before)


# --- Adan's own ---------------------------------------------------------------------------------------------------


def test_adan_takes_betas_in_either_convention() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    paper = piste.Adan([p], betas=(0.02, 0.08, 0.01), betas_convention="paper")
    assert paper.param_groups[0]["betas"] == (0.98, 0.92, 0.99)
    with pytest.raises(ValueError, match=r"legal: betas=\(0.98, 0.92, 0.99\), .* or betas_convention='paper'"):
        piste.Adan([p], betas=(0.02, 0.08, 0.01))
    with pytest.raises(ValueError, match="three numbers"):
        piste.Adan([p], betas=(0.9, 0.99))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'code', 'paper'"):
        piste.Adan([p], betas_convention="optax")
    with pytest.raises(ValueError, match="two numbers"):
        piste.AdamW([p], betas=(0.9, 0.9, 0.9))  # type: ignore[arg-type]


def test_adan_restarts_as_if_it_had_just_begun() -> None:
    params = parameters(DENSE)
    optimizer = piste.Adan(params, lr=0.02, weight_decay=0.1)
    for row in DENSE.gradients[:5]:
        set_gradients(params, row)
        optimizer.step()
    optimizer.restart()
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    anew = piste.Adan(fresh, lr=0.02, weight_decay=0.1)
    for row in DENSE.gradients[5:9]:
        for weights, one in ((params, optimizer), (fresh, anew)):
            set_gradients(weights, row)
            one.step()
    for a, b in zip(params, fresh, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["MADGRAD", "MirrorMADGRAD"])
def test_rules_without_a_direction_refuse_to_centralize_one(name: str) -> None:
    with pytest.raises(ValueError, match="gc_loc=False; legal: True"):
        getattr(piste, name)([torch.nn.Parameter(torch.ones(2))], use_gc=True, gc_loc=False)


# --- Adafactor's and Amos's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings_", [{}, {"clip_threshold": 1.2}, {"decay_rate": -0.5}], ids=str)
def test_adafactor_follows_torch_with_relative_steps(settings_: Hyperparameters, engine: str) -> None:
    """torch clamps by its first eps where the paper adds it: at 1e-30 that is nothing."""
    names = {"clip_threshold": "d", "decay_rate": "beta2_decay"}
    theirs = {names[key]: value for key, value in settings_.items()} | {"lr": 1e-2, "eps": (1e-30, 1e-3)}
    expected = by_optimizer(lambda p: torch.optim.Adafactor(p, foreach=False, **theirs), DENSE)
    actual = by_optimizer(lambda p: piste.Adafactor(p, factor="last", engine=engine, **settings_), DENSE)
    assert_same(actual, expected, RTOL, ATOL)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"lr": 0.1, "relative_step": True}, "relative_step=True with lr=0.1"),
        ({"relative_step": False}, "relative_step=False with lr=None"),
        ({"lr": 0.1, "warmup_init": True}, "warmup_init=True with lr=0.1"),
    ],
    ids=str,
)
def test_adafactor_refuses_two_rates(settings_: Hyperparameters, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        piste.Adafactor([torch.nn.Parameter(torch.ones(2))], **settings_)


@pytest.mark.parametrize(
    ("name", "settings_", "shape", "numbers"),
    [
        ("Adafactor", {}, (64, 32), 64 + 32),
        ("Adafactor", {}, (64, 32, 3, 3), 64 + 32 * 9),
        ("Adafactor", {"factor": "last"}, (64, 32, 3, 3), 2 * 64 * 32 * 3),
        ("Adafactor", {"lr": 0.1, "beta1": 0.9}, (64, 32), 64 * 32 + 64 + 32),
        ("Adafactor", {}, (64,), 64),
        ("Amos", {}, (64, 32, 3, 3), 64 + 64),
        ("Amos", {"transposed": True}, (64, 32, 3, 3), 32 + 32),
        ("Amos", {"momentum": 0.9}, (64, 32), 64 * 32 + 64 + 64),
        ("Amos", {}, (64,), 2),
        ("SM3", {"momentum": 0.0}, (64, 32, 3, 3), 64 + 32 + 3 + 3),
    ],
)
def test_numbers_kept(name: str, settings_: Hyperparameters, shape: tuple[int, ...], numbers: int) -> None:
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = getattr(piste, name)([p], **settings_)
    for _ in range(2):
        p.grad = torch.randn(shape)
        optimizer.step()
    assert sum(x.numel() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) == numbers


def test_amos_takes_scales_and_layouts_from_the_model() -> None:
    """The authors' table: norm scales 1, vectors 0.5, embeddings sqrt(2 / width), others by their fan-in."""
    nn = torch.nn
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(9, 8),
            "norm": nn.LayerNorm(8),
            "mlp": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 4)),
            "conv": nn.Conv2d(6, 10, 3, groups=2),
            "up": nn.ConvTranspose2d(6, 10, 3, groups=2),
        }
    )
    for optimizer in (piste.create("amos", model), piste.Amos(piste.Amos.groups(model))):
        groups = optimizer.param_groups
        scales = {name: group["scale"] for group in groups for name in group["param_names"]}
        assert scales == {
            "table.weight": 0.5,
            "norm.weight": 1.0,
            **dict.fromkeys(("norm.bias", "mlp.0.bias", "mlp.3.bias", "conv.bias", "up.bias"), 0.5),
            "mlp.0.weight": np.sqrt(1 / 8),
            "mlp.3.weight": np.sqrt(2 / 16),
            "conv.weight": np.sqrt(1 / 27),
            "up.weight": np.sqrt(1 / 27),
        }
        turned = {name: group["transposed"] for group in groups for name in group["param_names"]}
        assert {name for name, is_turned in turned.items() if is_turned} == {"up.weight"}
    fixed = piste.create("amos", model, scale=0.1)
    assert {group["scale"] for group in fixed.param_groups} == {0.1}


# --- what every class does ----------------------------------------------------------------------------------------

ROWS_AND_COLUMNS = 4 * (256 + 256) / 256**2  # bytes a weight, on the matrix that is measured

STATE_BYTES = {
    "AdaPNM": 16,
    "ADOPT": 8,
    "AdEMAMix": 12,
    "Adan": 16,
    "LaProp": 8,
    "NAdamW": 8,
    "StableAdamW": 8,
    "Lamb": 8,
    "Lion": 4,
    "LookaheadAdam": 12,
    "Ralamb": 8,
    "Ranger21": 20,
    "RangerLars": 12,
    "Adafactor": ROWS_AND_COLUMNS,
    "Amos": 4 + ROWS_AND_COLUMNS,
    "Prodigy": 16,
    "ScheduleFreeAdamW": 8,
    "ScheduleFreeRAdam": 8,
    "ScheduleFreeSGD": 4,
    "SM3": 4 + ROWS_AND_COLUMNS,
    "MADGRAD": 12,
    "MirrorMADGRAD": 8,
    "NovoGrad": 4,
    "PNM": 8,
}


@pytest.mark.parametrize("name", STATE_BYTES)
def test_state_bytes(name: str) -> None:
    """As in the papers' tables; a number per tensor is a ten-thousandth of a byte per weight here."""
    assert piste.state_bytes(name) == pytest.approx(STATE_BYTES[name], abs=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_learning_rate_zero_moves_nothing(name: str, engine: str) -> None:
    """Decay rests with it (Amos's own is per step), and a mixture of two equal numbers may round."""
    decay = {} if name == "Amos" else {"weight_decay": 0.3}
    actual = by_optimizer(lambda p: getattr(piste, name)(p, lr=0.0, engine=engine, **decay), DENSE)
    assert_same(actual[-1:], [DENSE.weights], rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_solves_a_convex_problem(name: str) -> None:
    """A random strongly convex quadratic falls by 1e6 under a learning rate that decays to zero.

    That is a property of the rule, on the engine that a user gets; engines are held to each other step by step above.
    """
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    curvature, best = a @ a.T / 20 + torch.eye(20, dtype=torch.float64), torch.randn(20, generator=generator).double()
    p = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    start = {
        "PNM": 0.3,
        "SGD": 0.3,
        "NovoGrad": 0.05,
        "Lamb": 0.1,
        "SM3": 0.5,
        "Prodigy": 1.0,
        "ScheduleFreeSGD": 0.3,
        "ScheduleFreeRAdam": 0.5,
        "MADGRAD": 0.3,
        "MirrorMADGRAD": 0.1,
    }.get(name, 0.1)
    # its slow average would go on for ten thousand steps
    extra = {"betas": (0.9, 0.999, 0.99), "alpha": 1.0} if name == "AdEMAMix" else {}
    optimizer = getattr(piste, name)([p], lr=start, weight_decay=0.0, **extra)
    losses = []
    steps = 1500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = start * (1 - step / steps) ** 2
        apart = p.detach() - best
        p.grad = curvature @ apart
        losses.append(0.5 * apart @ p.grad)
        optimizer.step()
    assert losses[-1] < 1e-6 * losses[0]
