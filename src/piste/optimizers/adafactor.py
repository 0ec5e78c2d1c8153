"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import check_update, standard
from piste.rules.factored import adafactor, adafactor_last
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adafactor"]


class Adafactor(Optimizer):
    r"""Adam's second moment as one number per row and one per column, with steps relative to the weight's size.

    .. math::
        \hat\beta_t = 1 - t^{c}, \quad r_t, c_t = \text{averages of row and column means of } g_t^2 + \epsilon, \quad
        u_t = g_t \Big/ \sqrt{\frac{r_t\, c_t}{\operatorname{mean}(r_t)}}

    .. math::
        u_t \leftarrow \frac{u_t}{\max(1, \text{RMS}(u_t) / d)}, \quad \alpha_t = \rho_t
        \max(\epsilon_s, \text{RMS}(p)),
        \quad p_t = p_{t-1} - \alpha_t u_t, \quad
        \rho_t = \eta \text{ or } \min(10^{-2}, 1/\sqrt{t})

    **When to use**: models whose Adam state does not fit; T5. **When not**: small models, where AdamW is steadier.

    State: about 0 bytes per parameter of matrices and convolutions (``out + in * kernel`` numbers), 4 of vectors; 4
    more with ``beta1``. Under ``state="bf16"``, ``"8bit"``, ``"4bit"`` with ``beta1``: 2.03, 1.05, 0.547.

    With an ``lr``, ``scale_parameter`` makes it relative to each weight's size; T5's fine-tuning has ``lr=1e-3`` and
    ``scale_parameter=False``.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; None takes the relative step size. Schedulers need a number.
        eps: added to squared gradients.
        eps_scale: the least size that a weight is taken to have. (Other code has both in one pair ``eps``.)
        clip_threshold: largest root mean square of the normalised gradient.
        decay_rate: exponent of the average's pace, below 0.
        beta1: kept fraction of the average of steps, None for none. It holds whole steps: a new rate acts with delay.
        weight_decay: decay by ``weight_decay`` times the step size of the weight; L2 with
            ``decoupled_weight_decay=False``.
        scale_parameter: multiply steps by the weight's root mean square.
        relative_step: None follows from ``lr``; True or False must agree with it.
        warmup_init: relative steps that begin at ``1e-6 * t``.
        factor: ``"matrix"``: a convolution is the matrix (out, in * kernel); ``"last"``: the last two axes are factored
            for each index of the others, as in fairseq and transformers, which saves little on a convolution.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range, or ``lr``, ``relative_step`` and ``warmup_init`` contradict each other.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.Adafactor(model.parameters(), lr=1e-3, scale_parameter=False)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Shazeer & Stern 2018, arXiv 1804.04235; parity with a formula typed from the paper, which was checked
    against transformers' ``Adafactor`` 5.23.0 (``factor="last"``; equal for matrices and vectors under either).
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: float = 1e-30,
        eps_scale: float = 1e-3,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        *,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        factor: str = "matrix",
        **options: Unpack[Options],
    ) -> None:
        if relative_step is not None and relative_step != (lr is None):
            raise ValueError(f"Adafactor got relative_step={relative_step} with lr={lr!r}; legal: True with lr=None")
        hyper: dict[str, Any] = {
            "lr": lr,
            "eps": eps,
            "eps_scale": eps_scale,
            "clip_threshold": clip_threshold,
            "beta1": beta1,
        }
        hyper |= {"decay_rate": decay_rate, "weight_decay": weight_decay, "factor": factor}
        flags = {"scale_parameter": scale_parameter, "warmup_init": warmup_init, "decoupled_weight_decay": True}
        super().__init__(params, hyper | flags, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_update("Adafactor", group)
        if group["warmup_init"] and group["lr"] is not None:
            raise ValueError(f"Adafactor got warmup_init=True with lr={group['lr']!r}; legal: with lr=None")

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        rule = adafactor if group["factor"] == "matrix" else adafactor_last
        return standard(group, rule, decoupled=None)
