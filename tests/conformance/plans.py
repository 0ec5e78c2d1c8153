"""Promises about work that must not be done again: no plan is built for a number that changes."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from oracles.replay import set_gradients

from conformance.matrix import promise
from conformance.subjects import SMALL, Subject, train, weights_of
from piste import execution


def _moving(group: dict[str, Any], step: int) -> dict[str, Any]:
    """New values for every continuous hyper-parameter of a group."""
    swing = 1.0 + 0.3 * math.sin(step)
    changed: dict[str, Any] = {"lr": 0.01 * swing, "weight_decay": 0.1 * swing}
    if "betas" in group:
        more = (0.999 + 0.0005 * swing,) if len(group["betas"]) == 3 else ()
        changed["betas"] = (0.9 - 0.05 * swing, 0.99 + 0.005 * swing, *more)
    if "momentum" in group:
        changed["momentum"] = 0.9 - 0.05 * swing
    if "eps" in group:
        changed["eps"] = 1e-6 * swing
    if "alpha" in group:
        changed["alpha"] = 0.5 + 0.2 * swing
    return changed


def _frames_compiled() -> int:
    """How many functions torch.compile has compiled so far in this process (recompilations included)."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported here: that takes a second
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def _assert_no_new_plan(subject: Subject, engine: str, steps: int) -> None:
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    optimizer.param_groups[0].update(_moving(optimizer.param_groups[0], -1))
    train(params, optimizer, SMALL)  # every variant (short average, sync, both) has been seen after twelve steps
    built, compiled = execution.plans_built(), _frames_compiled()
    for step in range(steps):
        optimizer.param_groups[0].update(_moving(optimizer.param_groups[0], step))
        set_gradients(params, SMALL.gradients[step % SMALL.steps])
        optimizer.step()
    assert execution.plans_built() == built
    assert _frames_compiled() == compiled


@promise("no new plan over 1,000 scheduled steps", compiled=True, gc=False)
def no_recompiles(subject: Subject, engine: str) -> None:
    """lr, betas, momentum, eps, alpha and weight decay move at every step; torch.compile compiles nothing either.

    Plans are made before any engine is asked: reference and foreach, which take the most time, take 100 steps. Kernels
    that are interpreted take 8: that Triton compiles nothing in a thousand is for test_triton_host.py.
    """
    steps = {"triton": 8, "reference": 100, "foreach": 100}.get(engine, 1000)
    _assert_no_new_plan(subject, engine, steps)


@promise("300 layers waking one by one build no further plan", gc=False)
def late_layers(subject: Subject, engine: str) -> None:
    """Layer i wakes at step i: three hundred different step counts in one model, and still the same few plans.

    Sorting weights is no business of an engine. The reference goes weight by weight, and foreach has a column to fill
    for each: 300 layers would cost them 45,000 single updates, so they get 30 and 100, and so do rules whose matrices
    are worked on one by one. So they would Triton's interpreter, which runs a kernel for each: 12. Centralization
    leaves vectors alone.
    """
    layers = {"reference": 30, "foreach": 100, "triton": 12}.get(engine, 100 if subject.by_matrix else 300)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(layers)]
    gradient = torch.ones(2)
    optimizer = subject.make(params, engine)
    params[0].grad = gradient
    for _ in range(12):
        optimizer.step()
    built = execution.plans_built()
    for awake in range(2, layers + 1):
        params[awake - 1].grad = gradient
        optimizer.step()
    assert execution.plans_built() == built
