"""RAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts import decay
from piste.parts.scale import rectified_step
from piste.parts.standard import standard
from piste.rules.adaptive import radam
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RAdam"]


class RAdam(Optimizer):
    r"""Adam that holds its step back while the second moment is known from too few gradients.

    .. math::
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        p_t = p_{t-1} - \eta\, \frac{1}{1 - \beta_1^t} \begin{cases}
            r_t \sqrt{1 - \beta_2^t}\; m_t / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ m_t & \text{else} \end{cases}

    The first five steps of any usual :math:`\beta_2` are momentum steps with the raw gradient.

    **When to use**: in place of Adam with a warm-up. **When not**: with very large first gradients, unless
    ``degenerated_to_sgd=False``, which leaves those five steps out (decoupled decay included).

    State: 8 bytes per parameter. Under ``state="bf16"``, ``"8bit"``, ``"4bit"``: 4, 2.05, 1.06.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        betas: fractions of the two averages that are kept.
        eps: added to the root of the second moment, before the bias correction, as in the released code.
        weight_decay: L2 penalty, torch's choice; ``decoupled_weight_decay=True`` is the authors'.
        degenerated_to_sgd: take momentum steps until the step is rectified; else none.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.RAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond" (ICLR 2020, arXiv 1908.03265); the
    threshold 5 is the released code's, the paper has 4. Parity with ``torch.optim.RAdam``.
    """

    torch_names: ClassVar[Mapping[str, str]] = {"exp_avg": "m", "exp_avg_sq": "v"}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        degenerated_to_sgd: bool = True,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper | {"degenerated_to_sgd": degenerated_to_sgd}, options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, radam, scale=(rectified_step,), decoupled=decay.decoupled_while_moving)
