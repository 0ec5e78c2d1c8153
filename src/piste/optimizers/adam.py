"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import standard
from piste.rules.adaptive import adam
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adam", "AdamW"]

_TORCH_NAMES = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vmax"}


class Adam(Optimizer):
    r"""Momentum divided by a running root mean square, both corrected for starting at zero.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        p_t = p_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    **When to use**: almost anywhere, with little tuning. **When not**: with weight decay (take :class:`AdamW`; the L2
    penalty here is divided by the denominator too), or when state of 8 bytes per parameter does not fit.

    State: 8 bytes per parameter, 12 with ``amsgrad``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of the two averages that are kept.
        eps: added to the denominator after the bias correction. 1e-8 is the paper's; larger ones, up to 1, make
            it more like SGD.
        weight_decay: L2 penalty; shrinks by ``lr * weight_decay`` with ``decoupled_weight_decay=True``.
        amsgrad: divide by the largest mean square so far (Reddi et al. 2018).
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Adam(model.parameters(), lr=3e-4)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Kingma & Ba, "Adam" (ICLR 2015, arXiv 1412.6980); parity with ``torch.optim.Adam``.
    """

    torch_names: ClassVar[Mapping[str, str]] = _TORCH_NAMES

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, hyper, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, adam)


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay: weights shrink by :math:`\eta\lambda` before the step, whatever the gradient.

    .. math::
        p_t = (1 - \eta\lambda)\, p_{t-1}
              - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`m, v` as in :class:`Adam`.

    **When to use**: the default for transformers and a strong one elsewhere; the baseline that others must beat.
    **When not**: where 8 bytes of state per parameter do not fit.

    State: 8 bytes per parameter, 12 with ``amsgrad``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs. Bare tensors are all decayed, as in torch;
            ``piste.param_groups(model)`` spares biases and norms.
        lr: learning rate; it scales the decay too.
        betas: fractions of the two averages that are kept.
        eps: added to the denominator after the bias correction.
        weight_decay: decay, multiplied by the current ``lr``. (The paper's decay is not: its value is about
            ``lr * weight_decay`` here.)
        amsgrad: divide by the largest mean square so far (Reddi et al. 2018).
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.AdamW(piste.param_groups(model, weight_decay=0.1), lr=3e-4)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Loshchilov & Hutter, "Decoupled weight decay regularization" (ICLR 2019, arXiv 1711.05101); parity with
    ``torch.optim.AdamW``.
    """

    torch_names: ClassVar[Mapping[str, str]] = _TORCH_NAMES

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, adam)
