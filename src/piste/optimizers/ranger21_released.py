"""Ranger21 as released (``faithful=True``): one clock and one decay for all weights, each taken from the wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from piste.optimizers.ranger21_schedule import refuse_another, runs, warmdown, warmup
from piste.parts import decay
from piste.parts.after import lookahead_together
from piste.parts.prepare import centralize, normalize
from piste.slots import Pipeline

__all__ = ["as_released", "check_faithful", "released", "released_start", "struck_flag"]

Group = Mapping[str, Any]


def check_faithful(group: Group) -> None:
    """Refuse what the released code cannot do: where it crashes there is nothing to be faithful to."""
    if not group["faithful"]:
        return
    for name, legal in (("use_cheb", False), ("pnm", True), ("stable_decay", True), ("decoupled_weight_decay", True)):
        if group[name] is not legal and not (name == "pnm" and group["use_madgrad"]):
            raise ValueError(f"Ranger21 got faithful=True with {name}={group[name]!r}; legal: {legal}")


def as_released(whole: Pipeline, group: Group) -> Pipeline:
    """Decay and norm loss strike one weight of a group; gradients are prepared twice; Lookahead has one count."""
    (stable,) = whole.decay
    struck = replace(stable, renamed={"lr": "other_pace", "weight_decay": "other_decay"})
    pulled = replace(decay.norm_loss, renamed={"lr": "other_lr"})
    spared = replace(stable, renamed={"weight_decay": "no_decay"})  # it counts in sigma
    again = ((centralize,) if group["use_gc"] else ()) + ((normalize,) if group["normalize"] else ())
    when = group.get("struck")
    late = tuple(replace(part, slot="after") for part in (struck, pulled)) if when == "after" else ()
    return replace(
        whole,
        prepare=whole.prepare if group["use_madgrad"] else (*whole.prepare, *again),
        decay=(struck, pulled) if when == "before" else (spared,),
        after=late + ((lookahead_together,) if group["lookahead"] else ()),
    )


def struck_flag(groups: Sequence[Group], group: int, position: int) -> tuple[tuple[str, Any], ...]:
    """The flag of the one weight of a group that decay reaches; only in the last group it comes before the step."""
    if not groups[group]["faithful"] or position != len(groups[group]["params"]) - 1:
        return ()
    return (("struck", "before" if group == len(groups) - 1 else "after"),)


def released_start(*, faithful: bool) -> dict[str, float]:
    """The further numbers before the first step."""
    more = ("clock", "furthest", "other_lr", "other_pace", "other_decay", "no_decay")
    return dict.fromkeys(more, 0.0) if faithful else {}


def released(optimizer: Optimizer, group: Group) -> dict[str, float]:
    """The numbers of the step to come as ranger21 0.1.0 has them."""
    groups = optimizer.param_groups
    index = next(i for i, each in enumerate(groups) if each is group)
    clocks = _clocks(optimizer)
    lrs = [_lr(optimizer, i, clocks) for i in range(len(groups))]
    # the last weight of a group is decayed in the name of the next group, that of the last group of the first
    other = (index + 1) % len(groups)
    last = group["params"][-1]
    pace = math.sqrt(clocks[other] / _count(optimizer, last)) if group["use_madgrad"] else 1.0
    return {
        "schedule_step": group["schedule_step"] + 1,
        "current_lr": lrs[index],
        "base_lr": float(group["lr"]),
        "clock": clocks[index],
        "furthest": max(*clocks, group["furthest"]),
        "other_lr": lrs[other],
        "other_pace": lrs[other] * pace,
        "other_decay": float(groups[other]["weight_decay"]),
    }


def _count(optimizer: Optimizer, weight: Tensor) -> int:
    """The number of this weight's step to come."""
    return int(optimizer.state.get(weight, {}).get("step", 0)) + 1


def _clocks(optimizer: Optimizer) -> list[int]:
    """Each group's step number: that of the last weight which was looked at before, if it has a gradient."""
    counts = [[_count(optimizer, p) for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    seen = [c for count in counts for c in count]
    clocks = [seen[-1] if seen else 1]
    for count in counts[:-1]:
        clocks.append(count[-1] if count else clocks[-1])
    return clocks


def _lr(optimizer: Optimizer, index: int, clocks: Sequence[int]) -> float:
    """Warm-up ends for all groups when it has ended for one; the way down is the constructor's, for all groups."""
    group, defaults = optimizer.param_groups[index], optimizer.defaults
    lr, clock = float(group["lr"]), clocks[index]
    if not runs(group):
        return lr
    refuse_another(group, lr)
    up = warmup(group, defaults["betas"][1])
    if group["use_warmup"] and max(*clocks[: index + 1], group["furthest"]) <= up:
        lr = lr * min(1.0, clock / up)
    if not group["use_warmdown"]:
        return lr
    down = warmdown(group, float(defaults["lr"]), group["warmdown_min_lr"], clock)
    return lr if down is None else down
