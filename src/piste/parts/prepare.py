"""Parts that prepare the gradient."""

from __future__ import annotations

from piste.ops import Value, clamp, lerp, maximum, mean, minimum, norm, size, sqrt, square, sum_, total, where
from piste.slots import Hyper, States, prepare, scale
from piste.storage import second_moment

__all__ = [
    "adaptive_clip",
    "ascend",
    "centralize",
    "centralize_direction",
    "clip_norm",
    "clip_value",
    "keep_second_moment",
    "l2",
    "normalize",
    "unit_norm",
]


@prepare
def ascend(g: Value) -> Value:
    """Maximise instead of minimise."""
    return -g


@prepare
def clip_norm(g: Value, hp: Hyper) -> Value:
    """Scale all gradients together so that their global norm is at most ``clip_norm``.

    The small constant is that of ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = sqrt(total(square(g), "gradient_norm"))
    return g * minimum(hp.clip_norm / (norm + 1e-6), 1.0)


@prepare
def clip_value(g: Value, hp: Hyper) -> Value:
    """Hold every number of the gradient within ``[-clip_value, clip_value]``."""
    return clamp(g, -hp.clip_value, hp.clip_value)


@prepare
def l2(g: Value, p: Value, hp: Hyper) -> Value:
    """Weight decay as a penalty: its gradient joins the loss's."""
    return g if hp.weight_decay == 0 else g + hp.weight_decay * p


def _centers(hp: Hyper, ndim: int) -> bool:
    """Does centralization touch weights of this rank? Vectors and scalars stay as they are."""
    return ndim > (3 if hp.gc_conv_only else 1)


def _centralized(x: Value, hp: Hyper, ndim: int) -> Value:
    """Take from each output unit its mean (Yong et al. 2020, eq. 1)."""
    return x - mean(x, keep=(0,)) if _centers(hp, ndim) else x


@prepare
def centralize(g: Value, hp: Hyper, ndim: int) -> Value:
    """Gradient centralization of the gradient."""
    return _centralized(g, hp, ndim)


@scale
def centralize_direction(d: Value, hp: Hyper, ndim: int) -> Value:
    """Gradient centralization of the final direction, which keeps each unit's mean weight where it is."""
    return _centralized(d, hp, ndim)


def unit_norm(x: Value, ndim: int) -> Value:
    """The norm of what makes one output unit (Brock et al. 2021): of a row, of a filter, of a whole vector.

    Filters of 1-D convolutions have one norm for each position, as in the code of that paper's authors.
    """
    if ndim <= 1:
        return norm(x)
    return norm(x, keep=(0, 2) if ndim == 3 else (0,))


@prepare
def adaptive_clip(g: Value, p: Value, hp: Hyper, ndim: int) -> Value:
    """Each unit's gradient is at most ``agc_clip`` times as long as the unit's weight (Brock et al. 2021, eq. 3)."""
    longest = maximum(unit_norm(p, ndim), hp.agc_eps) * hp.agc_clip
    length = unit_norm(g, ndim)
    return g * where(length > longest, longest / maximum(length, 1e-6), 1.0)


@prepare
def normalize(g: Value, hp: Hyper, ndim: int) -> Value:
    """Divide by the standard deviation of the whole gradient; one or two elements have none worth the name."""
    n = size(g)
    if n <= 2:
        return g
    around = g if hp.use_gc and _centers(hp, ndim) else g - mean(g)
    return g * (1 / (sqrt(sum_(square(around)) / (n - 1)) + 1e-8))


@prepare(v=second_moment)
def keep_second_moment(g: Value, st: States, hp: Hyper) -> tuple[Value, dict[str, Value]]:
    """A running mean of squares, for the parts that follow; the gradient goes on as it is."""
    return g, {"v": lerp(st.v, square(g), 1 - hp.beta2)}
