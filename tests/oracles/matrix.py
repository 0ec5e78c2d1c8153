"""Matrix rules, typed from their papers; functions of matrices through singular values and eigenvalues."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

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


def best_polynomials(powers: Sequence[Sequence[int]], least: float, margin: float) -> list[Array]:
    """Amsel et al. 2025, theorem 3.1, by Remez' exchange: coefficients of the odd polynomials nearest to 1, in turn.

    Each is for the values that the last one leaves, of an interval made wider by ``margin`` at both ends.
    """
    low, high, found = least, 1.0, []
    for odd in powers:
        places = np.linspace(low, high, len(odd) + 1)
        for _ in range(50):
            signs = (-1.0) ** np.arange(len(places))
            *coefficients, error = np.linalg.solve(
                np.column_stack([places[:, None] ** np.array(odd), signs]), np.ones(len(places))
            )
            slope = np.polynomial.Polynomial([0.0] * (max(odd) + 1))
            for power, coefficient in zip(odd, coefficients, strict=True):
                slope.coef[power - 1] += power * coefficient
            turns = slope.roots()
            turns = np.sort(turns[(abs(turns.imag) < 1e-9) & (turns.real > 0)].real)
            places = np.concatenate([[low], turns, [high]])
        found.append(np.array(coefficients))
        low, high = (1 - error) / margin, (1 + error) * margin
    return found


def deflated(x: Array) -> Array:
    """A wide matrix with its largest singular values brought down to the least of them, by block power iteration."""
    rows, columns = x.shape
    rank = min(max(rows // 8, 16), rows // 4)
    if not rank or not x.any():
        return x
    probes = torch.randn(columns, rank, generator=torch.Generator().manual_seed(columns)).double().numpy()
    basis = np.linalg.qr(x @ x.T @ np.linalg.qr(x @ probes)[0])[0]
    left, sizes, right = np.linalg.svd(basis.T @ x, full_matrices=False)
    lower = np.minimum(sizes, max(sizes.min(), 0.01 * sizes.max()))
    return np.asarray(x + basis @ (left * (lower - sizes)) @ right)


def orthogonal(x: Array, iteration: str = "quintic", steps: int | None = None) -> Array:
    """What the iterations make of a matrix, worked out on its singular values one by one."""
    if iteration == "deflated":
        if len(x) > x.shape[1]:
            return orthogonal(x.T, iteration, steps).T
        left, values, right = np.linalg.svd(deflated(x / max(np.linalg.norm(x), 1e-300)), full_matrices=False)
        values = values / (1.01 * max((values**8).sum() ** 0.125, 1e-6))
        triples = [*best_polynomials([(1, 3, 5), (1, 3, 5), (1, 3), (1, 3)], 0.025, 1.01), np.array([1.5, -0.5])]
        for step in range(steps or 3):
            values = sum(c * values ** (1 + 2 * i) for i, c in enumerate(triples[min(step, 4)]))
        return np.asarray((left * values) @ right)
    norm = np.sqrt((x * x).sum())
    scaled = x / (1.02 * norm + 1e-6) if iteration == "polar_express" else x / max(norm, 1e-7)
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    triples = POLAR_EXPRESS if iteration == "polar_express" else QUINTIC
    for step in range(steps or 5):
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
    steps: int | None = None,
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


# --- Shampoo ----------------------------------------------------------------------------------------------------------


def _merged(shape: tuple[int, ...], limit: int, backwards: bool) -> list[int]:
    """Neighbouring axes multiplied, greedily, from the first axis or from the last."""
    axes = [n for n in shape if n > 1]
    axes = axes[::-1] if backwards else axes
    result: list[int] = []
    while axes:
        size = axes.pop(0)
        while axes and size * axes[0] <= limit:
            size *= axes.pop(0)
        result.append(size)
    return (result[::-1] if backwards else result) or [1]


def _corners(shape: list[int], block: int) -> list[tuple[slice, ...]]:
    places: list[tuple[slice, ...]] = [()]
    for n in shape:
        places = [(*place, slice(at, at + block)) for place in places for at in range(0, n, block)]
    return places


def _power(matrix: Array, exponent: float, ridge: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors @ np.diag((np.maximum(values, 0) + ridge) ** -exponent) @ vectors.T)


def _outer(block: Array, axis: int) -> Array:
    others = [i for i in range(block.ndim) if i != axis]
    return np.asarray(np.tensordot(block, block, axes=(others, others)))


def _magnitude(x: Array, g: Array, state: State, t: int, s: dict[str, Any]) -> Array:
    if s["graft_normalized"]:
        x, g = x / (np.linalg.norm(x) + 1e-30), g / (np.linalg.norm(g) + 1e-30)
    kind, eps = s["graft"], s["graft_eps"]
    if kind in ("none", "sgd"):
        return x
    if kind == "sign":
        return np.sign(x)
    beta = s["betas"][1] if s["graft_beta"] is None else s["graft_beta"]
    old = state.get("v", np.zeros_like(g))
    if kind == "adagrad" or beta == 1:
        v = state["v"] = old + g * g
    else:
        v = state["v"] = beta * old + (1 - beta) * g * g
    if kind == "adam" and beta != 1:
        v = v / (1 - beta**t)
    return np.asarray(x / (np.sqrt(v) + eps))


_SHAMPOO: dict[str, Any] = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0, "form": "meta", "graft": "adam",
    "graft_beta": None, "graft_eps": 1e-8, "graft_normalized": False, "every": 10, "statistics_every": 1, "start": 10,
    "block_size": 1024, "merge_dims": True, "sides": "all", "corrected": False,
    "exponent": None, "root": "eigen", "relative_eps": False,
    "bias_correction": True, "beta3": None, "nesterov": False, "average_momentum": False,
    "decoupled_weight_decay": True, "use_gc": False, "gc_conv_only": False,
}  # fmt: skip


def shampoo(p: Array, g: Array, state: State, **settings: Any) -> Array:
    """Both forms, block by block and axis by axis."""
    s = _SHAMPOO | settings
    t = state["t"] = state.get("t", 0) + 1
    google = s["form"] == "google"
    if not s["decoupled_weight_decay"] and not google:
        g = g + s["weight_decay"] * p
    if s["use_gc"]:
        g = centralized(g, s["gc_conv_only"])
    block = s["block_size"] or max(p.size, 1)
    merge = block if s["merge_dims"] and s["block_size"] else 1
    shape = _merged(p.shape, merge, backwards=not google)
    places = _corners(shape, block)
    axes = [shape.index(min(shape))] if s["sides"] == "one" else list(range(len(shape)))
    b2 = s["betas"][1]
    factors = state.setdefault("factors", {})
    roots = state.setdefault("roots", {})
    blocks = state.get("statistics", g).reshape(shape)
    for i, place in enumerate(places):
        for axis in axes:
            outer = _outer(blocks[place], axis)
            start = s["eps"] * np.eye(len(outer)) if google else np.zeros_like(outer)
            roots.setdefault((i, axis), np.eye(len(outer)))
            if (t - 1) % s["statistics_every"] == 0:
                share = 1.0 if b2 == 1 else 1 - b2
                factors[i, axis] = b2 * factors.get((i, axis), start) + share * outer
    due = (t - 1) % s["every"] == 0 if google else t == s["start"] or (t > s["start"] and t % s["every"] == 0)
    if due:
        updates = (t - 1) // s["statistics_every"] + 1
        corrects = not google and s["bias_correction"] and b2 != 1
        for key, factor in factors.items():
            whole = factor / (1 - b2**updates) if corrects else factor
            ridge = s["eps"] * (np.linalg.eigvalsh(whole)[-1] if s["relative_eps"] else 1.0)
            if s["corrected"]:
                roots[key] = np.linalg.eigh(whole)[1]
            else:
                roots[key] = _power(whole, s["exponent"] or 1 / (2 * len(axes)), ridge)
    step = (_google if google else _meta)(p, g, state, t, s, places, shape)
    if s["decoupled_weight_decay"]:
        p = p * (1 - s["lr"] * s["weight_decay"])
    return p - s["lr"] * step


def _along_axes(x: Array, matrices: dict[int, Array]) -> Array:
    for axis, matrix in matrices.items():
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x


def _preconditioned(x: Array, roots: dict[tuple[int, int], Array], places: Any, shape: list[int]) -> Array:
    blocks = x.reshape(shape)
    result = np.zeros_like(blocks)
    for i, place in enumerate(places):
        result[place] = _along_axes(blocks[place], {axis: root for (block, axis), root in roots.items() if block == i})
    return result


def _corrected(x: Array, g: Array, state: State, t: int, s: dict[str, Any], places: Any, shape: list[int]) -> Array:
    """Meta's eigenvalue correction: squares of gradients are averaged in whatever basis there is at the time."""
    b2 = s["betas"][1]
    x, g = x.reshape(shape), g.reshape(shape)
    v = state.setdefault("eigenvalues", np.zeros(shape))
    result = np.zeros(shape)
    for i, place in enumerate(places):
        bases = {axis: basis for (block, axis), basis in state["roots"].items() if block == i}
        into = {axis: basis.T for axis, basis in bases.items()}
        v[place] = b2 * v[place] + (1.0 if b2 == 1 else 1 - b2) * _along_axes(g[place], into) ** 2
        whole = v[place] / (1 - b2**t) if s["bias_correction"] and b2 != 1 else v[place]
        ratio = _along_axes(x[place], into) / (whole ** (s["exponent"] or 0.5) + s["eps"])
        result[place] = _along_axes(ratio, bases)
    return result


def _meta(p: Array, g: Array, state: State, t: int, s: dict[str, Any], places: Any, shape: list[int]) -> Array:
    b1 = s["betas"][0]
    b3 = b1 if s["beta3"] is None else s["beta3"]
    old = state.get("m", np.zeros_like(g))
    x = b3 * old + (1 - b3) * g
    state["m"] = b1 * old + (1 - b1) * g
    if s["bias_correction"]:
        x = x / (1 - b3 * b1 ** (t - 1))
    magnitude = _magnitude(x, g, state, t, s)
    if s["corrected"]:
        d = _corrected(x, g, state, t, s, places, shape)
    else:
        d = _preconditioned(x, state["roots"], places, shape)
    if t < s["start"] and s["graft"] != "none":
        return magnitude
    if s["graft"] != "none":
        wanted = magnitude.reshape(shape)
        for place in places:
            d[place] *= np.linalg.norm(wanted[place]) / (np.linalg.norm(d[place]) + 1e-16)
    return d.reshape(p.shape)


def _google(p: Array, g: Array, state: State, t: int, s: dict[str, Any], places: Any, shape: list[int]) -> Array:
    magnitude = _magnitude(g, g, state, t, s)
    d = _preconditioned(g, state["roots"], places, shape).reshape(p.shape)
    if s["graft"] != "none":
        d = d * np.linalg.norm(magnitude) / (np.linalg.norm(d) + 1e-30)
    if not s["decoupled_weight_decay"]:
        d, magnitude = d + s["weight_decay"] * p, magnitude + s["weight_decay"] * p
    b1 = s["betas"][0]
    share = 1 - b1 if s["average_momentum"] else 1.0
    m = state["m"] = b1 * state.get("m", np.zeros_like(g)) + share * d
    a = state["a"] = b1 * state.get("a", np.zeros_like(g)) + share * magnitude
    taken, momentum = (d, m) if t >= s["start"] else (magnitude, a)
    return np.asarray(share * taken + b1 * momentum if s["nesterov"] else momentum)


# --- SOAP -------------------------------------------------------------------------------------------------------------


def _turned(x: Array, bases: list[Array | None], *, back: bool = False) -> Array:
    """Into the basis of columns along every axis, or back out of it."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            x = np.moveaxis(np.tensordot(basis if back else basis.T, x, axes=(1, axis)), 0, axis)
    return x


def soap(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    shampoo_beta: float | None = None,
    every: int = 10,
    max_size: int | None = 10_000,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    normalize: bool = False,
    bias_correction: bool = True,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    """The authors' `soap.py`, with the step that makes the first basis; k counts the steps after it."""
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    limit = max_size or max(p.shape, default=1)
    shape = _merged(p.shape, limit, backwards=False) if merge_dims else list(p.shape)
    x = g.reshape(shape)
    turns = p.ndim > 1 or (precondition_1d and p.ndim == 1)
    axes = [i for i, n in enumerate(shape) if turns and n <= limit]
    beta = betas[1] if shampoo_beta is None else shampoo_beta
    factors = state.setdefault("factors", {i: np.zeros((shape[i], shape[i])) for i in axes})
    seen = state.get("statistics", g).reshape(shape)
    new = {i: beta * factors[i] + (1 - beta) * _outer(seen, i) for i in axes}
    if "k" not in state:
        state.update(k=0, factors=new, m=np.zeros(shape), v=np.zeros(shape))
        state["bases"] = [np.linalg.eigh(new[i])[1][:, ::-1] if i in axes else None for i in range(len(shape))]
        return p.copy()
    k = state["k"] = state["k"] + 1
    bases = state["bases"]
    y = _turned(x, bases)
    m = state["m"] = betas[0] * state["m"] + (1 - betas[0]) * y
    v = state["v"] = betas[1] * state["v"] + (1 - betas[1]) * y * y
    step = lr * (np.sqrt(1 - betas[1] ** k) / (1 - betas[0] ** k) if bias_correction else 1.0)
    d = _turned(m / (np.sqrt(v) + eps), bases, back=True).reshape(p.shape)
    if normalize:
        d = d / (1e-30 + np.sqrt((d * d).mean()))
    state["factors"] = new
    if k % every == 0:
        m = _turned(m, bases, back=True)
        fresh = list(bases)
        for i in axes:
            order = np.argsort(-np.diag(bases[i].T @ new[i] @ bases[i]), kind="stable")
            v = np.take(v, order, axis=i)
            fresh[i] = np.linalg.qr(new[i] @ bases[i][:, order])[0]
        state.update(bases=fresh, v=v, m=_turned(m, fresh))
    p = p - step * d
    return p * (1 - lr * weight_decay) if decoupled_weight_decay else p


# --- PSGD -------------------------------------------------------------------------------------------------------------


def _probe(shape: Sequence[int], seed: int, t: int) -> Array:
    """The numbers that weights of this shape are promised in their own step t."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"probe {seed} {t}".encode()))
    return torch.randn(tuple(shape), generator=generator).double().numpy()


def _updates_until(t: float, flat: float, decay: float, least: float) -> int:
    """The integral from 0 to t of a probability that is 1 until ``flat`` and falls exponentially to ``least``."""
    end = flat - np.log(least) / decay
    if t <= flat:
        return int(t)
    if t <= end:
        return int(flat + (1 - np.exp(-decay * (t - flat))) / decay)
    return int(flat + (1 - least) / decay + least * (t - end))


def _lower_bound(a: Array) -> float:
    """Li's bound of a spectral norm."""
    size = np.abs(a).max()
    a = a / size
    x = a[:, (a * a).sum(0).argmax()] @ a
    return float(np.linalg.norm(a @ (x / np.linalg.norm(x))) * size)


def _fitted(x: Array, factors: list[Array], diagonal: list[bool], v: Array, rate: float) -> list[Array]:
    """Li 2018, equation for dQ = E Q: each factor a little nearer to whitening x."""
    x = x + 2.0**-11.5 * np.abs(x).mean() * v  # the root of a unit in the last place of float32
    a = _along_axes(x, dict(enumerate(factors)))
    b = _along_axes(v, {i: np.linalg.inv(q).T for i, q in enumerate(factors)})
    new = []
    for i, q in enumerate(factors):
        seen, wanted = _outer(a, i), _outer(b, i)
        if diagonal[i]:
            slope = np.diag(np.diag(seen - wanted)) / np.diag(seen + wanted).max()
        else:
            slope = np.triu(seen - wanted) / _lower_bound(seen + wanted)
        new.append(q - rate * slope @ q)
    return new


def psgd_kron(
    p: Array,
    g: Array,
    state: State,
    *,
    lr: float = 3e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    factor_lr: float = 0.1,
    init_scale: float = 1.0,
    whiten: str = "momentum",
    clip_rms: float | None = 1.1,
    flat_start: int = 500,
    probability_decay: float = 1e-3,
    least_probability: float = 0.03,
    max_size: int | None = 8192,
    diagonal: str = "none",
    merge_dims: bool = True,
    seed: int = 0,
    decoupled_weight_decay: bool = True,
    use_gc: bool = False,
    gc_conv_only: bool = False,
) -> Array:
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    if use_gc:
        g = centralized(g, gc_conv_only)
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = momentum * state.get("m", np.zeros_like(g)) + (1 - momentum) * g
    shape = p.shape or (1,)
    if p.ndim > 2 and merge_dims:
        first, last = (len(p), -1), (-1, p.shape[-1])
        shape = min((p.reshape(way).shape for way in (last, first)), key=lambda s: max(s) / min(s))
    limit = max_size or max(shape)
    diagonals = [diagonal == "all" or n == 1 or n > limit or len(shape) == 1 for n in shape]
    if diagonal == "longest":
        diagonals[int(np.argmax(shape))] = True
    x = (m / (1 - momentum**t)).reshape(shape)
    factors = state.setdefault("Q", [init_scale ** (1 / len(shape)) * np.eye(n) for n in shape])
    count, before = (_updates_until(s, flat_start, probability_decay, least_probability) for s in (t, t - 1))
    if count > before:
        if count % 100 == 0:
            sizes = [np.abs(q).max() for q in factors]
            factors = [q * np.prod(sizes) ** (1 / len(sizes)) / size for q, size in zip(factors, sizes, strict=True)]
        seen = x if whiten == "momentum" else g.reshape(shape)
        factors = state["Q"] = _fitted(seen, factors, diagonals, _probe(shape, seed, t), factor_lr)
    d = _along_axes(x, {i: q.T @ q for i, q in enumerate(factors)}).reshape(p.shape)
    if clip_rms is not None:
        d = d * min(1.0, clip_rms / (np.sqrt((d * d).mean()) + 1e-12))
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    return p - lr * d
