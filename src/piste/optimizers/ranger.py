"""Ranger and RangerAdaBelief: a rectified rule on centralized gradients, with Lookahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import EngineOptions, Params
from piste.parts import decay
from piste.parts.after import lookahead
from piste.parts.scale import rectified_step
from piste.parts.standard import standard
from piste.rules.adaptive import radam, ranger_adabelief
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Ranger", "RangerAdaBelief"]


class Ranger(Optimizer):
    r"""RAdam on centralized gradients, with Lookahead: every k steps the weights go back half of the way.

    .. math::
        g_t \leftarrow g_t - \operatorname{mean}_{\text{all but output axis}}(g_t), \qquad
        p_t = (1 - \eta\lambda)\, p_{t-1} - \eta\, \text{RAdam}(g_t), \qquad
        t \bmod k = 0:\; p_t = s_t = s_{t-k} + \alpha (p_t - s_{t-k})

    **When to use**: vision and tabular nets, with a flat learning rate and a cosine end (``piste.schedules.
    flat_cosine``). **When not**: with a schedule that decays from the start, or where a third state tensor does not
    fit. At the end of training the weights are good ones only after a multiple of k steps.

    State: 12 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 8, 6.05, 5.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs. Embeddings are centralized like any matrix; put them in
            a group with ``use_gc=False`` if that is unwanted.
        lr: learning rate; 1e-3 to 4e-3 is common.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay before the step. (The released code has 0; fastai and its author's runs 1e-2.)
        k: steps between two synchronisations of Lookahead.
        alpha: fraction of the way that is kept.
        use_gc: centralize gradients. (The released ``ranger.py`` ignores ``use_gc=False``; here it is honoured.)
        gc_conv_only: of 2-D and 3-D convolutions alone.
        gc_loc: centralize the gradient; else the final direction.
        **options: see :class:`piste.options.EngineOptions`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Ranger(model.parameters(), lr=2e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Wright, "Ranger" (2019-2020, lessw2020/Ranger-Deep-Learning-Optimizer); Liu et al. 2020 (RAdam), Zhang et
    al. 2019 (Lookahead), Yong et al. 2020 (centralization). Parity with formulas typed from ``ranger.py`` 20.4.11.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 1e-2,
        *,
        k: int = 6,
        alpha: float = 0.5,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        gc_loc: bool = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": k, "alpha": alpha}
        flags = {"use_gc": use_gc, "gc_conv_only": gc_conv_only, "gc_loc": gc_loc, "degenerated_to_sgd": True}
        super().__init__(params, hyper | flags | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, radam, scale=(rectified_step,), after=(lookahead,))


class RangerAdaBelief(Optimizer):
    r"""Ranger with AdaBelief's second moment, the decay inside the direction.

    .. math::
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)(g_t - m_t)^2 \;(+\,\epsilon \text{ once rectified}), \qquad
        p_t = p_{t-1} - \eta\, c_t \Big(\frac{m_t}{\sqrt{s_t} + \epsilon} + \lambda p_{t-1}\Big)

    with centralized :math:`g`, RAdam's step size :math:`c_t`, and Lookahead as in :class:`Ranger`. As in the released
    code the decay is scaled by :math:`c_t` too, so it is weak in the first steps.

    **When to use**: as Ranger; eps 1e-8 for vision, 1e-16 for language, 1e-12 for reinforcement learning
    (``piste.create("rangeradabelief", model, domain="nlp")``). **When not**: as Ranger and AdaBelief.

    State: 12 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 8, 6.05, 5.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of the two averages that are kept.
        eps: enters the state in every step. The released constructor has 1e-5, which is Ranger's and far too large
            here; its README recommends 1e-12.
        weight_decay: decay inside the direction; L2 with ``decoupled_weight_decay=False``. (Released code: 0.)
        k: steps between two synchronisations of Lookahead.
        alpha: fraction of the way that is kept.
        use_gc: centralize gradients.
        gc_conv_only: of 2-D and 3-D convolutions alone.
        gc_loc: centralize the gradient; else the direction, with the decay in it.
        **options: see :class:`piste.options.EngineOptions`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.RangerAdaBelief(model.parameters(), lr=2e-3, eps=1e-8)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Zhuang et al. 2020; parity with ``ranger-adabelief`` 0.1.0, except for its bug: until the step is rectified
    that code adds the decay to the momentum buffer itself, which it had only meant to read.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 1e-2,
        *,
        k: int = 6,
        alpha: float = 0.5,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        gc_loc: bool = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": k, "alpha": alpha}
        flags = {"use_gc": use_gc, "gc_conv_only": gc_conv_only, "gc_loc": gc_loc}
        super().__init__(params, hyper | flags | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        rectified = (rectified_step,)
        return standard(group, ranger_adabelief, scale=rectified, decoupled=decay.into_direction, after=(lookahead,))
