"""Dual averaging: the weight is where the sum of all gradients, suitably scaled, has carried the initial one."""

from __future__ import annotations

from collections.abc import Callable

from piste.ops import Value, cbrt, lerp, softplus, sqrt, square, where
from piste.slots import Hyper, States, update
from piste.storage import accumulator, anchor

__all__ = ["madgrad", "mirror_madgrad", "ranger21_dual"]


def _rate(hp: Hyper) -> Value:
    """The learning rate, with eps added for stability as in the released code; a rate of zero stays zero."""
    return hp.lr + hp.eps if hp.lr != 0 else hp.lr


def _per_root(x: Value, nu: Value, hp: Hyper) -> Value:
    """``x`` over the cube root of ``nu``, and 0 where nothing has been gathered."""
    root = cbrt(nu) + hp.eps
    return where(root > 0, x / root, 0.0)


def _averaged(
    g: Value,
    p: Value,
    st: States,
    hp: Hyper,
    weight: Value,
    x0: Callable[[], Value],
    per_root: Callable[[Value, Value, Hyper], Value],
) -> tuple[Value, dict[str, Value]]:
    """Defazio & Jelassi 2021, algorithm 1. Without momentum the initial weight is worked out and not kept."""
    nu, s = st.nu + weight * square(g), st.s + weight * g
    if hp.momentum == 0:
        z = p + per_root(st.s, st.nu, hp) - per_root(s, nu, hp)
    else:
        z = lerp(p, x0() - per_root(s, nu, hp), 1 - hp.momentum)
    return z, {"nu": nu, "s": s}


@update(nu=accumulator, s=accumulator, x0=anchor)
def madgrad(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """MADGRAD as its authors have it."""
    lr = _rate(hp)
    z, new = _averaged(g, p, st, hp, lr * sqrt(t), lambda: st.x0, _per_root)
    # the decay of the released code comes after the step, from the weight before it
    return (z - lr * hp.weight_decay * p if _decays(hp) else z), new


@update(nu=accumulator, s=accumulator, x0=anchor)
def ranger21_dual(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """MADGRAD inside Ranger21: no eps beside lr, a softened root, and decay before the step, the first one included."""
    count = hp.clock if hp.faithful else t
    z, new = _averaged(g, p, st, hp, hp.lr * sqrt(count), lambda: p if t == 1 else st.x0, _per_soft_root)
    return z, (new | {"x0": p} if hp.momentum != 0 and t == 1 else new)


@update(nu=accumulator, z=anchor)
def mirror_madgrad(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """The mirror-descent form of the same authors' package: weights move from where they are, not from the first."""
    lr = _rate(hp)
    nu = sqrt((t - 1) / t) * st.nu + square(g)
    z = (1 - lr * hp.weight_decay) * st.z if _decays(hp) else st.z
    z = z - lr * t ** (1 / 3) * _per_root(g, nu, hp)
    return (z if hp.momentum == 0 else lerp(p, z, 1 - hp.momentum)), {"nu": nu, "z": z}


def _per_soft_root(x: Value, nu: Value, hp: Hyper) -> Value:
    root = cbrt(nu)
    if hp.softplus:
        return x / softplus(root, hp.beta_softplus)
    return where(root > 0, x / root, 0.0)


def _decays(hp: Hyper) -> bool:
    return bool(hp.decoupled_weight_decay) and bool(hp.weight_decay != 0)
