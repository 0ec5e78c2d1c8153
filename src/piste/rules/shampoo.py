"""Shampoo: a gradient multiplied, along every axis, by an inverse root of what gradients have been along it."""

from __future__ import annotations

from functools import cache

import torch

from piste.kronecker import Kronecker
from piste.ops import Value, debias, lerp, norm, opaque, sign, sqrt, square
from piste.parts.grafting import grafted
from piste.renewals import rebasing, rooting
from piste.rules.denominator import denominator
from piste.slots import Hyper, Part, States, direction
from piste.storage import State, moment, second_moment
from piste.symbol import MATRIX

__all__ = ["shampoo_google", "shampoo_meta", "statistics"]

#: gradients of another loss, of which factors are made
statistics = State("gradient")

New = dict[str, Value]
Shape = tuple[Value, ...]

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
    return opaque(how.averaged, seen, before, hp.beta2, _share(hp.beta2), kind=MATRIX)


def _whole(factors: Value, hp: Hyper, t: Value) -> Value:
    """Factors corrected for starting at zero, where they do."""
    counted = (t - 1) // hp.statistics_every + 1
    return debias(factors, hp.beta2, counted) if hp.bias_correction and hp.beta2 != 1 else factors


def _renewed(how: Kronecker, factors: Value, st: States, hp: Hyper, shape: Shape) -> Value:
    exponent = 0.0 if hp.exponent is None else hp.exponent
    renew = rooting(how, hp.root, hp.relative_eps)
    return opaque(renew, factors, st.roots, exponent, hp.eps, *shape, kind=MATRIX)


def _filtered(g: Value, st: States, hp: Hyper, t: Value) -> tuple[Value, New]:
    """Momentum, of which another fraction may be used than is kept."""
    if hp.beta1 == 0:
        return g, {}
    beta3 = hp.beta1 if hp.beta3 is None else hp.beta3
    m = lerp(st.m, g, 1 - hp.beta1)
    x = m if hp.beta3 is None else lerp(st.m, g, 1 - beta3)
    return (x / (1 - beta3 * hp.beta1 ** (t - 1)) if hp.bias_correction else x), {"m": m}


def _rooted(
    how: Kronecker, x: Value, g: Value, factors: Value | None, st: States, hp: Hyper, t: Value, shape: Shape
) -> tuple[Value, New]:
    """``x`` times roots, which are renewed where there are ``factors``."""
    if factors is None:
        return opaque(how.times, x, st.roots), {}
    roots = _renewed(how, factors, st, hp, shape)
    return opaque(how.times, x, roots), {"roots": roots}


def _corrected(
    how: Kronecker, x: Value, g: Value, factors: Value | None, st: States, hp: Hyper, t: Value, shape: Shape
) -> tuple[Value, New]:
    """``x`` over the root mean square of gradients, in eigenbases that are renewed where there are ``factors``."""
    new: New = {}
    bases = st.bases
    if factors is not None:
        bases = new["bases"] = opaque(rebasing(how, "rising"), factors, st.bases, *shape, kind=MATRIX)
    v = new["eigenvalues"] = hp.beta2 * st.eigenvalues + _share(hp.beta2) * square(opaque(how.turned, g, bases))
    whole = debias(v, hp.beta2, t) if hp.bias_correction and hp.beta2 != 1 else v
    root = sqrt(whole) if hp.exponent is None else whole**hp.exponent
    return opaque(how.times, opaque(how.turned, x, bases) / (root + hp.eps), bases), new


def _states(how: Kronecker, low: bool) -> dict[str, State]:
    dtype = torch.bfloat16 if low else None
    return {
        "factors": State("accumulator", start=how.zeros, kind=MATRIX, dtype=dtype),
        "roots": State("accumulator", start=how.identity, kind=MATRIX, dtype=dtype),
        "bases": State("accumulator", start=how.identity, kind=MATRIX),
        "eigenvalues": second_moment,
        "statistics": statistics,
    }


@cache
def shampoo_meta(how: Kronecker, low: bool) -> Part:
    """The rule for weights cut up in this way, with factors in bfloat16 if ``low``."""

    @direction(m=moment, v=second_moment, **_states(how, low))
    def shampoo(g: Value, st: States, hp: Hyper, t: Value, shape: Shape) -> Value:
        """facebookresearch/optimizers (Shi et al. 2023): momentum goes in, each block has the length of its own."""
        factors = _factors(how, g, st.factors, st, hp, t)
        new: New = {"factors": factors}
        renews = t == hp.start or (t > hp.start and t % hp.every == 0)
        x, kept = _filtered(g, st, hp, t)
        new |= kept
        magnitude, kept = _magnitude(x, g, st, hp, t)
        new |= kept
        precondition = _corrected if hp.corrected else _rooted
        d, kept = precondition(how, x, g, _whole(factors, hp, t) if renews else None, st, hp, t, shape)
        new |= kept
        if hp.graft == "none":
            return d, new
        return (magnitude if t < hp.start else _grafted(how, d, magnitude)), new

    return shampoo


def _grafted(how: Kronecker, d: Value, magnitude: Value) -> Value:
    """Each block of ``d`` at the length of that block of ``magnitude``."""
    if how.block is None:
        return grafted(d, norm(d), norm(magnitude), 1e-16)[0]
    return grafted(d, opaque(how.norms, d), opaque(how.norms, magnitude), 1e-16)[0]


@cache
def shampoo_google(how: Kronecker, low: bool) -> Part:
    """The rule for weights cut up in this way, with factors in bfloat16 if ``low``."""

    @direction(m=moment, m_graft=moment, v=second_moment, **_states(how, low))
    def shampoo(g: Value, p: Value, st: States, hp: Hyper, t: Value, shape: Shape) -> Value:
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
            d, _ = grafted(d, norm(d), norm(magnitude), _TINY)
        if not hp.decoupled_weight_decay and hp.weight_decay != 0:
            d, magnitude = d + hp.weight_decay * p, magnitude + hp.weight_decay * p
        share = 1 - hp.beta1 if hp.average_momentum else 1.0
        new["m"] = hp.beta1 * st.m + share * d
        if t < hp.start:  # the momentum of what is taken until then
            new["m_graft"] = hp.beta1 * st.m_graft + share * magnitude
        taken, m = (d, new["m"]) if t >= hp.start else (magnitude, new["m_graft"])
        return (share * taken + hp.beta1 * m if hp.nesterov else m), new

    return shampoo
