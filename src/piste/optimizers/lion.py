"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import standard
from piste.rules.sign import lion
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion"]


class Lion(Optimizer):
    r"""Steps of one size in every coordinate: the sign of an average of gradients.

    .. math::
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    **When to use**: large models and batches, where half of Adam's state is welcome; with a learning rate 3 to 10 times
    smaller than AdamW's and a decay as many times larger. **When not**: small batches, and short runs whose schedule
    does not end near zero: steps do not shrink by themselves.

    State: 4 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 2, 1.02, 0.516.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, the size of every step.
        betas: fractions of the momentum that are kept: in the sign, and in the average itself. (0.95, 0.98) is said to
            be steadier on language.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``, of which only the sign would be left.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Lion(model.parameters(), lr=1e-4)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Chen et al. 2023, arXiv 2302.06675; parity with ``lion-pytorch`` and timm's ``Lion``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, hyper, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, lion)
