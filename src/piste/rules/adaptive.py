"""Rules that divide by a running size of the gradient."""

from __future__ import annotations

from dataclasses import replace

from piste.ops import Value, clamp, debias, exp, lerp, log, maximum, mean, minimum, rho, sqrt, square
from piste.rules.denominator import denominator
from piste.slots import Hyper, States, direction
from piste.storage import State, accumulator, moment, product, second_moment

__all__ = [
    "adabelief",
    "adam",
    "adam_step",
    "adan",
    "ademamix",
    "adopt",
    "lamb",
    "laprop",
    "nadam",
    "radam",
    "ranger_adabelief",
    "rmsprop",
    "rmsprop_tf",
    "stable_adam",
]


def adam_step(g: Value, st: States, hp: Hyper, t: Value, *, amsgrad: bool = False) -> tuple[Value, dict[str, Value]]:
    """Kingma & Ba 2015, algorithm 1, for rules that have it for some of their weights; see :func:`adam`."""
    m = lerp(st.m, g, 1 - hp.beta1)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    new = {"m": m, "v": v}
    if amsgrad:
        v = new["vmax"] = maximum(st.vmax, v)
    return debias(m, hp.beta1, t) / denominator(v, hp.beta2, t, hp.eps), new


@direction(m=moment, v=second_moment, vmax=accumulator)
def adam(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Kingma & Ba 2015, algorithm 1; with ``amsgrad`` the maximum is taken before the bias correction, as in torch."""
    return adam_step(g, st, hp, t, amsgrad=hp.amsgrad)


@direction(m=moment, v=second_moment)
def radam(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Liu et al. 2020, algorithm 2, up to its step size, which is the part ``rectified_step``.

    The threshold is 5 as in the released code, where the paper has 4; the denominator is not bias-corrected before
    eps is added, as in the released code.
    """
    m = lerp(st.m, g, 1 - hp.beta1)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    if rho(hp.beta2, t) > 5:
        return m / (sqrt(v) + hp.eps), {"m": m, "v": v}
    return (m if hp.degenerated_to_sgd else 0.0), {"m": m, "v": v}


@direction(m=moment, s=second_moment, smax=accumulator)
def adabelief(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Small steps where the gradient surprises its own average (Zhuang et al. 2020, algorithm 2).

    eps is added to the state itself, every step, so s never falls below eps / (1 - beta2). With ``rectify`` the step
    size is the part ``rectified_step``, and ``amsgrad`` has no effect, as in the released code.
    """
    m = lerp(st.m, g, 1 - hp.beta1)
    s = lerp(st.s, square(g - m), 1 - hp.beta2) + hp.eps
    new = {"m": m, "s": s}
    if hp.rectify:
        if rho(hp.beta2, t) > 5:
            return m / (sqrt(s) + hp.eps), new
        return (m if hp.degenerated_to_sgd else 0.0), new
    if hp.amsgrad:
        s = new["smax"] = maximum(st.smax, s)
    return debias(m, hp.beta1, t) / denominator(s, hp.beta2, t, hp.eps), new


@direction(m=moment, s=second_moment)
def ranger_adabelief(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """AdaBelief as RangerAdaBelief 0.1.0 has it: eps enters the state only once the step is rectified."""
    m = lerp(st.m, g, 1 - hp.beta1)
    s = lerp(st.s, square(g - m), 1 - hp.beta2)
    if rho(hp.beta2, t) > 5:
        s = s + hp.eps
        return m / (sqrt(s) + hp.eps), {"m": m, "s": s}
    return m, {"m": m, "s": s}


@direction(m=moment, v=second_moment)
def lamb(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Adam's direction inside LAMB (You et al. 2020, algorithm 2), whose bias correction may be left out."""
    m = lerp(st.m, g, 1 - hp.beta1)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    if hp.bias_correction:
        return debias(m, hp.beta1, t) / denominator(v, hp.beta2, t, hp.eps), {"m": m, "v": v}
    return m / (sqrt(v) + hp.eps), {"m": m, "v": v}


@direction(m=moment, d=moment, n=second_moment, previous=State("gradient"))
def adan(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Xie et al. 2022, algorithm 1, with the released code's bias corrections; betas are what is kept, as in the code.

    The first gradient has nothing to differ from.
    """
    change: Value = g - st.previous if t > 1 else 0.0
    m = lerp(st.m, g, 1 - hp.beta1)
    d = lerp(st.d, change, 1 - hp.beta2)
    n = lerp(st.n, square(g + hp.beta2 * change), 1 - hp.beta3)
    ahead = debias(m, hp.beta1, t) + hp.beta2 * debias(d, hp.beta2, t)
    return ahead / denominator(n, hp.beta3, t, hp.eps), {"m": m, "d": d, "n": n, "previous": g}


@direction(m=moment, v=second_moment)
def laprop(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Ziyin et al. 2020, algorithm 1: momentum of normalised gradients, where Adam normalises the momentum."""
    v = lerp(st.v, square(g), 1 - hp.beta2)
    m = lerp(st.m, g / denominator(v, hp.beta2, t, hp.eps), 1 - hp.beta1)
    return debias(m, hp.beta1, t), {"m": m, "v": v}


@direction(m=moment, v=second_moment)
def adopt(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Taniguchi et al. 2024, algorithm 2 with its clipping: each gradient is divided by what came before it.

    The first gradient only begins the mean square, and moves nothing.
    """
    if t == 1:
        return 0.0, {"v": square(g), "m": st.m}  # m is there from the first step on, as checkpoints expect
    bound = (t - 1) ** hp.clip_exponent
    m = lerp(st.m, clamp(g / maximum(sqrt(st.v), hp.eps), -bound, bound), 1 - hp.beta1)
    return m, {"m": m, "v": lerp(st.v, square(g), 1 - hp.beta2)}


@direction(m=moment, v=second_moment, product=product)
def nadam(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Dozat 2016, as in torch: Nesterov's momentum with a momentum that warms up, whose product debiases it."""
    now, then = (hp.beta1 * (1 - 0.5 * exp(log(0.96) * (at * hp.momentum_decay))) for at in (t, t + 1))
    m = lerp(st.m, g, 1 - hp.beta1)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    gathered = st.product * now
    ahead = g * ((1 - now) / (1 - gathered)) + m * (then / (1 - gathered * then))
    return ahead / denominator(v, hp.beta2, t, hp.eps), {"m": m, "v": v, "product": gathered}


@direction(m=moment, v=second_moment)
def stable_adam(g: Value, p: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Wortsman et al. 2023, algorithm 2: AdamW whose step, decay included, shrinks where gradients outgrow v."""
    m = lerp(st.m, g, 1 - hp.beta1)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    mean_square = debias(v, hp.beta2, t)
    d = debias(m, hp.beta1, t) / (sqrt(mean_square) + hp.eps)
    if hp.decoupled_weight_decay and hp.weight_decay != 0:
        d = d + hp.weight_decay * p
    surprise = sqrt(mean(square(g) / maximum(mean_square, hp.eps**2)))
    return d / maximum(surprise, 1.0), {"m": m, "v": v}


@direction(m=moment, slow=moment, v=second_moment)
def ademamix(g: Value, st: States, hp: Hyper, t: Value) -> Value:
    """Pagliardini et al. 2024, algorithm 1: Adam with a second, much slower average of gradients.

    Both its weight and its slowness may warm up; that average is not corrected for starting at zero.
    """
    alpha, beta3 = hp.alpha, hp.beta3
    if hp.warmup_steps is not None and t < hp.warmup_steps:
        done = t / hp.warmup_steps
        fast, slow = log(hp.beta1), log(hp.beta3)
        alpha = hp.alpha * done
        beta3 = minimum(exp(fast * slow / ((1 - done) * slow + done * fast)), hp.beta3)
    m = lerp(st.m, g, 1 - hp.beta1)
    far = lerp(st.slow, g, 1 - beta3)
    v = lerp(st.v, square(g), 1 - hp.beta2)
    mixed = debias(m, hp.beta1, t) + alpha * far
    return mixed / denominator(v, hp.beta2, t, hp.eps), {"m": m, "slow": far, "v": v}


def _mean_square(g: Value, st: States, hp: Hyper) -> tuple[Value, dict[str, Value]]:
    """Running mean of squared gradients; of their variance, where ``centered``."""
    v = lerp(st.v, square(g), 1 - hp.alpha)
    if not hp.centered:
        return v, {"v": v}
    gbar = lerp(st.gbar, g, 1 - hp.alpha)
    return maximum(v - square(gbar), 0.0), {"v": v, "gbar": gbar}  # rounding can make the difference negative


@direction(v=second_moment, gbar=moment)
def rmsprop(g: Value, st: States, hp: Hyper) -> Value:
    """Hinton's lecture 6e (2012), as in torch: the average begins at 0 and eps stands outside of the root."""
    size, new = _mean_square(g, st, hp)
    return g / (sqrt(size) + hp.eps), new


@direction(v=replace(second_moment, start="ones"), gbar=moment)
def rmsprop_tf(g: Value, st: States, hp: Hyper) -> Value:
    """RMSprop as in TensorFlow: the average begins at 1 and eps stands inside the root."""
    size, new = _mean_square(g, st, hp)
    return g / sqrt(size + hp.eps), new
