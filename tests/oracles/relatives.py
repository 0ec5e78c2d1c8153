"""Younger relatives of Adam, typed from their papers."""

from __future__ import annotations

import math

import numpy as np

from oracles.formulas import Array, State, centralized


def _prepared(p: Array, g: Array, weight_decay: float, decoupled: bool, use_gc: bool, gc_conv_only: bool) -> Array:
    g = g if decoupled else g + weight_decay * p
    return centralized(g, gc_conv_only) if use_gc else g


def _t(state: State) -> int:
    state["t"] = state.get("t", 0) + 1
    return int(state["t"])


def _running(state: State, name: str, new: Array, beta: float) -> Array:
    state[name] = beta * state.get(name, np.zeros_like(new)) + (1 - beta) * new
    return np.asarray(state[name])


def laprop(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 4e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Ziyin et al. 2020, algorithm 1."""
    t = _t(state)
    g = _prepared(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    root = np.sqrt(_running(state, "n", g**2, betas[1]) / (1 - betas[1] ** t)) + eps
    m = _running(state, "m", g / root, betas[0])
    shrunk = p * (1 - lr * weight_decay) if decoupled_weight_decay else p
    return shrunk - lr / (1 - betas[0] ** t) * m


def adopt(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip_exponent: float = 0.25,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Taniguchi et al. 2024, algorithm 2, whose step 0 sets v; the clipping of section 4."""
    k = _t(state) - 1
    g = _prepared(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    if k == 0:
        state["v"] = g * g
        return p
    scaled = g / np.maximum(np.sqrt(state["v"]), eps)
    limit = float(k) ** clip_exponent
    m = _running(state, "m", np.minimum(np.maximum(scaled, -limit), limit), betas[0])
    state["v"] = betas[1] * state["v"] + (1 - betas[1]) * g * g
    return (p - lr * weight_decay * p if decoupled_weight_decay else p) - lr * m


def nadamw(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Dozat 2016, with the momentum schedule of its section 3."""
    t = _t(state)
    g = _prepared(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    mu = betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["mus"] = state.get("mus", 1.0) * mu
    m = _running(state, "m", g, betas[0])
    v = _running(state, "v", g * g, betas[1]) / (1 - betas[1] ** t)
    ahead = (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next)
    return (p * (1 - lr * weight_decay) if decoupled_weight_decay else p) - lr * ahead / (np.sqrt(v) + eps)


def stable_adamw(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Wortsman et al. 2023, algorithm 2."""
    t = _t(state)
    g = _prepared(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    m = _running(state, "m", g, betas[0]) / (1 - betas[0] ** t)
    v = _running(state, "v", g * g, betas[1]) / (1 - betas[1] ** t)
    rms = math.sqrt(float((g * g / np.maximum(v, eps * eps)).mean()))
    rate = lr / max(1.0, rms)
    shrunk = p - rate * weight_decay * p if decoupled_weight_decay else p
    return shrunk - rate * m / (np.sqrt(v) + eps)


def ademamix(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    alpha: float = 5.0,
    warmup_steps: int | None = None,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Pagliardini et al. 2024, algorithm 1 and the schedulers of its section 3."""
    t = _t(state)
    g = _prepared(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    b1, b2, b3 = betas
    if warmup_steps is not None:
        share = t / warmup_steps
        alpha = min(share * alpha, alpha)
        if share < 1:
            half = math.log(b1) * math.log(b3) / ((1 - share) * math.log(b3) + share * math.log(b1))
            b3 = min(math.exp(half), b3)
    fast = _running(state, "fast", g, b1) / (1 - b1**t)
    slow = _running(state, "slow", g, b3)
    v = _running(state, "v", g * g, b2) / (1 - b2**t)
    shrunk = p * (1 - lr * weight_decay) if decoupled_weight_decay else p
    return shrunk - lr * (fast + alpha * slow) / (np.sqrt(v) + eps)
