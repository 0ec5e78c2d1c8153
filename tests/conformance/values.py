"""Promises about numbers: the right ones, from every engine, under every schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracles.replay import Problem, set_gradients
from torch.optim import lr_scheduler as schedule

from conformance.matrix import ONE_AVERAGE, ONE_ESTIMATE, promise
from conformance.subjects import (
    ATOL,
    BRIEF,
    DENSE,
    ENGINES,
    FEW,
    PROBLEM,
    RTOL,
    SMALL,
    Subject,
    assert_identical,
    assert_weights,
    at_length,
    train,
    trained,
    unless_built,
    weights_of,
)

#: The interpreter has no cube root and takes a power and a step of Newton's method, which is another number in one case
#: of a hundred; with the root of C++ in its place, all weights and states of both were the same to the last bit. What
#: these rules do besides others hold to that.
CUBE_ROOTS = {"MADGRAD", "MirrorMADGRAD"}


@promise("parity with the formulas", compiled=True)
def parity(subject: Subject, engine: str) -> None:
    """Float64, 14 steps, every rank, late and missing gradients."""
    follow_formula(subject, engine, at_length(engine))


def follow_formula(subject: Subject, engine: str, problem: Problem) -> None:
    """The weights after every step are those of the formula."""
    params = weights_of(problem)
    optimizer = subject.make(params, engine)
    run = subject.expect(problem.weights)
    for gradients in problem.gradients:
        set_gradients(params, gradients)
        optimizer.step()
        run.step(gradients)
        assert_weights(params, run.weights, RTOL, ATOL)


@promise(
    "engines agree",
    engines=tuple(e for e in ENGINES if e != "reference"),
    compiled=True,
    compiled_turned=True,
)
def engines_agree(subject: Subject, engine: str) -> None:
    """Float32, against the reference. One float32 ulp is 1.2e-7; fourteen steps of a dozen operations stay within
    some tens of ulps of the largest number involved, and 2e-5 is the smallest bound that leaves room for division
    by small roots. Triton and C++ say the same, to the last bit, where nothing is added up over a
    weight and no cube root is drawn."""
    ours = follow_reference(subject, engine, at_length(engine))
    if engine == "triton" and not subject.reduces and subject.name not in CUBE_ROOTS:
        native, _ = trained(subject, "cpp", at_length(engine), torch.float32)
        assert_identical(*([p.detach() for p in params] for params in (ours, native)))


def follow_reference(subject: Subject, engine: str, problem: Problem) -> list[torch.nn.Parameter]:
    """In float32, within the bounds above; returns the engine's weights."""
    ours, _ = trained(subject, engine, problem, torch.float32)
    reference, _ = trained(subject, "reference", problem, torch.float32)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    return ours


@promise(
    "late first gradient: own step count",
    not_for_wrappers="one count for the whole model, by definition",
    not_for=ONE_ESTIMATE | ONE_AVERAGE,
)
def late_gradient(subject: Subject, engine: str) -> None:
    """A weight that wakes at step 5 moves as it would in a new optimizer.

    Not to the last bit: the multi-tensor kernels round differently when the weights of a bucket have different
    factors (step counts, rates) than when they share one. Parity's tolerance, then."""
    subject = subject.apart
    late, alone = weights_of(DENSE), weights_of(DENSE)
    optimizer = subject.make(late, engine)
    for step in range(4):
        set_gradients(late, [g if i < 2 else None for i, g in enumerate(DENSE.gradients[step])])
        optimizer.step()
    fresh = subject.make(alone, engine)
    for step in range(8):
        for params, stepper in ((late, optimizer), (alone, fresh)):
            set_gradients(params, DENSE.gradients[step])
            stepper.step()
    assert_weights(late[2:], [p.detach().numpy() for p in alone[2:]], RTOL, ATOL)


@promise("maximize", gc=False)
def maximize(subject: Subject, engine: str) -> None:
    """Maximizing with the negated gradients is minimizing (an engine may fold the sign into another operation)."""
    problem = unless_built(engine, PROBLEM, FEW)
    negated = Problem(problem.weights, [[None if g is None else -g for g in row] for row in problem.gradients])
    up, _ = trained(subject, engine, negated, maximize=True)
    down, _ = trained(subject, engine, problem)
    assert_weights(up, [p.detach().numpy() for p in down], RTOL, ATOL)


@promise("lr as a tensor", gc=False)
def tensor_lr(subject: Subject, engine: str) -> None:
    """A one-element tensor gives what its number gives, and filling it in place changes the next step.

    2**-4 and 2**-5 are the same number in every precision, so equality is to the last bit.
    """
    weights, twins = weights_of(SMALL), weights_of(SMALL)
    lr = torch.tensor(2.0**-4)
    with_tensor, with_number = subject.make(weights, engine, lr=lr), subject.make(twins, engine, lr=2.0**-4)
    train(weights, with_tensor, SMALL, range(7))
    train(twins, with_number, SMALL, range(7))
    assert_identical([p.detach() for p in weights], [p.detach() for p in twins])
    lr.fill_(2.0**-5)
    with_number.param_groups[0]["lr"] = 2.0**-5
    train(weights, with_tensor, SMALL, range(7, 14))
    train(twins, with_number, SMALL, range(7, 14))
    assert_identical([p.detach() for p in weights], [p.detach() for p in twins])


def _cycles_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return any(key in optimizer.defaults for key in ("momentum", "betas"))


def _warm_then_decay(optimizer: torch.optim.Optimizer) -> Any:
    parts = [schedule.LinearLR(optimizer, 0.1, total_iters=4), schedule.ExponentialLR(optimizer, 0.9)]
    return schedule.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda o: schedule.StepLR(o, step_size=3, gamma=0.5),
    lambda o: schedule.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=_cycles_momentum(o)),
    lambda o: schedule.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=_cycles_momentum(o)),
    lambda o: schedule.CosineAnnealingWarmRestarts(o, T_0=5),
    _warm_then_decay,
]


@promise("any torch scheduler, momentum cycling included", gc=False)
def schedulers(subject: Subject, engine: str) -> None:
    """Whatever a scheduler writes into the groups is what the next step uses: checked against the formula."""
    scheduled = ("lr", "momentum", "betas")
    problem = BRIEF if engine == "triton" else SMALL
    for make_scheduler in SCHEDULERS:
        params = weights_of(problem)
        optimizer = subject.make(params, engine)
        scheduler = make_scheduler(optimizer)
        run = subject.expect(problem.weights)
        for gradients in problem.gradients:
            group = optimizer.param_groups[0]
            run.settings = [s | {k: group[k] for k in scheduled if k in group} for s in run.settings]
            set_gradients(params, gradients)
            optimizer.step()
            scheduler.step()
            run.step(gradients)
        assert_weights(params, run.weights, RTOL, ATOL)


@promise("clip_norm= is clip_grad_norm_ before the step", gc=False)
def clip_norm(subject: Subject, engine: str) -> None:
    """Against torch's own function. The joint norm may be summed in another order: float64 rounding only."""
    problem = unless_built(engine, PROBLEM, FEW)
    clipped, by_hand = weights_of(problem), weights_of(problem)
    inside, outside = subject.make(clipped, engine, clip_norm=0.7), subject.make(by_hand, engine)
    for gradients in problem.gradients:
        set_gradients(clipped, gradients)
        inside.step()
        set_gradients(by_hand, gradients)
        torch.nn.utils.clip_grad_norm_(by_hand, 0.7)
        outside.step()
    assert_weights(clipped, [p.detach().numpy() for p in by_hand], RTOL, ATOL)


@promise("p.grad stays untouched", gc=False)
def gradient_untouched(subject: Subject, engine: str) -> None:
    """Same tensor object, same bits, under everything that transforms a gradient: sign, clipping, L2, centring.

    The multi-tensor engine chooses for every rank and every combination anew where it may work in place; a kernel
    writes to what a plan names, and a gradient is not among that: there, the kernels of other promises do.
    """
    problem = unless_built(engine, DENSE, SMALL)
    together = {"maximize": True, "clip_norm": 0.5, "decoupled_weight_decay": False, "weight_decay": 0.1}
    for options in ({"maximize": True}, {"clip_norm": 0.5}) if engine == "cpp" else (together,):
        params = weights_of(problem)
        optimizer = subject.make(params, engine, **options)
        for gradients in problem.gradients[:7]:
            set_gradients(params, gradients)
            held = [p.grad for p in params]
            before = copy.deepcopy(held)
            optimizer.step()
            assert all(p.grad is g for p, g in zip(params, held, strict=True))
            assert_identical(held, before)
