"""LAMB, Adan and Lion, typed from You et al. 2020 (algorithm 2), Xie et al. 2022 (algorithm 1) and Chen et al. 2023."""

from __future__ import annotations

import numpy as np

from oracles.formulas import Array, State, centralized


def _average(state: State, name: str, new: Array, beta: float) -> Array:
    state[name] = beta * state.get(name, np.zeros_like(new)) + (1 - beta) * new
    return np.asarray(state[name])


def lamb(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    bias_correction: bool = True,
    always_adapt: bool = True,
    trust_clip: bool = False,
    max_weight_norm: float | None = None,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    t = state["t"] = state.get("t", 0) + 1
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    m, v = _average(state, "m", g, betas[0]), _average(state, "v", g * g, betas[1])
    if bias_correction:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    update = m / (np.sqrt(v) + eps)
    if decoupled_weight_decay:
        update = update + weight_decay * p
    trust = 1.0
    if always_adapt or weight_decay:
        weight, length = np.sqrt((p * p).sum()), np.sqrt((update * update).sum())
        weight = weight if max_weight_norm is None else min(weight, max_weight_norm)
        trust = float(weight / length) if weight > 0 and length > 0 else 1.0
        trust = min(trust, 1.0) if trust_clip else trust
    return p - lr * trust * update


def adan(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    t = state["t"] = state.get("t", 0) + 1
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    b1, b2, b3 = betas
    difference = g - state.get("previous", g)
    state["previous"] = g.copy()
    m = _average(state, "m", g, b1) / (1 - b1**t)
    d = _average(state, "d", difference, b2) / (1 - b2**t)
    n = _average(state, "n", (g + b2 * difference) ** 2, b3) / (1 - b3**t)
    root = np.sqrt(n) + eps
    if decoupled_weight_decay and no_prox:
        p = p - lr * weight_decay * p
    moved = p - lr * m / root - lr * b2 * d / root
    return moved / (1 + lr * weight_decay) if decoupled_weight_decay and not no_prox else moved


def lion(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    m = state.get("m", np.zeros_like(g))
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    step = np.sign(betas[0] * m + (1 - betas[0]) * g)
    return (p * (1 - lr * weight_decay) if decoupled_weight_decay else p) - lr * step
