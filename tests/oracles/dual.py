"""MADGRAD and its mirror form, typed from Defazio & Jelassi 2021 (algorithm 1) and the text of `mirror_madgrad.py`."""

from __future__ import annotations

import numpy as np

from oracles.formulas import Array, State, centralized


def _fraction(x: Array, nu: Array, eps: float) -> Array:
    root = np.cbrt(nu) + eps
    return np.divide(x, root, out=np.zeros_like(x), where=root != 0)


def madgrad(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float = 1e-6,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """x0 is kept always here, so that the form without momentum is checked against what it stands for.

    Where momentum is 0 the weight is z, and x0 is z plus what was taken off, decay included: the released code works
    x0 out from the weight as it is, so decoupled decay moves it along.
    """
    k = state["k"] = state.get("k", -1) + 1
    rate = lr + eps if lr else 0.0
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    x0 = state.setdefault("x0", p.copy())
    nu, s = state.get("nu", np.zeros_like(p)), state.get("s", np.zeros_like(p))
    if momentum == 0:
        x0 = p + _fraction(s, nu, eps)
    lam = rate * (k + 1) ** 0.5
    nu, s = nu + lam * g**2, s + lam * g
    state["nu"], state["s"] = nu, s
    new = momentum * p + (1 - momentum) * (x0 - _fraction(s, nu, eps))
    return new - rate * weight_decay * p if decoupled_weight_decay else new


def mirror_madgrad(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    decoupled_weight_decay: bool = False,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    k = state["k"] = state.get("k", -1) + 1
    rate = lr + eps if lr else 0.0
    z = state.get("z", p)
    if decoupled_weight_decay:
        z = z - rate * weight_decay * z
    else:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    nu = state["nu"] = state.get("nu", np.zeros_like(p)) * np.sqrt(k / (k + 1)) + g**2
    z = state["z"] = z - rate * np.cbrt(k + 1.0) * _fraction(g, nu, eps)
    return momentum * p + (1 - momentum) * z
