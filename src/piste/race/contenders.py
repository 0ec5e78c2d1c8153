"""Who races: an optimizer preset with a schedule. The only place where the race makes optimizers."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import piste
from piste.race.space import Dimension, Sweep, create_arguments, numbers_of, rounded, space_of

SCHEDULES = ("constant", "flat_cosine", "one_cycle", "untuned_warmup", "warmup_stable_decay")
_TORCH = "torch."  # "torch.AdamW" is the class of that name in torch.optim, raced beside the presets
_TORCH_DECADES = 1.5  # around the class's own default lr
OWN = "script"  # the schedule of a contender whose script brings one

# `--optimizers cheatsheet`: what the cheat-sheet names and a race can run. "SAM + optimizer" stands on both kinds of
# optimizer. ESAM, SAF and MESA need more than one loss a batch, AdaGraft is a pair to be chosen, and 8-bit states
# change the memory of a run and not its rule.
GROUPS: dict[str, tuple[str, ...]] = {
    "cheatsheet": (
        *("sgd", "sgd_momentum", "sgd_nesterov", "rmsprop", "lamb", "adamw", "ranger", "ranger_nogc", "ranger21"),
        *("rangeradabelief", "rangeradabelief_nogc", "adabelief", "shampoo", "shampoo_google", "adan", "amos"),
        *("adafactor", "novograd", "sm3", "madgrad", "lookahead+adamw"),
        *("sam+adamw", "sam+sgd_momentum", "asam+adamw", "looksam+adamw", "gsam+adamw"),
    )
}


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
        settings: what each of its runs has instead of the preset's, as pairs of name and value.
        space: what its trials choose beside the learning rate.
    """

    optimizer: str
    schedule: str
    lr_center: float
    decades_below: float
    decades_above: float
    settings: tuple[tuple[str, float], ...] = ()
    space: tuple[Dimension, ...] = ()

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

    @property
    def cells(self) -> list[dict[str, float]]:
        """Every combination of swept values; a single empty one where nothing is swept."""
        swept = [dimension for dimension in self.space if dimension.values]
        names = [dimension.name for dimension in swept]
        return [dict(zip(names, values, strict=True)) for values in product(*(d.values for d in swept))]

    @property
    def sampled(self) -> tuple[Dimension, ...]:
        """The dimensions that are searched in a range."""
        return tuple(dimension for dimension in self.space if not dimension.values)

    @property
    def lr_range(self) -> Dimension:
        """The learning rate as a dimension."""
        return Dimension("lr", self.lr_center, self.lr_at(0.0), self.lr_at(1.0))

    def value(self, name: str, hyperparameters: Mapping[str, float]) -> float:
        """What a trial has of a dimension, said or not."""
        defaults = {dimension.name: dimension.default for dimension in self.space}
        return hyperparameters[name] if name in hyperparameters else defaults[name]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Contender:
        """Back from plain data, also that of a version without settings and space."""
        settings = tuple((str(name), float(value)) for name, value in content.get("settings", ()))
        space = tuple(Dimension.from_json(dimension) for dimension in content.get("space", ()))
        return cls(**{**content, "settings": settings, "space": space})


def make_contenders(
    optimizers: Sequence[str],
    schedules: Sequence[str],
    *,
    trials: int = 1,
    sweeps: Sequence[Sweep] = (),
    agnostic: bool = False,
    script: bool = False,
) -> tuple[Contender, ...]:
    """Cross optimizers with schedules; without schedules each optimizer keeps its preset's own.

    Args:
        optimizers: names, patterns, ``torch.NAME``, or the name of a group such as ``"cheatsheet"``.
        schedules: names of functions in ``piste.schedules``.
        trials: decides what is searched beside the learning rate.
        sweeps: values to try one by one.
        agnostic: no settings by field of application: the same for every task.
        script: the schedule is that of a script.

    Raises:
        ContenderError: a name is unknown (the nearest one is suggested) or given twice; nobody has what is swept, or
            somebody refuses such a value.
    """
    names = [name for pattern in optimizers for name in _names(pattern)]
    _refuse_repeats("optimizer", names)
    _refuse_repeats("schedule", schedules)
    for schedule in schedules:
        if schedule not in SCHEDULES:
            raise ContenderError(f"no schedule {schedule!r}{_near(schedule, SCHEDULES)}; there are {_list(SCHEDULES)}")
    made = [
        _contender(name, schedule, trials, sweeps, agnostic)
        for name in names
        for schedule in _schedules(name, schedules, script)
    ]
    for sweep in sweeps:
        if not any(dimension.name == sweep.name for contender in made for dimension in contender.space):
            known = {name for contender in made for name in numbers_of(preset_behind(contender.optimizer))}
            raise ContenderError(
                f"no contender has a number {sweep.name!r} to sweep{_near(sweep.name, sorted(known))}; "
                f"there are {_list(sorted(known))}"
            )
        for contender in made:
            _refuse_illegal(contender, sweep)
    return tuple(made)


def _refuse_illegal(contender: Contender, sweep: Sweep) -> None:
    """A value that the optimizer does not take would be a failed run for each of its learning rates."""
    values = [value for each in contender.space if each.name == sweep.name for value in each.values]
    alone = replace(contender, schedule="constant")  # a script has one of its own
    for value in values:
        try:
            make_optimizer(alone, nn.Linear(2, 2), contender.lr_center, 10, others={sweep.name: value})
        except ValueError as error:
            raise ContenderError(f"--sweep {sweep.name}={value:g} is not legal for {contender.name}: {error}") from None


def preset_behind(optimizer: str) -> piste.Preset:
    """The preset of a contender's name; for a class of torch one that says nothing beyond the class."""
    return (
        piste.Preset(optimizer, _torch_class(optimizer)) if optimizer.startswith(_TORCH) else piste.presets[optimizer]
    )


def make_optimizer(
    contender: Contender,
    model: nn.Module,
    lr: float,
    total_steps: int,
    domain: str = "",
    *,
    others: Mapping[str, float] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The contender's optimizer and schedule on a model's weights.

    Args:
        contender: who.
        model: whose weights.
        lr: the learning rate.
        total_steps: length of the run.
        domain: the field of application.
        others: hyperparameters beside the learning rate.
        fixed: what the task gives every optimizer that knows it; it wins over ``others``.
    """
    preset = preset_behind(contender.optimizer)
    settings = create_arguments(preset, {**(others or {}), "lr": lr})
    if contender.optimizer.startswith(_TORCH):
        settings |= _taken(inspect.signature(preset.optimizer).parameters, fixed)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = preset.optimizer(weights, **settings)
        return optimizer, getattr(piste.schedules, contender.schedule)(optimizer, total_steps)
    # Classes that sort weights have arguments of that beside their own.
    sorting = inspect.signature(preset.optimizer.groups).parameters if hasattr(preset.optimizer, "groups") else {}
    settings |= _taken({**preset.arguments, **sorting}, fixed)
    # Some presets have settings of their own for a field of application (the eps of AdaBelief).
    by_field = preset.domains.get(domain, {})
    if by_field and not settings.keys() & by_field.keys():
        settings["domain"] = domain
    return piste.create_with_schedule(contender.optimizer, model, total_steps, schedule=contender.schedule, **settings)


def _taken(known: Mapping[str, Any], fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a task's settings an optimizer has."""
    return {name: value for name, value in (fixed or {}).items() if name in known}


def _names(pattern: str) -> list[str]:
    """The presets that a name or a pattern means, spelt as they are in ``piste.presets``."""
    if pattern.startswith(_TORCH):
        return [pattern]
    if pattern in GROUPS:
        return list(GROUPS[pattern])
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
    _refuse_buried_passes(found)
    return found


def _refuse_needs(names: Sequence[str]) -> None:
    """A task gives one loss for a batch; wrappers that need more cannot race."""
    for name in names:
        for wrapping in piste.presets[name].wrappings:
            needs = piste.WRAPPINGS[wrapping].needs
            if needs:
                raise ContenderError(f"{name} cannot race: {wrapping} needs {needs}, and a task gives one loss a batch")


def _refuse_buried_passes(names: Sequence[str]) -> None:
    """A second pass is asked of the outermost wrapper alone, as in every training loop."""
    for name in names:
        for inside in piste.presets[name].wrappings[1:]:
            if issubclass(piste.WRAPPINGS[inside].wrapper, piste.SAM):
                raise ContenderError(
                    f"{name} cannot race: {inside} makes two passes, so it stands first, and alone does so"
                )


def _schedules(optimizer: str, schedules: Sequence[str], script: bool) -> Sequence[str]:
    if script:
        return (OWN,)
    return schedules or (("constant",) if optimizer.startswith(_TORCH) else (piste.presets[optimizer].schedule,))


def _contender(optimizer: str, schedule: str, trials: int, sweeps: Sequence[Sweep], agnostic: bool) -> Contender:
    preset = preset_behind(optimizer)
    if optimizer.startswith(_TORCH):
        default_lr = inspect.signature(preset.optimizer).parameters["lr"].default
        center, below, above = float(default_lr), _TORCH_DECADES, _TORCH_DECADES
    else:
        prior = preset.lr_prior
        center, below, above = prior.center, prior.decades_below, prior.decades_above
    by_field = {name for settings in preset.domains.values() for name in settings} if agnostic else set()
    settings = tuple((name, value) for name, value in numbers_of(preset).items() if name in by_field)
    return Contender(
        *(optimizer, schedule, center, below, above, settings),
        space=space_of(preset, schedule, center, trials, sweeps),
    )


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
