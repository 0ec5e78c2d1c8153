"""Weight decay that is no part of the gradient."""

from __future__ import annotations

from piste.ops import Value, cbrt, debias, rho, size, sqrt, tally, total, where
from piste.parts.prepare import unit_norm
from piste.slots import Hyper, States, decay, scale

__all__ = [
    "decoupled",
    "decoupled_from_second_step",
    "decoupled_while_moving",
    "fixed",
    "into_direction",
    "norm_loss",
    "stable",
    "stable_dual",
]


@decay
def decoupled(p: Value, hp: Hyper) -> Value:
    """Shrink by ``lr * weight_decay``, before the step (Loshchilov & Hutter 2019; torch scales it with lr)."""
    return p if hp.weight_decay == 0 else p * (1 - hp.lr * hp.weight_decay)


@decay
def decoupled_while_moving(p: Value, hp: Hyper, t: Value) -> Value:
    """Decoupled decay of RAdam's authors: a weight that rests until the step is rectified is not decayed either."""
    return p if not hp.degenerated_to_sgd and rho(hp.beta2, t) <= 5 else decoupled(p, hp)


@decay
def decoupled_from_second_step(p: Value, hp: Hyper, t: Value) -> Value:
    """Decoupled decay of a rule that only looks in its first step."""
    return p if t == 1 else decoupled(p, hp)


@decay
def fixed(p: Value, hp: Hyper) -> Value:
    """Shrink by ``weight_decay`` alone, whatever the learning rate."""
    return p if hp.weight_decay == 0 else p * (1 - hp.weight_decay)


@scale
def into_direction(d: Value, p: Value, hp: Hyper) -> Value:
    """Decay inside the direction, so that whatever scales the direction scales the decay."""
    return d if hp.weight_decay == 0 else d + hp.weight_decay * p


def _mean_square(new: States, hp: Hyper, t: Value) -> Value:
    """The mean over all weights of their second moments; those that are not decayed count, too."""
    return total(debias(new.v, hp.beta2, t), "second_moment") / tally(size(new.v), "elements")


def _shrunk(p: Value, pace: Value, typical: Value) -> Value:
    """Gradients that are all zero so far tell no typical size, and let the weight be."""
    return p * (1 - where(typical > 0, pace / typical, 0.0))


@decay
def stable(p: Value, new: States, hp: Hyper, t: Value) -> Value:
    """Decoupled decay relative to the size of steps (Xie et al. 2020, arXiv 2011.11152): over the root mean square.

    Needs a second moment named ``v`` that begins at zero.
    """
    square = _mean_square(new, hp, t)
    return p if hp.weight_decay == 0 else _shrunk(p, hp.lr * hp.weight_decay, sqrt(square))


@decay
def stable_dual(p: Value, new: States, hp: Hyper, t: Value) -> Value:
    """The same for dual averaging, whose steps grow with the root of their number over a cube root."""
    square = _mean_square(new, hp, t)
    return p if hp.weight_decay == 0 else _shrunk(p, hp.lr * sqrt(t) * hp.weight_decay, cbrt(square))


@decay
def norm_loss(p: Value, hp: Hyper, ndim: int) -> Value:
    """Pull the norm of each output unit towards 1 (Georgiou et al. 2021, arXiv 2103.06583); units of zeros stay."""
    if hp.norm_loss == 0:
        return p
    length = unit_norm(p, ndim)
    excess = where(length > 0, 1 - 1 / (length + hp.eps), 0.0)
    return p * (1 - hp.lr * 2 * hp.norm_loss * excess)
