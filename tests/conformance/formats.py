"""Promises about state in codes and about weights that stand for more bits than they have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

import piste
from conformance.matrix import promise
from conformance.subjects import Subject, assert_identical, frozen
from piste.storage import WEIGHT_FORMATS

LOW = piste.STATE_FORMATS[1:]
#: across a synchronisation of Lookahead, which is the last one of what Triton's interpreter is given
STEPS, LESS = 8, 6
#: above and below the size from which codes are used, one of them with a block that is cut off
SHAPES = ((70, 61), (5, 7, 11, 13), (4200,), (30, 4))
#: without the fourth rank, for which a rule that tells axes apart has a kernel to build in each format: of those of
#: state, the one in which two codes share a byte has it. How numbers are stored is a matter of rows, not of ranks.
LOWER = ((70, 61), (30, 4), (4200,))
#: what Triton's interpreter is given
FEW = ((70, 61), (30, 4), (40,))
#: a sign that turns is a whole step, an estimate from all weights feels every one of them, and an inverse root makes
#: most of directions with the least in them
SENSITIVE = {"Lion", "Prodigy", "Shampoo"}
NO_MOMENTS = dict.fromkeys(("MADGRAD", "MirrorMADGRAD", "ScheduleFreeSGD"), "keeps no moments")


@cache
def _numbers(dtype: torch.dtype, shapes: tuple[torch.Size, ...]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights, and gradients of each step, that float32 and bfloat16 both hold exactly."""
    generator = torch.Generator().manual_seed(5)

    def draw(shape: tuple[int, ...], size: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).bfloat16().to(dtype)

    return [draw(s, 1.0) for s in shapes], [[draw(s, 0.1) for s in shapes] for _ in range(STEPS)]


def _length(engine: str) -> int:
    return LESS if engine == "triton" else STEPS


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of two tensors; of equal ones a little more than none, so that it may divide."""
    return float((a.detach() - b.detach()).norm()) + 1e-12


def _made(
    subject: Subject,
    engine: str,
    dtype: torch.dtype = torch.float32,
    *,
    to: str = "",
    most: bool = False,
    **options: Any,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Weights and their optimizer, to be compared with those of another engine, where one is named; of all ranks, or of
    fewer where each is a kernel to be built."""
    shapes = FEW if "triton" in (engine, to) else LOWER if "cpp" in (engine, to) and not most else SHAPES
    params = [torch.nn.Parameter(w.clone()) for w in _numbers(dtype, tuple(map(torch.Size, shapes)))[0]]
    return params, subject.make(params, engine, **({"lr": 0.01} | options))


def _steps(params: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    shapes = tuple(p.shape for p in params)
    for step in steps:
        for i, p in enumerate(params):
            missing = i == 2 and step in (0, 1, 5)  # a weight that wakes late, and one that rests
            p.grad = None if missing else _numbers(p.dtype, shapes)[1][step][i].clone()
        optimizer.step()


@promise("state in bf16, 8 and 4 bits: engines agree", not_for=NO_MOMENTS, gc=False)
def low_bits(subject: Subject, engine: str) -> None:
    """Held against the reference engine, and that against float32 state, as far as the format allows.

    A code may fall on the other side of a threshold where engines differ in the last bit of float32, which is rare.
    """
    more = 10.0 if subject.name in SENSITIVE else 1.0
    for form, gap in zip(LOW, (3e-3, 6e-2, 0.6), strict=True):
        most = form == "4bit"
        params, optimizer = _made(subject, engine, state=form, most=most)
        starts = [p.detach().clone() for p in params]
        _steps(params, optimizer, range(_length(engine)))
        whole = "fp32" if engine == "reference" else form
        expected, reference = _made(subject, "reference", to=engine, state=whole, most=most)
        _steps(expected, reference, range(_length(engine)))
        for p, e, start in zip(params, expected, starts, strict=True):
            error = _apart(p, e) / _apart(e, start)
            assert error <= more * (gap if engine == "reference" else 2e-3), (form, tuple(p.shape), error)


@promise("codes and scales resume bitwise", not_for=NO_MOMENTS, gc=False)
def low_bits_resume(subject: Subject, engine: str) -> None:
    """Saved, loaded and deep-copied in the middle; the thresholds of rounding go on where they were."""
    half = _length(engine) // 2
    for form in LOW:
        straight, optimizer = _made(subject, engine, state=form, seed=3)
        _steps(straight, optimizer, range(half))
        copied, twin = copy.deepcopy((straight, optimizer))
        saved = copy.deepcopy(optimizer.state_dict())
        fresh = [torch.nn.Parameter(p.detach().clone()) for p in straight]
        resumed = subject.make(fresh, engine, lr=0.01)
        resumed.load_state_dict(saved)
        for params, each in ((straight, optimizer), (fresh, resumed), (copied, twin)):
            _steps(params, each, range(half, 2 * half))
        assert_identical(frozen(fresh, resumed), frozen(straight, optimizer))
        assert_identical([p.detach() for p in copied], [p.detach() for p in straight])


@promise("bfloat16 weights with remainder are float32 weights", gc=False)
def remainder(subject: Subject, engine: str) -> None:
    """Bit by bit what float32 weights become under the same gradients; the weights themselves are the nearest ones.

    The foreach engine turns bfloat16 gradients into temporaries, which it may then overwrite: it orders operations
    otherwise than with float32 gradients, and the last bit differs. So do norms, which are added up tile by tile here.
    """
    full, optimizer = _made(subject, engine)
    _steps(full, optimizer, range(_length(engine)))
    params, optimizer = _made(subject, engine, torch.bfloat16, weights="remainder")
    starts = [p.detach().float() for p in params]
    _steps(params, optimizer, range(_length(engine)))
    inner = optimizer.optimizer if subject.wrapped else optimizer  # type: ignore[attr-defined]
    for p, e, start in zip(params, full, starts, strict=True):
        found = inner.full_precision(p)
        exact = engine != "foreach" and not subject.reduces
        assert torch.equal(found, e) or (not exact and _apart(found, e) <= 1e-3 * _apart(e, start))
        assert not exact or ((p.float() - e).abs() <= e.abs() * 2.0**-8).all()


@promise("stochastic and Kahan bfloat16 weights follow float32 ones", gc=False)
def bfloat16_weights(subject: Subject, engine: str) -> None:
    """Kahan to 16 bits; stochastic rounding without bias: over thousands of numbers the errors cancel."""
    full, optimizer = _made(subject, engine)
    _steps(full, optimizer, range(_length(engine)))
    for form in WEIGHT_FORMATS[1:3]:
        params, optimizer = _made(subject, engine, torch.bfloat16, weights=form)
        _steps(params, optimizer, range(_length(engine)))
        inner = optimizer.optimizer if subject.wrapped else optimizer  # type: ignore[attr-defined]
        for p, e in zip(params, full, strict=True):
            error = inner.full_precision(p) - e
            assert error.norm() <= e.norm() * (2.0**-7 if form == "stochastic" else 2.0**-12), form
            assert error.mean().abs() <= e.abs().max() * 2.0**-8 / e.numel() ** 0.5 * 6, form
