"""Schedule-Free and Prodigy, typed from Defazio et al. 2024 (algorithm 1) and Mishchenko & Defazio 2023 (algorithm 4).

Schedule-Free is written here with all three of its sequences, x included, where piste keeps two of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oracles.formulas import Array, State, centralized, ema, rectification


def _advance(numbers: State, lr: float, r: float, power: float) -> None:
    numbers["lr"], numbers["top"] = lr, max(lr, numbers.get("top", 0.0))
    weight = numbers["k"] ** r * numbers["top"] ** power
    numbers["sum"] = numbers.get("sum", 0.0) + weight
    numbers["c"] = weight / numbers["sum"] if numbers["sum"] else 0.0


def _warm(
    numbers: State,
    *,
    lr: float,
    warmup_steps: int | None = None,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    **_: Any,
) -> None:
    k = numbers["k"] = numbers.get("k", 0) + 1
    _advance(numbers, lr * min(1.0, k / warmup_steps) if warmup_steps else lr, r, weight_lr_power)


def _rectified(
    numbers: State,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    silent_sgd_phase: bool = True,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    **_: Any,
) -> None:
    k = numbers["k"] = numbers.get("k", 0) + 1
    rho, factor = rectification(betas[1], k)
    _advance(numbers, lr * (factor if rho > 4 else float(not silent_sgd_phase)), r, weight_lr_power)


def _moved(y: Array, d: Array, state: State, beta: float) -> Array:
    """z takes the step, x averages it, y lies between; x starts where y does."""
    numbers = state["group"]
    z, x = state.setdefault("z", y), state.setdefault("x", y)
    z = state["z"] = z - numbers["lr"] * d
    x = state["x"] = (1 - numbers["c"]) * x + numbers["c"] * z
    return np.asarray((1 - beta) * z + beta * x)


def schedule_free_sgd(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    if decoupled_weight_decay:
        g = g + weight_decay * p
    return _between_changes(p, g, state, momentum)


def _between_changes(p: Array, d: Array, state: State, beta: float) -> Array:
    """x as the y and z of before would give it under the beta of now, should that have changed."""
    if "z" in state:
        state["x"] = (p - (1 - beta) * state["z"]) / beta
    return _moved(p, d, state, beta)


def _adam(g: Array, state: State, beta2: float, eps: float) -> Array:
    t = state["t"] = state.get("t", 0) + 1
    state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, beta2)
    return np.asarray(g / (np.sqrt(state["v"] / (1 - beta2**t)) + eps))


def schedule_free_adamw(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    d = _adam(g, state, betas[1], eps)
    return _between_changes(p, d + weight_decay * p if decoupled_weight_decay else d, state, betas[0])


def schedule_free_radam(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    silent_sgd_phase: bool = True,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    d = _adam(g, state, betas[1], eps)
    d = d if rectification(betas[1], state["group"]["k"])[0] > 4 else g
    return _between_changes(p, d + weight_decay * p if decoupled_weight_decay else d, state, betas[0])


schedule_free_sgd.advance = _warm  # type: ignore[attr-defined]
schedule_free_adamw.advance = _warm  # type: ignore[attr-defined]
schedule_free_radam.advance = _rectified  # type: ignore[attr-defined]


def prodigy(
    ps: list[Array],
    gs: list[Array],
    states: list[State],
    shared: State,
    settings: list[dict[str, Any]],
    *,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    beta3: float | None = None,
    bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> list[Array]:
    """The estimate is one for all; where groups differ in what it is made with, each has its own of the common sums."""
    given = {**locals()}
    defaults = {
        name: value for name, value in given.items() if name not in ("ps", "gs", "states", "shared", "settings")
    }
    hps = [defaults | own for own in settings]
    gained = length = 0.0
    paces = []
    for i, (p, g, state, hp) in enumerate(zip(ps, gs, states, hps, strict=True)):
        if not hp["decoupled_weight_decay"]:
            g = g + hp["weight_decay"] * p
        if hp["use_gc"]:
            g = centralized(g, hp["gc_conv_only"])
        gs[i] = g
        group = _group(shared, hp)
        b1, b2 = hp["betas"]
        b3 = math.sqrt(b2) if hp["beta3"] is None else hp["beta3"]
        t = state["t"] = state.get("t", 0) + 1
        pace = group["d"] * hp["lr"]
        if hp["bias_correction"]:
            pace *= math.sqrt(1 - b2**t) / (1 - b1**t)
        paces.append(pace)
        if hp["lr"] == 0:
            continue
        zero, relative = np.zeros_like(g), group["d"] / hp["d0"]
        x0 = state.setdefault("x0", p.copy())
        state["m"] = ema(state.get("m", zero), group["d"] * g, b1)
        state["v"] = ema(state.get("v", zero), (group["d"] * g) ** 2, b2)
        state["s"] = b3 * state.get("s", zero) + relative * (group["d"] if hp["safeguard_warmup"] else pace) * g
        gained += relative * pace * float((g * (x0 - p)).sum())
        length += float(np.abs(state["s"]).sum())
    _grow(shared, hps, gained, length)
    return [
        _stepped(p, state, hp, pace, _group(shared, hp)["d"]) if hp["lr"] else p
        for p, state, hp, pace in zip(ps, states, hps, paces, strict=True)
    ]


def _group(shared: State, hp: dict[str, Any]) -> State:
    """Those of a group are found by what does not change under a schedule."""
    key = (hp["d_coef"], hp["d0"], hp["growth_rate"])
    return shared.setdefault(key, {"d": hp["d0"], "top": hp["d0"], "numerator": 0.0})  # type: ignore[no-any-return]


def _grow(shared: State, hps: list[dict[str, Any]], gained: float, length: float) -> None:
    done: list[int] = []
    for hp in hps:
        group = _group(shared, hp)
        if id(group) in done or length == 0:
            continue
        done.append(id(group))
        b3 = math.sqrt(hp["betas"][1]) if hp["beta3"] is None else hp["beta3"]
        group["numerator"] = b3 * group["numerator"] + gained
        found = hp["d_coef"] * group["numerator"] / length
        d = max(group["d"], found) if group["d"] == hp["d0"] else group["d"]
        group["top"] = max(group["top"], found)
        group["d"] = min(group["top"], d * hp["growth_rate"])


def _stepped(p: Array, state: State, hp: dict[str, Any], pace: float, d: float) -> Array:
    root = np.sqrt(state["v"]) + d * hp["eps"]
    step = np.divide(state["m"], root, out=np.zeros_like(root), where=root > 0)
    kept = p * (1 - pace * hp["weight_decay"]) if hp["decoupled_weight_decay"] else p
    return np.asarray(kept - pace * step)


prodigy.whole = True  # type: ignore[attr-defined]
