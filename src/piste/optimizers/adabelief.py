"""AdaBelief."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts import decay
from piste.parts.scale import rectified_step
from piste.parts.standard import standard
from piste.rules.adaptive import adabelief
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaBelief"]


class AdaBelief(Optimizer):
    r"""Adam that divides by how much gradients differ from their average, instead of by how large they are.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)(g_t - m_t)^2 + \epsilon

    and the step of :class:`Adam` (``rectify=False``) or of :class:`RAdam` (``rectify=True``) with :math:`s` for
    :math:`v`. eps is added to the state in every step, so it counts: :math:`\sqrt{s}` never falls below
    :math:`\sqrt{\epsilon / (1 - \beta_2)}`. As a rule it is the square of Adam's eps.

    **When to use**: try eps 1e-8 for vision, 1e-16 for language, 1e-12 for reinforcement learning. **When not**: with
    element-wise clamping of gradients, which makes :math:`g - m` vanish; clip the norm instead.

    State: 8 bytes per parameter, 12 with ``amsgrad`` (and ``rectify=False``). Under ``state="bf16"``, ``"8bit"``,
    ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of the two averages that are kept.
        eps: see above.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        amsgrad: divide by the largest s so far; without effect when ``rectify`` is on, as in the released code.
        rectify: RAdam's step size.
        degenerated_to_sgd: with ``rectify``, take momentum steps until the step is rectified; else none.
        fixed_decay: decoupled decay shrinks by ``weight_decay`` alone, not times ``lr``.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.AdaBelief(model.parameters(), lr=1e-3, eps=1e-8)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Zhuang et al., "AdaBelief optimizer" (NeurIPS 2020, arXiv 2010.07468); parity with ``adabelief-pytorch``
    0.2.1.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        fixed_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        flags = {"rectify": rectify, "degenerated_to_sgd": degenerated_to_sgd, "fixed_decay": fixed_decay}
        super().__init__(params, hyper | flags | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        own_decay = decay.fixed if group["fixed_decay"] else decay.decoupled
        return standard(group, adabelief, scale=(rectified_step,) if group["rectify"] else (), decoupled=own_decay)
