"""Ranger21 as piste has it by default, typed from Wright & Demeure 2021 and the papers that they put together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oracles.formulas import Array, State, centralized, ema


def unit_norm(x: Array) -> Array:
    """Brock et al. 2021: the length of each output unit's weight; of 3-D weights, at each position."""
    if x.ndim <= 1:
        return np.sqrt(np.asarray((x * x).sum()))
    axes = (1,) if x.ndim <= 3 else tuple(range(1, x.ndim))
    return np.asarray(np.sqrt((x * x).sum(axis=axes, keepdims=True)))


def softplus(x: Array, beta: float) -> Array:
    scaled = beta * x
    return np.where(scaled > 20, x, np.log1p(np.exp(np.minimum(scaled, 20.0))) / beta)


def clipped(g: Array, p: Array, clip: float, eps: float) -> Array:
    """Brock et al. 2021, equation 3."""
    limit, length = clip * np.maximum(unit_norm(p), eps), unit_norm(g)
    return np.where(length > limit, g * limit / np.maximum(length, 1e-6), g)


def _prepared(p: Array, g: Array, hp: dict[str, Any]) -> Array:
    if not hp["decoupled_weight_decay"]:
        g = g + hp["weight_decay"] * p
    if hp["use_agc"]:
        g = clipped(g, p, hp["agc_clip"], hp["agc_eps"])
    if hp["use_gc"]:
        g = centralized(g, hp["gc_conv_only"])
    if hp["normalize"] and g.size > 2:
        g = g / (g.std(ddof=1) + 1e-8)
    return g


def rate(hp: dict[str, Any], step: int) -> float:
    """The learning rate of this step of the run, from 1."""
    lr: float = hp["lr"]
    total = hp["total_steps"]
    if total is None and hp["epochs"] is not None:
        total = hp["epochs"] * hp["batches_per_epoch"]
    if total is None:
        return lr
    up = hp["warmup_steps"]
    if up is None:
        up = math.ceil(2 / (1 - hp["betas"][1]))
        up = int(hp["warmup_fraction"] * total) if up > 0.45 * total else up
    now = lr
    if hp["use_warmup"]:
        now = lr * min(1.0, step / up) if up else lr
    if hp["use_cheb"] and (step > up or not hp["use_warmup"]):
        now = lr * chebyshev(hp["epochs"] - 2, (step - 1) // hp["batches_per_epoch"])
    if hp["use_warmdown"]:
        first = int(hp["warmdown_start"] * total)
        end = min(hp["warmdown_min_lr"], lr)
        if step >= first:
            part = min(1.0, (step + 1 - first) / (total - first + 1))
            now = min(now, lr + part * (end - lr))
    return now


def chebyshev(count: int, epoch: int) -> float:
    """Agarwal et al. 2021: the steps 1 / (C - R cos((i + 1/2) pi / n)), between 1 and 10, in the fractal order."""
    order = [0]
    while len(order) < count:
        order = [x for i in order for x in (i, 2 * len(order) - 1 - i)]
    steps = [1 / (0.55 - 0.45 * math.cos((i + 0.5) / count * math.pi)) for i in order if i < count]
    return steps[min(max(epoch - 1, 0), count - 1)]


def ranger21(
    ps: list[Array],
    gs: list[Array],
    states: list[State],
    shared: State,
    settings: list[dict[str, Any]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    total_steps: int | None = None,
    epochs: int | None = None,
    batches_per_epoch: int | None = None,
    use_warmup: bool = True,
    warmup_steps: int | None = None,
    warmup_fraction: float = 0.22,
    use_warmdown: bool = True,
    warmdown_start: float = 0.72,
    warmdown_min_lr: float = 3e-5,
    use_cheb: bool = False,
    use_agc: bool = True,
    agc_clip: float = 1e-2,
    agc_eps: float = 1e-3,
    use_gc: bool = True,
    gc_conv_only: bool = False,
    normalize: bool = True,
    pnm: bool = True,
    beta0: float = 1.0,
    amsgrad: bool = True,
    softplus: bool = True,
    beta_softplus: float = 50.0,
    stable_decay: bool = True,
    norm_loss: float = 1e-4,
    lookahead: bool = True,
    k: int = 5,
    alpha: float = 0.5,
    use_madgrad: bool = False,
    momentum: float = 0.9,
    decoupled_weight_decay: bool = True,
) -> list[Array]:
    given = {**locals()}
    defaults = {
        name: value for name, value in given.items() if name not in ("ps", "gs", "states", "shared", "settings")
    }
    hps = [defaults | own for own in settings]
    if ps:
        shared["step"] = shared.get("step", 0) + 1
    spread, count = 0.0, 0
    prepared = []
    for p, g, state, hp in zip(ps, gs, states, hps, strict=True):
        t = state["t"] = state.get("t", 0) + 1
        g = _prepared(p, g, hp)
        state["v"] = ema(state.get("v", np.zeros_like(g)), g * g, hp["betas"][1])
        spread += float(state["v"].sum()) / (1 - hp["betas"][1] ** t)
        count += g.size
        prepared.append(g)
    typical = spread / count if count else 0.0
    return [
        _moved(p, g, state, hp, typical, rate(hp, shared["step"]))
        for p, g, state, hp in zip(ps, prepared, states, hps, strict=True)
    ]


ranger21.whole = True  # type: ignore[attr-defined]


def _moved(p: Array, g: Array, state: State, hp: dict[str, Any], typical: float, lr: float) -> Array:
    state.setdefault("slow", p.copy())
    t = state["t"]
    dual = hp["use_madgrad"]
    if hp["decoupled_weight_decay"]:
        pace = lr * math.sqrt(t) if dual and hp["stable_decay"] else lr
        sigma = (typical ** (1 / 3) if dual else math.sqrt(typical)) if hp["stable_decay"] else 1.0
        if sigma > 0:
            p = p * (1 - pace * hp["weight_decay"] / sigma)
    length = unit_norm(p)
    pull = np.where(length > 0, 1 - 1 / (length + hp["eps"]), 0.0)
    p = p * (1 - 2 * lr * hp["norm_loss"] * pull)
    p = _dual(p, g, state, hp, lr, t) if dual else p - lr * _direction(g, state, hp, t)
    if hp["lookahead"] and t % hp["k"] == 0:
        p = state["slow"] = hp["alpha"] * p + (1 - hp["alpha"]) * state["slow"]
    return np.array(p)


def _direction(g: Array, state: State, hp: dict[str, Any], t: int) -> Array:
    b1, b2 = hp["betas"]
    zero = np.zeros_like(g)
    if hp["pnm"]:
        b0, own, other = hp["beta0"], f"m{t % 2}", f"m{(t + 1) % 2}"
        state[own] = ema(state.get(own, zero), g, b1**2)
        m = ((1 + b0) * state[own] - b0 * state.get(other, zero)) / math.sqrt((1 + b0) ** 2 + b0**2)
    else:
        m = state["m1"] = ema(state.get("m1", zero), g, b1)
    v = state["v"]
    if hp["amsgrad"]:
        v = state["vmax"] = np.maximum(state.get("vmax", zero), v)
    root = np.sqrt(v / (1 - b2**t)) + hp["eps"]
    return m / (1 - b1**t) / (softplus(root, hp["beta_softplus"]) if hp["softplus"] else root)


def _dual(p: Array, g: Array, state: State, hp: dict[str, Any], lr: float, t: int) -> Array:
    """Defazio & Jelassi 2021, algorithm 1, without eps."""

    def over_root(s: Array, nu: Array) -> Array:
        root = np.cbrt(nu)
        if hp["softplus"]:
            return s / softplus(root, hp["beta_softplus"])
        return np.divide(s, root, out=np.zeros_like(s), where=root > 0)

    s, nu = state.get("s", np.zeros_like(g)), state.get("nu", np.zeros_like(g))
    x0 = state.setdefault("x0", p.copy()) if hp["momentum"] else p + over_root(s, nu)
    s, nu = state["s"], state["nu"] = s + lr * math.sqrt(t) * g, nu + lr * math.sqrt(t) * g * g
    z = x0 - over_root(s, nu)
    return np.asarray(hp["momentum"] * p + (1 - hp["momentum"]) * z)
