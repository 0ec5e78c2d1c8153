"""MADGRAD and its mirror form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piste.optimizer import Optimizer
from piste.options import Options, Params
from piste.parts.standard import check_update, standard
from piste.rules.dual import madgrad, mirror_madgrad
from piste.slots import Pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MADGRAD", "MirrorMADGRAD"]


class MADGRAD(Optimizer):
    r"""Dual averaging with a cube root: the weight follows the initial one minus the scaled sum of all gradients.

    .. math::
        \lambda_t = (\eta + \epsilon)\sqrt{t}, \quad \nu_t = \nu_{t-1} + \lambda_t g_t^2, \quad
        s_t = s_{t-1} + \lambda_t g_t, \qquad
        z_t = p_0 - \frac{s_t}{\sqrt[3]{\nu_t} + \epsilon}, \quad p_t = \mu p_{t-1} + (1 - \mu) z_t

    **When to use**: where SGD is too slow and Adam generalises worse: reconstruction, recommendation, vision, with a
    learning rate swept anew and a tenth or none of the usual weight decay; with warm-up, because early gradients stay
    in the sums for ever. **When not**: where something else moves the weights (an average swapped in, pruning,
    loading): the initial weight pulls them back. Very deep transformers like :class:`MirrorMADGRAD` better.

    State: 12 bytes per parameter, 8 with ``momentum=0``. It has no moments that could be stored in fewer bits.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate; 2.5e-4 to 0.025 in the authors' runs.
        momentum: fraction of the weight that is kept when it is averaged towards z.
        weight_decay: L2 penalty; with ``decoupled_weight_decay=True`` the weight before the step, times
            ``(lr + eps) * weight_decay``, is taken off after it.
        eps: added to the cube root, and to a learning rate that is not 0, as in the released code.
        **options: see :class:`piste.options.Options`; ``gc_loc=False`` is refused.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.MADGRAD(model.parameters(), lr=1e-2)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Defazio & Jelassi 2021, arXiv 2101.11075; parity with ``madgrad`` 1.3, but for steps that are counted per
    weight, and for ``eps=0`` without momentum, where that code divides 0 by 0.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, hyper, options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        check_update(cls.__name__, group)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, madgrad, decoupled=None)


class MirrorMADGRAD(MADGRAD):
    r"""MADGRAD that moves a second copy of the weight instead of pulling towards the initial one.

    .. math::
        \nu_t = \sqrt{\tfrac{t-1}{t}}\,\nu_{t-1} + g_t^2, \qquad
        z_t = z_{t-1} - (\eta + \epsilon)\sqrt[3]{t}\,\frac{g_t}{\sqrt[3]{\nu_t} + \epsilon}, \quad
        p_t = \mu p_{t-1} + (1 - \mu) z_t

    **When to use**: large transformers, for which its authors made it. **When not**: as :class:`MADGRAD`, but for the
    pull of the initial weight.

    State: 8 bytes per parameter. It has no moments that could be stored in fewer bits.

    Args:
        params: tensors, groups, or ``(name, tensor)`` pairs.
        lr: learning rate.
        momentum: fraction of the weight that is kept when it is averaged towards z.
        weight_decay: L2 penalty; with ``decoupled_weight_decay=True`` z shrinks by ``(lr + eps) * weight_decay``.
        eps: added to the cube root, and to a learning rate that is not 0.
        **options: see :class:`piste.options.Options`; ``gc_loc=False`` is refused.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.MirrorMADGRAD(model.parameters(), lr=1e-2)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()

    Source: Defazio & Jelassi, ``mirror_madgrad`` of the package ``madgrad`` 1.3 (no paper describes it); parity with
    it, but for steps that are counted per weight.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, eps, **options)

    @classmethod
    def pipeline(cls, group: Mapping[str, Any]) -> Pipeline:
        return standard(group, mirror_madgrad, decoupled=None)
