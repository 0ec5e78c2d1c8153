"""What a race was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from piste.race.sampling import HALTON

_LISTS = ("tasks", "optimizers", "schedules", "sweeps", "arguments")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Args:
        tasks: built-in names, or ``FILE.py`` or ``FILE.py:name``; the script alone where ``script`` is True.
        optimizers: presets, groups of them, or ``torch.AdamW`` for a class of ``torch.optim``.
        schedules: crossed with the optimizers; empty for each preset's own.
        steps: of a run; None for each task's own.
        trials: settings tried for each contender.
        seeds: confirmation runs for each contender.
        device: ``"auto"``, ``"cpu"``, ``"cuda:0"``, …
        sweeps: as ``space.parse_sweep`` takes them.
        sampler: ``"halton"`` or ``"tpe"``.
        screens: how often trials are halved on shorter schedules.
        timing: rounds of timing passes.
        target: the validation score to be timed; None for that of the tuned baselines.
        agnostic: the same settings for all tasks, whatever their field.
        budget: wall seconds that the whole race may take; None for as long as it takes.
        script: the task is a script that calls ``piste.race_optimizer``.
        arguments: of the script.
        metric: what its reports call the score.
        higher_is_better: direction of that.
        pack: trials of a contender are trained together where the task allows it.
        on: where runs are made: ``"local"``, ``"ray"``, ``"ray://HOST:PORT"`` or ``"slurm"``.
        workers: runs side by side; None for what that place has room for.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    schedules: tuple[str, ...]
    steps: int | None
    trials: int
    seeds: int
    device: str
    sweeps: tuple[str, ...] = ()
    sampler: str = HALTON
    screens: int = 0
    timing: int = 0
    target: float | None = None
    agnostic: bool = False
    budget: float | None = None
    script: bool = False
    arguments: tuple[str, ...] = ()
    metric: str = "loss"
    higher_is_better: bool = False
    pack: bool = False
    on: str = "local"
    workers: int | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """Back from plain data, also that of a version with fewer settings."""
        return cls(**{**content, **{name: tuple(content[name]) for name in _LISTS if name in content}})
