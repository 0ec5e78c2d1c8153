"""NovoGrad and positive-negative momentum, typed from Ginsburg et al. 2019 (algorithm 1) and Xie et al. 2021."""

from __future__ import annotations

import numpy as np

from oracles.formulas import Array, State, centralized


def novograd(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    grad_averaging: bool = False,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if use_gc:
        g = centralized(g, gc_conv_only)
    norm = float((g * g).sum())
    v = state.get("v", 0.0)
    v = state["v"] = norm if v == 0.0 else betas[1] * v + (1 - betas[1]) * norm
    if amsgrad:
        v = state["largest"] = max(state.get("largest", 0.0), v)
    entering = g / (np.sqrt(v) + eps)
    if decoupled_weight_decay:
        p = (1 - lr * weight_decay) * p
    else:
        entering = entering + weight_decay * p
    if grad_averaging:
        entering = (1 - betas[0]) * entering
    m = state["m"] = betas[0] * state.get("m", np.zeros_like(g)) + entering
    return p - lr * m


def _both(state: State, g: Array, beta1: float, beta0: float) -> Array:
    """The two averages change places at every step: the list is turned round."""
    older, newer = state.get("averages", [np.zeros_like(g), np.zeros_like(g)])
    updated = beta1**2 * older + (1 - beta1**2) * g
    state["averages"] = [newer, updated]
    return ((1 + beta0) * updated - beta0 * newer) / np.sqrt((1 + beta0) ** 2 + beta0**2)


def pnm(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    beta0: float = 1.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    direction = _both(state, g, momentum, beta0)
    return (p * (1 - lr * weight_decay) if decoupled_weight_decay else p) - lr * direction


def adapnm(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = True,
    beta0: float = 1.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    t = state["t"] = state.get("t", 0) + 1
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    direction = _both(state, g, betas[0], beta0)
    v = state["v"] = betas[1] * state.get("v", np.zeros_like(g)) + (1 - betas[1]) * g * g
    if amsgrad:
        v = state["largest"] = np.maximum(state.get("largest", np.zeros_like(g)), v)
    step = direction / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return (p * (1 - lr * weight_decay) if decoupled_weight_decay else p) - lr * step
