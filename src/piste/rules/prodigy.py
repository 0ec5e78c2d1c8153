"""Adam that finds its learning rate (Mishchenko & Defazio 2023, arXiv 2306.06101)."""

from __future__ import annotations

import math

from piste.ops import Value, absolute, lerp, maximum, minimum, sqrt, square, total, where
from piste.slots import Hyper, States, update
from piste.storage import State, anchor, moment, second_moment

__all__ = ["DENOMINATOR", "NUMERATOR", "grown", "prodigy"]

NUMERATOR, DENOMINATOR = "prodigy_numerator", "prodigy_denominator"
_sum_of_gradients = State("accumulator")


def grown(hp: Hyper, gained: Value, scale: Value) -> tuple[Value, Value, Value]:
    """The estimate d of the distance to the solution after this step, the largest one so far, and the numerator."""
    numerator = _beta3(hp) * hp.d_numerator + gained
    found = where(scale > 0, hp.d_coef * numerator / scale, hp.d)
    d = minimum(maximum(found, hp.d), where(hp.d == hp.d0, math.inf, hp.d))  # at once from the first estimate, only
    d_max = maximum(found, hp.d_max)
    return minimum(d_max, d * hp.growth_rate), d_max, numerator


def _beta3(hp: Hyper) -> Value:
    return sqrt(hp.beta2) if hp.beta3 is None else hp.beta3


@update(m=moment, v=second_moment, s=_sum_of_gradients, x0=anchor)
def prodigy(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Their algorithm 4. The step is scaled with the old estimate, eps with the new one, as in the released code."""
    if hp.lr == 0:
        return p
    pace = hp.d * hp.lr
    if hp.bias_correction:
        pace = pace * (sqrt(1 - hp.beta2**t) / (1 - hp.beta1**t))
    relative = hp.d / hp.d0  # keeps sums of tiny numbers within range
    v = lerp(st.v, square(hp.d * g), 1 - hp.beta2)
    s = _beta3(hp) * st.s + relative * (hp.d if hp.safeguard_warmup else pace) * g
    new = {"v": v, "s": s}
    if hp.beta1 == 0:
        m = hp.d * g
    else:
        m = new["m"] = lerp(st.m, hp.d * g, 1 - hp.beta1)
    d, _, _ = grown(hp, total(relative * pace * (g * (st.x0 - p)), NUMERATOR), total(absolute(s), DENOMINATOR))
    decays = hp.decoupled_weight_decay and hp.weight_decay != 0
    kept = p - hp.weight_decay * pace * p if decays else p
    return kept - pace * _ratio(m, sqrt(v) + d * hp.eps), new


def _ratio(m: Value, root: Value) -> Value:
    """No step where nothing has been seen, even with an eps of 0."""
    return where(root > 0, m / root, 0.0)
