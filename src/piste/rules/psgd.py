"""PSGD with Kronecker factors: a preconditioner that is itself found by descent (Li 2018, arXiv 1512.04202)."""

from __future__ import annotations

from functools import cache

import torch

from piste.ops import Value, debias, exp, lerp, log, maximum, mean, minimum, opaque, sqrt, square, where
from piste.slots import Hyper, Part, States, direction
from piste.storage import State, moment
from piste.symbol import MATRIX
from piste.whitening import Whitening

__all__ = ["psgd_kron"]

_BALANCED_EVERY = 100  # updates: Li draws a lot of one in a hundred


def _updates(hp: Hyper, t: Value) -> Value:
    """How often factors are updated in ``t`` steps: the sum of probabilities that fall from 1, as a whole number."""
    falling = log(1 / hp.least_probability) / hp.probability_decay  # steps from 1 to the least
    late = maximum(t - hp.flat_start, 0.0)
    gone = (1 - exp(-hp.probability_decay * minimum(late, falling))) / hp.probability_decay
    return (minimum(t, hp.flat_start) + gone + hp.least_probability * maximum(late - falling, 0.0)) // 1


@cache
def psgd_kron(how: Whitening, low: bool) -> Part:
    """The rule for weights whose axes have these factors, in bfloat16 if ``low``."""
    factors_of = State("accumulator", start=how.identity, kind=MATRIX, dtype=torch.bfloat16 if low else None)

    @direction(m=moment, factors=factors_of)
    def psgd_kron(g: Value, st: States, hp: Hyper, t: Value, ndim: int) -> Value:
        """As Kron of kron_torch has it: momentum is whitened, its factors fitted to momentum or gradient."""
        new: dict[str, Value] = {}
        x = g
        if hp.momentum != 0:
            new["m"] = lerp(st.m, g, 1 - hp.momentum)
            x = debias(new["m"], hp.momentum, t)
        factors = st.factors
        if t == 1:
            factors = new["factors"] = hp.init_scale ** (1 / how.count(ndim)) * factors
        updates = _updates(hp, t)
        if updates > _updates(hp, t - 1):
            seen = x if hp.whiten == "momentum" else g
            balance = where(updates % _BALANCED_EVERY == 0, 1.0, 0.0)
            factors = opaque(how.fitted, seen, factors, hp.factor_lr, hp.seed, t, balance, kind=MATRIX)
            new["factors"] = factors
        d = opaque(how.whitened, x, factors)
        if hp.clip_rms is not None:
            d = d * minimum(hp.clip_rms / (sqrt(mean(square(d))) + 1e-12), 1.0)
        return d, new

    return psgd_kron
