"""Prodigy."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import check_update, standard
from piste.rules.prodigy import DENOMINATOR, NUMERATOR, grown, prodigy
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Prodigy"]

_ESTIMATE = ("d", "d_max", "d_numerator")


class Prodigy(Optimizer):
    r"""AdamW that estimates its learning rate from how far the weights have come: leave ``lr`` at 1.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_t g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t^2 g_t^2 \\
        r_t &= \beta_3 r_{t-1} + \gamma_t d_t^2 \langle g_t, p_0 - p_{t-1} \rangle, \qquad
        s_t = \beta_3 s_{t-1} + \gamma_t d_t^2 g_t, \qquad
        d_{t+1} = \max\Big(d_t, \frac{r_t}{\lVert s_t \rVert_1}\Big) \\
        p_t &= (1 - \gamma_t d_t \lambda)\, p_{t-1} - \gamma_t d_t \frac{m_t}{\sqrt{v_t} + d_{t+1} \epsilon}

    with inner products and norms over all weights, and :math:`\gamma` the schedule (``lr``).

    **When to use**: no learning rate is known and there is no time to look for one; under a cosine schedule of ``lr``
    from 1. **When not**: where a tuned AdamW is at hand; with weights that must not share one estimate. It reads one
    number from the device in every step.

    State: 16 bytes per parameter, and the estimate in the group (``param_groups[0]["d"]``). Under ``state="bf16"``,
    ``"8bit"``, ``"4bit"``: 12, 10, 9.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: multiplies the estimate. A group with ``lr=0`` rests and has no part in the estimate.
        betas: fractions that are kept of the averages of gradients and their squares.
        eps: times d, added to the root of the mean square.
        weight_decay: strength of decoupled decay; L2 with ``decoupled_weight_decay=False``.
        beta3: fraction of numerator and denominator that is kept; None for the root of the second beta.
        bias_correction: Adam's.
        safeguard_warmup: leave ``lr`` out of the denominator; against estimates that grow too much under warm-up.
        d0: the first estimate.
        d_coef: multiplies the estimate: 0.5 to 2, in the place of a learning rate.
        growth_rate: how much larger the estimate may become in one step.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Prodigy(model.parameters())
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Mishchenko & Defazio 2023, arXiv 2306.06101; parity with ``prodigyopt`` 1.1.2, without its ``slice_p``. That
    one counts steps per group, asks equal learning rates of all groups, and without a first beta scales the gradient
    with the new estimate, where the paper has the old one.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta3: float | None = None,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "beta3": beta3, "d0": d0}
        hyper |= {"bias_correction": bias_correction, "safeguard_warmup": safeguard_warmup, "d_coef": d_coef}
        hyper |= {"growth_rate": growth_rate, "d": d0, "d_max": d0, "d_numerator": 0.0}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_update(cls.__name__, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; a group that joins late takes over the estimate."""
        if self.param_groups:
            param_group = {**{name: self.param_groups[0][name] for name in _ESTIMATE}, **param_group}
        super().add_param_group(param_group)

    def absorb(self, group: Mapping[str, Any], totals: Mapping[str, Tensor]) -> dict[str, Any]:
        scale = float(totals.get(DENOMINATOR, 0.0))
        if scale == 0:
            return {}
        hp = SimpleNamespace(**group, beta2=group["betas"][1])
        estimate = grown(hp, float(totals[NUMERATOR]), scale)
        return dict(zip(_ESTIMATE, map(float, estimate), strict=True))

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, prodigy, decoupled=None)
