"""What stands inside of what: optimizers in their wrappers, those of frameworks among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import piste

__all__ = ["from_outside_in", "two_pass_of"]


def from_outside_in(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, the one it is round, and so on; nothing for what is no optimizer.

    >>> import torch, piste
    >>> from piste.integrations.wrapped import from_outside_in
    >>> optimizer = piste.create("sam+lookahead+sgd", torch.nn.Linear(2, 1), lr=0.1)
    >>> [type(each).__name__ for each in from_outside_in(optimizer)]
    ['SAM', 'Lookahead', 'SGD']
    """
    while isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def two_pass_of(optimizer: Any) -> piste.SAM | None:
    """The wrapper that steps in two passes, if there is one."""
    return next((each for each in from_outside_in(optimizer) if isinstance(each, piste.SAM)), None)
