"""Named, sourced configurations: which optimizer, with which settings, on which weights, under which schedule.

    >>> from piste.presets import presets
    >>> presets["sgd_nesterov"].hyperparameters
    {'momentum': 0.9, 'nesterov': True}
    >>> presets["ranger"].schedule
    'flat_cosine'

`piste.create` turns a preset into an optimizer on a model.
"""

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
from piste.optimizer import Optimizer, Options
from piste.wrappings import WRAPPINGS, Wrapping

__all__ = ["LrPrior", "Preset", "Presets", "Settings", "WeightDecay", "decoupled", "presets"]

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
class LrPrior:
    """Where to look for a learning rate: a range round a centre, even in its logarithm.

    Args:
        center: the learning rate to try first, above 0.
        decades_below: how far the range reaches down, in powers of ten.
        decades_above: how far up.
    """

    center: float
    decades_below: float = 1.0
    decades_above: float = 1.0

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.center, self.decades_below, self.decades_above)))
        if not (finite and self.center > 0 and self.decades_below >= 0 and self.decades_above >= 0):
            raise ValueError(f"{self} is not legal; legal: center > 0, decades of at least 0, all finite")


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
    >>> from piste.registry import decoupled
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
    schedule, prior = _habits(getattr(optimizer, "__name__", ""), hyperparameters)
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


def _habits(class_name: str, hyperparameters: Mapping[str, Any]) -> tuple[str, LrPrior | None]:
    """Companion schedule and learning-rate range of a class; no range for classes that piste does not have."""
    schedule = "flat_cosine" if class_name.startswith("Ranger") else "one_cycle"
    prior = _PRIORS.get(class_name)
    kept = hyperparameters.get("momentum", 0)
    if prior is not None and class_name in ("SGD", "RMSprop") and 0 < kept < 1:
        # Undampened momentum adds up 1 / (1 - momentum) steps, so the same pace needs a rate that much smaller.
        prior = LrPrior(float(f"{prior.center * (1 - kept):.3g}"), prior.decades_below, prior.decades_above)
    return schedule, prior


# All two decades wide, so that equal numbers of trials search equally densely. Momentum 0.9 divides those of SGD and
# RMSprop by ten. "Measured" means: best of a race on both built-in tasks, a few hundred steps long. The centre is where
# `piste.create` starts without lr=, so it stands where longer runs begin, a little below what short ones like best.
_PRIORS: Mapping[str, LrPrior] = {
    # 0.1 with momentum, per 256 images (Goyal et al. 2017, arXiv 1706.02677); the best of DeepOBS (Schneider et al.
    # 2019) are 0.004 to 1.6 without momentum; measured 0.3 without (1.0 is unstable), 0.03 to 0.2 with.
    "SGD": LrPrior(0.5),
    # An Adam step without the average over gradients; 1e-3 of Hinton's lecture. Measured 2e-4 to 4e-4 with momentum.
    "RMSprop": LrPrior(2e-3),
    # 1e-3 is the paper's (Kingma & Ba 2015), 1e-3 to 3e-3 what small nets like; the best of DeepOBS 1.6e-4 to 0.04;
    # measured 2e-3 to 7e-3.
    "Adam": LrPrior(2e-3),
    "AdamW": LrPrior(2e-3),
    # Rectification is a warm-up of about 2 / (1 - beta2) steps: short runs want more than the 1e-3 of the papers (Liu
    # et al. 2019; Zhuang et al. 2020: 1e-4 to 1e-2). Measured 0.01 to 0.04.
    "RAdam": LrPrior(4e-3, 0.8, 1.2),
    "AdaBelief": LrPrior(4e-3, 0.8, 1.2),
    # 1e-3 to 4e-3 in its author's fastai runs. Measured 0.02 to 0.05: Lookahead halves the pace, too.
    "Ranger": LrPrior(6e-3, 0.8, 1.2),
    "RangerAdaBelief": LrPrior(6e-3, 0.8, 1.2),
    # Between AdamW's, which its authors start from, and Ranger's: softplus and Lookahead slow it, normalised gradients
    # with positive-negative momentum do not.
    "Ranger21": LrPrior(3e-3),
    # Adam with another order of operations, or less haste: where AdamW's is.
    **dict.fromkeys(("ADOPT", "AdEMAMix", "LaProp", "NAdamW", "StableAdamW"), LrPrior(2e-3)),
    # Ten times AdamW's, as its authors advise (5 to 10 times).
    "Adan": LrPrior(2e-2),
    # The relative change of a tensor per step; 1.8e-3 (BERT) to 1.2e-2 (ImageNet) in the paper at large batches.
    "Lamb": LrPrior(5e-3),
    # 1e-3 to 3e-2 in over9000's runs; on the update it is the relative change of a tensor per step.
    **dict.fromkeys(("Ralamb", "RangerLars"), LrPrior(5e-3)),
    # Adam's, and a little more, as Lookahead halves the pace.
    "LookaheadAdam": LrPrior(3e-3),
    # Adagrad's scale: 0.1 to 0.3 with a warm-up in the paper's runs.
    "SM3": LrPrior(0.1),
    # A third to a tenth of AdamW's (Chen et al. 2023).
    "Lion": LrPrior(3e-4),
    # "moonlight" gives its steps the size that AdamW's have late in long runs (Liu et al. 2025); early AdamW's are up
    # to five times as large. Measured 0.012 to 0.045 on three tasks, mostly after an extension of 2e-4 to 2e-2
    # (docs/quality.md), so the range ends at 0.063.
    "Muon": LrPrior(4e-3, 0.8, 1.2),
    "NorMuon": LrPrior(4e-3, 0.8, 1.2),
    # Adam's, in another basis; 3e-3 is its authors' choice for language models.
    "SOAP": LrPrior(2e-3),
    # A third of AdamW's (kron_torch): its steps have a root mean square near 1, as AdamW's have at most.
    "PSGDKron": LrPrior(6e-4),
    # Grafted to Adam's length, so where Adam's is.
    "Shampoo": LrPrior(2e-3),
    # 2.5e-4 (CIFAR-10) to 0.025 (IWSLT) in the paper; a step is about lr^(2/3) in size, so the range is wide in effect.
    "MADGRAD": LrPrior(5e-3, 1.2, 0.8),
    "MirrorMADGRAD": LrPrior(5e-3, 1.2, 0.8),
    # Undampened momentum over gradients of unit norm: 1e-2 in the paper's vision runs, with wide scatter.
    "NovoGrad": LrPrior(1e-2),
    # The relative change of a tensor per step (lr times its root mean square); 1e-2 is the most of relative steps.
    "Adafactor": LrPrior(1e-2),
    # 1 / sqrt(batches in the data): 1e-2 to 5e-2 for small data, less for large (authors' advice).
    "Amos": LrPrior(2e-2),
    # It multiplies an estimate: 1 is the authors' advice, with d_coef in its place for corrections.
    "Prodigy": LrPrior(1.0),
    # One to ten times AdamW's (authors' package; 2.5e-3 is their default).
    **dict.fromkeys(("ScheduleFreeAdamW", "ScheduleFreeRAdam"), LrPrior(4e-3)),
    # 10 to 50 times that of SGD with momentum under a schedule (authors' package).
    "ScheduleFreeSGD": LrPrior(1.0),
    # Averages instead of sums: ten times what SGD with momentum takes.
    "PNM": LrPrior(0.5),
    "AdaPNM": LrPrior(2e-3),
}


_NORMS_SPARED = WeightDecay(true_wd=True, bn_wd=False)
_L2_NORMS_SPARED = WeightDecay(true_wd=False, bn_wd=False)
_MAPPING = "the cheat-sheet's optimizer_config_mapping"
_EPS = "eps per domain: the README of juntang-zhuang/Adabelief-Optimizer, section on epsilon"
_DOMAINS = {"vision": {"eps": 1e-8}, "nlp": {"eps": 1e-16}, "rl": {"eps": 1e-12}}


def _preset(
    name: str,
    optimizer: type[torch.optim.Optimizer],
    hyperparameters: Mapping[str, Any],
    wd: WeightDecay,
    source: str,
    description: str,
    **others: Any,
) -> Preset:
    schedule, prior = _habits(optimizer.__name__, hyperparameters)
    habits: dict[str, Any] = {"schedule": schedule, "lr_prior": prior}
    return Preset(name, optimizer, hyperparameters, wd, source=source, description=description, **(habits | others))


#: the built-in presets: the cheat-sheet's nine, its last recipe, and one for each class that it does not configure
presets = Presets(
    {
        preset.name: preset
        for preset in (
            # the cheat-sheet decays norms and biases here (bn_wd) and has a recipe of its own that spares them; the
            # presets below that are not its own spare them, as is the custom
            _preset(
                "adamw",
                optimizers.AdamW,
                {},
                WeightDecay(true_wd=True, bn_wd=True),
                f"{_MAPPING}; Loshchilov & Hutter 2019, arXiv 1711.05101",
                "AdamW that decays every parameter: the baseline that others must beat.",
            ),
            _preset(
                "adamw_no_decay",
                optimizers.AdamW,
                {"lr": 1e-5, "weight_decay": 0.01},
                _NORMS_SPARED,
                "the cheat-sheet's recipe “AdamW no decay for bias/layernorm weight”",
                "AdamW for fine-tuning transformers: small steps, norms and biases not decayed.",
                lr_prior=LrPrior(2e-5, 1.0, 1.0),
            ),
            _preset(
                "ranger",
                optimizers.Ranger,
                {},
                _NORMS_SPARED,
                f"{_MAPPING}; Wright 2019, lessw2020/Ranger-Deep-Learning-Optimizer",
                "Rectified Adam with Lookahead on centralized gradients; the cheat-sheet's favourite.",
            ),
            _preset(
                "ranger_nogc",
                optimizers.Ranger,
                {"use_gc": False},
                _NORMS_SPARED,
                f"{_MAPPING}; Wright 2019, lessw2020/Ranger-Deep-Learning-Optimizer",
                "Ranger without gradient centralization.",
            ),
            _preset(
                "ranger21",
                optimizers.Ranger21,
                {},
                _NORMS_SPARED,
                "Wright & Demeure 2021, arXiv 2106.13731; ranger21 0.1.0",
                "Ranger's heir with eight more ideas; say total_steps= for the schedule inside, and no other.",
                schedule="constant",
            ),
            _preset(
                "ranger21_madgrad",
                optimizers.Ranger21,
                {"use_madgrad": True},
                _NORMS_SPARED,
                "Wright & Demeure 2021, arXiv 2106.13731; ranger21 0.1.0",
                "Ranger21 on MADGRAD's dual averages in Adam's place, which the cheat-sheet suggests for transformers.",
                schedule="constant",
            ),
            _preset(
                "rangeradabelief",
                optimizers.RangerAdaBelief,
                {},
                _NORMS_SPARED,
                f"{_MAPPING}; Zhuang et al. 2020, arXiv 2010.07468; {_EPS}",
                "Ranger with AdaBelief's second moment; say domain= to get its eps right.",
                domains=_DOMAINS,
            ),
            _preset(
                "rangeradabelief_nogc",
                optimizers.RangerAdaBelief,
                {"use_gc": False},
                _NORMS_SPARED,
                f"{_MAPPING}; Zhuang et al. 2020, arXiv 2010.07468; {_EPS}",
                "RangerAdaBelief without gradient centralization.",
                domains=_DOMAINS,
            ),
            _preset(
                "sgd",
                optimizers.SGD,
                {"momentum": 0, "nesterov": False},
                _NORMS_SPARED,
                _MAPPING,
                "Plain gradient descent: no state, much tuning.",
                set_betas=False,
            ),
            _preset(
                "sgd_momentum",
                optimizers.SGD,
                {"momentum": 0.9, "nesterov": False},
                _NORMS_SPARED,
                _MAPPING,
                "SGD with momentum: the one to beat on convolutional nets.",
                set_betas=False,
            ),
            _preset(
                "sgd_nesterov",
                optimizers.SGD,
                {"momentum": 0.9, "nesterov": True},
                _NORMS_SPARED,
                f"{_MAPPING}; Sutskever et al. 2013",
                "SGD with Nesterov momentum; the cheat-sheet's choice among the older optimizers, for vision.",
                set_betas=False,
            ),
            _preset(
                "rmsprop",
                optimizers.RMSprop,
                {"momentum": 0.9},
                _NORMS_SPARED,
                f"{_MAPPING}; Hinton et al. 2012, lecture 6e",
                "RMSprop with momentum, torch's form.",
                set_betas=False,
            ),
            _preset(
                "adam",
                optimizers.Adam,
                {},
                _L2_NORMS_SPARED,
                "Kingma & Ba 2015, arXiv 1412.6980",
                "Adam with L2, if any decay; adamw is its better-behaved form.",
            ),
            _preset(
                "radam",
                optimizers.RAdam,
                {},
                _L2_NORMS_SPARED,
                "Liu et al. 2019, arXiv 1908.03265",
                "Adam that warms itself up; its default settings, as in torch.",
            ),
            _preset(
                "laprop",
                optimizers.LaProp,
                {},
                _NORMS_SPARED,
                "Ziyin et al. 2020, arXiv 2002.04839",
                "Momentum of normalised gradients: calmer than Adam where they are noisy.",
            ),
            _preset(
                "adopt",
                optimizers.ADOPT,
                {},
                _NORMS_SPARED,
                "Taniguchi et al. 2024, arXiv 2411.02853",
                "Adam that converges at any beta2, with its authors' clipping.",
            ),
            _preset(
                "nadamw",
                optimizers.NAdamW,
                {},
                _NORMS_SPARED,
                "Dozat 2016; Dahl et al. 2023, arXiv 2306.07179",
                "AdamW with Nesterov's momentum, the baseline of AlgoPerf.",
            ),
            _preset(
                "stableadamw",
                optimizers.StableAdamW,
                {},
                _NORMS_SPARED,
                "Wortsman et al. 2023, arXiv 2304.13013",
                "AdamW that shortens surprising steps, in the place of gradient clipping.",
            ),
            _preset(
                "ademamix",
                optimizers.AdEMAMix,
                {},
                _NORMS_SPARED,
                "Pagliardini et al. 2024, arXiv 2409.03137",
                "AdamW with a second, very slow average; say warmup_steps= on long runs.",
            ),
            _preset(
                "adan",
                optimizers.Adan,
                {"weight_decay": 0.02},
                _NORMS_SPARED,
                "Xie et al. 2022, arXiv 2208.06677",
                "Adaptive Nesterov momentum; learning rates five to ten times AdamW's.",
            ),
            _preset(
                "lamb",
                optimizers.Lamb,
                {},
                _NORMS_SPARED,
                "You et al. 2020, arXiv 1904.00962",
                "Adam with layer-wise steps as long as the weights: large batches.",
            ),
            _preset(
                "lion",
                optimizers.Lion,
                {"weight_decay": 0.1},
                _NORMS_SPARED,
                "Chen et al. 2023, arXiv 2302.06675",
                "The sign of momentum: half of Adam's state, a third of its learning rate, ten times its decay.",
            ),
            _preset(
                "lookaheadadam",
                optimizers.LookaheadAdam,
                {},
                _L2_NORMS_SPARED,
                "mgrankin/over9000; Zhang et al. 2019, arXiv 1907.08610",
                "Adam with Lookahead, the plain pair of over9000.",
            ),
            _preset(
                "ralamb",
                optimizers.Ralamb,
                {},
                _NORMS_SPARED,
                "mgrankin/over9000, its trust ratio repaired",
                "Rectified Adam with LAMB's steps as long as the weights.",
                schedule="flat_cosine",
            ),
            _preset(
                "rangerlars",
                optimizers.RangerLars,
                {},
                _NORMS_SPARED,
                "mgrankin/over9000, its trust ratio repaired",
                "Ralamb with Lookahead.",
            ),
            _preset(
                "over9000",
                optimizers.RangerLars,
                {"trust_denominator": "weights", "late_start": True},
                _NORMS_SPARED,
                "mgrankin/over9000 as released",
                "RangerLars as its published results had it: a trust ratio near 1, Lookahead that starts late.",
            ),
            _preset(
                "shampoo",
                optimizers.Shampoo,
                {},
                _NORMS_SPARED,
                "Shi et al. 2023, arXiv 2309.06497",
                "Shampoo at Adam's length, its roots renewed every ten steps.",
            ),
            _preset(
                "shampoo_meta",
                optimizers.Shampoo,
                {"every": 100, "start": 100, "block_size": 8192, "weight_decay": 1e-5},
                _NORMS_SPARED,
                "facebookresearch/optimizers, example 3 of its README",
                "Meta's Shampoo as its authors use it in Adam's place: large blocks, roots every hundred steps.",
            ),
            _preset(
                "shampoo_google",
                optimizers.Shampoo,
                {
                    "form": "google",
                    "graft": "sgd",
                    "eps": 1e-6,
                    "relative_eps": True,
                    "root": "newton",
                    "start": 6,
                    "nesterov": True,
                },
                _L2_NORMS_SPARED,
                "Anil et al. 2020, arXiv 2002.09018; google-research scalable_shampoo, its defaults",
                "Google's Shampoo at the length of SGD with Nesterov momentum; roots every ten steps, not every step.",
                lr_prior=LrPrior(0.05),
            ),
            _preset(
                "shampoo_onesided",
                optimizers.Shampoo,
                {"sides": "one"},
                _NORMS_SPARED,
                "Xie et al. 2025, arXiv 2503.10537; An et al. 2025, arXiv 2503.20762",
                "Shampoo from the shorter side alone, by an inverse square root, at Adam's length.",
            ),
            _preset(
                "shampoo_corrected",
                optimizers.Shampoo,
                {"corrected": True, "graft": "none", "eps": 1e-8, "start": 1},
                _NORMS_SPARED,
                "Vyas et al. 2024, arXiv 2409.11321; facebookresearch/optimizers, EigenvalueCorrectedShampoo",
                "SOAP as Meta has it: momentum stays in the weights' basis and no step is left out.",
            ),
            _preset(
                "psgdkron",
                optimizers.PSGDKron,
                {},
                _NORMS_SPARED,
                "Li 2018, arXiv 1512.04202; Li 2024, arXiv 2402.11858; kron_torch",
                "Momentum whitened by triangular factors that are found by descent.",
                set_betas=False,
            ),
            _preset(
                "soap",
                optimizers.SOAP,
                {},
                _NORMS_SPARED,
                "Vyas et al. 2024, arXiv 2409.11321",
                "Adam in the eigenbasis of Shampoo's factors, renewed every ten steps.",
            ),
            _preset(
                "sm3",
                optimizers.SM3,
                {},
                _NORMS_SPARED,
                "Anil et al. 2019, arXiv 1901.11150",
                "Adagrad in the memory of momentum alone; constant learning rate after a warm-up.",
                set_betas=False,
            ),
            _preset(
                "madgrad",
                optimizers.MADGRAD,
                {},
                _L2_NORMS_SPARED,
                "Defazio & Jelassi 2021, arXiv 2101.11075",
                "Dual averaging with a cube root, its default settings; sweep the learning rate anew.",
                set_betas=False,
            ),
            _preset(
                "mirrormadgrad",
                optimizers.MirrorMADGRAD,
                {},
                _NORMS_SPARED,
                "Defazio & Jelassi 2021, the package madgrad 1.3",
                "MADGRAD's mirror form, for large transformers.",
                set_betas=False,
            ),
            _preset(
                "muon",
                optimizers.Muon,
                {},
                _NORMS_SPARED,
                "Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
                "Orthogonal momentum for hidden matrices, AdamW for embeddings, heads, norms and biases.",
            ),
            _preset(
                "normuon",
                optimizers.NorMuon,
                {},
                _NORMS_SPARED,
                "Li et al. 2025, arXiv 2510.05491",
                "Muon whose rows are brought to one size.",
            ),
            _preset(
                "novograd",
                optimizers.NovoGrad,
                {"weight_decay": 1e-3},
                _L2_NORMS_SPARED,
                "Ginsburg et al. 2019, arXiv 1905.11286",
                "Momentum of layer-wise normalised gradients, at half of Adam's memory.",
            ),
            _preset(
                "pnm",
                optimizers.PNM,
                {},
                _L2_NORMS_SPARED,
                "Xie et al. 2021, arXiv 2103.17182",
                "SGD with positive-negative momentum: more noise, the same mean.",
                set_betas=False,
            ),
            _preset(
                "adapnm",
                optimizers.AdaPNM,
                {},
                _NORMS_SPARED,
                "Xie et al. 2021, arXiv 2103.17182",
                "Adam with positive-negative momentum and amsgrad, its authors' settings.",
            ),
            _preset(
                "adafactor",
                optimizers.Adafactor,
                {"lr": 1e-2},
                _NORMS_SPARED,
                "Shazeer & Stern 2018, arXiv 1804.04235",
                "Adam's second moment in rows and columns, steps relative to the weight's size: next to no state.",
            ),
            _preset(
                "amos",
                optimizers.Amos,
                {"momentum": 0.9},
                _NORMS_SPARED,
                "Tian & Parikh 2022, arXiv 2210.11693",
                "Decay towards scales that the model's layers call for; they are filled in from the modules.",
                schedule="constant",
            ),
            _preset(
                "prodigy",
                optimizers.Prodigy,
                {"safeguard_warmup": True},  # its companion schedule warms up; as prodigyopt advises then
                _NORMS_SPARED,
                "Mishchenko & Defazio 2023, arXiv 2306.06101; prodigyopt, on safeguard_warmup",
                "AdamW that finds its learning rate; lr is the schedule alone and begins at 1.",
            ),
            _preset(
                "schedulefreesgd",
                optimizers.ScheduleFreeSGD,
                {},
                _L2_NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "SGD that averages in the place of a schedule; eval() and train() switch its weights.",
                schedule="constant",
            ),
            _preset(
                "schedulefreeadamw",
                optimizers.ScheduleFreeAdamW,
                {},
                _NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "AdamW that averages in the place of a schedule; eval() and train() switch its weights.",
                schedule="constant",
            ),
            _preset(
                "schedulefreeradam",
                optimizers.ScheduleFreeRAdam,
                {},
                _NORMS_SPARED,
                "Defazio et al. 2024, arXiv 2405.15682",
                "The same with RAdam's rectifier as its warm-up.",
                schedule="constant",
            ),
            _preset(
                "adabelief",
                optimizers.AdaBelief,
                {},
                _NORMS_SPARED,
                f"Zhuang et al. 2020, arXiv 2010.07468; adabelief-pytorch 0.2; {_EPS}",
                "AdaBelief, rectified and decoupled; say domain= to get its eps right.",
                domains=_DOMAINS,
            ),
        )
    }
)
