"""piste in MosaicML's Composer: nothing to do for most optimizers, one line for those with two passes.

Composer gives every optimizer a closure that clears gradients and runs all micro-batches of a batch, forward and
backward. Its convention goes beyond that of torch: the closure takes keywords, adds to the loss that is logged, and
returns None where the gradients of some process were not finite.

Source: ``composer.algorithms.sam``, ``composer.trainer`` and ``composer.trainer._scaler`` of Composer 0.32. Its pins
exclude current versions of torch, so this module imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import piste

__all__ = ["two_passes"]


def two_passes(optimizer: piste.SAM) -> piste.SAM:
    """Let a two-pass optimizer speak Composer's dialect of closures.

    * The first of two passes is asked not to average gradients over processes (``ddp_sync=False``): each climbs with
      its own, as in the paper and in Composer's SAM. Where both gradients are combined (GSAM, LookSAM) it is averaged,
      and all processes climb alike: Composer averages within a pass, so their steps would differ otherwise.
    * The second is given a dictionary of its own for losses (``loss_dict={}``), or it would be added to what is logged.
    * A pass that returns None, as Composer's scaler has it where gradients overflowed, skips the step; the weights are
      where they were.
    * Under float16 Composer hands closures only to optimizers that say that they know all this; this one then does.

    Args:
        optimizer: :class:`piste.SAM`, GSAM or LookSAM; ESAM with ``gamma=1``.

    Returns:
        The same optimizer, for ``composer.Trainer(optimizers=...)``. Its ``step(closure)`` is Composer's from now on.

    Raises:
        TypeError: ``optimizer`` has no two passes: it needs nothing of this.
        ValueError: it needs the losses of single samples, which Composer's closure does not give.

    Not for other trainers, whose closures take no keywords.

    Example:
        >>> import torch, piste
        >>> from piste.integrations import composer
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = composer.two_passes(piste.SAM(piste.AdamW(model.parameters(), lr=1e-3), model=model))
        >>> def closure(loss_dict=None, ddp_sync=True):  # what Composer's trainer hands over
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     return loss.item()
        >>> loss = optimizer.step(closure=closure)
    """
    if not isinstance(optimizer, piste.SAM):
        raise TypeError(
            f"two_passes got optimizer={type(optimizer).__name__}; legal: piste.SAM and its descendants. Other "
            "optimizers are given to composer.Trainer as they are"
        )
    if optimizer.selects:
        raise ValueError(
            f"two_passes got {type(optimizer).__name__} with gamma below 1, which needs the loss of each sample; "
            "legal: gamma=1"
        )
    optimizer._step_supports_amp_closure = True  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(_translate)
    return optimizer


def _translate(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``step`` with Composer's closure in torch's terms."""
    assert isinstance(optimizer, piste.SAM)
    given = dict(zip(("self", "closure"), args, strict=False)) | kwargs
    closure = given.get("closure")
    if closure is None or isinstance(closure, _Closure):  # a subclass has called the step of its parent
        return args, kwargs
    return args[:1], {"closure": _Closure(optimizer, closure)}


class _Closure:
    """A closure of Composer's, called once or twice."""

    def __init__(self, optimizer: piste.SAM, closure: Callable[..., Any]) -> None:
        self.optimizer, self.closure = optimizer, closure
        self.keywords: list[dict[str, Any]] = [{}]
        if optimizer.needs_two_passes:
            self.keywords = [{} if optimizer.combines else {"ddp_sync": False}, {"loss_dict": {}}]

    def __call__(self) -> Any:
        loss = self.closure(**self.keywords.pop(0))
        if loss is None:
            self.optimizer.give_up()
        return loss
