"""Matrix rules, typed from their papers; functions of matrices through singular values and eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracles.formulas import Array, State, adamw, centralized

# Jordan et al. 2024; Amsel et al. 2025, the coefficients of their listing for five iterations.
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonal(x: Array, iteration: str = "quintic", steps: int = 5) -> Array:
    """What the iterations make of a matrix, worked out on its singular values one by one."""
    norm = np.sqrt((x * x).sum())
    scaled = x / (1.02 * norm + 1e-6) if iteration == "polar_express" else x / max(norm, 1e-7)
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    triples = POLAR_EXPRESS if iteration == "polar_express" else QUINTIC
    for step in range(steps):
        a, b, c = triples[min(step, 4)]
        values = a * values + b * values**3 + c * values**5
    return np.asarray((left * values) @ right)


def muon(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    scale: str = "moonlight",
    iteration: str = "quintic",
    steps: int = 5,
    split: int = 1,
    rule: str = "auto",
    row_beta: float | None = None,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """Jordan et al. 2024, with torch's average in the place of a sum; vectors as AdamW has them.

    ``row_beta`` is NorMuon's.
    """
    if p.ndim < 2 or rule == "adamw":
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        return adamw(p, g, state, **adam, decoupled_weight_decay=decoupled_weight_decay, use_gc=use_gc)
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    buffer = state["buf"] = momentum * state.get("buf", np.zeros_like(p)) + (1 - momentum) * g
    ahead = momentum * buffer + (1 - momentum) * g if nesterov else buffer
    blocks = np.split(ahead.reshape(len(p), -1), split)
    rows, columns = blocks[0].shape
    length = {
        "keller": max(1.0, rows / columns) ** 0.5,
        "moonlight": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
    }[scale]
    u = np.concatenate([orthogonal(block, iteration, steps) for block in blocks])
    if row_beta is not None:
        u = _even(u, state, row_beta)
    u = u.reshape(p.shape)
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    return p - lr * length * u


def _even(u: Array, state: State, beta: float) -> Array:
    """Li et al. 2025: each row over the root of its running mean square, the whole as long as before."""
    rows = state["rows"] = beta * state.get("rows", np.zeros((len(u), 1))) + (1 - beta) * (u * u).mean(1, keepdims=True)
    even = u / (np.sqrt(rows) + 1e-10)
    return np.asarray(even * np.linalg.norm(u) / (np.linalg.norm(even) + 1e-10))


def normuon(p: Array, g: Array, state: State, *, row_beta: float = 0.95, **settings: Any) -> Array:
    return muon(p, g, state, row_beta=row_beta, **settings)
