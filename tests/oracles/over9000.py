"""Ralamb, RangerLars, LookaheadAdam and SM3, typed from over9000's code as described, and from Anil et al. 2019."""

from __future__ import annotations

import math

import numpy as np

from oracles.formulas import Array, State, adam, centralized, ema, rectification


def ralamb(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    trust_denominator: str = "update",
    max_weight_norm: float | None = 10.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """`trust_denominator="weights"` divides by the norm of the weights after an unscaled step, as released."""
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    v = state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, betas[1])
    rho, r = rectification(betas[1], t)
    c1, c2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    if rho > 5.0:
        update, held = math.sqrt(c2) / c1 * m / (np.sqrt(v) + eps), r
    else:
        update, held = m / c1, 1.0
    start = p * (1.0 - lr * weight_decay) if decoupled_weight_decay else p
    probe = update if trust_denominator == "update" else start - lr * held * update
    weight, length = float(np.sqrt((p * p).sum())), float(np.sqrt((probe * probe).sum()))
    if max_weight_norm is not None:
        weight = min(weight, max_weight_norm)
    trust = weight / length if weight > 0 and length > 0 else 1.0
    return start - lr * held * trust * update


def _synced(p: Array, state: State, t: int, k: int, alpha: float, late_start: bool) -> Array:
    if t % k:
        return p
    slow = state["slow"] = p if late_start and t == k else alpha * p + (1 - alpha) * state["slow"]
    return np.array(slow)


def ranger_lars(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    k: int = 6,
    alpha: float = 0.5,
    trust_denominator: str = "update",
    max_weight_norm: float | None = 10.0,
    late_start: bool = False,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    state.setdefault("slow", p.copy())
    own = state.setdefault("ralamb", {})
    p = ralamb(
        *(p, g, own),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        trust_denominator=trust_denominator,
        max_weight_norm=max_weight_norm,
        decoupled_weight_decay=decoupled_weight_decay,
        use_gc=use_gc,
        gc_conv_only=gc_conv_only,
    )
    return _synced(p, state, own["t"], k, alpha, late_start)


def lookahead_adam(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    k: int = 6,
    alpha: float = 0.5,
    late_start: bool = False,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    state.setdefault("slow", p.copy())
    own = state.setdefault("adam", {})
    p = adam(
        *(p, g, own),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        decoupled_weight_decay=decoupled_weight_decay,
        use_gc=use_gc,
        gc_conv_only=gc_conv_only,
    )
    return _synced(p, state, own["t"], k, alpha, late_start)


def sm3(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    beta: float = 1.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """SM3-II. optax 0.2.8 `scale_by_sm3` is this with b1 = momentum, b2 = beta (it refuses scalars)."""
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    least = np.zeros_like(g)
    if g.ndim <= 1:
        least = state.get("all", least)
    elif "slices" in state:
        least = np.broadcast_to(state["slices"][0], g.shape)
        for accumulator in state["slices"][1:]:
            least = np.minimum(least, accumulator)
    nu = least + g * g if beta == 1 else beta * least + (1 - beta) * g * g
    if g.ndim <= 1:
        state["all"] = nu
    else:
        every = range(g.ndim)
        state["slices"] = [nu.max(axis=tuple(j for j in every if j != i), keepdims=True) for i in every]
    step = np.where(nu > 0, g / np.sqrt(np.where(nu > 0, nu + eps, 1.0)), 0.0)
    if momentum:
        step = state["buffer"] = momentum * state.get("buffer", np.zeros_like(g)) + (1 - momentum) * step
    return (p * (1 - lr * weight_decay) if decoupled_weight_decay else p) - lr * step
