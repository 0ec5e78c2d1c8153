"""SM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import standard
from piste.rules.cover import sm3
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SM3"]


class SM3(Optimizer):
    r"""Adagrad that keeps one number for each row, column or other slice instead of one for each weight.

    .. math::
        \nu_t = \min_i \mu_{t-1}^{(i)} + g_t^2, \qquad
        \mu_t^{(i)} = \max_{\text{all axes but } i} \nu_t, \qquad
        m_t = \mu\, m_{t-1} + (1 - \mu) \frac{g_t}{\sqrt{\nu_t + \epsilon}}, \qquad p_t = p_{t-1} - \eta\, m_t

    with :math:`\beta \min_i \mu^{(i)} + (1 - \beta) g^2` for the first sum where ``beta`` is below 1. Convolutions
    have an accumulator for each of their axes; vectors and scalars have Adagrad's own, of full size.

    **When to use**: embeddings and transformers whose second moments do not fit. **When not**: where 8 bytes per
    parameter do; sums grow for ever, so without ``beta`` a long run slows down by itself, and it wants a warm-up and a
    constant learning rate then.

    State: 4 bytes per parameter, next to none of it with ``momentum=0``: 4 bytes for each row, column or slice. Vectors
    keep 4 bytes more per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 2.03, 1.05, 0.547.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate, on Adagrad's scale. (The authors' code has no default; 0.1 is that of ``pytorch_optimizer``.)
        momentum: fraction of the averaged step that is kept; the paper's runs have 0.9.
        beta: fraction of the accumulators that is kept; 1 adds squares up, as in the paper. Below 1 accumulators can
            shrink, where some ports take the larger of the old and the new and they cannot.
        eps: added under the root; 1e-30 in the authors' code, 1e-8 in optax, which tiny gradients notice.
        weight_decay: decoupled decay; L2 with ``decoupled_weight_decay=False``. (The authors' code has none.)
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.SM3(model.parameters(), lr=0.1)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Anil, Gupta, Koren, Singer 2019, arXiv 1901.11150, algorithm SM3-II; parity with formulas typed from the
    authors' code, and from optax 0.2.8, whose ``b2`` is ``beta`` here.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        beta: float = 1.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper | {"decoupled_weight_decay": True}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, sm3)
