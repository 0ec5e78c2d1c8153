"""A race from what was asked for to its result: plans it, has its runs made, and reads one that is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from piste.race import environment, sampling
from piste.race.budget import BudgetError, Paces, fitted, pace_of_script
from piste.race.contenders import Contender, ContenderError, make_contenders
from piste.race.driver import Driver, InterruptedRaceError, State, View, stop_signals
from piste.race.executors import LOCAL, Executor, make_executor, sizing
from piste.race.inspection import TaskCard
from piste.race.limits import Limits
from piste.race.probes import first_runs, inspect_tasks, measured_paces
from piste.race.protocol import Plan
from piste.race.record import fingerprint
from piste.race.result import StudyResult
from piste.race.script import Script
from piste.race.settings import Settings
from piste.race.space import parse_sweep
from piste.race.standings import study_result
from piste.race.store import Store, StoreError
from piste.race.task import BUILT_IN, split_reference
from piste.race.wishes import with_optimizers
from piste.race.words import count, listing

__all__ = [
    "DeviceError",
    "InterruptedRaceError",
    "Settings",
    "SettingsError",
    "State",
    "View",
    "race",
    "resolve_device",
    "stored_result",
    "stored_settings",
    "title",
    "with_optimizer",
]


_JOINED = "joined while the race was going on"


class DeviceError(ValueError):
    """The device does not exist here."""


class SettingsError(ValueError):
    """Two things that were asked for exclude each other."""


def race(settings: Settings, store: Store, view: View, command: str, limits: Limits | None = None) -> StudyResult:
    """Make all runs of a race that the store does not hold yet.

    Args:
        settings: what to race.
        store: where runs are kept; held for the time of the race.
        view: shows the race.
        command: what repeats this race, for the report.
        limits: what a run may take.

    Raises:
        ContenderError, TaskError, DeviceError, SettingsError, SamplerError, BudgetError: a setting is wrong, or cannot
            be had here; nothing has been written, but for first runs of a script that has a budget.
        StoreError: the store cannot be used, or no longer; finished runs are kept.
        ExecutorError: workers cannot be started, or the cluster cannot be reached.
        InterruptedRaceError: Ctrl-C or a signal to end; finished runs are kept, and it brings their result.
        KeyboardInterrupt: Ctrl-C a second time.
    """
    limits = limits or Limits()
    begun = time.monotonic()
    _refuse_contradictions(settings)
    contenders = contenders_for(settings, settings.trials)
    asked = _device(settings)
    script = _script(settings)
    described = () if script is None else (script.card(),)
    references = [_absolute(task) for task in settings.tasks] if script is None else []
    at_once = sum(len(who.cells) for who in contenders) * max(settings.trials, settings.seeds) * len(settings.tasks)
    spread = settings.device in ("auto", "cuda")
    with (
        stop_signals() as stopped,
        store.writing(),
        make_executor(settings.on, settings.workers, store.logs, asked, spread, at_once, limits.memory) as executor,
    ):
        view.looking(settings.tasks)
        device = executor.device
        cards = described or inspect_tasks(references, device, executor, stopped, limits, pack=settings.pack)
        if settings.workers is None and device == "cpu":
            executor.fit(sizing.together([card.peak_bytes for card in cards]))
        plan = _plan(settings, cards, contenders, device, executor.machine)
        if settings.budget is not None:
            measured = partial(_measured, plan, script, executor, stopped, view, limits, store)
            plan = _planned_before(settings, plan, store) or _fitted(settings, plan, begun, executor.width, measured)
        plan = _with_what_joined(settings, plan, store)
        created = environment.now()
        kept = {"settings": asdict(settings), "plan": plan.to_json()}
        about = {
            "title": title(plan),
            "created": created,
            "command": command,
            "workers": executor.width,
            "machine": executor.machine,
        }
        store.write_study({**kept, **about})

        def enlarged(plan: Plan, optimizer: str) -> Plan:
            nonlocal settings
            settings, plan = with_optimizer(settings, plan, optimizer)
            about["title"] = title(plan)
            about["command"] = with_optimizers(command, settings.optimizers)
            store.write_study({"settings": asdict(settings), "plan": plan.to_json(), **about})
            return plan

        driver = Driver(plan, store, view, executor, stopped, script, limits, enlarged)
        interrupted = False
        try:
            driver.run()
        except InterruptedRaceError:
            interrupted = True
    if interrupted and not driver.records:
        raise InterruptedRaceError
    result = study_result(driver.plan, driver.records, **about)  # type: ignore[arg-type]
    if interrupted:
        raise InterruptedRaceError(result)
    return result


def with_optimizer(settings: Settings, plan: Plan, optimizer: str) -> tuple[Settings, Plan]:
    """A race with one more optimizer, which gets the trials and seeds of all others.

    Raises:
        ContenderError: there is none of that name, or it races already.
    """
    settings = replace(settings, optimizers=(*settings.optimizers, optimizer))
    racing = {contender.name for contender in plan.contenders}
    new = tuple(each for each in contenders_for(settings, plan.trials) if each.name not in racing)
    names = listing([contender.name for contender in new], 9)
    remark = f"{names} {_JOINED}, with the trials and seeds of all others."
    return settings, replace(plan, contenders=plan.contenders + new, remarks=(*plan.remarks, remark))


def _with_what_joined(settings: Settings, plan: Plan, store: Store) -> Plan:
    """The plan with the remarks on optimizers that joined this same race before it was resumed."""
    try:
        same = replace(stored_settings(store), on=settings.on, workers=settings.workers) == settings
        before = Plan.from_json(store.read_study()["plan"]).remarks if same else ()
    except (StoreError, KeyError, TypeError):
        return plan
    joined = [remark for remark in before if _JOINED in remark and remark not in plan.remarks]
    return replace(plan, remarks=(*plan.remarks, *joined))


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


def _refuse_contradictions(settings: Settings) -> None:
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


def _plan(
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


def _fitted(
    settings: Settings, plan: Plan, begun: float, workers: int, measured: Callable[[float], tuple[Paces, int]]
) -> Plan:
    """The race that fits into the budget."""
    assert settings.budget is not None
    end = begun + settings.budget
    paces, made = measured(end - time.monotonic())
    left = end - time.monotonic()
    return fitted(plan, settings.budget, left, paces, workers, partial(contenders_for, settings), made)


def _measured(
    plan: Plan,
    script: Script | None,
    executor: Executor,
    stopped: Callable[[], bool],
    view: View,
    limits: Limits,
    store: Store,
    left: float,
) -> tuple[Paces, int]:
    """How fast contenders are here, and how many trials of each were made to learn it.

    A few steps of every contender say so of a task. How long a script is, a whole run has to tell; it is the first one
    that the race would have made, and is kept.
    """
    contenders = count(len(plan.contenders), "contender")
    if script is None:
        view.measuring(f"a few steps of {contenders}")
        return measured_paces(plan, executor, stopped, limits), 0
    view.measuring(f"a first run of {contenders}")
    runs = first_runs(plan, script, executor, stopped, limits, left, store.add)
    longest = max((seconds for run, seconds in runs if run.finished), default=math.nan)
    if math.isnan(longest):
        raise BudgetError(f"no first run of {script.path} finished, so nothing can be planned: {runs[0][0].message}")
    # One that was lost says little of the others at other rates.
    return {
        (script.path, run.key.contender): pace_of_script(run, seconds if run.finished else max(seconds, longest))
        for run, seconds in runs
    }, 1


def _planned_before(settings: Settings, plan: Plan, store: Store) -> Plan | None:
    """What the same command planned for the same budget: measured again, it would come out a little different."""
    try:
        stored = Plan.from_json(store.read_study()["plan"]) if stored_settings(store) == settings else None
    except (StoreError, KeyError, TypeError):
        return None
    same_tasks = stored is not None and [c.task_hash for c in stored.cards] == [c.task_hash for c in plan.cards]
    if stored is None or not same_tasks or stored.versions != plan.versions or stored.machine != plan.machine:
        return None
    return stored


def _script(settings: Settings) -> Script | None:
    if not settings.script:
        return None
    (path,) = settings.tasks
    return Script(str(Path(path).resolve()), settings.arguments, settings.metric, settings.higher_is_better)


def stored_settings(store: Store) -> Settings:
    """What the last race in a directory was asked for.

    Raises:
        StoreError: there is none, or its file is damaged.
    """
    study = store.read_study()
    with _taken_apart(store):
        return Settings.from_json(study["settings"])


def stored_result(store: Store) -> StudyResult:
    """The result of the last race in a directory, from what is kept there.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    study = store.read_study()
    with _taken_apart(store):
        about = {name: study[name] for name in ("title", "created", "command", "workers", "machine")}
        plan = Plan.from_json(study["plan"])
    return study_result(plan, store.load(set_aside=False), **about)


@contextmanager
def _taken_apart(store: Store) -> Iterator[None]:
    """Turn what goes wrong with a study of another shape into one message."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.study} does not hold a race as this version writes it ({type(error).__name__}: {error}); "
            "repeat the command that started the race"
        ) from error


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


def _device(settings: Settings) -> str:
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


def title(plan: Plan) -> str:
    """``4 contenders on char_transformer and digits``."""
    names = " and ".join(card.name for card in plan.cards)
    count = len(plan.contenders)
    return f"{count} contender{'s' * (count != 1)} on {names}"


def _absolute(task: str) -> str:
    """A task's reference, valid in every directory."""
    if task in BUILT_IN:
        return task
    path, name = split_reference(task)
    return f"{Path(path).resolve()}{':' + name if name else ''}"
