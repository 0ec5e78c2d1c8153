"""A race from what was asked for to its result: fits its plan, has its runs made, and reads one that is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from piste.race import environment
from piste.race.budget import BudgetError, Paces, fitted, pace_of_script
from piste.race.driver import Driver, InterruptedRaceError, View, stop_signals
from piste.race.executors import Executor, make_executor, sizing
from piste.race.limits import Limits
from piste.race.planning import (
    JOINED,
    absolute,
    contenders_for,
    device_for,
    plan_for,
    refuse_contradictions,
    script_of,
    title,
    with_optimizer,
)
from piste.race.probes import first_runs, inspect_tasks, measured_paces
from piste.race.protocol import Plan
from piste.race.result import StudyResult
from piste.race.script import Script
from piste.race.settings import Settings
from piste.race.standings import study_result
from piste.race.store import Store, StoreError
from piste.race.wishes import with_optimizers
from piste.race.words import count

__all__ = ["InterruptedRaceError", "race", "stored_result", "stored_settings"]


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
    refuse_contradictions(settings)
    contenders = contenders_for(settings, settings.trials)
    asked = device_for(settings)
    script = script_of(settings)
    described = () if script is None else (script.card(),)
    references = [absolute(task) for task in settings.tasks] if script is None else []
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
        plan = plan_for(settings, cards, contenders, device, executor.machine)
        if settings.budget is not None:
            measured = partial(_measured, plan, script, executor, stopped, view, limits, store)
            plan = _planned_before(settings, plan, store) or _fitted(settings, plan, begun, executor.width, measured)
        plan = _with_what_joined(settings, plan, store)
        about = {
            "title": title(plan),
            "created": environment.now(),
            "command": command,
            "workers": executor.width,
            "machine": executor.machine,
        }
        _write_down(store, settings, plan, about)

        def enlarged(plan: Plan, optimizer: str) -> Plan:
            nonlocal settings
            settings, plan = with_optimizer(settings, plan, optimizer)
            about["title"] = title(plan)
            about["command"] = with_optimizers(command, settings.optimizers)
            _write_down(store, settings, plan, about)
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


def _write_down(store: Store, settings: Settings, plan: Plan, about: Mapping[str, object]) -> None:
    store.write_study({"settings": asdict(settings), "plan": plan.to_json(), **about})


def _with_what_joined(settings: Settings, plan: Plan, store: Store) -> Plan:
    """The plan with the remarks on optimizers that joined this same race before it was resumed."""
    try:
        same = replace(stored_settings(store), on=settings.on, workers=settings.workers) == settings
        before = Plan.from_json(store.read_study()["plan"]).remarks if same else ()
    except (StoreError, KeyError, TypeError):
        return plan
    joined = [remark for remark in before if JOINED in remark and remark not in plan.remarks]
    return replace(plan, remarks=(*plan.remarks, *joined))


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
