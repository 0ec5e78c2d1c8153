"""The numbers that Ranger21 carries from step to step: its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["START", "check_schedule", "length", "refuse_another", "runs", "scheduled", "told", "warmdown", "warmup"]

Group = Mapping[str, Any]

#: the numbers before the first step
START: dict[str, float] = {"schedule_step": 0, "current_lr": 0.0, "base_lr": 0.0}
_FASTEST, _SLOWEST = 1.0, 0.1  # of Chebyshev's steps: between one and ten times the learning rate


def length(total_steps: int | None, epochs: int | None, batches_per_epoch: int | None) -> dict[str, int | None]:
    """The three lengths of a run out of those that were given; a run without epochs is a single one."""
    given = {"total_steps": total_steps, "epochs": epochs, "batches_per_epoch": batches_per_epoch}
    if (epochs is None) != (batches_per_epoch is None) or (total_steps is not None and epochs is not None):
        had = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"Ranger21 got {had}; legal: total_steps alone, epochs with batches_per_epoch, or none")
    if epochs is None or batches_per_epoch is None:
        return given | ({} if total_steps is None else {"epochs": 1, "batches_per_epoch": total_steps})
    return given | {"total_steps": epochs * batches_per_epoch}


def told(group: Group, total_steps: int) -> dict[str, int | None]:
    """The lengths of a group whose run turns out to take so many steps."""
    if group["total_steps"] == total_steps:
        return {}
    if group["epochs"] not in (None, 1):
        had = f"epochs={group['epochs']!r} and batches_per_epoch={group['batches_per_epoch']!r}"
        raise ValueError(f"Ranger21 got total_steps={total_steps!r} with {had}; legal: their product, or neither")
    return length(total_steps, None, None)


def check_schedule(group: Group) -> None:
    """Refuse what no schedule can be made of."""
    total, epochs, batches = (group[name] for name in ("total_steps", "epochs", "batches_per_epoch"))
    if (total is None) != (epochs is None) or (total is not None and total != epochs * batches):
        had = f"total_steps={total!r} with epochs={epochs!r} and batches_per_epoch={batches!r}"
        raise ValueError(f"Ranger21 got a group with {had}; legal: their product, or all None")
    if group["use_cheb"] and (epochs is None or epochs < 3):
        raise ValueError(f"Ranger21 got use_cheb=True with epochs={epochs!r}; legal: epochs >= 3, batches_per_epoch")


def scheduled(group: Group) -> dict[str, float]:
    """The numbers of the step to come."""
    step, lr = group["schedule_step"] + 1, float(group["lr"])
    numbers = {"schedule_step": step, "current_lr": lr, "base_lr": lr}
    if runs(group):
        refuse_another(group, lr)
        numbers["current_lr"] = _lr(group, lr, step)
    return numbers


def runs(group: Group) -> bool:
    """Is there an inner schedule?"""
    return group["total_steps"] is not None and any(group[k] for k in ("use_warmup", "use_warmdown", "use_cheb"))


def refuse_another(group: Group, lr: float) -> None:
    """Two schedules multiply to neither; one that only cycles momentum does no harm."""
    base = float(group["base_lr"] or group.get("initial_lr", lr))
    if lr != base:
        raise ValueError(
            f"group['lr']={lr!r} was {base!r}: something else schedules the learning rate of this Ranger21, which has "
            "a schedule of its own; legal: no lr scheduler, or one round Ranger21 without total_steps and epochs (or "
            "use_warmup=False, use_warmdown=False, use_cheb=False)"
        )


def _lr(group: Group, lr: float, step: int) -> float:
    """Up a straight line, level or along Chebyshev's steps, and down a straight line."""
    up = warmup(group, group["betas"][1])
    now = lr * step / up if group["use_warmup"] and step < up else lr
    if group["use_cheb"] and not (group["use_warmup"] and step <= up):
        # the released code crashes here; the first two epochs take the first step
        epoch = (step - 1) // group["batches_per_epoch"]
        steps = _chebyshev(group["epochs"] - 2)
        now *= steps[min(max(epoch - 1, 0), len(steps) - 1)]
    down = warmdown(group, lr, min(group["warmdown_min_lr"], lr), step) if group["use_warmdown"] else None
    # the smaller one where both ends meet: the released code jumps up to the way down, whatever was warmed up
    return now if down is None else min(now, down)


def warmup(group: Group, beta2: float) -> int:
    """Ma & Yarats 2019: 2 / (1 - beta2) steps; of runs too short for that, a fixed part."""
    if group["warmup_steps"] is not None:
        return int(group["warmup_steps"])
    steps = math.ceil(2 / (1 - beta2))
    return int(group["warmup_fraction"] * group["total_steps"]) if steps / group["total_steps"] > 0.45 else steps


def warmdown(group: Group, lr: float, end: float, step: int) -> float | None:
    """The straight line from ``lr`` that reaches ``end`` with the last step; None before it begins."""
    first = int(group["warmdown_start"] * group["epochs"] * group["batches_per_epoch"])
    if step < first:
        return None
    way = (step + 1 - first) / (group["total_steps"] - first + 1)
    return float(max(lr - (lr - end) * min(way, 1.0), end))


@cache
def _chebyshev(count: int) -> tuple[float, ...]:
    """Chebyshev's steps in the fractal order that keeps long ones apart (Agarwal et al. 2021, arXiv 2103.01338).

    The order exists for powers of two; the released code fails for other counts, here the numbers beyond are left out.
    """
    middle, radius = (_FASTEST + _SLOWEST) / 2, (_FASTEST - _SLOWEST) / 2
    order = [0]
    while len(order) < count:
        order = [i for first in order for i in (first, 2 * len(order) - 1 - first)]
    return tuple(1 / (middle - radius * math.cos((i + 0.5) / count * math.pi)) for i in order if i < count)
