"""Parts that prepare the gradient."""

from __future__ import annotations

from piste.ops import Value, mean, minimum, sqrt, square, total
from piste.slots import Hyper, prepare, scale

__all__ = ["ascend", "centralize", "centralize_direction", "clip_norm", "l2"]


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
def l2(g: Value, p: Value, hp: Hyper) -> Value:
    """Weight decay as a penalty: its gradient joins the loss's."""
    return g if hp.weight_decay == 0 else g + hp.weight_decay * p


def _centralized(x: Value, hp: Hyper, ndim: int) -> Value:
    """Take from each output unit its mean (Yong et al. 2020, eq. 1): vectors and scalars stay as they are."""
    return x - mean(x, keep=(0,)) if ndim > (3 if hp.gc_conv_only else 1) else x


@prepare
def centralize(g: Value, hp: Hyper, ndim: int) -> Value:
    """Gradient centralization of the gradient."""
    return _centralized(g, hp, ndim)


@scale
def centralize_direction(d: Value, hp: Hyper, ndim: int) -> Value:
    """Gradient centralization of the final direction, which keeps each unit's mean weight where it is."""
    return _centralized(d, hp, ndim)
