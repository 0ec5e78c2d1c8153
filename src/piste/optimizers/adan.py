"""Adan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.checks import check_choice
from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts import decay
from piste.parts.apply import proximal
from piste.parts.standard import standard
from piste.rules.adaptive import adan
from piste.slots import Pipeline, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adan"]


class Adan(Optimizer):
    r"""Adam that also averages how gradients change, and looks ahead by that, as Nesterov's momentum does.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        d_t = \beta_2 d_{t-1} + (1 - \beta_2)(g_t - g_{t-1}), \quad
        n_t = \beta_3 n_{t-1} + (1 - \beta_3)\big(g_t + \beta_2 (g_t - g_{t-1})\big)^2, \qquad
        p_t = \frac{1}{1 + \eta\lambda}\Big(p_{t-1} - \eta\,
              \frac{\hat m_t + \beta_2 \hat d_t}{\sqrt{\hat n_t} + \epsilon}\Big)

    where hats divide by :math:`1 - \beta^t`.

    **When to use**: vision and language at learning rates 5 to 10 times AdamW's, with warm-up. **When not**: where 16
    bytes of state per parameter do not fit, or gradients are rescaled between steps (it compares successive ones;
    unscale before the step).

    State: 16 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 10, 7.06, 5.58.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions that are *kept*, as in the released code. The paper writes what is *taken in*: its
            (0.02, 0.08, 0.01) are (0.98, 0.92, 0.99) here.
        eps: added to the denominator.
        weight_decay: decay, as a proximal map after the step; L2 with ``decoupled_weight_decay=False``.
        no_prox: shrink by ``lr * weight_decay`` before the step instead, as AdamW does.
        betas_convention: ``"code"``, or ``"paper"`` for betas as the paper writes them; groups keep the code's.
        **options: see :class:`piste.options.Options`; ``clip_norm`` is the released code's ``max_grad_norm``.

    Raises:
        ValueError: a value is out of range, or ``betas`` look like the paper's without ``betas_convention="paper"``.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Adan(model.parameters(), lr=1e-2, weight_decay=0.02)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Xie et al. 2022, arXiv 2208.06677; parity with timm's ``Adan``, which follows the authors' code, but for
    bias corrections of weights that wake late: theirs count the group's steps, ours the weight's.
    """

    betas_count = 3
    cycles_momentum = False  # a schedule that cycles 0.95 to 0.85 means Adam's 0.9 and not this 0.98

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        betas_convention: str = "code",
        **options: Unpack[Options],
    ) -> None:
        check_choice("betas_convention", betas_convention, ("code", "paper"))
        kept = tuple(round(1 - b, 12) for b in betas) if betas_convention == "paper" else betas
        hyper = {"lr": lr, "betas": kept, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        betas = group["betas"]
        if max(betas) < 0.5:
            ours = tuple(round(1 - b, 12) for b in betas)
            raise ValueError(
                f"{cls.__name__} got betas={tuple(betas)}, which look like the paper's, of what is taken in; "
                f"legal: betas={ours}, of what is kept, or betas_convention='paper'"
            )

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        prox = group["decoupled_weight_decay"] and not group["no_prox"]
        return standard(group, adan, decoupled=None if prox else decay.decoupled, apply=proximal if prox else plain)

    def restart(self) -> None:
        """Forget all averages and count steps anew, the restart of the paper's algorithm 1; call it between steps."""
        for state in self.state.values():
            for average in ("m", "d", "n"):
                if average in state:
                    state[average].zero_()
            state["step"] = 0
