"""SOAP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from piste.kronecker import kronecker
from piste.optimizers.statistics import FactorsOfOthers
from piste.options import Options, Params, hyperparameters
from piste.parts.apply import decayed_last
from piste.parts.prepare import l2
from piste.parts.standard import standard
from piste.rules.soap import soap
from piste.slots import Pipeline, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SOAP"]


class SOAP(FactorsOfOthers):
    r"""Adam in the basis in which Shampoo's factors are diagonal.

    .. math::
        L_t = \beta L_{t-1} + (1-\beta)\, G_t G_t^\top, \quad R_t = \beta R_{t-1} + (1-\beta)\, G_t^\top G_t, \qquad
        G'_t = Q_L^\top G_t Q_R

    .. math::
        M_t = \beta_1 M_{t-1} + (1-\beta_1)\, G'_t, \quad V_t = \beta_2 V_{t-1} + (1-\beta_2)\, G'^2_t, \quad
        p \leftarrow p - \eta\,\frac{\sqrt{1-\beta_2^k}}{1-\beta_1^k}\,
        Q_L \frac{M_t}{\sqrt{V_t} + \epsilon} Q_R^\top, \quad p \leftarrow (1 - \eta\lambda)\, p

    with :math:`k = t - 1`: the first gradient moves nothing, it makes the first basis (by eigendecomposition), so that
    no gradient is seen in a basis of its own making. Every ``every`` steps one power iteration and a QR decomposition
    renew the basis, in which columns are sorted anew, V with them, and M is turned. A weight of r axes has r bases.

    **When to use**: matrices and convolutions at large batches; it needs fewer refreshes than Shampoo, and about Adam's
    learning rate. **When not**: small batches; where a step of AdamW is already slower than a batch; with gradient
    centralization, which leaves each matrix a direction without gradients, where a step is rounding divided by eps.

    State of a square matrix: 8 bytes per parameter of factors and as much of bases, 8 of moments. Under
    ``state="bf16"``, ``"8bit"``, ``"4bit"`` the moments take 4, 2.05, 1.06; ``factors="bf16"`` halves the factors.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: kept fractions of the two moments.
        eps: added to the denominator, outside of the bias correction.
        weight_decay: decoupled decay, after the step; L2 with ``decoupled_weight_decay=False``.
        shampoo_beta: kept fraction of the factors; None for ``betas[1]``.
        every: steps from one renewal of the bases to the next.
        max_size: axes longer than this (a vocabulary) keep their own basis; None for no limit.
        merge_dims: merge neighbouring axes, from the first on, while their product is at most ``max_size``.
        precondition_1d: also vectors have a basis; without it they have Adam's step.
        normalize: bring every step of a weight to a root mean square of 1; for renewals that are far apart.
        bias_correction: correct moments for starting at zero.
        factors: how factors are kept: ``"fp32"`` (float64 for float64 weights) or ``"bf16"``.
        preconditioner_gradients: factors, and so bases, are made of gradients that
            :meth:`give_preconditioner_gradients` brings, not of those of the loss, of which both moments stay; 4 more
            bytes per parameter of weights that have a basis.
        **options: see :class:`piste.options.Options`.

    A basis that is not finite, or whose residual is 0.1 or more, is not taken: the last one stays, and the log says so.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.SOAP(model.parameters(), lr=3e-3)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).sum().backward()
        ...     optimizer.step()

    Source: Vyas et al. 2024, arXiv 2409.11321; parity with formulas typed from the authors' ``soap.py``, which was run
    beside them.
    """

    shaping = ("max_size",)

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        shampoo_beta: float | None = None,
        every: int = 10,
        max_size: int | None = 10_000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize: bool = False,
        bias_correction: bool = True,
        factors: str = "fp32",
        preconditioner_gradients: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = hyperparameters(locals())
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["merge_dims"] and group["max_size"] is None:
            raise ValueError(
                f"{cls.__name__} got merge_dims=True with max_size=None; legal: a whole number to merge up to"
            )

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        longest = group["max_size"]
        how = kronecker(None, longest if group["merge_dims"] else None, longest=longest)
        apply = decayed_last if group["decoupled_weight_decay"] else plain
        return standard(group, soap(how, group["factors"] == "bf16"), coupled=l2, decoupled=None, apply=apply)

    @staticmethod
    def has_factors(group: Mapping[str, Any], weight: Tensor) -> bool:
        return weight.ndim > 1 or group["precondition_1d"]
