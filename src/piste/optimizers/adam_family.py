"""Younger relatives of Adam: other ways to normalise, to look ahead, to remember, to stay calm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts import decay
from piste.parts.standard import standard
from piste.rules.adaptive import ademamix, adopt, laprop, nadam, stable_adam
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ADOPT", "AdEMAMix", "LaProp", "NAdamW", "StableAdamW"]


class LaProp(Optimizer):
    r"""Momentum of gradients that have been normalised, where Adam normalises the momentum.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}, \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta \frac{m_t}{1 - \beta_1^t}

    **When to use**: as AdamW, above all with a small second beta or noisy gradients, where Adam diverges. **When not**:
    where AdamW is well tuned already; gains are small then.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for AdamW.
        betas: fractions of momentum and mean square that are kept; any two go together.
        eps: added to the root; 1e-15 in the authors' code.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.LaProp(model.parameters(), lr=4e-4)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Ziyin, Wang, Ueda 2020, arXiv 2002.04839; parity with timm's ``LaProp`` at a constant learning rate (the
    authors' code, and timm, average the learning rate with the momentum, the paper does not).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, hyper, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, laprop)


class ADOPT(Optimizer):
    r"""Adam that divides each gradient by the mean square of those *before* it, which lets it converge at any beta2.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \operatorname{clip}\!\Big(
              \frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)}, \pm (t-1)^{c}\Big), \quad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta m_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    with :math:`v_1 = g_1^2`: the first step moves nothing.

    **When to use**: as AdamW, where noise is large and beta2 had to be tuned. **When not**: runs of a few steps.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for AdamW.
        betas: fractions of momentum and mean square that are kept.
        eps: the least that a gradient is divided by.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        clip_exponent: normalised gradients may reach ``(t - 1) ** clip_exponent``; the authors' 0.25.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.ADOPT(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Taniguchi et al. 2024, arXiv 2411.02853; parity with timm's ``Adopt`` at ``clip_exp=0.25``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        clip_exponent: float = 0.25,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_exponent": clip_exponent}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, adopt, decoupled=decay.decoupled_from_second_step)


class NAdamW(Optimizer):
    r"""AdamW with Nesterov's momentum, which warms up.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12 0.96^{t\psi}), \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \frac{\eta}{\sqrt{\hat v_t} + \epsilon}\Big(
              \frac{1 - \mu_t}{1 - \prod_{i \le t}\mu_i} g_t + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1}\mu_i} m_t\Big)

    with AdamW's :math:`m` and :math:`\hat v`.

    **When to use**: where AdamW is used; the baseline of the AlgoPerf benchmark. **When not**: as AdamW.

    State: 8 bytes per parameter and a number per tensor. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for AdamW.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the mean square.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        momentum_decay: psi, how fast the momentum warms up; 4e-3 is Dozat's.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.NAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Dozat 2016, "Incorporating Nesterov momentum into Adam"; parity with ``torch.optim.NAdam``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        momentum_decay: float = 4e-3,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, nadam)


class StableAdamW(Optimizer):
    r"""AdamW that takes smaller steps for a tensor whose gradients have outgrown their running mean square.

    .. math::
        \rho_t = \sqrt{\operatorname{mean}\big(g_t^2 / \max(\hat v_t, \epsilon^2)\big)}, \qquad
        p_t = p_{t-1} - \frac{\eta}{\max(1, \rho_t)}\Big(\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
              + \lambda p_{t-1}\Big)

    **When to use**: large language and vision-language models, in the place of gradient clipping. **When not**: with
    ``clip_norm`` besides, which it makes needless; or where tensors are split, flattened or fused.

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for AdamW.
        betas: fractions of the two averages that are kept; a second of 0.99 or less is recommended.
        eps: added to the root; its square is the least mean square.
        weight_decay: decoupled decay, which shrinks with the step; L2 with ``decoupled_weight_decay=False``.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.StableAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2; parity with ``torch-optimi``'s ``StableAdamW``.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, hyper, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, stable_adam, decoupled=None)


class AdEMAMix(Optimizer):
    r"""AdamW with a second average of gradients, which remembers tens of thousands of steps.

    .. math::
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta \frac{\hat m_t + \alpha_t\, s_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
        s_t = \beta_{3,t} s_{t-1} + (1 - \beta_{3,t}) g_t

    with AdamW's :math:`\hat m` and :math:`\hat v`. Over ``warmup_steps``, alpha grows evenly from 0, and the half-life
    of s evenly from that of m.

    **When to use**: long runs of language models, with ``warmup_steps`` about their length. **When not**: short runs,
    in which the slow average never fills; or where 12 bytes of state per parameter do not fit.

    State: 12 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 6, 3.06, 1.58.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, as for AdamW.
        betas: fractions that are kept: of the fast average, of the mean square, of the slow average.
        eps: added to the root of the mean square.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``.
        alpha: weight of the slow average, at least 0; 5 to 10 for language.
        warmup_steps: over how many steps alpha and the third beta grow; None for not at all.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.AdEMAMix(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Pagliardini, Ablin, Grangier 2024, arXiv 2409.03137; parity with ``pytorch_optimizer``'s ``AdEMAMix``.
    """

    betas_count = 3

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        alpha: float = 5.0,
        warmup_steps: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        mixing = {"alpha": alpha, "warmup_steps": warmup_steps, "decoupled_weight_decay": True}
        super().__init__(params, hyper | mixing, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        beta1, _, beta3 = group["betas"]
        if group["warmup_steps"] is not None and 0 in (beta1, beta3):
            raise ValueError(
                f"AdEMAMix got betas={group['betas']} with warmup_steps; legal: the first and third above 0"
            )

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, ademamix)
