"""Promises about bad input: one clear ValueError that names the argument and its value, before anything changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from conformance.matrix import promise
from conformance.subjects import SMALL, Subject, assert_identical, frozen, train, weights_of
from piste.preset import arguments_of

ANY_ENGINE = ("reference",)  # refusals happen before an engine is chosen

# For every hyper-parameter that an optimizer may have: values outside its legal range.
ILLEGAL: dict[str, list[Any]] = {
    "lr": [-1e-3, math.nan, math.inf, "fast", torch.tensor(-1.0), torch.ones(2)],
    "betas": [(1.0, 0.999), (-0.1, 0.999), (0.9, 1.0), (0.9, math.nan), (0.9,), 0.9],
    "Shampoo.betas": [(1.0, 0.999), (-0.1, 0.999), (0.9, 1.1), (0.9, math.nan), (0.9,), 0.9],
    "form": ["metal"],
    "graft": ["adan"],
    "every": [0, 2.5],
    "sides": ["left"],
    "corrected": [1],
    "factor_lr": [-0.1, 1.1, math.nan],
    "init_scale": [0.0],
    "whiten": ["weights"],
    "clip_rms": [0.0],
    "flat_start": [-1, 2.5],
    "probability_decay": [0.0],
    "least_probability": [0.0, 1.1],
    "diagonal": ["some"],
    "block_size": [0],
    "max_size": [0],
    "exponent": [0.0],
    "shampoo_beta": [1.0],
    "row_beta": [1.0],
    "rule": ["sgd"],
    "split": [0],
    "steps": [0],
    "iteration": ["cubic"],
    "precision": ["fp8"],
    "eps": [-1e-8, math.nan],
    "weight_decay": [-0.1, math.nan],
    "momentum": [-0.1, math.nan],
    "dampening": [math.nan],
    "alpha": [-0.1, 1.5, math.nan],
    "AdEMAMix.alpha": [-0.1, math.nan],
    "beta": [-0.1, 1.5, math.nan],
    "trust_denominator": ["norm", None],
    "late_start": ["yes"],
    "total_steps": [0, 2.5],
    "beta1": [1.0],
    "clip_threshold": [0.0],
    "clip_value": [0.0],
    "decay_rate": [0.1],
    "eps_scale": [-1.0],
    "factor": ["first"],
    "scale": [0.0],
    "start": [0],
    "scale_parameter": [None],
    "r": [-1.0],
    "weight_lr_power": [-1.0],
    "silent_sgd_phase": ["no"],
    "d0": [0.0],
    "d_coef": [0.0],
    "Amos.d_coef": [-1.0],
    "growth_rate": [1.0, math.nan],
    "beta3": [1.0],
    "safeguard_warmup": ["yes"],
    "agc_clip": [0.0, math.nan],
    "agc_eps": [-1.0],
    "beta_softplus": [0.0],
    "norm_loss": [-1e-4],
    "warmdown_start": [1.5, -0.1],
    "warmdown_min_lr": [-1.0],
    "warmup_fraction": [1.5],
    "faithful": [1],
    "beta0": [-0.1, math.inf],
    "clip_exponent": [-0.1],
    "momentum_decay": [-0.1],
    "warmup_steps": [0, 2.5],
    "max_weight_norm": [0.0, -1.0],
    "always_adapt": ["yes"],
    "grad_averaging": [1],
    "no_prox": [None],
    "k": [0, -1, 2.5],
    "maximize": ["yes"],
    "use_gc": ["no"],
    "amsgrad": [None],
    "clip_norm": [-1.0, 0.0, math.nan],
}
ILLEGAL_OPTIONS: dict[str, list[Any]] = {
    "engine": ["warp", 3],
    "nonfinite": ["ignored"],
    "state": ["3bit"],
    "weights": ["bouncy"],
}


def refused(action: Callable[[], Any], *words: str) -> None:
    """`action` raises a ValueError whose message holds every word."""
    try:
        action()
    except ValueError as error:
        message = str(error)
        missing = [word for word in words if word not in message]
        assert not missing, f"{message!r} does not name {missing}"
    else:
        raise AssertionError(f"taken without a word; expected an error that names {words}")


def _shown(value: Any) -> str:
    """The value as a message would show it; tensors may be shown as their number."""
    return "" if isinstance(value, torch.Tensor) else repr(value)


@promise("illegal hyper-parameters", engines=ANY_ENGINE, not_for_wrappers="the wrapped optimizer refuses", gc=False)
def illegal_hyperparameters(subject: Subject, engine: str) -> None:
    """As argument and as group entry, at construction and in add_param_group."""
    optimizer = subject.make(weights_of(SMALL))
    before = frozen([], optimizer)
    for name, values in ILLEGAL.items():
        if name not in arguments_of(subject.cls):
            continue
        for value in ILLEGAL.get(f"{subject.name}.{name}", values):
            refused(lambda n=name, v=value: subject.make(weights_of(SMALL), **{n: v}), name, _shown(value))
            group = {"params": weights_of(SMALL), name: value}
            refused(lambda g=group: subject.make([g]), name, _shown(value))
            refused(lambda g=group: optimizer.add_param_group(g), name, _shown(value))
    assert_identical(frozen([], optimizer), before)


@promise("illegal and misspelt options", engines=ANY_ENGINE, not_for_wrappers="the wrapped optimizer refuses", gc=False)
def illegal_options(subject: Subject, engine: str) -> None:
    for name, values in ILLEGAL_OPTIONS.items():
        for value in values:
            refused(lambda n=name, v=value: subject.make(weights_of(SMALL), **{n: v}), name, repr(value))

    def misspelt(**options: Any) -> Callable[[], Any]:
        settings = subject.settings | options
        return lambda: subject.cls(weights_of(SMALL), **settings)

    refused(misspelt(decoupled_wieght_decay=True), "decoupled_wieght_decay", "decoupled_weight_decay")
    refused(misspelt(clipnorm=1.0), "clipnorm", "clip_norm")


@promise(
    "foreach= and fused= of torch", engines=ANY_ENGINE, not_for_wrappers="the wrapped optimizer takes them", gc=False
)
def torch_keywords(subject: Subject, engine: str) -> None:
    """Accepted where they agree with engine=, refused by name where they contradict it."""
    cls, settings = subject.cls, subject.settings
    for accepted in (
        {"foreach": None, "fused": None},
        {"foreach": True},
        {"foreach": False},
        {"foreach": False, "fused": False},
    ):
        params, plain = weights_of(SMALL), weights_of(SMALL)
        train(params, cls(params, **settings, **accepted), SMALL)
        train(plain, cls(plain, **settings, engine="foreach" if accepted.get("foreach") else "auto"), SMALL)
        for a, b in zip(params, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    contradiction = [{"foreach": True, "engine": "reference"}, {"foreach": False, "engine": "foreach"}]
    for options in contradiction:
        refused(lambda o=options: cls(weights_of(SMALL), **settings, **o), "foreach", "engine")
    refused(lambda: cls(weights_of(SMALL), **settings, foreach=True, fused=True), "foreach", "fused")


@promise("bad parameter lists", engines=ANY_ENGINE, not_for_wrappers="the wrapped optimizer refuses", gc=False)
def bad_parameters(subject: Subject, engine: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    refused(lambda: subject.make([]), "empty")
    refused(lambda: subject.make([p, p]), "uplicate")
    refused(lambda: subject.make([{"params": [p]}, {"params": [p]}]), "uplicate")
    refused(lambda: subject.make([p * 2]), "leaf")
    for nonsense in ([1.0], p, "weights", None):
        try:
            subject.make(nonsense)
        except (ValueError, TypeError):
            continue
        raise AssertionError(f"params={nonsense!r} was taken without a word")


@promise("bad add_param_group changes nothing", engines=ANY_ENGINE, gc=False)
def bad_group(subject: Subject, engine: str) -> None:
    params = weights_of(SMALL)
    optimizer = subject.make(params)
    train(params, optimizer, SMALL, range(3))
    before = frozen(params, optimizer)
    fresh = torch.nn.Parameter(torch.zeros(2))
    refused(lambda: optimizer.add_param_group({"params": [params[0]]}))
    refused(lambda: optimizer.add_param_group({"params": [fresh, fresh]}))
    refused(lambda: optimizer.add_param_group({"params": [fresh * 2]}), "leaf")
    refused(lambda: optimizer.add_param_group({"params": [fresh], "lr": -1.0}), "lr", "-1.0")
    assert_identical(frozen(params, optimizer), before)
    train(params, optimizer, SMALL, range(3, 5))


@promise("mismatched state dictionaries change nothing", engines=ANY_ENGINE, gc=False)
def bad_state(subject: Subject, engine: str) -> None:
    """Another number of groups or weights, other shapes, missing keys, another optimizer's state, no dictionary."""
    params = weights_of(SMALL)
    optimizer = subject.make(params)
    train(params, optimizer, SMALL, range(5))
    good = copy.deepcopy(optimizer.state_dict())
    before = frozen(params, optimizer)

    def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        change(bad)
        return bad

    def wider(bad: dict[str, Any]) -> None:
        for state in bad["state"].values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    state[key] = torch.cat([value, value])

    def foreign(bad: dict[str, Any]) -> None:
        for state in bad["state"].values():
            for key in [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()]:
                state[f"not_{key}"] = state.pop(key)

    for bad in (
        changed(lambda b: b["param_groups"].append(copy.deepcopy(b["param_groups"][0]))),
        changed(lambda b: b["param_groups"][0]["params"].pop()),
        changed(wider),
        changed(foreign),
        changed(lambda b: b.pop("state")),
        changed(lambda b: b.pop("param_groups")),
        changed(lambda b: b["param_groups"][0].update(lr=-1.0)),
        {},
    ):
        refused(lambda b=bad: optimizer.load_state_dict(b))
        assert_identical(frozen(params, optimizer), before)
    optimizer.load_state_dict(good)
    train(params, optimizer, SMALL, range(5, 7))
