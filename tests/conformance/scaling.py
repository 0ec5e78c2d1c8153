"""Promises about loss scaling and non-finite gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from oracles.replay import set_gradients

from conformance.matrix import promise
from conformance.subjects import SMALL, Subject, assert_identical, frozen, train, weights_of

# A power of two: scaling and unscaling are exact. What is left is that an engine may fold the factor into another
# operation and round once more or less: a few float32 ulps (1.2e-7) a step, over fourteen steps.
SCALE = 1024.0
RTOL, ATOL = 5e-6, 1e-6


def _scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))  # creates the scale tensor, as the first backward pass does
    return scaler


def _give_scaled(params: list[torch.nn.Parameter], step: int, poison: float | None = None) -> None:
    set_gradients(params, SMALL.gradients[step])
    for p in params:
        if p.grad is not None:
            p.grad.mul_(SCALE)
    if poison is not None:
        grad = params[0].grad
        assert grad is not None
        grad.view(-1)[1] = poison


def _assert_scaled_run_equals_plain(subject: Subject, engine: str, **options: Any) -> None:
    """Fourteen steps with one overflow in the middle, against thirteen plain ones without that step."""
    scaled, plain = weights_of(SMALL, torch.float32), weights_of(SMALL, torch.float32)
    optimizer, reference = subject.make(scaled, engine, **options), subject.make(plain, engine)
    scaler = _scaler()
    for step in range(SMALL.steps):
        overflow = step == 7
        _give_scaled(scaled, step, math.inf if overflow else None)
        before = frozen(scaled, optimizer)
        scaler.step(optimizer)
        if overflow:
            after = frozen(scaled, optimizer)
            assert_identical(after["weights"], before["weights"])
            assert_identical(after["state_dict"], before["state_dict"])
        else:
            train(plain, reference, SMALL, [step])
        scaler.update(SCALE)
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL)


@promise("GradScaler, ordinary path", gc=False)
def grad_scaler(subject: Subject, engine: str) -> None:
    _assert_scaled_run_equals_plain(subject, engine)


@promise("GradScaler, unscaling inside the step", gc=False)
def amp_unscale(subject: Subject, engine: str) -> None:
    """The fused protocol: p.grad stays scaled, an overflow advances nothing, an explicit unscale_ is respected."""
    params = weights_of(SMALL, torch.float32)
    ordinary = subject.make(params, engine)
    assert not getattr(ordinary, "_step_supports_amp_scaling", False)  # Lightning refuses clipping when it is set
    _assert_scaled_run_equals_plain(subject, engine, amp_unscale=True)

    optimizer = subject.make(params, engine, amp_unscale=True)
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    scaler = _scaler()
    _give_scaled(params, 0)
    held = [p.grad.clone() for p in params if p.grad is not None]
    scaler.step(optimizer)
    assert_identical([p.grad for p in params], held)

    explicit, plain = weights_of(SMALL, torch.float32), weights_of(SMALL, torch.float32)
    unscaled, reference = subject.make(explicit, engine, amp_unscale=True), subject.make(plain, engine)
    scaler = _scaler()
    _give_scaled(explicit, 0)
    scaler.unscale_(unscaled)
    scaler.step(unscaled)
    train(plain, reference, SMALL, [0])
    assert_identical([p.detach() for p in explicit], [p.detach() for p in plain])


@promise("clip_norm= sees unscaled gradients", gc=False)
def clip_under_scaling(subject: Subject, engine: str) -> None:
    """The limit bites (norms here are near 3), and means the same under a scale of 1024."""
    scaled, plain = weights_of(SMALL), weights_of(SMALL)  # in float64: clip_norm has the kernels of the plain one
    optimizer = subject.make(scaled, engine, amp_unscale=True, clip_norm=0.5)
    reference = subject.make(plain, engine, clip_norm=0.5)
    scaler = _scaler()
    for step in range(4):  # before Lookahead and rectification set in: two more plans, and gradients met them before
        _give_scaled(scaled, step)
        scaler.step(optimizer)
        scaler.update(SCALE)
        train(plain, reference, SMALL, [step])
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the 1e-6 beside the norm may be scaled: float32


def _poisoned(subject: Subject, engine: str, bad: float, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine, **options)
    train(params, optimizer, SMALL, range(4))
    set_gradients(params, SMALL.gradients[4])
    grad = params[-1].grad
    assert grad is not None
    grad[0] = bad
    return params, optimizer


@promise('nonfinite="raise"', gc=False)
def nonfinite_raise(subject: Subject, engine: str) -> None:
    """NaN or infinity anywhere: an error, and no weight, state or counter of any parameter has moved."""
    for bad in (math.nan, math.inf, -math.inf):
        params, optimizer = _poisoned(subject, engine, bad, nonfinite="raise")
        before = frozen(params, optimizer)
        try:
            optimizer.step()
        except (ValueError, ArithmeticError, RuntimeError) as error:
            assert "finite" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"a gradient of {bad} was taken without a word")
        assert_identical(frozen(params, optimizer), before)


@promise('nonfinite="skip"', gc=False)
def nonfinite_skip(subject: Subject, engine: str) -> None:
    """The step is as if it had not been asked for, `last_step` says so, and the next one goes on as usual."""
    params, optimizer = _poisoned(subject, engine, math.nan, nonfinite="skip")
    before = frozen(params, optimizer)
    optimizer.step()
    assert_identical(frozen(params, optimizer), before)
    assert optimizer.last_step.skipped  # type: ignore[attr-defined]
    train(params, optimizer, SMALL, range(4, 9))
    assert not optimizer.last_step.skipped  # type: ignore[attr-defined]
    straight = weights_of(SMALL)
    train(straight, subject.make(straight, engine), SMALL, range(9))
    assert_identical([p.detach() for p in params], [p.detach() for p in straight])
