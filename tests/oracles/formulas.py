"""The update formulas, typed a second time.

Every function here is written from the papers (or, where the released code and the paper differ, from the released
code) and from nothing in `src/piste`. The arithmetic is NumPy in float64, one weight at a time, with a small state
dictionary of its own, so that no operator, no engine and no helper is shared with the library under test.

A formula has the shape ``formula(p, g, state, **hyperparameters) -> new p``. It changes `state` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Any]
Formula = Callable[..., Array]


# --- pieces -------------------------------------------------------------------------------------------------------


def centralized(x: Array, conv_only: bool = False) -> Array:
    """Gradient centralization (Yong et al. 2020, eq. 1): subtract the mean over every axis but the first."""
    if x.ndim <= (3 if conv_only else 1):
        return x
    return x - x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)


def ema(old: Array, new: Array, decay: float) -> Array:
    return decay * old + (1.0 - decay) * new


def rectification(beta2: float, t: int) -> tuple[float, float]:
    """Length of the approximated average and the rectification term (Liu et al. 2019, eqs. 3-5)."""
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * t * beta2**t / (1.0 - beta2**t)
    if rho <= 4.0:
        return rho, 0.0
    r = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    return rho, r


def clip_coefficient(gradients: list[Array], max_norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplies by: the joint L2 norm, 1e-6 under the bar, never above 1."""
    joint = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    return min(1.0, max_norm / (joint + 1e-6))


def _gradient(p: Array, g: Array, weight_decay: float, decoupled: bool, use_gc: bool, gc_conv_only: bool) -> Array:
    """The gradient the moments see: L2 first, then centralization (the order of the GC authors' code)."""
    if weight_decay and not decoupled:
        g = g + weight_decay * p
    return centralized(g, gc_conv_only) if use_gc else g


def _decayed(p: Array, lr: float, weight_decay: float, decoupled: bool) -> Array:
    return p * (1.0 - lr * weight_decay) if decoupled else p


def _tick(state: State) -> int:
    state["t"] = state.get("t", 0) + 1
    return int(state["t"])


# --- SGD ----------------------------------------------------------------------------------------------------------


def sgd(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Momentum SGD as torch defines it: the buffer starts as the first gradient, lr stands outside the buffer."""
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    direction = g
    if momentum:
        buffer = momentum * state["buffer"] + (1.0 - dampening) * g if "buffer" in state else g.copy()
        state["buffer"] = buffer
        direction = g + momentum * buffer if nesterov else buffer
    return _decayed(p, lr, weight_decay, decoupled_weight_decay) - lr * direction


# --- RMSprop ------------------------------------------------------------------------------------------------------


def rmsprop(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    tf: bool = False,
    lr_in_momentum: bool = True,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """RMSprop (Hinton's lecture; centered: Graves 2013).

    ``tf=True`` is TensorFlow's: the average starts at one, eps stands inside the root, the momentum buffer holds lr.
    """
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    v = ema(state.get("v", np.ones_like(g) if tf else np.zeros_like(g)), g * g, alpha)
    state["v"] = v
    variance = v
    if centered:
        state["mean"] = ema(state.get("mean", np.zeros_like(g)), g, alpha)
        variance = v - state["mean"] ** 2
    root = np.sqrt(variance + eps) if tf else np.sqrt(variance) + eps
    direction = g / root
    p = _decayed(p, lr, weight_decay, decoupled_weight_decay)
    if not momentum:
        return p - lr * direction
    old = state.get("buffer", np.zeros_like(g))
    if tf and lr_in_momentum:
        state["buffer"] = momentum * old + lr * direction
        return p - state["buffer"]
    state["buffer"] = momentum * old + direction
    return p - lr * state["buffer"]


# --- Adam, AdamW --------------------------------------------------------------------------------------------------


def adam(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Adam (Kingma & Ba 2014, algorithm 1); AMSGrad keeps the maximum of the *uncorrected* second moment."""
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    t = _tick(state)
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    v = state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, betas[1])
    if amsgrad:
        v = state["vmax"] = np.maximum(state.get("vmax", np.zeros_like(g)), v)
    m_hat = m / (1.0 - betas[0] ** t)
    v_hat = v / (1.0 - betas[1] ** t)
    return _decayed(p, lr, weight_decay, decoupled_weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)


def adamw(p: Array, g: Array, state: State, **hyperparameters: Any) -> Array:
    """Adam with decoupled decay (Loshchilov & Hutter 2019), its decay 0.01 unless told, as in torch."""
    return adam(p, g, state, **({"decoupled_weight_decay": True, "weight_decay": 1e-2} | hyperparameters))


# --- RAdam --------------------------------------------------------------------------------------------------------


def radam(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    degenerated_to_sgd: bool = True,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Rectified Adam (Liu et al. 2019, algorithm 2) with the threshold 5 that every released code uses.

    eps is added to the uncorrected root. With ``degenerated_to_sgd=False`` the weight rests while the average is
    too short: no gradient step and no decay (the authors' code), though the moments go on collecting.
    """
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    t = _tick(state)
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    v = state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, betas[1])
    rho, r = rectification(betas[1], t)
    c1, c2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    decayed = _decayed(p, lr, weight_decay, decoupled_weight_decay)
    if rho > 5.0:
        return decayed - lr * r * math.sqrt(c2) / c1 * m / (np.sqrt(v) + eps)
    if degenerated_to_sgd:
        return decayed - lr / c1 * m
    return p.copy()


# --- AdaBelief ----------------------------------------------------------------------------------------------------


def adabelief(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    rectify: bool = True,
    degenerated_to_sgd: bool = True,
    fixed_decay: bool = False,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """AdaBelief (Zhuang et al. 2020, algorithm 2) as adabelief-pytorch 0.2.1 runs it.

    The residual is taken against the new mean; eps is added to the stored `s` at every step, so it accumulates up to
    eps/(1-beta2), and once more to the root. The rectified branch divides by `s` itself: it ignores AMSGrad's
    maximum. ``fixed_decay`` shrinks by ``weight_decay`` without lr. The decay also happens while the weight rests.
    """
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc, gc_conv_only)
    if decoupled_weight_decay:
        p = p * (1.0 - (weight_decay if fixed_decay else lr * weight_decay))
    t = _tick(state)
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    s = state["s"] = ema(state.get("s", np.zeros_like(g)), (g - m) ** 2, betas[1]) + eps
    largest = s
    if amsgrad:
        largest = state["smax"] = np.maximum(state.get("smax", np.zeros_like(g)), s)
    c1, c2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    if not rectify:
        return p - lr / c1 * m / (np.sqrt(largest) / math.sqrt(c2) + eps)
    rho, r = rectification(betas[1], t)
    if rho >= 5.0:
        return p - lr * r * math.sqrt(c2) / c1 * m / (np.sqrt(s) + eps)
    if degenerated_to_sgd:
        return p - lr / c1 * m
    return p.copy()


# --- the Ranger family --------------------------------------------------------------------------------------------


def _synced(p: Array, state: State, t: int, k: int, alpha: float) -> Array:
    """Integrated Lookahead on the weight's own step count; `slow` was stored before the first step."""
    if t % k:
        return p
    state["slow"] = alpha * p + (1.0 - alpha) * state["slow"]
    return state["slow"].copy()


def ranger(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 1e-2,
    k: int = 6,
    alpha: float = 0.5,
    use_gc: bool = True,
    gc_conv_only: bool = False,
    gc_loc: bool = True,
    decoupled_weight_decay: bool = True,
) -> Array:
    """lessw2020's ranger.py: centralized gradient, RAdam (strictly above 5), decay on p, Lookahead from the start.

    ``gc_loc=False`` centralizes the direction instead (the GC authors' second placement).
    """
    state.setdefault("slow", p.copy())
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc and gc_loc, gc_conv_only)
    t = _tick(state)
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    v = state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, betas[1])
    rho, r = rectification(betas[1], t)
    c1, c2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    direction, scale = (m / (np.sqrt(v) + eps), r * math.sqrt(c2) / c1) if rho > 5.0 else (m, 1.0 / c1)
    if use_gc and not gc_loc:
        direction = centralized(direction, gc_conv_only)
    p = _decayed(p, lr, weight_decay, decoupled_weight_decay) - lr * scale * direction
    return _synced(p, state, t, k, alpha)


def ranger_adabelief(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-12,
    weight_decay: float = 1e-2,
    k: int = 6,
    alpha: float = 0.5,
    use_gc: bool = True,
    gc_conv_only: bool = False,
    gc_loc: bool = True,
    decoupled_weight_decay: bool = True,
) -> Array:
    """ranger-adabelief 0.1.0 with its alias repaired.

    As released: eps enters the stored `s` only in steps that are rectified, the decay is added to the direction (so
    the rectifier scales it too), and ``gc_loc=False`` centralizes the direction *with* its decay. Not as released: in
    the short-average phase the package adds the decay into the momentum buffer itself, because direction and buffer
    are one tensor there; here the buffer stays clean.
    """
    state.setdefault("slow", p.copy())
    g = _gradient(p, g, weight_decay, decoupled_weight_decay, use_gc and gc_loc, gc_conv_only)
    t = _tick(state)
    m = state["m"] = ema(state.get("m", np.zeros_like(g)), g, betas[0])
    s = ema(state.get("s", np.zeros_like(g)), (g - m) ** 2, betas[1])
    rho, r = rectification(betas[1], t)
    c1, c2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    if rho > 5.0:
        s = s + eps
        direction, scale = m / (np.sqrt(s) + eps), r * math.sqrt(c2) / c1
    else:
        direction, scale = m, 1.0 / c1
    state["s"] = s
    if decoupled_weight_decay:
        direction = direction + weight_decay * p
    if use_gc and not gc_loc:
        direction = centralized(direction, gc_conv_only)
    return _synced(p - lr * scale * direction, state, t, k, alpha)
