"""Shampoo: a gradient multiplied, along every axis, by an inverse root of what gradients have been along it."""

from __future__ import annotations

from functools import cache

import torch

from piste.kronecker import Kronecker, rooting
from piste.ops import Value, debias, length_ratio, lerp, norm, opaque, sign, sqrt, square
from piste.rules.denominator import denominator
from piste.slots import Hyper, Part, States, direction
from piste.storage import State, moment, second_moment
from piste.symbol import MATRIX

__all__ = ["shampoo_google", "shampoo_meta", "statistics"]

#: gradients of another loss, of which factors are made
statistics = State("gradient")

New = dict[str, Value]

_TINY = 1e-30


def _share(beta: Value) -> Value:
    """What of a new term enters a sum that keeps the fraction ``beta``: all of it where nothing is forgotten."""
    return 1.0 if beta == 1 else 1 - beta


def _magnitude(x: Value, g: Value, st: States, hp: Hyper, t: Value) -> tuple[Value, New]:
    """What gives the step its length, made of ``x``; averages are over gradients."""
    if hp.graft_normalized:
        x, g = x / (norm(x) + _TINY), g / (norm(g) + _TINY)
    if hp.graft in ("none", "sgd"):
        return x, {}
    if hp.graft == "sign":
        return sign(x), {}
    if hp.graft == "adagrad":
        v = st.v + square(g)
        return x / (sqrt(v) + hp.graft_eps), {"v": v}
    beta = hp.beta2 if hp.graft_beta is None else hp.graft_beta
    v = beta * st.v + _share(beta) * square(g)
    if hp.graft == "adam" and beta != 1:
        return x / denominator(v, beta, t, hp.graft_eps), {"v": v}
    return x / (sqrt(v) + hp.graft_eps), {"v": v}


def _factors(how: Kronecker, g: Value, before: Value, st: States, hp: Hyper, t: Value) -> Value:
    """The sums of outer products along each axis of each block, after a step that may leave them as they are."""
    if (t - 1) % hp.statistics_every != 0:
        return before
    seen = st.statistics if hp.preconditioner_gradients else g
    outer = opaque(how.gram, seen, kind=MATRIX)
    return before + outer if hp.beta2 == 1 else lerp(before, outer, 1 - hp.beta2)


def _renewed(how: Kronecker, factors: Value, st: States, hp: Hyper, shape: tuple[Value, ...]) -> Value:
    exponent = 0.0 if hp.exponent is None else hp.exponent
    renew = rooting(how, hp.root, hp.relative_eps)
    return opaque(renew, factors, st.roots, exponent, hp.eps, *shape, kind=MATRIX)


def _states(how: Kronecker, low: bool) -> dict[str, State]:
    dtype = torch.bfloat16 if low else None
    return {
        "factors": State("accumulator", start=how.zeros, kind=MATRIX, dtype=dtype),
        "roots": State("accumulator", start=how.identity, kind=MATRIX, dtype=dtype),
        "statistics": statistics,
    }


@cache
def shampoo_meta(how: Kronecker, low: bool) -> Part:
    """The rule for weights cut up in this way, with factors in bfloat16 if ``low``."""

    @direction(m=moment, v=second_moment, **_states(how, low))
    def shampoo(g: Value, st: States, hp: Hyper, t: Value, shape: tuple[Value, ...]) -> Value:
        """facebookresearch/optimizers (Shi et al. 2023): momentum goes in, each block has the length of its own."""
        factors = _factors(how, g, st.factors, st, hp, t)
        new: New = {"factors": factors}
        roots = st.roots
        if t == hp.start or (t > hp.start and t % hp.every == 0):
            counted = (t - 1) // hp.statistics_every + 1
            whole = debias(factors, hp.beta2, counted) if hp.bias_correction and hp.beta2 != 1 else factors
            roots = new["roots"] = _renewed(how, whole, st, hp, shape)
        x = g
        if hp.beta1 != 0:
            new["m"] = lerp(st.m, g, 1 - hp.beta1)
            x = new["m"] if hp.beta3 is None else lerp(st.m, g, 1 - hp.beta3)
            if hp.bias_correction:
                x = x / (1 - (hp.beta1 if hp.beta3 is None else hp.beta3) * hp.beta1 ** (t - 1))
        magnitude, kept = _magnitude(x, g, st, hp, t)
        new |= kept
        if t < hp.start and hp.graft != "none":
            return magnitude, new
        d = opaque(how.times, x, roots)
        return (d if hp.graft == "none" else d * _ratio(how, magnitude, d)), new

    return shampoo


def _ratio(how: Kronecker, magnitude: Value, d: Value) -> Value:
    """What brings each block of ``d`` to the length of that block of ``magnitude``."""
    if how.block is None:
        return length_ratio(norm(magnitude), norm(d), 1e-16)
    return length_ratio(opaque(how.norms, magnitude), opaque(how.norms, d), 1e-16)


@cache
def shampoo_google(how: Kronecker, low: bool) -> Part:
    """The rule for weights cut up in this way, with factors in bfloat16 if ``low``."""

    @direction(m=moment, m_graft=moment, v=second_moment, **_states(how, low))
    def shampoo(g: Value, p: Value, st: States, hp: Hyper, t: Value, shape: tuple[Value, ...]) -> Value:
        """google-research's scalable_shampoo (Anil et al. 2020): gradients go in, momentum is of what comes out."""
        before = st.factors + hp.eps * st.roots if t == 1 else st.factors  # roots begin as the identity
        factors = _factors(how, g, before, st, hp, t)
        new: New = {"factors": factors}
        roots = st.roots
        if (t - 1) % hp.every == 0:
            roots = new["roots"] = _renewed(how, factors, st, hp, shape)
        magnitude, kept = _magnitude(g, g, st, hp, t)
        new |= kept
        d = opaque(how.times, g, roots)
        if hp.graft != "none":
            d = d * length_ratio(norm(magnitude), norm(d), _TINY)
        if not hp.decoupled_weight_decay and hp.weight_decay != 0:
            d, magnitude = d + hp.weight_decay * p, magnitude + hp.weight_decay * p
        share = 1 - hp.beta1 if hp.average_momentum else 1.0
        new["m"] = hp.beta1 * st.m + share * d
        if t < hp.start:  # the momentum of what is taken until then
            new["m_graft"] = hp.beta1 * st.m_graft + share * magnitude
        taken, m = (d, new["m"]) if t >= hp.start else (magnitude, new["m_graft"])
        return (share * taken + hp.beta1 * m if hp.nesterov else m), new

    return shampoo
