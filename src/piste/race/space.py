"""What a trial may choose: the learning rate, and with more trials (or ``--sweep``) other hyperparameters.

How many trials allow which dimension follows Godbole et al., "Deep Learning Tuning Playbook" (2023): a search of few
points over many dimensions finds less than one over the learning rate alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import piste

# From how many trials on a dimension is searched.
TRIALS_FOR_DECAY = 10
TRIALS_FOR_EPS = 26
TRIALS_FOR_BETA2 = 50

# What a decoupled decay takes off a weight per step, lr * weight_decay: AdamW at 2e-3 from 1e-3 to 0.3, SGD at 0.05
# from 4e-5 to 0.012, Lion at 3e-4 from 0.007 to 2, around what their papers use.
_DECAY_PER_STEP = (2e-6, 6e-4)
_L2 = (1e-6, 1e-2)
_BETA1 = (0.7, 0.98)
_BETA2 = (0.9, 0.9995)
_ADAM_EPS = (1e-10, 1e-3)
_BELIEF_EPS = (1e-16, 1e-8)
_RHO = (0.2, 10.0)  # times the wrapper's default: 0.01 to 0.5 for SAM, 0.1 to 5 for ASAM

# What `--sweep eps` and `--sweep rho` try, from the cheat-sheet.
_ADAM_EPS_LIST = (1.0, 0.1, 0.01, 1e-4)
_BELIEF_EPS_LIST = (1e-8, 1e-10, 1e-12, 1e-14, 1e-16)
_RHO_LIST = (0.2, 0.4, 1.0, 2.0, 4.0, 10.0)  # times the default, again: {0.01, 0.02, 0.05, 0.1, 0.2, 0.5}
LISTED = ("eps", "rho")

_BELIEF = ("AdaBelief", "RangerAdaBelief")
# Their eps guards a root of a matrix or a factored statistic, which Adam's range says nothing about.
_OTHER_EPS = ("Adafactor", "LaProp", "Muon", "NorMuon", "Prodigy", "SM3", "SOAP", "Shampoo")
_CYCLING = ("one_cycle",)  # schedules that set the momentum themselves in each step
_NO_DECAY = ("Amos",)  # its own decay follows from the rule, and `weight_decay` is another L2 term


@dataclass(frozen=True)
class Dimension:
    """A hyperparameter beside the learning rate that trials differ in.

    Args:
        name: ``weight_decay``, ``beta1``, ``beta2``, ``momentum``, ``eps``, ``rho`` or any other number.
        default: what a trial has that does not say.
        low: lower end of the range, even in the logarithm (of ``1 - value`` for betas and momenta).
        high: upper end.
        values: these and no others, each with as many learning rates (``--sweep``).
    """

    name: str
    default: float
    low: float = 0.0
    high: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def decades(self) -> float:
        """Width of the range in powers of ten."""
        return abs(self._log(self.high) - self._log(self.low))

    def at(self, position: float) -> float:
        """The value at a position in [0, 1]."""
        return self._value(self._log(self.low) + position * (self._log(self.high) - self._log(self.low)))

    def position(self, value: float) -> float:
        """Where in [0, 1] a value stands; values outside of the range stand at its ends."""
        if value <= 0 and not self._mirrored:
            return 0.0
        whole = (self._log(value) - self._log(self.low)) / (self._log(self.high) - self._log(self.low))
        return min(1.0, max(0.0, whole))

    def beyond(self, edge: str, value: float, decades: float) -> float | None:
        """A value so many decades further, or None where none is legal (below zero)."""
        outward = 1 if (edge == "high") != self._mirrored else -1
        if value <= 0:
            return None
        found = self._value(self._log(value) + outward * decades)
        return None if found <= 0 else found

    @property
    def _mirrored(self) -> bool:
        return self.name.startswith("beta") or self.name == "momentum"

    def _log(self, value: float) -> float:
        return math.log10(1 - value if self._mirrored else value)

    def _value(self, logarithm: float) -> float:
        return rounded(1 - 10**logarithm) if self._mirrored else rounded(10**logarithm)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Dimension:
        """Back from plain data."""
        return cls(**{**content, "values": tuple(content["values"])})


@dataclass(frozen=True)
class Sweep:
    """What ``--sweep`` asks for: a name, and its values where they are given."""

    name: str
    values: tuple[float, ...] = ()


def rounded(value: float) -> float:
    """Four significant digits: enough for a hyperparameter, and it prints as it is."""
    return float(f"{value:.4g}")


def parse_sweep(text: str) -> Sweep:
    """``eps=1,0.1`` or ``eps``.

    Raises:
        ValueError: it is neither, a value is no finite number or stands there twice, or the name has no list.
    """
    name, equals, listed = text.partition("=")
    name = name.strip()
    if name == "lr":
        raise ValueError("lr is always tuned, --trials says at how many points; sweep another hyperparameter")
    if not name.isidentifier():
        raise ValueError(f"{text!r} is not legal; legal: NAME=VALUE,VALUE,… or one of {', '.join(LISTED)} alone")
    if not equals:
        if name not in LISTED:
            raise ValueError(f"{name} has no list of its own; legal: {name}=VALUE,VALUE,…")
        return Sweep(name)
    try:
        values = tuple(float(value) for value in listed.split(","))
    except ValueError:
        raise ValueError(f"{listed!r} holds something that is no number; legal: {name}=VALUE,VALUE,…") from None
    if not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise ValueError(f"{listed!r} is not legal; legal: finite values, each once")
    return Sweep(name, values)


def space_of(
    preset: piste.Preset, schedule: str, lr_center: float, trials: int, sweeps: Sequence[Sweep]
) -> tuple[Dimension, ...]:
    """The dimensions beside the learning rate for a preset: those swept, and those that so many trials allow."""
    numbers = numbers_of(preset)
    swept = {sweep.name: _swept(sweep, preset, numbers) for sweep in sweeps if sweep.name in numbers}
    found = [dimension for dimension in swept.values() if dimension is not None]
    ranges: dict[str, tuple[float, float]] = {}
    if trials >= TRIALS_FOR_DECAY:
        ranges |= _decay(preset, lr_center) | _momentum(preset, numbers, schedule) | _rho(numbers)
    if trials >= TRIALS_FOR_EPS:
        ranges |= _eps(preset)
    if trials >= TRIALS_FOR_BETA2:
        ranges["beta2"] = _BETA2
    for name, (low, high) in ranges.items():
        if name in numbers and name not in swept:
            found.append(Dimension(name, numbers[name], rounded(low), rounded(high)))
    return tuple(found)


def numbers_of(preset: piste.Preset) -> dict[str, float]:
    """Every hyperparameter of a preset that is a number, with its value there; betas one by one."""
    settings: dict[str, Any] = {**preset.arguments, **preset.hyperparameters}
    for name in preset.wrappings:
        settings |= piste.WRAPPINGS[name].arguments
    betas = settings.get("betas")
    if isinstance(betas, (tuple, list)) and preset.set_betas:
        settings |= {f"beta{place}": beta for place, beta in enumerate(betas, 1)}
    plain = {name: value for name, value in settings.items() if _is_number(value)}
    return {name: float(value) for name, value in plain.items() if name != "lr"}


def create_arguments(preset: piste.Preset, hyperparameters: Mapping[str, float]) -> dict[str, Any]:
    """Hyperparameters as ``piste.create`` and the classes take them: ``beta1`` within ``betas``."""
    arguments: dict[str, Any] = {}
    defaults = {**preset.arguments, **preset.hyperparameters}
    betas = list(defaults.get("betas") or ())
    for name, value in hyperparameters.items():
        place = name.removeprefix("beta")
        if place.isdigit() and 0 < int(place) <= len(betas) and name not in defaults:
            betas[int(place) - 1] = value
            arguments["betas"] = tuple(betas)
        elif isinstance(defaults.get(name), int):
            arguments[name] = int(value)
        else:
            arguments[name] = value
    return arguments


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _swept(sweep: Sweep, preset: piste.Preset, numbers: Mapping[str, float]) -> Dimension | None:
    default = numbers[sweep.name]
    values = sweep.values
    if not values and sweep.name == "rho":
        values = tuple(rounded(factor * default) for factor in _RHO_LIST)
    elif not values:
        values = _eps_list(preset)
    return Dimension(sweep.name, default, values=values) if values else None


def _eps_list(preset: piste.Preset) -> tuple[float, ...]:
    if not _eps(preset):
        return ()
    if preset.optimizer.__name__ in _BELIEF:
        return _BELIEF_EPS_LIST
    default = numbers_of(preset)["eps"]
    return (*_ADAM_EPS_LIST, default) if default not in _ADAM_EPS_LIST else _ADAM_EPS_LIST


def _decay(preset: piste.Preset, lr_center: float) -> dict[str, tuple[float, float]]:
    if preset.optimizer.__name__ in _NO_DECAY:
        return {}
    low, high = (each / lr_center for each in _DECAY_PER_STEP) if preset.wd.true_wd else _L2
    return {"weight_decay": (low, high)}


def _momentum(preset: piste.Preset, numbers: Mapping[str, float], schedule: str) -> dict[str, tuple[float, float]]:
    if schedule in _CYCLING and preset.set_betas:
        return {}
    if 0 < numbers.get("momentum", 0) < 1:
        return {"momentum": _BETA1}
    return {"beta1": _BETA1}


def _rho(numbers: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {"rho": (_RHO[0] * numbers["rho"], _RHO[1] * numbers["rho"])} if "rho" in numbers else {}


def _eps(preset: piste.Preset) -> dict[str, tuple[float, float]]:
    name = preset.optimizer.__name__
    if name in _OTHER_EPS or numbers_of(preset).get("eps", 0.0) <= 0:
        return {}
    return {"eps": _BELIEF_EPS if name in _BELIEF else _ADAM_EPS}
