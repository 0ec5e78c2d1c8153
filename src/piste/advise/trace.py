"""The learning rates that a scheduler is going to give, looked up on a copy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from piste.schedules import Schedule

__all__ = ["Trace", "own_length", "trace"]

_POINTS, _LONGEST, _UNKNOWN = 1000, 20_000, 1000
_NEARLY = 0.98


@dataclass(frozen=True)
class Trace:
    """Learning rates of the first parameter group, evenly spaced over a run, as multiples of its ``initial_lr``."""

    rates: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The largest."""
        return max(self.rates)

    @property
    def begins(self) -> float:
        """The first as a fraction of the largest."""
        return self.rates[0] / self.peak

    @property
    def ends(self) -> float:
        """The last as a fraction of the largest."""
        return self.rates[-1] / self.peak

    @property
    def flat(self) -> float:
        """The fraction of the run at the largest rate or next to it."""
        return sum(rate >= _NEARLY * self.peak for rate in self.rates) / len(self.rates)

    @property
    def is_constant(self) -> bool:
        """Does it never leave the largest rate?"""
        return self.flat == 1

    @property
    def rises_again(self) -> bool:
        """Is the end well above the lowest rate behind the peak?"""
        behind = self.rates[self.rates.index(self.peak) :]
        return self.rates[-1] - min(behind) > 0.1 * self.peak


def own_length(scheduler: Any) -> int | None:
    """The number of steps that a scheduler was made for, where it says."""
    if isinstance(scheduler, Schedule):
        return getattr(scheduler.curve, "total_steps", None)
    if isinstance(scheduler, OneCycleLR):
        return int(scheduler.total_steps)
    return int(scheduler.T_max) if isinstance(scheduler, CosineAnnealingLR) else None


def trace(scheduler: Any, steps: int | None) -> Trace | None:
    """The rates of a run of so many steps; None where they depend on the run, or cannot be looked up from here."""
    length = steps or own_length(scheduler) or _UNKNOWN
    points = sorted({i * length // _POINTS for i in range(_POINTS)} | {length - 1})
    if isinstance(scheduler, Schedule):
        group = scheduler.optimizer.param_groups[0]
        rates = [scheduler.curve.lr(1.0, point, group) for point in points]
    elif type(scheduler) is LambdaLR:
        rates = [scheduler.lr_lambdas[0](point) for point in points]
    elif isinstance(scheduler, LRScheduler) and scheduler.last_epoch == 0 and length <= _LONGEST:
        rates = _walked(scheduler, points)
    else:
        return None
    rates = [float(rate) for rate in rates]
    return Trace(tuple(rates)) if rates and all(map(math.isfinite, rates)) and max(rates) > 0 else None


def _walked(scheduler: LRScheduler, points: Sequence[int]) -> list[float]:
    """Step a copy that moves a stand-in for the optimizer; nothing if it cannot be copied or ends before the run."""
    real = scheduler.optimizer
    stand_in = torch.optim.SGD([torch.zeros(1) for _ in real.param_groups], lr=0.0)
    for ours, theirs in zip(stand_in.param_groups, real.param_groups, strict=True):
        ours.update({key: copy.copy(value) for key, value in theirs.items() if key not in ("params", "param_names")})
    base = float(real.param_groups[0].get("initial_lr", real.param_groups[0]["lr"])) or 1.0
    wanted, rates = set(points), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer was stepped
        try:
            twin = copy.deepcopy(scheduler, {id(real): stand_in})
            for step in range(points[-1] + 1):
                if step in wanted:
                    rates.append(float(stand_in.param_groups[0]["lr"]) / base)
                twin.step()
        except Exception:  # a scheduler of somebody's own may do anything; OneCycleLR raises behind its last step
            return rates if len(rates) == len(points) else []
    return rates
