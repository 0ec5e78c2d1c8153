"""SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.apply import scaled_lr
from piste.parts.standard import standard
from piste.rules.sgd import sgd
from piste.slots import Pipeline, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD"]


class SGD(Optimizer):
    r"""Stochastic gradient descent, with heavy-ball or Nesterov momentum.

    .. math::
        b_1 = g_1, \quad b_t = \mu b_{t-1} + (1 - \tau) g_t, \qquad
        p_t = p_{t-1} - \eta\,(g_t + \mu b_t \text{ if Nesterov, else } b_t)

    The learning rate stands outside of the buffer, and the first gradient enters it undampened, as in torch.

    **When to use**: convolutional networks, where with momentum 0.9 it often generalises best. **When not**:
    transformers and large vocabularies, where adaptive methods are far ahead at any tuning.

    State: one float32 tensor per weight with momentum (4 bytes per parameter), none without. Under ``state="bf16"``,
    ``"8bit"``, ``"4bit"`` with momentum: 2, 1.02, 0.516.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; CNNs commonly 0.1 per 256 images.
        momentum: fraction of the buffer that is kept, 0 for none.
        dampening: fraction of the gradient that is kept out of the buffer.
        weight_decay: L2 penalty; shrinks by ``lr * weight_decay`` with ``decoupled_weight_decay=True``.
        nesterov: look one step ahead; needs momentum and no dampening.
        lr_scale: a group's own factor on the learning rate of its steps, which schedules leave alone (decoupled decay
            does not feel it). :meth:`piste.Graft.scaled_groups` fills it in. timm's layer-wise decay uses the same
            entry, and timm's schedulers multiply it into ``lr`` themselves, so under those it would count twice:
            leave it out of this class's groups there.
        **options: see :class:`piste.options.Options`.

    Raises:
        ValueError: a value is out of range, or ``nesterov`` without momentum or with dampening.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum" (2013);
    parity with ``torch.optim.SGD``.
    """

    torch_names: ClassVar[Mapping[str, str]] = {"momentum_buffer": "buf"}
    #: does a step read its group's "lr_scale"? Not where schedulers multiply it into "lr" themselves
    reads_lr_scale: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        lr_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, hyper | {"nesterov": nesterov, "lr_scale": lr_scale}, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            had = f"momentum={group['momentum']!r} and dampening={group['dampening']!r}"
            raise ValueError(f"SGD got nesterov=True with {had}; legal: momentum > 0 and dampening = 0")

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, sgd, apply=scaled_lr if cls.reads_lr_scale else plain)
