"""Learning-rate and momentum schedules: real ``torch`` schedulers for any ``torch`` optimizer, one step a batch.

Every schedule is a function of ``x = batches done / total batches``, as in fastai: the first batch trains at ``x = 0``
and the last at ``x = (N - 1) / N``, so the end value itself is reached only after the last batch. Stepping on past
``total_steps`` holds that end value. The learning rate that a parameter group has when the schedule is made (its
``initial_lr``) is its peak.

    optimizer = piste.create("ranger", model)
    schedule = piste.schedules.flat_cosine(optimizer, total_steps=1000)
    for batch in batches:
        loss(batch).backward()
        optimizer.step()
        schedule.step()

To resume, make the schedule again with the same arguments and load both state dicts, in either order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, TypeVar, final

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from piste.checks import near

__all__ = [
    "Schedule",
    "constant",
    "flat_cosine",
    "named",
    "one_cycle",
    "set_momentum",
    "untuned_warmup",
    "warmup_stable_decay",
]

Group = dict[str, Any]
Number = TypeVar("Number", float, Tensor)

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda y: y,
    "cosine": lambda y: (1 - math.cos(math.pi * y)) / 2,
    "sqrt": math.sqrt,
}


def _anneal(shape: str, start: Number, end: Number, y: float) -> Number:
    return start + (end - start) * _SHAPES[shape](y)


@dataclass(frozen=True)
class Curve(ABC):
    """What a schedule asks for after ``done`` batches."""

    @abstractmethod
    def lr(self, peak: Any, done: int, group: Group) -> Any:
        """The learning rate of a group."""

    def momentum(self, done: int) -> float | None:
        """The momentum of all groups; None leaves it alone."""
        return None


@dataclass(frozen=True)
class _OneCycle(Curve):
    total_steps: int
    pct_start: float
    div: float
    div_final: float
    moms: tuple[float, float, float] | None

    def _cycle(self, start: Number, middle: Number, end: Number, done: int) -> Number:
        x = min(done / self.total_steps, 1.0)
        if x < self.pct_start:
            return _anneal("cosine", start, middle, x / self.pct_start)
        return _anneal("cosine", middle, end, (x - self.pct_start) / (1 - self.pct_start))

    def lr(self, peak: Any, done: int, group: Group) -> Any:
        return self._cycle(peak / self.div, peak, peak / self.div_final, done)

    def momentum(self, done: int) -> float | None:
        return None if self.moms is None else self._cycle(*self.moms, done)


@dataclass(frozen=True)
class _FlatCosine(Curve):
    total_steps: int
    pct_start: float
    div_final: float

    def lr(self, peak: Any, done: int, group: Group) -> Any:
        x = min(done / self.total_steps, 1.0)
        if x < self.pct_start:
            return peak
        return _anneal("cosine", peak, peak / self.div_final, (x - self.pct_start) / (1 - self.pct_start))


@dataclass(frozen=True)
class _WarmupStableDecay(Curve):
    total_steps: int
    pct_warmup: float
    pct_decay: float
    shape: str
    div: float
    div_final: float

    def lr(self, peak: Any, done: int, group: Group) -> Any:
        x = min(done / self.total_steps, 1.0)
        decay_from = 1 - self.pct_decay
        if x < self.pct_warmup:
            return _anneal("linear", peak / self.div, peak, x / self.pct_warmup)
        if x <= decay_from:
            return peak
        return _anneal(self.shape, peak, peak / self.div_final, (x - decay_from) / self.pct_decay)


@dataclass(frozen=True)
class _UntunedWarmup(Curve):
    beta2: float | None

    def lr(self, peak: Any, done: int, group: Group) -> Any:
        beta2 = float(group["betas"][1]) if self.beta2 is None else self.beta2
        return peak * min(1.0, (done + 1) * (1 - beta2) / 2)


@dataclass(frozen=True)
class _Constant(Curve):
    def lr(self, peak: Any, done: int, group: Group) -> Any:
        return peak


@final
class Schedule(LRScheduler):
    """A curve followed by an optimizer, one point a ``step()``; made by the functions of this module.

    It differs from torch's schedulers in three ways. Loading a state dict sets the learning rate (and momentum) of that
    moment at once, so it does not matter whether the optimizer's state is loaded before or after. A state saved by
    another schedule, or by this one with other settings, is refused with a ValueError. Groups added to the optimizer
    later join in, with the learning rate they were added with as their peak.
    """

    def __init__(self, optimizer: Optimizer, curve: Curve) -> None:
        self.curve = curve
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group for the batch about to come."""
        groups = self.optimizer.param_groups
        for late in groups[len(self.base_lrs) :]:
            peak = late.setdefault("initial_lr", _copied(late["lr"]))
            self.base_lrs = [*self.base_lrs, _copied(peak)]
        pairs = zip(self.base_lrs, groups, strict=True)
        return [self.curve.lr(peak, self.last_epoch, group) for peak, group in pairs]

    def step(self, epoch: int | None = None) -> None:
        """Move on by one batch; call it after ``optimizer.step()``."""
        super().step(epoch)
        self._set_momentum()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings (tensors where lr is one): ``torch.load(weights_only=True)`` reads it."""
        return {**super().state_dict(), "curve": self._description()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved schedule stood. ValueError, and nothing changed, if it was another schedule."""
        groups = self.optimizer.param_groups
        saved = dict(state_dict)
        curve, count = saved.pop("curve", None), len(saved.get("base_lrs", ()))
        if curve != self._description():
            raise ValueError(f"state_dict is of another schedule: it has curve={curve}, this one {self._description()}")
        if count != len(groups):
            raise ValueError(
                f"state_dict has {count} learning rates for the optimizer's {len(groups)} parameter groups"
            )
        super().load_state_dict(saved)
        for group, lr in zip(groups, self.get_lr(), strict=True):
            _put(group, "lr", lr)
        self._set_momentum()

    def _description(self) -> dict[str, Any]:
        return {"name": type(self.curve).__name__.lstrip("_"), **asdict(self.curve)}

    def _set_momentum(self) -> None:
        momentum = self.curve.momentum(self.last_epoch)
        if momentum is not None:
            set_momentum(self.optimizer.param_groups, momentum)


def set_momentum(groups: Sequence[Group], momentum: float) -> None:
    """Set the momentum of parameter groups that have one to cycle: ``betas[0]``, or else ``momentum``.

    Args:
        groups: of one optimizer, all of them or some.
        momentum: the new value, in (0, 1).

    Groups marked ``cycle_momentum=False`` (by presets whose ``set_betas`` is False, and by schedule-free optimizers)
    stay, and so does a momentum of 0.

    >>> from piste.schedules import set_momentum
    >>> groups = [{"betas": (0.9, 0.99)}, {"momentum": 0.9, "cycle_momentum": False}]
    >>> set_momentum(groups, 0.85)
    >>> groups
    [{'betas': (0.85, 0.99)}, {'momentum': 0.9, 'cycle_momentum': False}]
    """
    for group in groups:
        # A preset with set_betas=False marks its groups, and a group added later follows the first. Zero momentum
        # means that the algorithm has none to cycle.
        if not group.get("cycle_momentum", groups[0].get("cycle_momentum", True)):
            continue
        if "betas" in group and group["betas"][0] != 0:
            beta1, *others = group["betas"]
            group["betas"] = (_filled(beta1, momentum), *others)
        elif "momentum" in group and group["momentum"] != 0:
            _put(group, "momentum", momentum)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _filled(old: Any, new: Any) -> Any:
    """The new value, kept in the old one's memory where that is a tensor: a captured step reads it there."""
    return old.fill_(float(new)) if isinstance(old, Tensor) else new


def _put(group: Group, key: str, value: Any) -> None:
    group[key] = _filled(group[key], value)


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    *,
    pct_start: float = 0.25,
    div: float = 25.0,
    div_final: float = 1e5,
    moms: tuple[float, float, float] | None = (0.95, 0.85, 0.95),
) -> LRScheduler:
    """Up from ``lr / div`` to ``lr``, down to ``lr / div_final``, along cosines; the momentum goes the other way.

    fastai's ``fit_one_cycle``. Not ``torch.optim.lr_scheduler.OneCycleLR``, which divides its end value by the starting
    value instead of the peak, turns at 30 %, and spreads its points over ``total_steps - 1``.

    Args:
        optimizer: any ``torch.optim.Optimizer``; the lr of each of its groups is that group's peak.
        total_steps: number of batches that will be trained, at least 1.
        pct_start: fraction of them spent going up, in [0, 1).
        div: peak divided by the first learning rate, at least 1.
        div_final: peak divided by the end value, at least 1.
        moms: momentum at the start, the turn and the end, each in (0, 1): ``betas[0]`` where a group has betas, else
            its ``momentum``. None leaves it alone; so does a momentum of 0, and a group marked ``cycle_momentum=False``
            (presets whose ``set_betas`` is False).

    Raises:
        ValueError: an argument out of its range, before the optimizer is touched.

    Not for optimizers that carry their own schedule, nor for runs whose length is unknown.

    >>> import torch, piste
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    >>> schedule = piste.schedules.one_cycle(optimizer, total_steps=4)
    >>> for _ in range(4):
    ...     print(f"{optimizer.param_groups[0]['lr']:.4f} {optimizer.param_groups[0]['betas'][0]:.3f}")
    ...     optimizer.step()
    ...     schedule.step()
    0.0400 0.950
    1.0000 0.850
    0.7500 0.875
    0.2500 0.925

    Source: L. Smith, "A disciplined approach to neural network hyper-parameters", 2018 (arXiv 1803.09820); fastai 2.
    """
    steps = _steps(total_steps)
    _check("pct_start", pct_start, "in [0, 1)", lambda v: 0 <= v < 1)
    _check("div", div, "finite and at least 1", _divides)
    _check("div_final", div_final, "finite and at least 1", _divides)
    _check("moms", moms, "None or three numbers in (0, 1)", lambda v: v is None or _momenta(v))
    cycle = None if moms is None else (moms[0], moms[1], moms[2])
    return Schedule(optimizer, _OneCycle(steps, pct_start, div, div_final, cycle))


def flat_cosine(
    optimizer: Optimizer, total_steps: int, *, pct_start: float = 0.75, div_final: float = 1e5
) -> LRScheduler:
    """``lr`` for three quarters, then down a cosine to ``lr / div_final``: the companion of the Ranger family.

    fastai's ``fit_flat_cos``. The momentum is left alone.

    Args:
        optimizer: any ``torch.optim.Optimizer``; the lr of each of its groups is that group's flat value.
        total_steps: number of batches that will be trained, at least 1.
        pct_start: fraction of them at the flat value, in [0, 1); 0 is a plain cosine.
        div_final: flat value divided by the end value, at least 1.

    Raises:
        ValueError: an argument out of its range, before the optimizer is touched.

    Not for optimizers that need a warm-up (plain Adam on transformers): it starts at the full rate.

    >>> import torch, piste
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    >>> schedule = piste.schedules.flat_cosine(optimizer, total_steps=8)
    >>> rates = []
    >>> for _ in range(8):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> print(*(f"{rate:.1f}" for rate in rates))
    1.0 1.0 1.0 1.0 1.0 1.0 1.0 0.5

    Source: fastai 2; the practice comes with L. Wright's Ranger, 2019.
    """
    steps = _steps(total_steps)
    _check("pct_start", pct_start, "in [0, 1)", lambda v: 0 <= v < 1)
    _check("div_final", div_final, "finite and at least 1", _divides)
    return Schedule(optimizer, _FlatCosine(steps, pct_start, div_final))


def warmup_stable_decay(
    optimizer: Optimizer,
    total_steps: int,
    *,
    pct_warmup: float = 0.05,
    pct_decay: float = 0.2,
    shape: str = "sqrt",
    div: float = 25.0,
    div_final: float = 1e5,
) -> LRScheduler:
    """A straight line up from ``lr / div``, a long stable stretch, and a last part down to ``lr / div_final``.

    Args:
        optimizer: any ``torch.optim.Optimizer``; the lr of each of its groups is that group's stable value.
        total_steps: number of batches that will be trained, at least 1.
        pct_warmup: fraction of them spent going up, in [0, 1].
        pct_decay: fraction spent going down, in [0, 1]; both together at most 1.
        shape: of the way down: "sqrt" (one minus the root, steep first), "linear" or "cosine".
        div: stable value divided by the first learning rate, at least 1.
        div_final: stable value divided by the end value, at least 1.

    Raises:
        ValueError: an argument out of its range, before the optimizer is touched.

    Made for long runs that may be continued from the stable stretch; in short ones ``one_cycle`` or ``flat_cosine`` are
    the usual choice.

    >>> import torch, piste
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    >>> schedule = piste.schedules.warmup_stable_decay(
    ...     optimizer, 10, pct_warmup=0.2, pct_decay=0.4, shape="linear", div=4
    ... )
    >>> rates = []
    >>> for _ in range(10):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> print(*(f"{rate:.3f}" for rate in rates))
    0.250 0.625 1.000 1.000 1.000 1.000 1.000 0.750 0.500 0.250

    Source: Hu et al., MiniCPM, 2024 (arXiv 2404.06395); the root-shaped fifth at the end: Hägele et al., 2024 (arXiv
    2405.18392).
    """
    steps = _steps(total_steps)
    _check("pct_warmup", pct_warmup, "in [0, 1]", lambda v: 0 <= v <= 1)
    _check("pct_decay", pct_decay, "in [0, 1 - pct_warmup]", lambda v: 0 <= v <= 1 - pct_warmup + 1e-12)
    _check("shape", shape, f"one of {sorted(_SHAPES)}", lambda v: v in _SHAPES)
    _check("div", div, "finite and at least 1", _divides)
    _check("div_final", div_final, "finite and at least 1", _divides)
    return Schedule(optimizer, _WarmupStableDecay(steps, pct_warmup, pct_decay, shape, div, div_final))


def untuned_warmup(optimizer: Optimizer, total_steps: int | None = None, *, beta2: float | None = None) -> LRScheduler:
    """A straight line up to ``lr`` over 2 / (1 - beta2) batches, then flat: the warm-up of Adam that needs no tuning.

    Batch t (counted from 1) trains at ``lr * min(1, t * (1 - beta2) / 2)``: 2,000 batches of warm-up at beta2 = 0.999.

    Args:
        optimizer: any ``torch.optim.Optimizer``; the lr of each of its groups is that group's flat value.
        total_steps: taken so that all schedules are called alike; the length follows from beta2 alone.
        beta2: decay rate of the second moment, in [0, 1). None reads ``betas[1]`` of each group, at each step.

    Raises:
        ValueError: an argument out of its range, or no ``beta2`` given and a group without betas; nothing is touched.

    Not for SGD, whose step has no second moment to wait for, nor with RAdam and the Ranger family, which rectify
    themselves.

    >>> import torch, piste
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0, betas=(0.9, 0.5))
    >>> schedule = piste.schedules.untuned_warmup(optimizer)
    >>> rates = []
    >>> for _ in range(5):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> print(*rates)
    0.25 0.5 0.75 1.0 1.0

    Source: Ma and Yarats, "On the adequacy of untuned warmup for adaptive optimization", 2019 (arXiv 1910.04209).
    """
    if total_steps is not None:
        _steps(total_steps)
    _check("beta2", beta2, "None or in [0, 1)", lambda v: v is None or 0 <= v < 1)
    for index, group in enumerate(optimizer.param_groups):
        if beta2 is None and len(group.get("betas", ())) < 2:
            raise ValueError(
                f"beta2=None is not legal: parameter group {index} has no betas; legal: a number in [0, 1)"
            )
    return Schedule(optimizer, _UntunedWarmup(beta2))


def constant(optimizer: Optimizer, total_steps: int | None = None) -> LRScheduler:
    """``lr`` for ever: the schedule for optimizers that bring their own, and the baseline for the others.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        total_steps: taken so that all schedules are called alike.

    Raises:
        ValueError: ``total_steps`` is neither None nor a whole number of at least 1.

    Not for a final result with a plain optimizer: without a decay the last weights keep the noise of a full-size step.

    >>> import torch, piste
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> piste.schedules.constant(optimizer).get_last_lr()
    [0.1]
    """
    if total_steps is not None:
        _steps(total_steps)
    return Schedule(optimizer, _Constant())


_BY_NAME: dict[str, Callable[..., LRScheduler]] = {
    function.__name__: function for function in (constant, flat_cosine, one_cycle, untuned_warmup, warmup_stable_decay)
}


def named(name: str) -> Callable[..., LRScheduler]:
    """The schedule of that name, to be called with (optimizer, total_steps).

    Args:
        name: "constant", "flat_cosine", "one_cycle", "untuned_warmup" or "warmup_stable_decay"; hyphens do for
            underscores.

    Raises:
        ValueError: there is none; the message names the nearest.

    Not needed where the schedule is known in advance: call the function itself.

    >>> import piste
    >>> piste.schedules.named("flat-cosine").__name__
    'flat_cosine'
    """
    key = str(name).lower().replace("-", "_")
    if key not in _BY_NAME:
        raise ValueError(f"no schedule {name!r}{near(key, _BY_NAME)}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[key]


def _check(name: str, value: Any, legal: str, holds: Callable[[Any], bool]) -> None:
    try:
        good = bool(holds(value))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{name}={value!r} is not legal; legal: {legal}")


def _steps(total_steps: Any) -> int:
    is_whole = isinstance(total_steps, Integral) and not isinstance(total_steps, bool)
    _check("total_steps", total_steps, "a whole number of at least 1", lambda v: is_whole and v >= 1)
    return int(total_steps)


def _divides(value: Any) -> bool:
    return math.isfinite(value) and value >= 1


def _momenta(moms: Any) -> bool:
    return len(moms) == 3 and all(0 < m < 1 for m in moms)
