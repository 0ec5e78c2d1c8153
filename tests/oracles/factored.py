"""Adafactor and Amos, typed from Shazeer & Stern 2018 (algorithms 4 to 6) and Tian & Parikh 2022 (algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from oracles.formulas import Array, State, centralized


def adafactor(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float | None = None,
    eps: float = 1e-30,
    eps_scale: float = 1e-3,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    warmup_init: bool = False,
    factor: str = "matrix",
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """``factor="last"`` is transformers' Adafactor 5.23.0 for every rank, ``"matrix"`` for vectors and matrices."""
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    t = state["t"] = state.get("t", 0) + 1
    rho = lr if lr is not None else min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
    rate = rho * max(eps_scale, math.sqrt(float((p * p).mean()))) if scale_parameter else rho
    kept = 1 - t**decay_rate
    x = g.reshape(g.shape[0], -1) if factor == "matrix" and g.ndim > 1 else g
    q = x * x + eps
    if x.ndim > 1:
        r = state["r"] = kept * state.get("r", 0.0) + (1 - kept) * q.mean(-1)
        c = state["c"] = kept * state.get("c", 0.0) + (1 - kept) * q.mean(-2)
        u = x / np.sqrt((r / r.mean(-1, keepdims=True))[..., :, None] * c[..., None, :])
    else:
        v = state["v"] = kept * state.get("v", 0.0) + (1 - kept) * q
        u = x / np.sqrt(v)
    u = u.reshape(g.shape)
    u = rate * u / max(1.0, math.sqrt(float((u * u).mean())) / clip_threshold)
    if beta1 is not None:
        u = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * u
    return np.asarray(p - (weight_decay * rate * p if decoupled_weight_decay else 0.0) - u)


def amos(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    beta: float = 0.999,
    scale: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    clip_value: float | None = None,
    transposed: bool = False,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    if clip_value is not None:
        g = np.clip(g, -clip_value, clip_value)
    t = state["t"] = state.get("t", 0) + 1
    output = 1 if transposed else 0
    axes = tuple(a for a in range(g.ndim) if a != output) if g.ndim > 1 else None
    g2 = np.asarray((g * g).mean(axis=axes, keepdims=g.ndim > 1))
    v = state["v"] = beta * state.get("v", 0.0) + (1 - beta) * g2
    b = state.get("b", np.zeros_like(v))
    inverse = (1 - beta**t) / np.maximum(v, 2.0**-125)
    gamma = lr**2 * inverse * g2 / np.sqrt(1 + c_coef * math.sqrt(lr) * b)
    pull = gamma / 2 + (weight_decay if decoupled_weight_decay else 0.0)
    u = (-lr * scale * np.sqrt(inverse) * g - pull * p) / (1 + d_coef * math.sqrt(lr * scale) * b)
    state["b"] = b + gamma * (1 + b)
    if momentum:
        u = state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * u
    return np.asarray(p + u)
