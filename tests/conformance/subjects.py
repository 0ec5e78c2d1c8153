"""The rows of the matrix: one record per optimizer of the registry, and one for each wrapper."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from oracles.formulas import Formula
from oracles.replay import GAPS, SHAPES, FormulaRun, Problem, random_problem, set_gradients
from oracles.table import FORMULAS

import piste
from piste.registry import OPTIMIZERS

# Fast engines are exercised on everything; the compiled one on little (see `matrix`).
ENGINES = ("reference", "foreach", "cpp")

PROBLEM = random_problem(seed=21, missing=GAPS)
DENSE = random_problem(seed=22)
# Two weights: one that centralization touches, one that it leaves alone.
SMALL = random_problem([SHAPES["linear"], SHAPES["vector"]], seed=23)
# The same two kinds, one of which begins late while the other rests once.
FEW = random_problem(
    [SHAPES["linear"], SHAPES["vector"]], seed=24, missing=(*((t, 1) for t in range(3)), *((t, 0) for t in (4, 5, 6)))
)

# What Triton's interpreter is given, which takes a call of Python for each operation of a kernel: past RAdam's switch,
# past a synchronisation of Lookahead, and on from where a saved state is loaded; one weight begins late.
BRIEF = random_problem([SHAPES["linear"], SHAPES["vector"]], steps=10, seed=25, missing=((0, 1), (1, 1)))

# Settings under which an optimizer keeps every state it can keep. A class that is not named here runs with defaults.
FULL_STATE: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05},
    "RMSprop": {"lr": 0.05, "momentum": 0.9, "centered": True, "weight_decay": 0.05},
    "Adam": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.05},
    "NovoGrad": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.05},
    "Adafactor": {"lr": 0.05, "beta1": 0.9, "weight_decay": 0.05},
    "Amos": {"lr": 0.05, "momentum": 0.9},
    # Longer axes than the other one has numbers would leave eigenvectors open, which everybody chooses otherwise; and
    # centralization leaves a direction without gradients, in which a small eps would divide nothing but rounding.
    "SOAP": {"lr": 0.05, "eps": 0.05, "every": 3, "max_size": 5, "weight_decay": 0.05},
    "Shampoo": {"lr": 0.05, "eps": 0.05, "every": 3, "start": 2, "block_size": 12, "weight_decay": 0.05},
    # Fewer updates than steps, from the third step on.
    "PSGDKron": {"lr": 0.05, "flat_start": 2, "probability_decay": 0.3, "least_probability": 0.4, "weight_decay": 0.05},
    "AdaBelief": {"lr": 0.05, "eps": 1e-8, "amsgrad": True, "rectify": False, "weight_decay": 0.05},
}
# Rules with norms of whole weights, besides centralization.
REDUCING = {
    "Adafactor",
    "Amos",
    "Lamb",
    "Muon",
    "NorMuon",
    "NovoGrad",
    "PSGDKron",
    "Prodigy",
    "Ralamb",
    "Ranger21",
    "RangerLars",
    "SM3",
    "SOAP",
    "Shampoo",
    "StableAdamW",
}
# Rules that multiply matrices: their cost grows with the cube of a side.
BY_MATRIX = {"Muon", "NorMuon", "PSGDKron", "SOAP", "Shampoo"}
# What lets weights see each other (besides clipping), switched off.
APART: dict[str, dict[str, Any]] = {"Ranger21": {"weight_decay": 0.0}}
WRAPPED = "Lookahead(AdamW)"
LOOKAHEAD = {"k": 6, "alpha": 0.5}
GRAFTED = "Graft(Adam, SGD)"
DIRECTION = {"lr": 0.5, "momentum": 0.9}


@dataclass(frozen=True)
class Subject:
    """An optimizer under test: its class, the settings it is tested with, and the formula that knows its numbers."""

    name: str
    cls: type[torch.optim.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    wrapped: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}{'-' + self.variant if self.variant else ''}"

    @property
    def centralizes(self) -> bool:
        return bool(self.make([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["use_gc"])

    @property
    def reduces(self) -> bool:
        """Does a step combine elements of a weight?"""
        return self.centralizes or self.name in REDUCING or self.name == GRAFTED

    @property
    def by_matrix(self) -> bool:
        """Does a step multiply matrices?"""
        return self.name in BY_MATRIX

    @property
    def apart(self) -> Subject:
        """The same with nothing that makes one weight's step depend on another weight."""
        return replace(self, settings=self.settings | APART.get(self.name, {}))

    @property
    def formula(self) -> Formula:
        return _grafted if self.name == GRAFTED else FORMULAS[self.cls.__name__]

    def make(self, params: Any, engine: str = "auto", **overrides: Any) -> torch.optim.Optimizer:
        settings = self.settings | overrides
        if self.name == GRAFTED:
            return _graft(params, engine, settings)
        optimizer = self.cls(params, engine=engine, **settings)  # type: ignore[call-arg]
        return piste.Lookahead(optimizer, **LOOKAHEAD) if self.wrapped else optimizer

    def expect(self, weights: Sequence[np.ndarray], each: Sequence[dict[str, Any]] | None = None) -> FormulaRun:
        """The formula over the same weights; `each` overrides settings weight by weight."""
        each = each or [{}] * len(weights)
        lookahead = LOOKAHEAD if self.name == WRAPPED else None
        return FormulaRun(self.formula, weights, [self.settings | own for own in each], lookahead)


def _subject(name: str, cls: type[torch.optim.Optimizer]) -> Subject:
    return Subject(name, cls, {"lr": 0.05} | FULL_STATE.get(name, {}))


def _graft(params: Any, engine: str, settings: dict[str, Any]) -> piste.Graft:
    """Adam's length, the direction of SGD, whose learning rate is its own; decay outside; options are for both."""
    decay, settings = settings.get("weight_decay", 0.0), settings | {"weight_decay": 0.0}
    both = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
    theirs = [{**entry, "lr": DIRECTION["lr"]} if isinstance(entry, dict) else entry for entry in both]
    magnitude = piste.Adam(both, engine=engine, **settings)
    return piste.Graft(magnitude, piste.SGD(theirs, engine=engine, **(settings | DIRECTION)), weight_decay=decay)


def _grafted(p: np.ndarray, g: np.ndarray, state: dict[str, Any], **settings: Any) -> np.ndarray:
    """Agarwal et al. 2020, layer-wise."""
    decay = settings.pop("weight_decay", 0.0)
    mine, theirs = state.setdefault("magnitude", {}), state.setdefault("direction", {})
    length = FORMULAS["Adam"](p.copy(), g, mine, **settings) - p
    options = {k: v for k, v in settings.items() if k != "betas"}  # schedulers cycle Adam's
    direction = FORMULAS["SGD"](p.copy(), g, theirs, **(options | DIRECTION)) - p
    norm = np.sqrt((direction**2).sum())
    p = p * (1 - settings["lr"] * decay)
    return p + np.sqrt((length**2).sum()) / norm * direction if norm > 0 else p


def _centralization_turned(subject: Subject) -> Subject:
    """The same optimizer with gradient centralization the other way round from its default."""
    group = subject.cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    turned = {"use_gc": not group["use_gc"]}
    return replace(subject, settings=subject.settings | turned, variant="no_gc" if group["use_gc"] else "gc")


@cache
def subjects() -> list[Subject]:
    """Every optimizer class, with and without gradient centralization, other forms and wrappers of some of them."""
    plain = [_subject(info.name, info.optimizer) for info in OPTIMIZERS]
    wrapped = replace(_subject("AdamW", piste.AdamW), name=WRAPPED, wrapped=True)
    grafted = Subject(GRAFTED, piste.Adam, {"lr": 0.05}, wrapped=True)
    google = replace(_subject("Shampoo", piste.Shampoo), variant="google")
    google = replace(google, settings=google.settings | {"form": "google", "graft": "rmsprop", "nesterov": True})
    corrected = replace(_subject("Shampoo", piste.Shampoo), variant="corrected")
    corrected = replace(corrected, settings=corrected.settings | {"corrected": True, "sides": "one", "block_size": 2})
    return [*plain, *map(_centralization_turned, plain), google, corrected, wrapped, grafted]


def unless_built(engine: str, problem: Problem, small: Problem) -> Problem:
    """The problem, or the small one where each rank of a weight and each option is a kernel to be compiled for itself,
    or an interpreted one.

    For promises about what happens to every element, whatever stands beside it: that kernels get every rank right is
    what `parity` (float64), `engines_agree` (float32) and `bfloat16` hold them to.
    """
    return small if engine in ("cpp", "compile", "triton") else problem


def at_length(engine: str) -> Problem:
    """Every rank and fourteen steps, or less where a shape compiles for seconds, or steps are interpreted."""
    return {"compile": SMALL, "triton": BRIEF}.get(engine, PROBLEM)


# --- running ------------------------------------------------------------------------------------------------------


def weights_of(problem: Problem, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in problem.weights]


def train(
    params: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    steps: Iterable[int] | None = None,
) -> None:
    for step in range(problem.steps) if steps is None else steps:
        set_gradients(params, problem.gradients[step])
        optimizer.step()


def trained(
    subject: Subject, engine: str, problem: Problem = PROBLEM, dtype: torch.dtype = torch.float64, **overrides: Any
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = weights_of(problem, dtype)
    optimizer = subject.make(params, engine, **overrides)
    train(params, optimizer, problem)
    return params, optimizer


def frozen(params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a step may change, copied: weights, gradients, state, groups."""
    return copy.deepcopy(
        {
            "weights": [p.detach() for p in params],
            "gradients": [p.grad for p in params],
            "state_dict": optimizer.state_dict(),
        }
    )


def identical(a: Any, b: Any) -> bool:
    """Same structure, same types, same dtypes, same bits (NaN equals NaN)."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool(((a == b) | ((a != a) & (b != b))).all())
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The paths at which two structures differ: what an assertion prints."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for k in a for line in differences(a[k], b[k], f"{where}[{k!r}]")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}[{i}]")]
    return [] if identical(a, b) else [f"{where}: {a!r} is not {b!r}"]


def assert_identical(a: Any, b: Any) -> None:
    found = differences(a, b)
    assert not found, "\n".join(found[:5])


def assert_weights(params: Sequence[torch.Tensor], expected: Sequence[np.ndarray], rtol: float, atol: float) -> None:
    for i, (p, e) in enumerate(zip(params, expected, strict=True)):
        np.testing.assert_allclose(
            p.detach().to(torch.float64).numpy(), e, rtol=rtol, atol=atol, err_msg=f"weight {i} of shape {e.shape}"
        )


# Float64 against a formula in another order of operations: see tests/test_parity.py.
RTOL, ATOL = 1e-12, 1e-13
