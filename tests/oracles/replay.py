"""Runs the formulas over whole models, and the same gradients through any torch optimizer.

One `Problem` holds initial weights and a gradient (or none) for every weight and step. `by_formula` and `by_optimizer`
return the weights after each step, as float64 NumPy arrays, so that two trajectories compare in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oracles.formulas import Array, Formula, State, clip_coefficient

Trajectory = list[list[Array]]

# A scalar, a bias, a Linear, three convolutions and an embedding: every rank that a rule may treat differently.
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "vector": (5,),
    "linear": (3, 4),
    "conv1d": (2, 3, 3),
    "conv2d": (2, 3, 2, 2),
    "conv3d": (2, 1, 2, 2, 2),
    "embedding": (6, 3),
}

# As many weights, of three ranks. An engine that builds kernels builds one for each rank of a rule that tells axes
# apart; that they get every rank right is what the conformance matrix holds them to (`parity`, `engines_agree`), and a
# test of something else need not build them all again for its own options.
FEWER: tuple[tuple[int, ...], ...] = ((5,), (3, 4), (2, 3, 2, 2), (4,), (6, 3), (2, 3, 2, 2), (2, 5))


@dataclass(frozen=True)
class Problem:
    """Initial weights and, for each step, one gradient (or None) for each weight."""

    weights: list[Array]
    gradients: list[list[Array | None]]

    @property
    def steps(self) -> int:
        return len(self.gradients)


def random_problem(
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES.values()),
    steps: int = 14,
    seed: int = 0,
    missing: Sequence[tuple[int, int]] = (),
) -> Problem:
    """Normal weights and gradients; `missing` lists the (step, weight) pairs, counted from 0, without a gradient."""
    rng = np.random.default_rng(seed)
    weights = [np.asarray(rng.normal(size=shape)) for shape in shapes]
    gradients = [
        [None if (step, i) in missing else np.asarray(rng.normal(size=shape)) for i, shape in enumerate(shapes)]
        for step in range(steps)
    ]
    return Problem(weights, gradients)


# Weight 1 wakes at the fourth step, weight 2 sleeps in between, weight 3 has gaps across a Lookahead sync.
GAPS = (
    *((step, 1) for step in range(3)),
    *((step, 2) for step in (4, 5, 6)),
    *((step, 3) for step in (5, 11)),
)


class FormulaRun:
    """A formula over several weights: group settings, missing gradients, maximize, joint clipping, outer Lookahead."""

    def __init__(
        self,
        formula: Formula,
        weights: Sequence[Array],
        settings: Sequence[dict[str, Any]],
        lookahead: dict[str, Any] | None = None,
    ) -> None:
        self.formula = formula
        self.weights = [np.array(w, dtype=np.float64) for w in weights]
        self.settings = [dict(s) for s in settings]
        self.states: list[State] = [{} for _ in weights]
        self.shared: State = {}
        self.group_of = [self.settings.index(own) for own in self.settings]
        self.numbers: dict[int, State] = {group: {} for group in self.group_of}
        self.lookahead = lookahead
        self.slow = [w.copy() for w in self.weights]
        self.steps = 0

    def step(self, gradients: Sequence[Array | None]) -> None:
        coefficient = self._coefficient([g for g in gradients if g is not None])
        present: list[tuple[int, Array, dict[str, Any]]] = []
        for i, g in enumerate(gradients):
            if g is None:
                continue
            hyperparameters = dict(self.settings[i])
            hyperparameters.pop("clip_norm", None)
            sign = -1.0 if hyperparameters.pop("maximize", False) else 1.0
            present.append((i, sign * coefficient * np.asarray(g, dtype=np.float64), hyperparameters))
        if present and hasattr(self.formula, "advance"):
            self._advance()
        if getattr(self.formula, "whole", False):
            self._step_whole(present)
        else:
            for i, g, hyperparameters in present:
                self.weights[i] = self.formula(self.weights[i], g, self.states[i], **hyperparameters)
        self._sync()

    def _advance(self) -> None:
        """A formula with a function ``advance`` keeps numbers for each group: weights of equal settings at the start.

        It is called as ``advance(numbers, **settings)`` before every step, and the formula finds them as its weight's
        ``state["group"]``.
        """
        for i, group in enumerate(self.group_of):
            self.states[i]["group"] = self.numbers[group]
        for group, numbers in self.numbers.items():
            self.formula.advance(numbers, **self.settings[group])  # type: ignore[attr-defined]

    def _step_whole(self, present: list[tuple[int, Array, dict[str, Any]]]) -> None:
        """A formula with the attribute ``whole`` gets all weights at once, with one more state that they share.

        It is called as ``formula(ps, gs, states, shared, settings)``, five lists but for ``shared``, and returns the
        new weights. Weights without a gradient are not in the lists.
        """
        which = [i for i, _, _ in present]
        new = self.formula(
            [self.weights[i] for i in which],
            [g for _, g, _ in present],
            [self.states[i] for i in which],
            self.shared,
            [hyperparameters for _, _, hyperparameters in present],
        )
        for i, weight in zip(which, new, strict=True):
            self.weights[i] = weight

    def _coefficient(self, present: list[Array]) -> float:
        limit = self.settings[0].get("clip_norm")
        return 1.0 if limit is None else clip_coefficient(present, limit)

    def _sync(self) -> None:
        """The wrapper of Zhang et al. 2019, algorithm 1: one count for the whole model, every weight is synced."""
        self.steps += 1
        if self.lookahead is None or self.steps % self.lookahead["k"]:
            return
        alpha = self.lookahead["alpha"]
        self.slow = [alpha * fast + (1.0 - alpha) * slow for fast, slow in zip(self.weights, self.slow, strict=True)]
        self.weights = [slow.copy() for slow in self.slow]


def by_formula(
    formula: Formula,
    problem: Problem,
    settings: dict[str, Any] | Sequence[dict[str, Any]],
    lookahead: dict[str, Any] | None = None,
    change: Callable[[int], dict[str, Any]] | None = None,
) -> Trajectory:
    """The weights after each step. `settings` is one for all or one for each weight; `change(step)` updates all."""
    each = [settings] * len(problem.weights) if isinstance(settings, dict) else settings
    run = FormulaRun(formula, problem.weights, each, lookahead)
    trajectory = []
    for step, gradients in enumerate(problem.gradients):
        if change is not None:
            run.settings = [s | change(step) for s in run.settings]
        run.step(gradients)
        trajectory.append([w.copy() for w in run.weights])
    return trajectory


def parameters(problem: Problem, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in problem.weights]


def set_gradients(params: Sequence[torch.Tensor], gradients: Sequence[Array | None]) -> None:
    """Fresh gradient tensors: some oracles write into `p.grad`, so nothing is shared between two runs."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def snapshot(params: Sequence[torch.Tensor]) -> list[Array]:
    return [p.detach().to(torch.float64).numpy().copy() for p in params]


def by_optimizer(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    problem: Problem,
    dtype: torch.dtype = torch.float64,
    change: Callable[[int], dict[str, Any]] | None = None,
) -> Trajectory:
    """The same, through a torch optimizer that `make` builds over the parameters."""
    params = parameters(problem, dtype)
    optimizer = make(params)
    trajectory = []
    for step, gradients in enumerate(problem.gradients):
        if change is not None:
            for group in optimizer.param_groups:
                group.update(change(step))
        set_gradients(params, gradients)
        optimizer.step()
        trajectory.append(snapshot(params))
    return trajectory


def assert_same(actual: Trajectory, expected: Trajectory, rtol: float, atol: float) -> None:
    """Equal at every step; the message names the first step and weight that differ."""
    assert len(actual) == len(expected), f"{len(actual)} steps against {len(expected)}"
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            np.testing.assert_allclose(
                a, b, rtol=rtol, atol=atol, err_msg=f"step {step + 1}, weight {i} of shape {b.shape}"
            )


def with_statistics(
    params: Sequence[torch.nn.Parameter],
    optimizer: Any,
    formula: Formula,
    settings: dict[str, Any],
    problem: Problem,
) -> tuple[list[Array], list[Array]]:
    """The last weights where factors are made of other gradients: by the optimizer, and by the formula."""
    other = random_problem([w.shape for w in problem.weights], seed=9, steps=problem.steps)
    run = FormulaRun(formula, problem.weights, [settings] * len(params))
    for row, statistics in zip(problem.gradients, other.gradients, strict=True):
        optimizer.give_preconditioner_gradients({p: torch.tensor(s) for p, s in zip(params, statistics, strict=True)})
        for state, s in zip(run.states, statistics, strict=True):
            state["statistics"] = s
        set_gradients(params, row)
        optimizer.step()
        run.step(row)
    return [p.detach().numpy() for p in params], run.weights
