"""Parts of sharpness-aware minimisation: the way up to where the loss is measured again, and what two gradients make.

Norms and inner products are over all weights together. Parts that combine gradients take the gradient at the perturbed
weights for ``p`` and that at the weights themselves for ``g``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from piste.ops import Value, absolute, norm, sqrt, square, sum_, total, where
from piste.slots import Hyper, Part, States, update
from piste.storage import State

__all__ = ["ASCENTS", "Projection", "of_some", "projection", "surrogate_gap", "surrogate_gap_of_clean"]

_TINY = 1e-12


def _share(x: Value, y: Value) -> Value:
    """``x / y``, and 0 where there is nothing to be a share of."""
    return where(y > 0, x / y, 0.0)


def _ascent(operator: Callable[[Value, Hyper], Value]) -> Part:
    """``p + rho T^2 g / |T g|``, with an operator T that scales with the weights (Kwon et al. 2021, eq. 9)."""

    @update
    def ascend(p: Value, g: Value, hp: Hyper) -> Value:
        t = operator(p, hp)
        length = sqrt(total(square(t * g), "ascent"))
        return p + hp.rho / (length + _TINY) * (t * (t * g))

    return ascend


@update
def _scaled_direction(p: Value, g: Value, hp: Hyper) -> Value:
    """The perturbation of SAM, each element times its weight (Zhuang et al. 2022, their JAX code)."""
    length = sqrt(total(square(g), "ascent"))
    return p + hp.rho / (length + _TINY) * (absolute(p) * g)


@update
def _plain(p: Value, g: Value, hp: Hyper) -> Value:
    """``p + rho g / |g|`` (Foret et al. 2021, eq. 2)."""
    length = sqrt(total(square(g), "ascent"))
    return p + hp.rho / (length + _TINY) * g


@update
def _relative(p: Value, g: Value, hp: Hyper) -> Value:
    """Each tensor by ``rho`` of its own norm, LAMB's trust ratio on the way up (Liu et al. 2022, layer-wise SAM)."""
    total(square(g), "ascent")  # for whoever has to know whether it is finite
    return p + hp.rho * _share(norm(p), norm(g)) * g


@update(mask=State("accumulator"))
def of_some(p: Value, g: Value, st: States, hp: Hyper) -> Value:
    """SAM's perturbation of a random choice of elements, as much longer as they are fewer (Du et al. 2022, eq. 4)."""
    length = sqrt(total(square(g), "ascent"))
    return p + hp.rho / (hp.beta * (length + hp.eps)) * (st.mask * g)


#: how weights are perturbed, by what ``adaptive=`` says; ``"ascent"`` is the total that must be finite
ASCENTS = {
    "sam": _plain,
    "asam": _ascent(lambda p, hp: absolute(p) + hp.eta if hp.scaled == 1 else 1.0),
    "elementwise": _ascent(lambda p, hp: absolute(p)),
    "layerwise": _ascent(lambda p, hp: norm(p)),
    "gsam": _scaled_direction,
    "relative": _relative,
}


@update
def surrogate_gap(p: Value, g: Value, hp: Hyper) -> Value:
    """The perturbed gradient without ``alpha`` times the part of the clean one across it (Zhuang et al. 2022)."""
    along = _share(total(g * p, "both"), total(square(p), "perturbed"))
    return p - hp.alpha * (g - along * p)


@update
def surrogate_gap_of_clean(p: Value, g: Value, hp: Hyper) -> Value:
    """The clean gradient with ``alpha`` times the part of the perturbed one across it."""
    along = _share(total(g * p, "both"), total(square(g), "clean"))
    return g + hp.alpha * (p - along * g)


class Projection(NamedTuple):
    """LookSAM's two kinds of steps (Liu et al. 2022, eqs. 5 and 6).

    Attributes:
        split: keep the part of the perturbed gradient across the clean one.
        reuse: add what was kept to a clean gradient, ``alpha`` times as long as that is.
    """

    split: Part
    reuse: Part


def projection(*, together: bool) -> Projection:
    """Over all weights together, as in the paper, or for each weight by itself."""

    def over(x: Value, name: str) -> Value:
        return total(x, name) if together else sum_(x)

    @update(across=State("gradient"))
    def split(p: Value, g: Value) -> Value:
        across = p - _share(over(g * p, "both"), over(square(g), "clean")) * g
        total(square(across), "across")  # for whoever has to know whether it is finite
        return p, {"across": across}

    @update(across=State("gradient"))
    def reuse(p: Value, st: States, hp: Hyper) -> Value:
        size = sqrt(_share(over(square(p), "clean"), over(square(st.across), "across")))
        return p + hp.alpha * size * st.across

    return Projection(split, reuse)
