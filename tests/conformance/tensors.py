"""Promises about kinds of tensors: ranks, layouts, dtypes, and clear refusals of what is not supported."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from oracles.replay import Problem, random_problem, set_gradients

from conformance.matrix import ONE_ESTIMATE, promise
from conformance.subjects import (
    ATOL,
    RTOL,
    Subject,
    assert_identical,
    assert_weights,
    frozen,
    train,
    weights_of,
)


def _steps(engine: str) -> int:
    """Past RAdam's switch and a synchronisation of Lookahead, once where steps are interpreted and twice elsewhere."""
    return 7 if engine == "triton" else 14


@promise("0-d weights", gc=False)
def zero_dimensional(subject: Subject, engine: str) -> None:
    problem = random_problem([(), ()], seed=31)
    params = weights_of(problem)
    run = subject.expect(problem.weights)
    optimizer = subject.make(params, engine)
    for gradients in problem.gradients:
        set_gradients(params, gradients)
        optimizer.step()
        run.step(gradients)
    assert all(p.shape == () for p in params)
    assert_weights(params, run.weights, RTOL, ATOL)


@promise("empty weights")
def empty(subject: Subject, engine: str) -> None:
    """A weight without elements neither fails nor disturbs the others (a mean over nothing is NaN)."""
    shapes = [(0,), (0, 3), (3, 0), (2, 3)]
    problem = random_problem(shapes, steps=7, seed=32)
    params, alone = weights_of(problem), weights_of(problem)[-1:]
    # clipping that meets centralization turned round is a kernel that no other promise has
    clip = {} if subject.variant and engine == "cpp" else {"clip_norm": 0.5}
    train(params, subject.make(params, engine, **clip), problem)
    train(
        alone,
        subject.make(alone, engine, **clip),
        Problem(problem.weights[-1:], [row[-1:] for row in problem.gradients]),
    )
    assert [tuple(p.shape) for p in params] == shapes
    assert_identical(params[-1].detach(), alone[0].detach())


def _strided(w: np.ndarray) -> torch.Tensor:
    """The same numbers with another memory order: transposed, and every second element of a wider buffer."""
    wide = torch.zeros(*w.shape[:-1], 2 * w.shape[-1], dtype=torch.float64)
    view = wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    result = torch.as_strided(
        torch.zeros(2 * view.numel(), dtype=torch.float64), w.shape, [2 * s for s in view.stride()]
    )
    result.copy_(torch.tensor(w))
    return result


def _assert_layouts_agree(
    subject: Subject, engine: str, problem: Problem, weights: list[torch.Tensor], gradients_as_weights: bool
) -> None:
    """Layout changes the order of a mean's additions at most: float64 rounding."""
    plain = weights_of(problem)
    params = [w.requires_grad_() for w in weights]
    strides = [p.stride() for p in params]
    optimizer, reference = subject.make(params, engine), subject.make(plain, engine)
    for row in problem.gradients:
        set_gradients(plain, row)
        for p, g in zip(params, row, strict=True):
            if g is None:
                p.grad = None
            elif gradients_as_weights:
                p.grad = torch.empty_like(p).copy_(torch.tensor(g))
            else:
                p.grad = torch.tensor(g)
        optimizer.step()
        reference.step()
    assert [p.stride() for p in params] == strides
    assert_weights(params, [p.detach().numpy() for p in plain], RTOL, ATOL)


@promise("non-contiguous weights and gradients")
def non_contiguous(subject: Subject, engine: str) -> None:
    problem = random_problem([(3, 4), (2, 3, 4), (5, 1)], steps=_steps(engine), seed=33)
    for gradients_as_weights in (True, False):
        weights = [_strided(w) for w in problem.weights]
        assert not any(w.is_contiguous() for w in weights[:2])
        _assert_layouts_agree(subject, engine, problem, weights, gradients_as_weights)


@promise("channels_last")
def channels_last(subject: Subject, engine: str) -> None:
    problem = random_problem([(4, 3, 2, 2)], steps=_steps(engine), seed=34)
    for gradients_as_weights in (True, False):
        weights = [torch.tensor(problem.weights[0]).to(memory_format=torch.channels_last)]
        _assert_layouts_agree(subject, engine, problem, weights, gradients_as_weights)


def _assert_rounds_once(
    subject: Subject, engine: str, dtype: torch.dtype, *shapes: tuple[int, ...], steps: int = 14
) -> None:
    """Each step is the float64 formula from the weights as stored, rounded once to the storage.

    The formula is told the stored weights before every step, so rounding does not pile up. The library computes in
    float32, so a value next to a rounding boundary may fall to the other side: one unit in the last place is allowed,
    in at most one element out of twenty. A step that went through products of matrices has roundings as large as its
    largest element, which show where a weight ends up near zero.
    """
    near_zero = 2e-6 if subject.by_matrix else 0.0
    ulp = torch.finfo(dtype).eps
    problem = random_problem(shapes, steps=steps, seed=35)
    params = weights_of(problem, dtype)
    optimizer = subject.make(params, engine)
    run = subject.expect([p.detach().to(torch.float64).numpy() for p in params])
    exact, total = 0, 0
    for row in problem.gradients:
        rounded = [torch.tensor(g, dtype=dtype).to(torch.float64).numpy() for g in row if g is not None]
        run.weights = [p.detach().to(torch.float64).numpy() for p in params]
        set_gradients(params, rounded)
        optimizer.step()
        run.step(rounded)
        for p, w in zip(params, run.weights, strict=True):
            stored = torch.tensor(w).to(dtype)
            torch.testing.assert_close(p.detach(), stored, rtol=1.01 * ulp, atol=near_zero)
            exact += int((p.detach() == stored).sum())
            total += p.numel()
    assert exact >= 0.95 * total, f"{total - exact} of {total} elements are rounded otherwise"


@promise("bf16 weights, fp32 state", gc=False)
def bfloat16(subject: Subject, engine: str) -> None:
    _assert_rounds_once(subject, engine, torch.bfloat16, (8, 6), (31,), (4, 3, 2, 2))


@promise("fp16 weights, fp32 state", gc=False)
def float16(subject: Subject, engine: str) -> None:
    """Loads and stores apart, the code is that of bfloat16, which has been held to more ranks, and to more variants of
    a step where each is a kernel to be built."""
    _assert_rounds_once(subject, engine, torch.float16, (8, 6), (31,), steps=4 if engine == "cpp" else 14)


@promise("float64 weights, float64 state")
def float64(subject: Subject, engine: str) -> None:
    """No state of a double weight is kept in less: parity at 1e-12 needs it, and the dtype is asserted here."""
    params = weights_of(random_problem([(3, 4), (5,)], seed=36))
    optimizer = subject.make(params, engine)
    train(params, optimizer, random_problem([(3, 4), (5,)], seed=36))
    shaped = [v for s in _per_weight(optimizer) for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert shaped, f"{subject.name} keeps no tensors: the check is empty"
    assert {v.dtype for v in shaped} == {torch.float64}


def _per_weight(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    return list(optimizer.state_dict()["state"].values())


@promise("weights keep their storage", gc=False)
def storage_kept(subject: Subject, engine: str) -> None:
    """Written in place, so views, flat buffers and other holders of the memory see the new numbers."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        problem = random_problem([(3, 4), (5,)], seed=40, steps=7)
        flat = torch.cat([torch.tensor(w, dtype=dtype).flatten() for w in problem.weights])
        params = [flat[:12].view(3, 4).requires_grad_(), flat[12:].requires_grad_()]
        plain = weights_of(problem, dtype)
        train(params, subject.make(params, engine), problem)
        train(plain, subject.make(plain, engine), problem)
        assert_identical(flat, torch.cat([p.detach().flatten() for p in plain]))


@promise("weights of several dtypes in one optimizer", not_for=ONE_ESTIMATE, gc=False)
def mixed_dtypes(subject: Subject, engine: str) -> None:
    """Each dtype moves as it does alone."""
    subject = subject.apart
    problem = random_problem([(3, 4), (5,)], steps=_steps(engine), seed=41)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    together = [p for dtype in dtypes for p in weights_of(problem, dtype)]
    train(together, subject.make(together, engine), Problem(problem.weights, [row * 4 for row in problem.gradients]))
    alone = [weights_of(problem, dtype) for dtype in dtypes]
    for params in alone:
        train(params, subject.make(params, engine), problem)
    assert_identical([p.detach() for p in together], [p.detach() for params in alone for p in params])


@cache
def _large(by_matrix: bool, interpreted: bool) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights, smaller ones for rules that multiply matrices or are interpreted in tiles of a thousand elements, and
    three rows of gradients."""
    generator = torch.Generator().manual_seed(42)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    starts = [draw(3), draw(600_001), draw(40, 7), draw(1000, 700), draw(700, 900).t()]
    if by_matrix:
        starts = [draw(3), draw(6001), draw(40, 7), draw(100, 70), draw(70, 90).t()]
    if interpreted:
        starts = [draw(3), draw(2049), draw(40, 7), draw(30, 70), draw(35, 31).t()]
    return starts, [[draw(*w.shape) for w in starts] for _ in range(3)]


@promise("large weights, taken in pieces or whole", engines=("foreach", "cpp"), gc=False)
def large_weights(subject: Subject, engine: str) -> None:
    """Fast engines cut weights of half a million elements and more, triton of a thousand; small neighbours and clipping
    see no seam.

    Against the reference, in float64. Among fourteen million results some come from a gradient that cancels to
    nearly zero before it is divided by its own root, which magnifies rounding a thousandfold; a seam would show whole.
    """
    starts, rows = _large(subject.by_matrix, engine == "triton")
    results = []
    for name in (engine, "reference"):
        params = [w.clone().requires_grad_() for w in starts]
        assert not params[-1].is_contiguous()
        optimizer = subject.make(params, name, clip_norm=100.0)  # the joint norm is near 1,400
        for step in range(6):  # the last one synchronises Lookahead, and is the first that is rectified
            for p, g in zip(params, rows[step % 3], strict=True):
                p.grad = g
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@promise("gradient dtype other than the weight's", gc=False)
def foreign_gradient_dtype(subject: Subject, engine: str) -> None:
    """A float32 gradient on a bf16 weight is used as it is, and a bf16 one on a float32 weight after widening."""
    if not hasattr(torch.Tensor, "grad_dtype"):  # older torch cannot hold such a gradient at all
        return
    for weight, gradient in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        problem = random_problem([(3, 4), (5,)], seed=37, steps=4)  # every variant of a step reads gradients alike
        params = weights_of(problem, weight)
        for p in params:
            p.grad_dtype = gradient
        optimizer = subject.make(params, engine)
        run = subject.expect([p.detach().to(torch.float64).numpy() for p in params])
        for row in problem.gradients:
            run.weights = [p.detach().to(torch.float64).numpy() for p in params]
            given = [torch.tensor(g, dtype=gradient) for g in row]
            for p, g in zip(params, given, strict=True):
                p.grad = g
            optimizer.step()
            run.step([g.to(torch.float64).numpy() for g in given])
            for p, w in zip(params, run.weights, strict=True):
                # One unit of bf16, or a few roundings of float32 near the largest weights, which are about two.
                tolerance = 1.01 * torch.finfo(weight).eps if weight is torch.bfloat16 else 2e-6
                torch.testing.assert_close(p.detach(), torch.tensor(w).to(weight), rtol=tolerance, atol=1e-6)


@promise("complex weights (refused under centralization)")
def complex_weights(subject: Subject, engine: str) -> None:
    """Real and imaginary parts move as two real weights, or the optimizer refuses, names complex and does nothing."""
    problem = random_problem([(3, 4), (3, 4), (5,), (5,)], seed=38)
    real, imaginary = problem.weights[0::2], problem.weights[1::2]
    params = [torch.nn.Parameter(torch.tensor(a + 1j * b)) for a, b in zip(real, imaginary, strict=True)]
    run = subject.expect(problem.weights)
    try:
        optimizer = subject.make(params, engine)
        for row in problem.gradients:
            for p, a, b in zip(params, row[0::2], row[1::2], strict=True):
                p.grad = torch.tensor(a + 1j * b)
            optimizer.step()
            run.step(row)
    except ValueError as error:
        assert "complex" in str(error)  # noqa: PT017  a refusal is one of two right answers here
        assert subject.reduces, "only means and norms of a weight are refused"
        assert run.steps == 0
    parts = [part for p in params for part in (p.detach().real, p.detach().imag)]
    assert_weights(parts, run.weights, RTOL, ATOL)


@promise("sparse gradients are refused, nothing changes", gc=False)
def sparse(subject: Subject, engine: str) -> None:
    problem = random_problem([(3, 4), (5,)], seed=39)
    params = weights_of(problem)
    optimizer = subject.make(params, engine)
    train(params, optimizer, problem, range(3))
    set_gradients(params, problem.gradients[3])
    before = copy.deepcopy(frozen(params, optimizer))
    params[0].grad = torch.tensor(problem.gradients[3][0]).to_sparse()
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        assert "sparse" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a sparse gradient was taken without a word")
    after = frozen(params, optimizer)
    assert_identical(after["weights"], before["weights"])
    assert_identical(after["state_dict"], before["state_dict"])
