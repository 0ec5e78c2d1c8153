"""Promises about an optimizer's life: saving, loading, copying, growing, hooks and closures."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from oracles.replay import Problem, set_gradients

from conformance.matrix import ONE_ESTIMATE, promise
from conformance.subjects import (
    ATOL,
    DENSE,
    RTOL,
    SMALL,
    Subject,
    assert_identical,
    assert_weights,
    at_length,
    frozen,
    train,
    unless_built,
    weights_of,
)
from piste.registry import optimizer_info

MIDDLE = 8  # two steps into the second Lookahead period (k = 6), two steps after the last gap of the problem


def through_a_file(saved: Any) -> Any:
    """As `torch.save` writes it and `torch.load` reads it when it may run nothing."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _interrupted(
    subject: Subject, engine: str, resume_engine: str, problem: Problem, dtype: torch.dtype
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = weights_of(problem, dtype)
    optimizer = subject.make(params, engine)
    train(params, optimizer, problem, range(MIDDLE))
    loaded = through_a_file({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    fresh = [torch.nn.Parameter(w.clone()) for w in loaded["weights"]]
    resumed = subject.make(fresh, resume_engine)
    resumed.load_state_dict(loaded["optimizer"])
    train(fresh, resumed, problem, range(MIDDLE, problem.steps))
    return fresh, resumed


@promise("resume is bitwise", compiled=True)
def resume(subject: Subject, engine: str) -> None:
    """Saved in the middle of a Lookahead period, loaded with weights_only=True: same weights and state, bit by bit."""
    problem = at_length(engine)
    straight = weights_of(problem, torch.float32)
    optimizer = subject.make(straight, engine)
    train(straight, optimizer, problem)
    resumed, again = _interrupted(subject, engine, engine, problem, torch.float32)
    assert_identical([p.detach() for p in resumed], [p.detach() for p in straight])
    assert_identical(again.state_dict()["state"], optimizer.state_dict()["state"])


@promise("resume on another engine")
def resume_elsewhere(subject: Subject, engine: str) -> None:
    """Float64, so the tolerance is that of parity."""
    other = "foreach" if engine == "reference" else "reference"
    problem = at_length(engine)
    straight = weights_of(problem)
    train(straight, subject.make(straight, engine), problem)
    resumed, _ = _interrupted(subject, engine, other, problem, torch.float64)
    assert_weights(resumed, [p.detach().numpy() for p in straight], RTOL, ATOL)


@promise("loading keeps state dtypes and bits", gc=False)
def load_keeps_dtypes(subject: Subject, engine: str) -> None:
    """bf16 weights keep float32 state; torch's own loader would cast it down to bf16.

    States are allocated alike for every engine."""
    problem = unless_built(engine, DENSE, SMALL)
    params = weights_of(problem, torch.bfloat16)
    optimizer = subject.make(params, engine)
    train(params, optimizer, problem, range(MIDDLE))
    saved = optimizer.state_dict()
    shaped = [v for s in saved["state"].values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert {v.dtype for v in shaped} == {torch.float32}
    fresh = subject.make([torch.nn.Parameter(p.detach().clone()) for p in params], engine)
    fresh.load_state_dict(through_a_file(saved))
    assert_identical(fresh.state_dict()["state"], saved["state"])


@promise("keeps the states its record names, no others", not_for_wrappers="keeps one more than the wrapped optimizer")
def states(subject: Subject, engine: str) -> None:
    """What `optimizer_info(name).state` says is what memory is spent on (these settings keep every state)."""
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    train(params, optimizer, SMALL)
    kept = {k for s in optimizer.state_dict()["state"].values() for k, v in s.items() if torch.is_tensor(v)}
    named = set(optimizer_info(subject.name).state)
    assert kept <= named
    group = optimizer.param_groups[0]
    off = set() if group.get("amsgrad") else {"smax", "vmax"}  # FULL_STATE leaves it off for some
    off |= {"statistics"} | ({"m_graft"} if group.get("form") == "meta" else set())
    off |= {"roots"} if group.get("corrected") else {"bases", "eigenvalues"}
    assert named - kept <= off


@promise("loading copies: later steps leave the saved dictionary alone", gc=False)
def load_copies(subject: Subject, engine: str) -> None:
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    train(params, optimizer, SMALL, range(MIDDLE))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    again = subject.make(params, engine)
    again.load_state_dict(saved)
    train(params, again, SMALL, range(MIDDLE, SMALL.steps))
    assert_identical(saved, kept)


@promise("names are saved and matched on load in any order", gc=False)
def names(subject: Subject, engine: str) -> None:
    problem = unless_built(engine, DENSE, SMALL)
    weights = weights_of(problem)
    named = [(f"layer{i}.weight", p) for i, p in enumerate(weights)]
    optimizer = subject.make(named, engine)
    train(weights, optimizer, problem, range(MIDDLE))
    saved = through_a_file(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    shuffled = list(reversed([(name, twin) for (name, _), twin in zip(named, twins, strict=True)]))
    resumed = subject.make(shuffled, engine)
    resumed.load_state_dict(saved)
    train(weights, optimizer, problem, range(MIDDLE, problem.steps))
    train(twins, resumed, problem, range(MIDDLE, problem.steps))
    assert_identical([p.detach() for p in twins], [p.detach() for p in weights])


@promise("add_param_group late", not_for=ONE_ESTIMATE)
def add_group_late(subject: Subject, engine: str) -> None:
    """A group added later moves as in a new optimizer, with its own lr, and the old ones do not notice.

    Parity's tolerance: with two rates in a bucket the multi-tensor kernels round differently than with one."""
    subject = subject.apart
    old, new, alone = (weights_of(SMALL) for _ in range(3))
    straight = weights_of(SMALL)
    optimizer, reference = subject.make(old, engine), subject.make(straight, engine)
    k = 6  # for the wrapper, which counts for the whole model, the new weights start at the beginning of a period
    train(old, optimizer, SMALL, range(k))
    train(straight, reference, SMALL, range(k))
    optimizer.add_param_group({"params": new, "lr": 0.01})
    fresh = subject.make(alone, engine, lr=0.01)
    for step in range(k, SMALL.steps):
        set_gradients([*old, *new], SMALL.gradients[step] * 2)
        optimizer.step()
    train(straight, reference, SMALL, range(k, SMALL.steps))
    train(alone, fresh, SMALL, range(k, SMALL.steps))
    assert_weights(old, [p.detach().numpy() for p in straight], RTOL, ATOL)
    assert_weights(new, [p.detach().numpy() for p in alone], RTOL, ATOL)
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]


def _without_empty_entries(seen: dict[str, Any]) -> dict[str, Any]:
    """A weight without a state may have an empty entry or none."""
    saved = seen["state_dict"]
    state = {number: entries for number, entries in saved["state"].items() if entries}
    return seen | {"state_dict": saved | {"state": state}}


@promise("a step without any gradient changes nothing", not_for_wrappers="it counts steps of the model", gc=False)
def no_gradients(subject: Subject, engine: str) -> None:
    """Before the first gradient and between others; also with clipping, whose norm is then of nothing."""
    steps = 4 if engine == "triton" else 8
    for options in ({}, {"clip_norm": 0.5}, {"nonfinite": "skip"}, {"nonfinite": "raise"}):
        params, plain = weights_of(SMALL), weights_of(SMALL)
        optimizer, reference = subject.make(params, engine, **options), subject.make(plain, engine, **options)
        nothing = [None] * len(params)
        for step in range(steps):
            set_gradients(params, nothing)
            before = _without_empty_entries(frozen(params, optimizer))
            optimizer.step()
            assert_identical(_without_empty_entries(frozen(params, optimizer)), before)
            set_gradients(params, SMALL.gradients[step])
            optimizer.step()
        train(plain, reference, SMALL, range(steps))
        assert_identical([p.detach() for p in params], [p.detach() for p in plain])


def _go_on(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    train(params, optimizer, SMALL, steps)
    return [p.detach() for p in params]


@promise("deepcopy", gc=False)
def deepcopy(subject: Subject, engine: str) -> None:
    """The copy owns its weights and goes on as the original does; the original does not notice."""
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    train(params, optimizer, SMALL, range(MIDDLE))
    twin = copy.deepcopy(optimizer)
    before = frozen(params, optimizer)
    theirs = _go_on(twin, range(MIDDLE, SMALL.steps))
    assert_identical(frozen(params, optimizer), before)
    assert_identical(theirs, _go_on(optimizer, range(MIDDLE, SMALL.steps)))


@promise("pickle", gc=False)
def pickling(subject: Subject, engine: str) -> None:
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    train(params, optimizer, SMALL, range(MIDDLE))
    twin = pickle.loads(pickle.dumps(optimizer))
    assert_identical(_go_on(twin, range(MIDDLE, SMALL.steps)), _go_on(optimizer, range(MIDDLE, SMALL.steps)))


@promise("closures: once, with gradients enabled, loss returned", gc=False)
def closures(subject: Subject, engine: str) -> None:
    with_closure, without = weights_of(SMALL), weights_of(SMALL)
    optimizer, reference = subject.make(with_closure, engine), subject.make(without, engine)
    calls: list[bool] = []

    def loss_of(params: list[torch.nn.Parameter]) -> torch.Tensor:
        return torch.stack([(p**2).sum() for p in params]).sum()

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(with_closure)
        loss.backward()
        return loss

    for _ in range(3):
        expected = loss_of(without)
        reference.zero_grad()
        expected.backward()
        reference.step()
        returned = optimizer.step(closure)
        assert returned is not None
        assert_identical(torch.as_tensor(returned).detach(), expected.detach())
    assert calls == [True] * 3
    assert_identical([p.detach() for p in with_closure], [p.detach() for p in without])
    assert reference.step() is None


@promise("hooks of torch.optim.Optimizer", gc=False)
def hooks(subject: Subject, engine: str) -> None:
    """Step hooks once a step, before and after; state dict hooks once a call; removed hooks no more."""
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after")),
        optimizer.register_state_dict_post_hook(lambda opt, saved: seen.append("saved")),
        optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded")),
    ]
    train(params, optimizer, SMALL, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "before", "after", "saved", "loaded"]
    for handle in handles:
        handle.remove()
    train(params, optimizer, SMALL, range(1))
    assert len(seen) == 6


@promise("last_step: norms and whether it was skipped", gc=False)
def last_step(subject: Subject, engine: str) -> None:
    """Against the norms of the gradients given and of the change seen."""
    params = weights_of(SMALL)
    optimizer = subject.make(params, engine)
    train(params, optimizer, SMALL, range(3))
    set_gradients(params, SMALL.gradients[3])
    before = [p.detach().clone() for p in params]
    (optimizer.optimizer if subject.wrapped else optimizer).measure_updates = True  # type: ignore[union-attr]
    optimizer.step()
    report = optimizer.last_step  # type: ignore[attr-defined]
    gradients = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    torch.testing.assert_close(torch.as_tensor(report.gradient_norm, dtype=torch.float64), gradients.norm())
    update = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)]).norm()
    torch.testing.assert_close(torch.as_tensor(report.update_norm, dtype=torch.float64), update)
    assert report.skipped is False
