"""Ralamb, RangerLars and LookaheadAdam, the optimizers of mgrankin/over9000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.after import late_lookahead, lookahead
from piste.parts.scale import corrected_step, rectified, rectified_step, trust_of_new_weights, trust_ratio
from piste.parts.standard import standard
from piste.rules.adaptive import adam, radam
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LookaheadAdam", "Ralamb", "RangerLars"]

#: where the trust ratio stands: on RAdam's bias-corrected direction, or on its whole step as released
_SCALES = {
    "update": (corrected_step, trust_ratio, rectified),
    "weights": (rectified_step, trust_of_new_weights),
}
_ALWAYS = {"degenerated_to_sgd": True, "always_adapt": True, "trust_clip": False, "decoupled_weight_decay": True}


class Ralamb(Optimizer):
    r"""RAdam whose direction is scaled, for each tensor, to the length of the weight.

    .. math::
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta\, r_t\,\frac{\min(\lVert p_{t-1}\rVert, 10)}{\lVert u_t\rVert}\, u_t,
        \qquad u_t = \frac{m_t / (1 - \beta_1^t)}{(\sqrt{v_t} + \epsilon) / \sqrt{1 - \beta_2^t}}

    with RAdam's rectifier :math:`r_t`; in its first five steps :math:`u_t = m_t / (1 - \beta_1^t)` and
    :math:`r_t = 1`. The ratio is 1 where either norm is 0.

    The released code divides by the norm of the *new weights* instead of that of the update. Its ratio is therefore
    near 1 for a tensor of norm below 10, and 10 over the norm for a larger one: RAdam with a smaller learning rate for
    large tensors. Published results of over9000 were had so; ``trust_denominator="weights"`` does it as released.
    Here the rectifier stands outside of the ratio, for inside the ratio would divide it out again.

    **When to use**: as Lamb, without a warm-up of its own. **When not**: with many scalars or biases near 0, whose
    steps are as small as they are.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; about the relative change of each tensor per step, or as for RAdam where
            ``trust_denominator="weights"``.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the second moment, before the bias correction, as in the released code.
        weight_decay: decoupled decay, outside of the ratio as in the released code; L2 with
            ``decoupled_weight_decay=False``.
        trust_denominator: "update", or "weights" for the released code.
        max_weight_norm: the most that a weight's norm may count; None for no bound.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Ralamb(model.parameters(), lr=5e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Grankin 2019, mgrankin/over9000 ``ralamb.py``; Liu et al. 2020 (RAdam), You et al. 2020 (trust ratio).
    Parity with formulas in float64.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        trust_denominator: str = "update",
        max_weight_norm: float | None = 10.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        trust = {"trust_denominator": trust_denominator, "max_weight_norm": max_weight_norm}
        super().__init__(params, hyper | trust | _ALWAYS, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, radam, scale=_SCALES[group["trust_denominator"]])


class RangerLars(Optimizer):
    r"""Ralamb with Lookahead, also called Over9000.

    .. math::
        p_t = \text{Ralamb}(p_{t-1}, g_t), \qquad
        t \bmod k = 0:\; p_t = s_t = s_{t-k} + \alpha (p_t - s_{t-k})

    The preset ``over9000`` is the released code: ``trust_denominator="weights", late_start=True``.

    **When to use**: as Ranger, with a flat learning rate and a cosine end; no gradient is centralized here unless
    ``use_gc=True``. **When not**: as Ralamb, or where a third state tensor does not fit.

    State: 12 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 8, 6.05, 5.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for Ralamb.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, outside of the trust ratio.
        k: steps between two synchronisations of Lookahead.
        alpha: fraction of the way that is kept.
        trust_denominator: "update", or "weights" for the released code; see :class:`Ralamb`.
        max_weight_norm: the most that a weight's norm may count; None for no bound.
        late_start: slow weights begin after the first k steps, so that the first synchronisation moves nothing, as in
            the released code; else they begin as the initial weights (Zhang et al. 2019).
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.RangerLars(model.parameters(), lr=5e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Grankin 2019, mgrankin/over9000; Zhang et al. 2019, arXiv 1907.08610 (Lookahead). Parity with formulas in
    float64.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        k: int = 6,
        alpha: float = 0.5,
        trust_denominator: str = "update",
        max_weight_norm: float | None = 10.0,
        late_start: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": k, "alpha": alpha}
        trust = {"trust_denominator": trust_denominator, "max_weight_norm": max_weight_norm}
        super().__init__(params, hyper | trust | {"late_start": late_start} | _ALWAYS, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        scale = _SCALES[group["trust_denominator"]]
        return standard(group, radam, scale=scale, after=(late_lookahead if group["late_start"] else lookahead,))


class LookaheadAdam(Optimizer):
    r"""Adam with Lookahead: every k steps the weights go back half of the way.

    .. math::
        p_t = \text{Adam}(p_{t-1}, g_t), \qquad
        t \bmod k = 0:\; p_t = s_t = s_{t-k} + \alpha (p_t - s_{t-k})

    Each weight counts its own steps; ``piste.Lookahead(piste.Adam(...))`` counts one for all, like the paper.

    **When to use**: where Adam's last weights scatter from run to run. **When not**: where a third state tensor does
    not fit. At the end of training the weights are good ones only after a multiple of k steps.

    State: 12 bytes per parameter, 16 with ``amsgrad``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 8, 6.05, 5.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the second moment.
        weight_decay: L2 penalty, torch's choice; ``decoupled_weight_decay=True`` makes it AdamW's.
        amsgrad: divide by the largest second moment so far.
        k: steps between two synchronisations of Lookahead.
        alpha: fraction of the way that is kept.
        late_start: slow weights begin after the first k steps, so that the first synchronisation moves nothing, as in
            over9000 and timm; else they begin as the initial weights, as in the paper.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.LookaheadAdam(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Zhang et al. 2019, arXiv 1907.08610; Grankin 2019, mgrankin/over9000. Parity with ``torch.optim.Adam`` in
    timm's Lookahead (``late_start=True``) and ``pytorch_optimizer``'s.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        k: int = 6,
        alpha: float = 0.5,
        late_start: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": k, "alpha": alpha}
        super().__init__(params, hyper | {"amsgrad": amsgrad, "late_start": late_start}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, adam, after=(late_lookahead if group["late_start"] else lookahead,))
