"""A named configuration: which optimizer, with which settings, on which weights, under which schedule."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from piste import optimizers, schedules
from piste.checks import near, refuse_unknown
from piste.lr_priors import LrPrior, habits
from piste.optimizer import Optimizer
from piste.options import Options
from piste.wrappings import WRAPPINGS, Wrapping

__all__ = ["Preset", "Presets", "Settings", "WeightDecay", "arguments_of", "decoupled"]

logger = logging.getLogger("piste")

T = TypeVar("T")


class Settings(Mapping[str, T]):
    """A dictionary that cannot be changed."""

    def __init__(self, values: Mapping[str, T] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> T:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class WeightDecay:
    """What weight decay means, in the words of fastai v1.

    Args:
        true_wd: True shrinks weights by ``lr * weight_decay`` (decoupled); False adds an L2 term to the gradient.
        bn_wd: True decays every parameter; False spares norms, biases and other vectors.
    """

    true_wd: bool = True
    bn_wd: bool = True

    def __post_init__(self) -> None:
        for name in ("true_wd", "bn_wd"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not legal; legal: True or False")


@dataclass(frozen=True)
class Preset:
    """A configuration of an optimizer. Frozen; `dataclasses.replace` makes a changed copy.

    Args:
        name: its name, for messages and records.
        optimizer: a class of piste, of ``torch.optim``, or any other ``torch.optim.Optimizer``.
        hyperparameters: arguments of the class where they differ from its defaults.
        wd: what weight decay means here; how much of it there is, ``weight_decay`` says.
        set_betas: False: schedules never cycle the momentum, and ``piste.create`` refuses ``betas=``.
        schedule: its companion, the name of a function in ``piste.schedules``.
        lr_prior: where a race looks for its learning rate. Its ``center`` is also what ``piste.create`` takes where no
            ``lr=`` is given and ``hyperparameters`` have none. Left out: a range around the class's own default.
        domains: settings by field of application, chosen with ``domain=``.
        gradient_evaluations: forward-backward passes per step.
        source: where the configuration comes from.
        description: when to take it, in a sentence.
        wrappings: names of what is put round the optimizer, the outermost first; see :mod:`piste.wrappings`.

    Raises:
        TypeError: ``optimizer`` is no optimizer class, or ``lr_prior`` no :class:`LrPrior`.
        ValueError: a setting that the class does not know, an unknown schedule, ``betas`` against ``set_betas=False``.

    Not a place for a learning rate that was found on one problem: pass ``lr=`` to ``piste.create``.

        >>> import dataclasses, torch
        >>> from piste.presets import Preset
        >>> slow = Preset("slow", torch.optim.SGD, {"momentum": 0.99})
        >>> dataclasses.replace(slow, schedule="constant").schedule
        'constant'
        >>> slow.lr_prior.center
        0.001
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    hyperparameters: Mapping[str, Any] = field(default_factory=Settings)
    wd: WeightDecay = WeightDecay()
    set_betas: bool = True
    schedule: str = "one_cycle"
    lr_prior: LrPrior = None  # type: ignore[assignment]  # None lasts until __post_init__, which knows the class
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=Settings)
    gradient_evaluations: float = 1
    source: str = ""
    description: str = ""
    wrappings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.optimizer, type) and issubclass(self.optimizer, torch.optim.Optimizer)):
            raise TypeError(f"preset {self.name!r}: optimizer={self.optimizer!r}; legal: a torch.optim.Optimizer class")
        refuse_unknown(f"preset {self.name!r}", self.hyperparameters, self.arguments)
        if not self.set_betas and "betas" in self.hyperparameters:
            raise ValueError(f"preset {self.name!r} sets betas, which its set_betas=False forbids")
        schedules.named(self.schedule)
        if self.lr_prior is None:
            object.__setattr__(self, "lr_prior", _around_default(self.optimizer))
        if not isinstance(self.lr_prior, LrPrior):
            raise TypeError(f"preset {self.name!r}: lr_prior={self.lr_prior!r}; legal: an LrPrior, or None")
        object.__setattr__(self, "hyperparameters", Settings(self.hyperparameters))
        object.__setattr__(self, "domains", Settings({k: Settings(v) for k, v in self.domains.items()}))

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument of the class but ``params``, with its default (None for options that default to nothing)."""
        return arguments_of(self.optimizer)

    def with_decay(self, true_wd: bool | None = None) -> Preset:
        """The same preset for weights that are decayed, now or later: of a class that can do it as it should be.

        Args:
            true_wd: what decay means, as in :class:`WeightDecay`; None for what the preset says.

        Raises:
            ValueError: neither its class nor one of piste with the same name can.

        Not needed for :func:`piste.create`, which sees whether there is any decay.

            >>> import torch
            >>> from piste.presets import Preset
            >>> Preset("sgd", torch.optim.SGD).with_decay().optimizer
            <class 'piste.optimizers.sgd.SGD'>
        """
        wd = self.wd if true_wd is None else replace(self.wd, true_wd=true_wd)
        optimizer, _ = decoupled(self.optimizer, wd.true_wd, needed=True)
        return replace(self, wd=wd, optimizer=optimizer)


def arguments_of(optimizer: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """The keyword arguments of an optimizer class with their defaults, the options of piste's classes included."""
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    options = dict.fromkeys(sorted(Options.__optional_keys__)) if issubclass(optimizer, Optimizer) else {}
    return options | named


#: torch's classes that take weight decay in one way only, which their signature does not tell
_TORCH_DECOUPLED = {"AdamW", "Muon", "Adafactor"}
_TORCH_L2 = {"SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"}


def decoupled(optimizer: type[torch.optim.Optimizer], wanted: bool, *, needed: bool) -> tuple[Any, dict[str, Any]]:
    """The class, and the arguments with which its weight decay is (or is not) decoupled, as wanted.

    Args:
        optimizer: any optimizer class.
        wanted: decoupled, or as an L2 term in the gradient?
        needed: is there going to be any decay?

    Returns:
        The class, or that of piste which has its name; and arguments for it.

    Raises:
        ValueError: it is needed and cannot be had.

    >>> import torch
    >>> from piste.preset import decoupled
    >>> decoupled(torch.optim.SGD, True, needed=True)
    (<class 'piste.optimizers.sgd.SGD'>, {'decoupled_weight_decay': True})
    """
    arguments = arguments_of(optimizer)
    for keyword in ("decoupled_weight_decay", "weight_decouple", "decoupled_decay"):
        if keyword in arguments:
            return optimizer, {keyword: wanted}
    of_torch = optimizer.__module__.startswith("torch.optim.")
    as_wanted = of_torch and optimizer.__name__ in (_TORCH_DECOUPLED if wanted else _TORCH_L2)
    if as_wanted or not needed:
        return optimizer, {}
    stand_in = getattr(optimizers, optimizer.__name__, None) if of_torch else None
    if stand_in is None:
        raise ValueError(
            f"true_wd={wanted} cannot be had of {optimizer.__module__}.{optimizer.__name__}; legal: weight_decay=0, "
            "or a class that takes decoupled_weight_decay"
        )
    name = optimizer.__name__
    logger.info("torch.optim.%s cannot have true_wd=%s: piste.%s stands in", name, wanted, name)
    return stand_in, {"decoupled_weight_decay": wanted}


def _around_default(optimizer: type[torch.optim.Optimizer]) -> LrPrior:
    """The range round the default learning rate of a class that we know nothing else about."""
    default = arguments_of(optimizer).get("lr")
    if not (isinstance(default, (int, float)) and math.isfinite(default) and default > 0):
        default = 1e-3
    return LrPrior(float(default), 1.5, 1.5)


class Presets(Settings[Preset]):
    """Presets by name. ``piste.presets`` is the built-in one.

    ``presets["sam+adamw"]`` is the preset ``adamw`` with SAM round it; :data:`piste.wrappings.WRAPPINGS` has what can
    stand before a ``+``. Such pairs are made when they are asked for, and are in no list.

        >>> import piste
        >>> piste.presets["sam+adamw"].gradient_evaluations
        2
    """

    def __getitem__(self, name: str) -> Preset:
        outer, _, inner = str(name).partition("+")
        if inner:
            if outer not in WRAPPINGS:
                raise KeyError(f"no wrapper {outer!r}{near(outer, WRAPPINGS)} in {name!r}")
            return _wrapped(WRAPPINGS[outer], self[inner])
        if name not in self._values:
            raise KeyError(f"no preset {name!r}{near(str(name), self._values)}")
        return self._values[name]

    @staticmethod
    def from_mapping(mapping: Mapping[str, Mapping[str, Any]]) -> Presets:
        """Presets from a dictionary in the cheat-sheet's own format.

        Args:
            mapping: name -> ``{"optimizer": class, "hyperparameters": {...}, "wd": {"true_wd": ..., "bn_wd": ...},
                "set_betas": ...}``; all but ``"optimizer"`` may be missing. Missing are: no hyperparameters, True for
                ``true_wd``, ``bn_wd`` and ``set_betas`` (fastai v1's defaults). ``"schedule"`` may be added. Classes
                may be of piste, of ``torch.optim``, or others. ``hyperparameters`` are kept as they are, an ``"lr"`` in
                them included. Companion schedule and learning-rate range are those of the piste class of the same
                name, where there is one; a class of another name is looked at around its own default.

        Raises:
            TypeError: a value is no dictionary or no optimizer class.
            ValueError: a key that is unknown, with the nearest known ones, or a value out of its range.

        Not for choosing between classes: give ``piste.create`` one of the presets returned.

            >>> import piste, torch
            >>> mapping = {"mine": {"optimizer": torch.optim.SGD, "hyperparameters": {"momentum": 0.9}}}
            >>> optimizer = piste.create(piste.presets.from_mapping(mapping)["mine"], torch.nn.Linear(2, 1))
            >>> type(optimizer).__name__, optimizer.param_groups[0]["momentum"]
            ('SGD', 0.9)

        Source: ``optimizer_config_mapping`` of the cheat-sheet.
        """
        return Presets({name: _from_entry(name, entry) for name, entry in mapping.items()})


def _wrapped(wrapping: Wrapping, inner: Preset) -> Preset:
    """A preset with a wrapper round it."""
    return replace(
        inner,
        name=f"{wrapping.name}+{inner.name}",
        gradient_evaluations=wrapping.gradient_evaluations * inner.gradient_evaluations,
        source=f"{wrapping.source}; {inner.source}",
        description=f"{wrapping.description} Inside: {inner.description}",
        wrappings=(wrapping.name, *inner.wrappings),
    )


_ENTRY_KEYS = ("optimizer", "hyperparameters", "wd", "set_betas", "schedule")


def _from_entry(name: str, entry: Mapping[str, Any]) -> Preset:
    owner = f"preset {name!r}"
    wd = entry.get("wd", {}) if isinstance(entry, Mapping) else None
    hyperparameters = entry.get("hyperparameters", {}) if isinstance(entry, Mapping) else None
    if not (isinstance(wd, Mapping) and isinstance(hyperparameters, Mapping)):
        raise TypeError(f"{owner} is {entry!r}; legal: a dictionary with the keys {', '.join(_ENTRY_KEYS)}")
    refuse_unknown(owner, entry, _ENTRY_KEYS)
    refuse_unknown(f"wd of {owner}", wd, ("true_wd", "bn_wd"))
    set_betas = entry.get("set_betas", True)
    if not isinstance(set_betas, bool):
        raise ValueError(f"{owner}: set_betas={set_betas!r} is not legal; legal: True or False")
    optimizer = entry.get("optimizer")
    schedule, prior = habits(getattr(optimizer, "__name__", ""), hyperparameters)
    return Preset(
        name,
        optimizer,  # type: ignore[arg-type]  # Preset refuses what is no class
        hyperparameters,
        WeightDecay(**wd),
        set_betas,
        entry.get("schedule", schedule),
        prior,  # type: ignore[arg-type]  # None: Preset asks the class
        source="a mapping in the cheat-sheet's format",
    )
