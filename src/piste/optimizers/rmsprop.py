"""RMSprop, in torch's form and in TensorFlow's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.apply import lr_in_momentum as momentum_over_steps
from piste.parts.scale import heavy_ball
from piste.parts.standard import standard
from piste.rules.adaptive import rmsprop, rmsprop_tf
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RMSprop"]


class RMSprop(Optimizer):
    r"""Gradients divided by a running root mean square, optionally with momentum.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \qquad p_t = p_{t-1} - \eta b_t

    With ``tf=True``, as TensorFlow and the EfficientNet recipes have it: :math:`v_0 = 1`, the denominator is
    :math:`\sqrt{v_t + \epsilon}`, and the buffer holds whole steps, :math:`b_t = \mu b_{t-1} + \eta d_t`. Recipes with
    ``eps=1e-3`` are meant for that form: outside of the root it is another number altogether.

    **When to use**: vision recipes that ask for it; reinforcement learning. **When not**: without warm-up at small
    ``1 - alpha``: there is no bias correction, so the first step is ``lr / sqrt(1 - alpha)`` long.

    State: 4 bytes per parameter, 4 more with momentum, 4 more with ``centered``. Under ``state="bf16"``, ``"8bit"``,
    ``"4bit"``: 2, 1.03, 0.547.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        alpha: fraction of the running mean square that is kept.
        eps: added to the denominator (``tf=True``: under the root).
        weight_decay: L2 penalty; shrinks by ``lr * weight_decay`` with ``decoupled_weight_decay=True``.
        momentum: fraction of the buffer that is kept, 0 for none.
        centered: divide by the running standard deviation instead.
        tf: TensorFlow's form.
        lr_in_momentum: with ``tf``, keep the learning rate inside the buffer.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Hinton, Srivastava, Swersky, "Neural networks for machine learning", lecture 6e (2012); parity with
    ``torch.optim.RMSprop`` and timm's ``RMSpropTF``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        tf: bool = False,
        lr_in_momentum: bool = True,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, hyper | {"centered": centered, "tf": tf, "lr_in_momentum": lr_in_momentum}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["cautious"] and group["tf"] and group["lr_in_momentum"]:
            raise ValueError("RMSprop got cautious=True with tf=True; legal: lr_in_momentum=False, or cautious=False")

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        rule = rmsprop_tf if group["tf"] else rmsprop
        if group["tf"] and group["lr_in_momentum"]:
            return standard(group, rule, apply=momentum_over_steps)
        return standard(group, rule, momentum=(heavy_ball,))
