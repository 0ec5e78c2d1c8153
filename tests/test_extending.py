"""The optimizer that docs/extending.md writes in fifteen lines keeps every promise of the conformance matrix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conformance.matrix import Promise, promises
from conformance.subjects import Subject
from oracles.formulas import centralized
from oracles.table import FORMULAS
from test_docs import blocks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
NAME = "piste_docs_extending"
OF_THE_REGISTRY = "states"  # what a row of the registry says; the class has none


def formula(
    p: np.ndarray,
    g: np.ndarray,
    state: dict[str, Any],
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    use_gc: bool = False,
) -> np.ndarray:
    """Zaheer et al. 2018, algorithm 2, with Adam's bias correction of the first moment and decoupled decay."""
    g = centralized(g) if use_gc else g
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", np.zeros_like(p)) + (1 - betas[0]) * g
    v = state.get("v", np.zeros_like(p))
    v = state["v"] = v - (1 - betas[1]) * np.sign(v - g * g) * g * g
    return p * (1 - lr * weight_decay) - lr * m / (1 - betas[0] ** t) / (np.sqrt(v) + eps)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    """The class of the page, in a module that pickles find."""
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    _, code = blocks(PAGE, "python")[0]
    exec(compile(code, str(PAGE), "exec"), vars(module))
    FORMULAS["Yogi"] = formula
    yield Subject("Yogi", module.Yogi, {"lr": 0.05, "weight_decay": 0.05})
    del sys.modules[NAME], FORMULAS["Yogi"]


def test_it_has_fifteen_lines() -> None:
    _, code = blocks(PAGE, "python")[0]
    body = code[code.index("@direction") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("promise", [p for p in promises() if p.name != OF_THE_REGISTRY], ids=lambda p: p.name)
def test_it_keeps_its_promises(promise: Promise, subject: Subject) -> None:
    """On two engines; native code, which is generated from the same plan, takes one promise to compile."""
    assert promise.applies(subject)
    torch.manual_seed(0)
    compiled = {"cpp"} if promise.name in ("parity", "engines_agree") else set()
    for engine in {"reference", "foreach", *compiled} & set(promise.engines):
        promise.check(subject, engine)
