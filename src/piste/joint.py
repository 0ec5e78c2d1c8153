"""Steps of several optimizers at once, in one launch where none of them could tell."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from inspect import unwrap
from itertools import chain
from typing import Any

import torch

from piste import execution
from piste.optimizer import Optimizer
from piste.roster import Roster

__all__ = ["JointStep"]


class JointStep:
    """Takes the steps of many like optimizers together, each of which trains a model of its own.

    With small models a step is calls and not arithmetic; the weights of all models then go through the rule in one
    call. Groups, states and schedules stay those of each optimizer: it can be saved, or step by itself, in between.

    What the rule takes together *within* a weight (norms of LAMB, factors of Adafactor and Shampoo) concerns nobody
    else. What it sums over all weights of an optimizer (``clip_norm``, Prodigy's distance, Ranger21's normalisation)
    would mix models; a rule that does so is found by its graph, and every optimizer then steps by itself, as do all
    that have a step of their own (wrappers, Schedule-Free), stochastic or coded formats, hooks, or a loss scale, that
    decide on gradients that are not finite, or that share work between processes.

    Args:
        optimizers: of any kind; together go those of one class and engine. To leave one out from some step on, make
            another of these: it costs what sorting the weights costs.

    Raises:
        TypeError: one of them is no optimizer.

    Example:
        >>> import torch, piste
        >>> weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        >>> optimizers = [piste.AdamW([w], lr=lr) for w, lr in zip(weights, (0.1, 0.2, 0.3))]
        >>> joint = piste.JointStep(optimizers)
        >>> for w in weights:
        ...     w.grad = torch.ones(2)
        >>> joint.step()
        >>> [round(float(w[0].detach()), 3) for w in weights]
        [0.899, 0.798, 0.697]
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        for each in self.optimizers:
            if not isinstance(each, torch.optim.Optimizer):
                raise TypeError(f"JointStep got optimizers with a {type(each).__name__}; legal: instances of Optimizer")
        self._rosters: list[Roster] = []
        self._roster = Roster([])
        kinds = {(type(o), getattr(o, "_engine_name", "")) for o in self.optimizers}
        self._apart = len(kinds) > 1 or not all(map(_is_plain, self.optimizers))

    def step(self) -> None:
        """Take one step of every optimizer, with the gradients that its weights have.

        Numbers are those of ``optimizer.step()`` for each; where a rule works on whole matrices, to rounding.
        """
        if self._apart or any(map(_is_watched, self.optimizers)) or not self._together(self.optimizers):
            for optimizer in self.optimizers:
                optimizer.step()

    @torch.no_grad()
    def _together(self, optimizers: Sequence[Any]) -> bool:
        """Whether the step could be taken in one; nothing has been changed if not."""
        dues = [each._due() for each in optimizers]
        self._bring_up_to_date(optimizers)
        if not self._roster.plain or self._roster.sharded or self._roster.shared:
            self._apart = True
            return False
        gradients = list(chain.from_iterable(due.gradients for due in dues))
        step = self._roster.sort(gradients, list(chain.from_iterable(due.numbers for due in dues)))
        if any(bucket.plan.totals or bucket.plan.tallies for bucket in step.buckets):
            self._apart = True
            return False
        totals = execution.take(step, optimizers[0]._engine_name)
        renewed = step.renews
        for optimizer, due in zip(optimizers, dues, strict=True):
            optimizer._taken(due, totals, renewed)
            optimizer._opt_called = True  # which schedules of torch look at, to say that they came too early
        return True

    def _bring_up_to_date(self, optimizers: Sequence[Optimizer]) -> None:
        """The weights of all in one roster, groups numbered through."""
        rosters = [optimizer._roster for optimizer in optimizers]
        if len(rosters) == len(self._rosters) and all(map(operator.is_, rosters, self._rosters)):
            return
        members = []
        before = 0
        for optimizer, roster in zip(optimizers, rosters, strict=True):
            members += [member._replace(group=before + member.group) for member in roster.members]
            before += len(optimizer.param_groups)
        self._rosters, self._roster = rosters, Roster(members)


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Is there nothing about its steps but the rule?"""
    return (
        isinstance(optimizer, Optimizer)
        # torch puts a function of its own round the step of each class
        and unwrap(type(optimizer).step) is unwrap(Optimizer.step)
        and optimizer._options["nonfinite"] == "ignore"
        and not optimizer.capturable
    )


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Does somebody want to be told of its step, or has left word for it?"""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    )
