"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from functools import cache

import torch

from piste.kronecker import Kronecker
from piste.ops import Value, lerp, mean, opaque, sqrt, square
from piste.renewals import rebasing
from piste.rules.shampoo import statistics
from piste.slots import Hyper, Part, States, direction
from piste.storage import State, moment, second_moment
from piste.symbol import MATRIX

__all__ = ["soap"]


def _stepped(x: Value, st: States, hp: Hyper) -> tuple[Value, Value, Value]:
    """Adam's moments in whatever basis, and their ratio."""
    m = lerp(st.m, x, 1 - hp.beta1)
    v = lerp(st.v, square(x), 1 - hp.beta2)
    return m, v, m / (sqrt(v) + hp.eps)


def _sized(d: Value, hp: Hyper, taken: Value) -> Value:
    """The ratio as a step: at a root mean square of 1 if asked, then Adam's bias correction, eps outside of it."""
    if hp.normalize:
        d = d / (sqrt(mean(square(d))) + 1e-30)
    return d * (sqrt(1 - hp.beta2**taken) / (1 - hp.beta1**taken)) if hp.bias_correction else d


@cache
def soap(how: Kronecker, low: bool) -> Part:
    """The rule for weights cut up in this way, with factors in bfloat16 if ``low``."""
    factors_of = State("accumulator", start=how.zeros, kind=MATRIX, dtype=torch.bfloat16 if low else None)
    bases_of = State("accumulator", start=how.identity, kind=MATRIX)

    @direction(m=moment, v=second_moment, factors=factors_of, bases=bases_of, statistics=statistics)
    def soap(g: Value, st: States, hp: Hyper, t: Value, ndim: int, shape: tuple[Value, ...]) -> Value:
        """Vyas et al. 2024, algorithm 3, as released: the first gradient only makes a basis, which none sees itself."""
        taken = t - 1  # steps that moved the weight, with this one
        if ndim < 2 and not hp.precondition_1d:
            if t == 1:
                return 0.0, {"m": st.m, "v": st.v}  # they are there from the first step on, as checkpoints expect
            m, v, d = _stepped(g, st, hp)
            return _sized(d, hp, taken), {"m": m, "v": v}
        beta = hp.beta2 if hp.shampoo_beta is None else hp.shampoo_beta
        seen = st.statistics if hp.preconditioner_gradients else g
        factors = opaque(how.averaged, seen, st.factors, beta, 1 - beta, kind=MATRIX)
        if t == 1:
            bases = opaque(rebasing(how, "eigen"), factors, st.bases, *shape, kind=MATRIX)
            return 0.0, {"factors": factors, "bases": bases, "m": st.m, "v": st.v}
        m, v, d = _stepped(opaque(how.turned, g, st.bases), st, hp)
        d = opaque(how.times, d, st.bases)
        new = {"factors": factors}
        if taken % hp.every == 0:
            images = opaque(how.moved, factors, st.bases, *shape, kind=MATRIX)
            bases = new["bases"] = opaque(rebasing(how, "qr"), images, st.bases, *shape, kind=MATRIX)
            m = opaque(how.rebased, m, st.bases, bases)
            v = opaque(how.in_order, v, images, st.bases)
        return _sized(d, hp, taken), new | {"m": m, "v": v}

    return soap
