"""The typed formulas against other people's code: what makes `oracles.formulas` worth comparing with.

No name of piste appears in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import formulas, live
from oracles.replay import GAPS, SHAPES, Problem, assert_same, by_formula, by_optimizer, random_problem
from oracles.table import FORMULAS

# Both sides do the same float64 arithmetic in another order. Fourteen steps of a few operations each leave some tens
# of ulps (1e-16 each); 1e-12 is a hundred times that and still a thousandth of the smallest real difference here
# (an eps of 1e-8 at the wrong side of a root moves weights by more than 1e-9).
RTOL, ATOL = 1e-12, 1e-13

DENSE = random_problem(seed=1)
GAPPY = random_problem(seed=2, missing=GAPS)

# name of a formula, its settings, the oracle's constructor, the oracle's settings
Case = tuple[str, dict[str, Any], Callable[..., torch.optim.Optimizer], dict[str, Any]]


def same(name: str, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Case:
    return name, settings, make, settings


def torch_cases() -> list[Case]:
    optim = torch.optim
    return [
        same("SGD", optim.SGD, lr=0.1),
        same("SGD", optim.SGD, lr=0.1, weight_decay=0.05),
        same("SGD", optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05),
        same("SGD", optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        same("SGD", optim.SGD, lr=0.1, momentum=0.9, maximize=True, weight_decay=0.05),
        same("RMSprop", optim.RMSprop),
        same("RMSprop", optim.RMSprop, momentum=0.9, centered=True, weight_decay=0.05, alpha=0.9),
        same("RMSprop", optim.RMSprop, eps=1e-2, centered=True, maximize=True, weight_decay=0.05),
        same("Adam", optim.Adam, lr=0.02),
        same("Adam", optim.Adam, lr=0.02, eps=1e-2, weight_decay=0.05, betas=(0.8, 0.99)),
        same("Adam", optim.Adam, lr=0.02, amsgrad=True, betas=(0.8, 0.5)),
        same("AdamW", optim.AdamW, lr=0.02, weight_decay=0.3, amsgrad=True, betas=(0.8, 0.5)),
        same("AdamW", optim.AdamW, lr=0.02),
        same("RAdam", optim.RAdam, lr=0.02, eps=1e-2),
        same("RAdam", optim.RAdam, lr=0.02, weight_decay=0.3),
        same("RAdam", optim.RAdam, lr=0.02, weight_decay=0.3, decoupled_weight_decay=True, betas=(0.8, 0.95)),
    ]


def timm_cases() -> list[Case]:
    plain = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3}
    return [
        (
            "RMSprop",
            plain | {"tf": True, "momentum": m, "centered": c} | ours,
            live.rmsprop_tf,
            plain | {"momentum": m, "centered": c} | theirs,
        )
        for m, c, ours, theirs in [
            (0.0, False, {}, {}),
            (0.9, False, {"weight_decay": 0.05}, {"weight_decay": 0.05}),
            (0.9, True, {"lr_in_momentum": False}, {"lr_in_momentum": False}),
            (
                0.0,
                True,
                {"weight_decay": 0.3, "decoupled_weight_decay": True},
                {"weight_decay": 0.3, "decoupled_decay": True},
            ),
            (
                0.9,
                True,
                {"weight_decay": 0.3, "decoupled_weight_decay": True},
                {"weight_decay": 0.3, "decoupled_decay": True},
            ),
        ]
    ]


def adabelief_cases() -> list[Case]:
    cases = []
    for rectify in (True, False):
        for decoupled in (True, False):
            for extra in (
                {},
                {"eps": 1e-8},
                {"eps": 1e-4, "amsgrad": True, "betas": (0.8, 0.95)},
                {"degenerated_to_sgd": False},
                {"fixed_decay": True},
            ):
                shared = {"lr": 0.02, "weight_decay": 0.05, "rectify": rectify} | extra
                cases.append(
                    (
                        "AdaBelief",
                        shared | {"decoupled_weight_decay": decoupled},
                        live.adabelief,
                        shared | {"weight_decouple": decoupled},
                    )
                )
    return cases


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-" + "-".join(f"{k}={v}" for k, v in case[1].items())) for case in cases]


def averaged_cases() -> list[Case]:
    """timm's MADGRAD and NvNovoGrad."""
    decayed = {"lr": 0.02, "weight_decay": 0.3}
    return [
        same("MADGRAD", live.madgrad, lr=0.05),
        same("MADGRAD", live.madgrad, eps=1e-3, momentum=0.5, **decayed),
        same("NovoGrad", live.novograd, lr=0.02),
        same("NovoGrad", live.novograd, amsgrad=True, grad_averaging=True, **decayed),
        same("NovoGrad", live.novograd, betas=(0.9, 0.0), eps=1e-2, **decayed),
        (
            "NovoGrad",
            decayed | {"decoupled_weight_decay": True},
            live.novograd,
            decayed | {"decoupled_decay": True},
        ),
    ]


@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
@pytest.mark.parametrize(
    ("name", "settings", "make", "theirs"),
    named(torch_cases() + timm_cases() + adabelief_cases() + averaged_cases()),
)
def test_formula_is_the_oracle(
    name: str,
    settings: dict[str, Any],
    make: Callable[..., torch.optim.Optimizer],
    theirs: dict[str, Any],
    problem: Problem,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = by_optimizer(lambda params: make(params, **theirs), problem)
    assert_same(by_formula(FORMULAS[name], problem, settings), expected, RTOL, ATOL)


@pytest.mark.parametrize(
    ("name", "settings", "make", "theirs"),
    named(
        [
            same("Lamb", live.lamb, lr=0.02, weight_decay=0.0, always_adapt=True),
            same("Lamb", live.lamb, lr=0.02, weight_decay=0.0, always_adapt=False),
            same("Lamb", live.lamb, lr=0.02, weight_decay=0.3, trust_clip=True),
            same("Lamb", live.lamb, lr=0.02, weight_decay=0.3, bias_correction=False, eps=1e-2, betas=(0.8, 0.95)),
            same("Adan", live.adan, lr=0.02),
            same("Adan", live.adan, lr=0.02, weight_decay=0.3, eps=1e-2),
            same("Adan", live.adan, lr=0.02, weight_decay=0.3, no_prox=True, betas=(0.9, 0.8, 0.95)),
            same("Lion", live.lion, lr=0.02, weight_decay=0.3),
            same("LaProp", live.laprop, lr=0.02, eps=1e-8),
            same("ADOPT", live.adopt, lr=0.02),
            (
                "ADOPT",
                {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95)},
                live.adopt,
                {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "decoupled": True},
            ),
            same("NAdamW", live.nadam, lr=0.02, weight_decay=0.3, decoupled_weight_decay=True),
            (
                "NAdamW",
                {"lr": 0.02, "weight_decay": 0.3, "momentum_decay": 0.1, "eps": 1e-2, "decoupled_weight_decay": False},
                live.nadam,
                {"lr": 0.02, "weight_decay": 0.3, "momentum_decay": 0.1, "eps": 1e-2},
            ),
            same("StableAdamW", live.stable_adamw, lr=0.02, weight_decay=0.3),
            same("StableAdamW", live.stable_adamw, lr=0.02, weight_decay=0.0, betas=(0.8, 0.5), eps=1e-3),
            (
                "AdEMAMix",
                {"lr": 0.02, "weight_decay": 0.3, "warmup_steps": 9, "alpha": 3.0, "betas": (0.8, 0.95, 0.99)},
                live.ademamix,
                {
                    "lr": 0.02,
                    "weight_decay": 0.3,
                    "weight_decouple": True,
                    "t_alpha_beta3": 9,
                    "alpha": 3.0,
                    "betas": (0.8, 0.95, 0.99),
                },
            ),
        ]
    ),
)
def test_formula_is_timms_where_every_weight_steps(
    name: str,
    settings: dict[str, Any],
    make: Callable[..., torch.optim.Optimizer],
    theirs: dict[str, Any],
) -> None:
    expected = by_optimizer(lambda params: make(params, **theirs), DENSE)
    assert_same(by_formula(FORMULAS[name], DENSE, settings), expected, RTOL, ATOL)


@pytest.mark.parametrize("decoupled", [False, True])
def test_positive_negative_momentum_is_pytorch_optimizers(decoupled: bool) -> None:
    """Dense only, see `live`. Its `betas` hold beta0 as the last one."""
    decayed = {"weight_decay": 0.3, "weight_decouple": decoupled}
    ours = {"weight_decay": 0.3, "decoupled_weight_decay": decoupled}
    expected = by_optimizer(lambda p: live.positive_negative(p, lr=0.1, betas=(0.8, 0.5), **decayed), DENSE)
    actual = by_formula(FORMULAS["PNM"], DENSE, {"lr": 0.1, "momentum": 0.8, "beta0": 0.5} | ours)
    assert_same(actual, expected, RTOL, ATOL)
    # eps is 0: the package divides it by the bias correction too, the authors add it after that
    theirs = {"lr": 0.02, "betas": (0.8, 0.5, 0.7), "eps": 0.0} | decayed
    expected = by_optimizer(lambda p: live.adaptive_positive_negative(p, **theirs), DENSE)
    numbers = {"lr": 0.02, "betas": (0.8, 0.5), "beta0": 0.7, "eps": 0.0} | ours
    # and it adds 1e-15 under the root, which moves small gradients in the tenth digit
    assert_same(by_formula(FORMULAS["AdaPNM"], DENSE, numbers), expected, 1e-9, 1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eps": 1e-8, "gc_conv_only": True},
        {"use_gc": False, "k": 4, "alpha": 0.8},
        {"betas": (0.9, 0.99), "eps": 1e-16},
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", [DENSE, GAPPY], ids=["dense", "gaps"])
def test_ranger_adabelief_without_decay_is_the_package(settings: dict[str, Any], problem: Problem) -> None:
    """Without decay the package's alias (see below) never writes anything, so all steps compare."""
    ours = {"lr": 0.05, "eps": 1e-5, "weight_decay": 0.0} | settings
    expected = by_optimizer(lambda params: live.ranger_adabelief(params, **ours), problem)
    assert_same(by_formula(formulas.ranger_adabelief, problem, ours), expected, RTOL, ATOL)


@pytest.mark.parametrize("gc_loc", [True, False])
def test_ranger_adabelief_with_decay_is_the_package_once_rectified(gc_loc: bool) -> None:
    """The package writes decay (and the second GC placement) into the momentum buffer while the average is short.

    Steps 1 to 5 therefore run without both; from step 6 on, decay and centralization of the direction are compared.
    """
    ours = {"lr": 0.05, "eps": 1e-8, "gc_loc": gc_loc}

    def change(step: int) -> dict[str, Any]:
        return {"weight_decay": 0.0 if step < 5 else 0.3, "use_gc": gc_loc or step >= 5}

    class Switched:
        """`use_gc` belongs to the whole optimizer in the package and to the group here."""

        def __init__(self, params: list[torch.nn.Parameter]) -> None:
            self.inner = live.ranger_adabelief(params, **ours)
            self.param_groups = self.inner.param_groups

        def step(self) -> None:
            self.inner.use_gc = self.param_groups[0]["use_gc"]
            self.inner.step()

    expected = by_optimizer(Switched, DENSE, change=change)  # type: ignore[arg-type]
    assert_same(by_formula(formulas.ranger_adabelief, DENSE, ours, change=change), expected, RTOL, ATOL)


def test_the_alias_of_the_package_is_real() -> None:
    """Why steps 1 to 5 cannot be compared with decay: a zero gradient leaves a momentum of wd * p in the package."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = live.ranger_adabelief([p], weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * before)


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.3}, {"gc_conv_only": True, "k": 5, "alpha": 0.8}, {"use_gc": False}], ids=str
)
def test_ranger_is_pytorch_optimizers(settings: dict[str, Any]) -> None:
    """pytorch_optimizer's fifth step sees 4.996 < 5 as lessw's strict test does; dense only (see `live.ranger`)."""
    ours = {"lr": 0.05, "weight_decay": 0.0} | settings
    expected = by_optimizer(lambda params: live.ranger(params, **ours), DENSE)
    assert_same(by_formula(formulas.ranger, DENSE, ours), expected, RTOL, ATOL)


def test_resting_radam_is_pytorch_optimizers() -> None:
    """No step *and no decay* while the average is short: the one place where the two could be told apart."""
    settings = {"lr": 0.05, "weight_decay": 0.3}
    ours = settings | {"degenerated_to_sgd": False, "decoupled_weight_decay": True}
    expected = by_optimizer(lambda params: live.resting_radam(params, **settings), DENSE)
    assert_same(expected[:5], [DENSE.weights] * 5, rtol=0, atol=0)
    assert_same(by_formula(formulas.radam, DENSE, ours), expected, RTOL, ATOL)


def test_outer_lookahead_is_pytorch_optimizers() -> None:
    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return live.eager_lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9), k=6, alpha=0.3)

    ours = by_formula(formulas.sgd, DENSE, {"lr": 0.1, "momentum": 0.9}, lookahead={"k": 6, "alpha": 0.3})
    assert_same(ours, by_optimizer(make, DENSE), RTOL, ATOL)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clip_coefficient_is_torchs(limit: float) -> None:
    gradients = [g for g in DENSE.gradients[0] if g is not None]
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_(params, limit)
    coefficient = formulas.clip_coefficient(gradients, limit)
    for p, g in zip(params, gradients, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), coefficient * g, rtol=1e-14, atol=0)


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.99, 0.999])
def test_rectification_begins_at_the_sixth_step(beta2: float) -> None:
    """The reference sheet's claim, on which 'strictly above' and 'at least' 5 are the same test."""
    assert formulas.rectification(beta2, 5)[0] < 5.0 < formulas.rectification(beta2, 6)[0]


def test_rectification_near_its_threshold() -> None:
    """rho_5 = 4.996 and r_5 = 0.0173 for beta2 = 0.999: figures printed in the reference sheet, to its digits."""
    rho, r = formulas.rectification(0.999, 5)
    assert rho == pytest.approx(4.996, abs=5e-4)
    assert r == pytest.approx(0.0173, abs=5e-5)


def test_centralized_leaves_vectors_and_zeroes_row_means() -> None:
    for name, shape in SHAPES.items():
        x = np.random.default_rng(0).normal(size=shape)
        wide, narrow = formulas.centralized(x), formulas.centralized(x, conv_only=True)
        rows = np.asarray(wide.reshape(shape[0], -1).mean(axis=1)) if wide.ndim > 1 else np.zeros(1)
        np.testing.assert_allclose(rows, 0.0, atol=1e-15, err_msg=name)
        assert (wide is x) == (x.ndim <= 1)
        assert (narrow is x) == (x.ndim <= 3)  # Conv1d weights, of rank 3, are not "conv" to the authors' code
