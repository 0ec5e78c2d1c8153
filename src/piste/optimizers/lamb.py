"""LAMB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts import decay
from piste.parts.scale import trust_ratio
from piste.parts.standard import standard
from piste.rules.adaptive import lamb
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lamb"]


class Lamb(Optimizer):
    r"""Adam's direction with the decay in it, scaled for each tensor to the length of the weight.

    .. math::
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda p_{t-1}, \qquad
        p_t = p_{t-1} - \eta\,\frac{\lVert p_{t-1}\rVert}{\lVert u_t\rVert}\, u_t

    with Adam's :math:`m` and :math:`v`; the ratio is 1 where either norm is 0.

    **When to use**: very large batches; the learning rate then grows with the square root of the batch, after a
    warm-up. ``clip_norm=1.0`` is part of NVIDIA's and timm's recipes and off here, as in the paper. **When not**: small
    batches, or tensors that are split, flattened or fused, whose norms mean something else.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; about the relative change of each tensor per step.
        betas: fractions of the two averages that are kept.
        eps: added to the denominator.
        weight_decay: decay inside the direction, scaled with it; L2 with ``decoupled_weight_decay=False``.
        bias_correction: correct the averages for starting at zero; Google's code does not.
        always_adapt: scale weights that are not decayed too, as in the paper; timm and apex do not by default.
        trust_clip: let no ratio exceed 1 (LAMBC).
        max_weight_norm: the most that a weight's norm may count, 10 in some published codes; None for no bound.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Lamb(model.parameters(), lr=5e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: You et al. 2020, arXiv 1904.00962; parity with timm's ``Lamb`` (``always_adapt`` as set there, no global
    clipping) and ``pytorch-lamb`` 1.0.0 (``bias_correction=False, max_weight_norm=10``).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
        max_weight_norm: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_weight_norm": max_weight_norm}
        flags = {"bias_correction": bias_correction, "always_adapt": always_adapt, "trust_clip": trust_clip}
        super().__init__(params, hyper | flags | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, lamb, scale=(trust_ratio,), decoupled=decay.into_direction)
