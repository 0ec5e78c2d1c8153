"""Who races: an optimizer preset with a schedule. The only place where the race makes optimizers."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import piste

SCHEDULES = ("constant", "flat_cosine", "one_cycle", "untuned_warmup", "warmup_stable_decay")
_TORCH = "torch."  # "torch.AdamW" is the class of that name in torch.optim, raced beside the presets
_TORCH_DECADES = 1.5  # around the class's own default lr


class ContenderError(ValueError):
    """An optimizer or schedule of that name cannot race."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with a schedule, and where to look for its learning rate.

    Args:
        optimizer: name of a preset, or ``"torch.AdamW"`` for a class of ``torch.optim``.
        schedule: name of a function in ``piste.schedules``.
        lr_center: the middle of the prior.
        decades_below: how far the prior reaches below it, in powers of ten.
        decades_above: how far above.
    """

    optimizer: str
    schedule: str
    lr_center: float
    decades_below: float
    decades_above: float

    @property
    def name(self) -> str:
        """``optimizer+schedule``."""
        return f"{self.optimizer}+{self.schedule}"

    def lr_at(self, position: float) -> float:
        """The learning rate at a position in [0, 1] of the prior, even in its logarithm, to four digits."""
        exponent = math.log10(self.lr_center) - self.decades_below + position * self.decades
        return rounded(10**exponent)

    @property
    def decades(self) -> float:
        """Width of the prior in powers of ten."""
        return self.decades_below + self.decades_above


def rounded(lr: float) -> float:
    """Four significant digits: enough for a learning rate, and it prints as it is."""
    return float(f"{lr:.4g}")


def make_contenders(optimizers: Sequence[str], schedules: Sequence[str]) -> tuple[Contender, ...]:
    """Cross optimizers with schedules; without schedules each optimizer keeps its preset's own.

    Raises:
        ContenderError: a name is unknown (the nearest one is suggested) or given twice.
    """
    names = [name for pattern in optimizers for name in _names(pattern)]
    _refuse_repeats("optimizer", names)
    _refuse_repeats("schedule", schedules)
    for schedule in schedules:
        if schedule not in SCHEDULES:
            raise ContenderError(f"no schedule {schedule!r}{_near(schedule, SCHEDULES)}; there are {_list(SCHEDULES)}")
    return tuple(contender for name in names for contender in _with_schedules(name, schedules))


def make_optimizer(
    contender: Contender,
    model: nn.Module,
    lr: float,
    total_steps: int,
    domain: str = "",
    *,
    fixed: Mapping[str, Any] | None = None,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The contender's optimizer and schedule on a model's weights, with a task's field and what it fixes."""
    if contender.optimizer.startswith(_TORCH):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        factory: Callable[..., torch.optim.Optimizer] = _torch_class(contender.optimizer)
        optimizer = factory(weights, lr=lr, **_taken(inspect.signature(factory).parameters, fixed))
        return optimizer, getattr(piste.schedules, contender.schedule)(optimizer, total_steps)
    # Some presets have settings of their own for a field of application (the eps of AdaBelief).
    preset = piste.presets[contender.optimizer]
    field = {"domain": domain} if domain in preset.domains else {}
    # Classes that sort weights have arguments of that beside their own.
    sorting = inspect.signature(preset.optimizer.groups).parameters if hasattr(preset.optimizer, "groups") else {}
    taken = _taken({**preset.arguments, **sorting}, fixed)
    return piste.create_with_schedule(
        contender.optimizer, model, total_steps, schedule=contender.schedule, lr=lr, **field, **taken
    )


def _taken(known: Mapping[str, Any], fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a task's settings an optimizer has."""
    return {name: value for name, value in (fixed or {}).items() if name in known}


def _names(pattern: str) -> list[str]:
    """The presets that a name or a pattern means, spelt as they are in ``piste.presets``."""
    if pattern.startswith(_TORCH):
        return [pattern]
    *outer, inner = pattern.split("+")
    found = piste.list_optimizers(pattern)
    if not found:
        wrong = next((part for part in outer if not piste.list_wrappers(part)), None)
        if wrong is not None:
            near = _near(wrong.lower(), piste.list_wrappers())
            raise ContenderError(f"no wrapper {wrong!r}{near} in {pattern!r}; piste list shows them all")
        raise ContenderError(
            f"no optimizer {inner!r}{_near(inner.lower(), sorted(piste.presets))}; piste list shows them all"
        )
    _refuse_needs(found)
    return found


def _refuse_needs(names: Sequence[str]) -> None:
    """A task gives one loss for a batch; wrappers that need more cannot race."""
    for name in names:
        for wrapping in piste.presets[name].wrappings:
            needs = piste.WRAPPINGS[wrapping].needs
            if needs:
                raise ContenderError(f"{name} cannot race: {wrapping} needs {needs}, and a task gives one loss a batch")


def _with_schedules(optimizer: str, schedules: Sequence[str]) -> list[Contender]:
    if optimizer.startswith(_TORCH):
        default_lr = inspect.signature(_torch_class(optimizer)).parameters["lr"].default
        prior = (float(default_lr), _TORCH_DECADES, _TORCH_DECADES)
        return [Contender(optimizer, schedule, *prior) for schedule in schedules or ("constant",)]
    preset = piste.presets[optimizer]
    prior = (preset.lr_prior.center, preset.lr_prior.decades_below, preset.lr_prior.decades_above)
    return [Contender(optimizer, schedule, *prior) for schedule in schedules or (preset.schedule,)]


def _torch_class(name: str) -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, name.removeprefix(_TORCH), None)
    # LBFGS needs a closure and SparseAdam sparse gradients; the base class has no lr.
    unable = (torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)) or found in unable:
        raise ContenderError(f"no optimizer {name!r} that can race (torch.optim.{name.removeprefix(_TORCH)})")
    return found


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ContenderError(f"{what} {name!r} is given twice")


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
