"""Positive-negative momentum, alone and with Adam's denominator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import standard
from piste.rules.positive_negative import adapnm, pnm
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PNM", "AdaPNM"]


class PNM(Optimizer):
    r"""SGD on a difference of two momentums, which take turns, so that the gradient's noise grows and its mean stays.

    .. math::
        m_t = \beta_1^2 m_{t-2} + (1 - \beta_1^2) g_t, \qquad
        p_t = p_{t-1} - \eta\,\frac{(1 + \beta_0) m_t - \beta_0 m_{t-1}}{\sqrt{(1 + \beta_0)^2 + \beta_0^2}}

    **When to use**: in the place of SGD with momentum on vision, where its noise is meant to find flatter minima; at
    the learning rate of SGD without dampening times ten. **When not**: small batches, which are noisy enough.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.03, 1.03.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        momentum: beta1, fraction of an average that is kept over two steps is its square.
        beta0: how much of the older average is taken off; 0 is momentum over every other gradient.
        weight_decay: L2 penalty; shrinks by ``lr * weight_decay`` with ``decoupled_weight_decay=True``.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.PNM(model.parameters(), lr=0.1)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Xie, Yuan, Zhu, Sugiyama 2021, arXiv 2103.17182; parity with ``pytorch_optimizer``'s PNM. Steps are counted
    per weight here, so one that rests for a step goes on with the average whose turn it is.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        beta0: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "beta0": beta0, "weight_decay": weight_decay}
        super().__init__(params, hyper, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, pnm)


class AdaPNM(Optimizer):
    r"""Adam with positive-negative momentum.

    .. math::
        m_t = \beta_1^2 m_{t-2} + (1 - \beta_1^2) g_t, \quad
        \hat m_t = \frac{(1 + \beta_0) m_t - \beta_0 m_{t-1}}{\sqrt{(1 + \beta_0)^2 + \beta_0^2}\,(1 - \beta_1^t)},
        \qquad p_t = p_{t-1} - \eta\,\frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with Adam's :math:`v` (its largest value so far with ``amsgrad``).

    **When to use**: in the place of AdamW where it overfits. **When not**: where 16 bytes of state per parameter do not
    fit, or gradients are very noisy already.

    State: 12 bytes per parameter, 16 with ``amsgrad``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 10, 7.06, 5.58.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions that are kept: the first squared of an average over two steps, the second of mean squares.
        eps: added to the root of the mean squares.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        amsgrad: divide by the largest mean square so far, as the authors do.
        beta0: how much of the older average is taken off.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.AdaPNM(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Xie, Yuan, Zhu, Sugiyama 2021, arXiv 2103.17182, algorithm 2; parity with ``pytorch_optimizer``'s AdaPNM
    at ``eps=0`` (that package divides eps by the bias correction, the authors add it afterwards, as here).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = True,
        *,
        beta0: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "beta0": beta0}
        super().__init__(params, hyper | {"amsgrad": amsgrad, "decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, adapnm)
