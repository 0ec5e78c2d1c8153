"""NovoGrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import standard
from piste.rules.layerwise import novograd
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NovoGrad"]


class NovoGrad(Optimizer):
    r"""Momentum of gradients that are divided by the running norm of their whole tensor.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\lVert g_t\rVert^2, \quad v_1 = \lVert g_1\rVert^2, \qquad
        m_t = \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \eta m_t

    **When to use**: speech and vision models with large batches, at half of Adam's memory; learning rates are like
    SGD's. **When not**: embeddings whose rows see gradients of very different size, which share one norm here. A
    tensor that is split over devices or fused with another has another norm: the algorithm changes with it.

    State: 4 bytes per parameter and a number per tensor, two with ``amsgrad``. Under ``state="bf16"``, ``"8bit"``,
    ``"4bit"``: 2, 1.02, 0.516.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of momentum and squared norm that are kept. (The paper's; NVIDIA's Jasper has 0 for the
            second, its earlier code 0.25.)
        eps: added to the root of the squared norm.
        weight_decay: decay inside the momentum, as in the paper; with ``decoupled_weight_decay=True`` it shrinks the
            weight instead.
        amsgrad: divide by the largest norm so far.
        grad_averaging: weigh what enters the momentum with ``1 - beta1``; learning rates are ``1 / (1 - beta1)`` times
            as large then.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.NovoGrad(model.parameters(), lr=1e-2, weight_decay=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Ginsburg et al. 2019, arXiv 1905.11286; parity with timm's ``NvNovoGrad`` (NVIDIA's Jasper code).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        grad_averaging: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper | {"amsgrad": amsgrad, "grad_averaging": grad_averaging}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, novograd, coupled=None)
