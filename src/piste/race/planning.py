"""A plan for what was asked for: who races, on which device, and what has to be said of it from the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from piste.race import environment, sampling
from piste.race.contenders import Contender, ContenderError, make_contenders
from piste.race.executors import LOCAL
from piste.race.inspection import TaskCard
from piste.race.protocol import Plan
from piste.race.record import fingerprint
from piste.race.script import Script
from piste.race.settings import Settings
from piste.race.space import parse_sweep
from piste.race.task import BUILT_IN, split_reference
from piste.race.words import listing

__all__ = [
    "JOINED",
    "DeviceError",
    "SettingsError",
    "absolute",
    "contenders_for",
    "device_for",
    "plan_for",
    "refuse_contradictions",
    "resolve_device",
    "script_of",
    "title",
    "with_optimizer",
]

#: in the remark on an optimizer that was added to a race
JOINED = "joined while the race was going on"


class DeviceError(ValueError):
    """The device does not exist here."""


class SettingsError(ValueError):
    """Two things that were asked for exclude each other."""


def refuse_contradictions(settings: Settings) -> None:
    """Refuse what excludes something else.

    Raises:
        SettingsError: it does.
        SamplerError: the sampler needs a library that is not installed.
    """
    if settings.sampler == sampling.TPE:
        sampling.optuna_or_refusal()
        if settings.screens:
            raise SettingsError("--screens and --sampler tpe exclude each other: TPE needs each result before the next")
        if settings.pack:
            raise SettingsError("--pack and --sampler tpe exclude each other: TPE needs each result before the next")
    if settings.script:
        for name, given in (
            ("--steps", settings.steps is not None),
            ("--schedules", bool(settings.schedules)),
            ("--screens", settings.screens > 0),
            ("--pack", settings.pack),
        ):
            if given:
                raise SettingsError(f"{name} and --script exclude each other: how a run goes is up to the script")


def contenders_for(settings: Settings, trials: int) -> tuple[Contender, ...]:
    """Who races; how many trials there are decides what they search.

    Raises:
        ContenderError: a name or a sweep is wrong.
    """
    try:
        sweeps = [parse_sweep(text) for text in settings.sweeps]
    except ValueError as error:
        raise ContenderError(f"--sweep: {error}") from error
    return make_contenders(
        settings.optimizers,
        settings.schedules,
        trials=trials,
        sweeps=sweeps,
        agnostic=settings.agnostic,
        script=settings.script,
    )


def plan_for(
    settings: Settings,
    cards: tuple[TaskCard, ...],
    contenders: tuple[Contender, ...],
    device: str,
    machine: dict[str, str],
) -> Plan:
    """The race as it was asked for."""
    remarks = []
    if settings.sampler == sampling.TPE:
        remarks.append(
            "Trials were chosen by TPE from the results of earlier ones (--sampler tpe): they cannot be scored anew by "
            "another measure, and how a contender does with fewer of them cannot be told from them."
        )
    if settings.script:
        remarks.append(
            "The script's own schedule was used for all contenders. Where its reports hold no test_ numbers, scores "
            "are those of the split that chose the settings, on fresh seeds."
        )
    for card in cards:
        if card.packs:
            remarks.append(
                f"Trials on {card.name} were trained together (--pack). They are equal to trials trained alone but for "
                "rounding; what was confirmed and timed was trained alone."
            )
        elif card.not_packed:
            remarks.append(f"Trials on {card.name} were trained one by one in spite of --pack: {card.not_packed}.")
    return Plan(
        *(cards, contenders, settings.steps, settings.trials, settings.seeds, device, environment.versions()),
        sampler=settings.sampler,
        screens=settings.screens,
        timing=settings.timing,
        machine=fingerprint(machine),
        target=settings.target,
        remarks=tuple(remarks),
    )


def with_optimizer(settings: Settings, plan: Plan, optimizer: str) -> tuple[Settings, Plan]:
    """A race with one more optimizer, which gets the trials and seeds of all others.

    Raises:
        ContenderError: there is none of that name, or it races already.
    """
    settings = replace(settings, optimizers=(*settings.optimizers, optimizer))
    racing = {contender.name for contender in plan.contenders}
    new = tuple(each for each in contenders_for(settings, plan.trials) if each.name not in racing)
    names = listing([contender.name for contender in new], 9)
    remark = f"{names} {JOINED}, with the trials and seeds of all others."
    return settings, replace(plan, contenders=plan.contenders + new, remarks=(*plan.remarks, remark))


def title(plan: Plan) -> str:
    """``4 contenders on char_transformer and digits``."""
    names = " and ".join(card.name for card in plan.cards)
    count = len(plan.contenders)
    return f"{count} contender{'s' * (count != 1)} on {names}"


def script_of(settings: Settings) -> Script | None:
    """The script that is raced; None where tasks are."""
    if not settings.script:
        return None
    (path,) = settings.tasks
    return Script(str(Path(path).resolve()), settings.arguments, settings.metric, settings.higher_is_better)


def absolute(task: str) -> str:
    """A task's reference, valid in every directory."""
    if task in BUILT_IN:
        return task
    path, name = split_reference(task)
    return f"{Path(path).resolve()}{':' + name if name else ''}"


def resolve_device(name: str) -> str:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        DeviceError: there is no such device here.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a number comes back: "meta" can make tensors, but knows no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise DeviceError(f"device {name!r} cannot be used here: {reason}") from error
    return {"cuda": "cuda:0", "cpu:0": "cpu"}.get(str(device), str(device))


def device_for(settings: Settings) -> str:
    """The device as the place takes it that runs are made in: only of this machine it can be said what it has.

    Raises:
        DeviceError: there is no such device here, or none of that name in a cluster.
    """
    if settings.on == LOCAL:
        return resolve_device(settings.device)
    legal = {"auto": "auto", "cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0"}
    if settings.device not in legal:
        raise DeviceError(f"device {settings.device!r} is not legal with --on {settings.on}; legal: auto, cpu, cuda")
    return legal[settings.device]
