"""Amos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from piste.groups import model_scales, param_groups
from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.prepare import clip_value as hold
from piste.parts.standard import check_update, standard
from piste.rules.factored import amos, amos_transposed
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Amos"]


class Amos(Optimizer):
    r"""Adaptive decay towards a model-oriented scale: each weight is told how large its entries should become.

    .. math::
        v_t = \beta v_{t-1} + (1-\beta)\operatorname{mean}(g_t^2), \quad \hat v = v_t / (1-\beta^t), \quad
        \gamma = \frac{\xi^2 \operatorname{mean}(g_t^2) / \hat v}{\sqrt{1 + c\sqrt{\xi}\, b_{t-1}}}

    .. math::
        u = \frac{\xi s\, g_t / \sqrt{\hat v} + (\gamma/2 + \lambda)\, p_{t-1}}{1 + d\sqrt{\xi s}\, b_{t-1}}, \quad
        b_t = b_{t-1} + \gamma (1 + b_{t-1}), \quad p_t = p_{t-1} - u

    with :math:`s` the ``scale`` and means over all axes but that of the outputs; b slows learning down by itself.

    **When to use**: transformers trained from scratch, with a constant rate after warm-up and no other decay.
    **When not**: fine-tuning, or a model whose scales are unknown: too small a scale stunts a layer.

    State: near 0 bytes per parameter, 4 more with momentum. Under ``state="bf16"``, ``"8bit"``, ``"4bit"`` with
    momentum: 2.03, 1.05, 0.547.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs; :meth:`groups` makes groups with their scales.
        lr: about one over the root of the number of batches in the data.
        beta: kept fraction of the average of squares; ``1 - beta`` of the size of ``lr``.
        scale: expected root mean square of a weight's entries after training.
        momentum: kept fraction of the average of steps, 0 for none; 0.9 for BERT.
        weight_decay: more decay, per step and not times ``lr`` (the authors' ``extra_l2``, 0 in all their runs); L2
            with ``decoupled_weight_decay=False``.
        c_coef: how fast b slows the decay down.
        d_coef: how fast b slows learning down.
        clip_value: hold each number of the gradient within this, None for no limit; 1.0 for BERT.
        transposed: outputs lie along the second axis of weights, as in transposed convolutions, not along the first.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Amos(piste.Amos.groups(model), lr=1e-2)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Tian & Parikh 2022, arXiv 2210.11693; parity with formulas typed from ``jestimator`` 0.3.3.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        beta: float = 0.999,
        scale: float = 1.0,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        clip_value: float | None = None,
        transposed: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "beta": beta, "scale": scale, "momentum": momentum, "weight_decay": weight_decay}
        hyper |= {"c_coef": c_coef, "d_coef": d_coef, "decoupled_weight_decay": True}
        super().__init__(params, hyper | {"clip_value": clip_value, "transposed": transposed}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_update("Amos", group)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        finish = () if group["clip_value"] is None else (hold,)
        return standard(group, amos_transposed if group["transposed"] else amos, finish=finish, decoupled=None)

    @classmethod
    def groups(cls, model: nn.Module, groups: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Groups of a model (or those given), split by ``scale`` and layout; ``piste.create`` calls it by itself."""
        return model_scales(model, param_groups(model, weight_decay=0) if groups is None else groups)
