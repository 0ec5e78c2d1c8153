"""The commands: ``piste race``, ``memory``, ``list``, ``show``, ``report``; and those that other files bring."""

from __future__ import annotations

import difflib
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

import piste
from piste.race import footprint, report
from piste.race.advice import advise
from piste.race.budget import BudgetError, parse_budget
from piste.race.catalogue import find, show, show_list, show_tasks
from piste.race.contenders import ContenderError, make_contenders
from piste.race.executors import LOCAL, PLACES, ExecutorError, is_place
from piste.race.limits import Limits
from piste.race.planning import DeviceError, SettingsError
from piste.race.result import StudyResult
from piste.race.sampling import SAMPLERS, SamplerError
from piste.race.serve import ServeError, served
from piste.race.settings import Settings
from piste.race.space import parse_sweep
from piste.race.starter import STARTER
from piste.race.store import Store, StoreError
from piste.race.study import (
    InterruptedRaceError,
    race,
    stored_result,
    stored_settings,
)
from piste.race.task import BUILT_IN, TaskError
from piste.race.terminal import show_result, view_for
from piste.race.verdict import recommended

__all__ = ["command"]

_TASKS = ("char_transformer", "digits")
_OPTIMIZERS = "sgd_momentum,adamw,ranger,rangeradabelief"
_RESULTS = Path("piste-race")
_WRONG = (
    BudgetError,
    ContenderError,
    DeviceError,
    SamplerError,
    ServeError,
    SettingsError,
    TaskError,
)  # a setting is wrong


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(piste.__version__, prog_name="piste")
def command() -> None:
    """Optimizers for PyTorch, raced honestly on your own problem."""


@contextmanager
def _explained(debug: bool, out: Path | None = None) -> Iterator[None]:
    """Turn errors that a user can mend into one message, with the traceback only where it was asked for."""
    try:
        yield
    except (InterruptedRaceError, KeyboardInterrupt):
        # Before the tasks have been tried there is nothing to resume.
        again = f"piste race --resume --out {shlex.quote(str(out))}" if out and Store(out).study.exists() else ""
        words = f"all finished runs are kept. Go on with: {again}" if again else "the race had not begun"
        click.echo(f"piste: stopped; {words}", err=True)
        sys.exit(130)
    except (*_WRONG, report.ExportError, StoreError, ExecutorError, OSError) as error:
        if debug:
            traceback.print_exc()
        message = str(error) if not isinstance(error, OSError) else f"{error.filename or ''}: {error.strerror or error}"
        click.echo(f"piste: {message}", err=True)
        sys.exit(1 if isinstance(error, (StoreError, ExecutorError, OSError)) else 2)


def _names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names and value != parameter.default:
        raise click.BadParameter(f"{value!r} holds no name; legal: {parameter.name} with commas between them")
    return names


def _sweeps(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Checked here, so that a mistake is one of the command line; kept as text, to be compared and stored."""
    for text in value:
        try:
            parse_sweep(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not legal; legal: a finite number")
    return value


def _time(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else parse_budget(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _place(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_place(value):
        raise click.BadParameter(f"{value!r} is not legal; legal: {PLACES}")
    return value


class _Size(click.ParamType[float]):
    """A number of bytes with its unit; a ``/s`` behind it where a second belongs to it."""

    def __init__(self, per_second: str = "") -> None:
        self.per_second, self.name = per_second, "bytes per second" if per_second else "bytes"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            return footprint.bytes_of(str(value), self.per_second)
        except ValueError as error:
            self.fail(str(error), parameter, context)


class _Port(click.ParamType[int]):
    """A port, which may be left out."""

    name = "port"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and int(text) < 2**16):
            self.fail(
                f"{text!r} is no port; legal: 0 to 65535, or none, and then --serve stands behind the task", parameter
            )
        return int(text)


def _debug(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(function)


@command.command(name="race", short_help="Race optimizers on a task.")
@click.argument("task", required=False, metavar="[TASK.py[:name]]")
@click.argument("arguments", nargs=-1, metavar="[-- ARGS]")
@click.option(
    "--optimizers", default=_OPTIMIZERS, show_default=True, callback=_names, help="Names, with commas; or cheatsheet."
)
@click.option(
    "--schedules", default="", callback=_names, help="Crossed with the optimizers. [default: each one's companion]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of a run. [default: the task's]")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Confirmation runs each.")
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Settings tried, each.")
@click.option(
    "--sweep", "sweeps", multiple=True, callback=_sweeps, metavar="NAME[=V,V…]", help="eps, rho, or any with values."
)
@click.option("--sampler", type=click.Choice(SAMPLERS), default=SAMPLERS[0], show_default=True, help="Of trials.")
@click.option("--screens", type=click.IntRange(0, 4), default=0, show_default=True, help="Halvings on short schedules.")
@click.option("--timing", type=click.IntRange(min=0), default=3, show_default=True, help="Rounds of timing passes.")
@click.option("--pack", is_flag=True, help="Train trials of small models together: faster, equal to rounding.")
@click.option("--target", type=float, callback=_finite, help="Score to be timed. [default: what tuned baselines reach]")
@click.option("--agnostic", is_flag=True, help="No settings by field: the same for every task.")
@click.option("--budget", callback=_time, metavar="TIME", help="Plan the race to fit, such as 10m or 1h30m.")
@click.option("--script", type=click.Path(), help="Race a script of yours; its arguments stand after --.")
@click.option("--metric", default="loss", show_default=True, help="What of a script's reports is the score.")
@click.option("--higher-is-better", is_flag=True, help="The direction of that.")
@click.option(
    "--on", default=LOCAL, show_default=True, callback=_place, metavar="PLACE", help=f"Where runs are made: {PLACES}."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Runs side by side. [default: as many as there is room for]"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, …")
@click.option(
    "--timeout", callback=_time, metavar="TIME", help="Longest run. [default: 20 times the expected, at least 10m]"
)
@click.option(
    "--memory", type=_Size(), metavar="GiB", help="Most memory of a run. [default: its share, if it is short]"
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory of results. [default: piste-race/<tasks>]")
@click.option("--resume", is_flag=True, help="Go on with the last race in --out, as it was asked for.")
@click.option(
    "--serve", is_flag=False, flag_value="0", type=_Port(), metavar="[PORT]", help="Show the report in a browser, live."
)
@click.option("--stay", is_flag=True, help="Serve on after the end, until Ctrl-C.")
@click.option("--new", type=click.Path(path_type=Path), metavar="FILE.py", help="Write a task to start from, and end.")
@click.option("--list-tasks", is_flag=True, help="Show the built-in tasks, and end.")
@_debug
@click.pass_context
def _race(
    context: click.Context,
    /,
    task: str | None,
    arguments: tuple[str, ...],
    script: str | None,
    out: Path | None,
    timeout: float | None,
    memory: float | None,
    resume: bool,
    serve: int | None,
    stay: bool,
    new: Path | None,
    list_tasks: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Race optimizers on TASK: a built-in one or a file of your own.

    --list-tasks shows the built-in ones. Every contender tries the same number of settings around its own prior; its
    best is trained again on fresh seeds and scored on data used for nothing else. Without TASK, two built-in tasks are
    raced. Finished runs are kept: the same command goes on where it was stopped. A training script of your own that
    calls piste.race_optimizer is raced with --script.
    """
    if list_tasks:
        show_tasks(Console())
        return
    if new is not None:
        _write_starter(new)
        return
    if script is not None:
        # Whatever is not an option is the script's; click cannot tell what stood before the "--".
        arguments = (*((task,) if task else ()), *arguments)
        task = script
    elif arguments:
        raise click.UsageError(f"one task at a time, not {' '.join((str(task), *arguments))}; ARGS belong to --script")
    if stay and serve is None:
        raise click.UsageError("--stay goes with --serve")
    for name in ("metric", "higher_is_better"):
        if script is None and not resume and _is_given(context, name):
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --script: a task names its own")
    asked = Settings((task,) if task else _TASKS, script=script is not None, arguments=arguments, **options)
    given = [name for name in (*options, "script", "task", "arguments") if _is_given(context, name)]
    if out is None:
        out = _latest() if resume and task is None else _RESULTS / "+".join(_stem(each) for each in asked.tasks)
    with _explained(debug, out):
        store = Store(out)
        settings, words = _stored(store, asked, given) if resume else (asked, shlex.join(["piste", *sys.argv[1:]]))
        console = Console()
        plain = view_for(console)
        limits = Limits(timeout, None if memory is None else int(memory))
        with nullcontext(plain) if serve is None else served(console, store, plain, serve, stay) as view:
            try:
                result = race(settings, store, view, words, limits=limits)
            except InterruptedRaceError as stop:
                if stop.result is not None:
                    _show(console, store, stop.result)
                raise
            _show(console, store, result)
        if not any(recommended(each.standings) for each in result.results):
            click.echo("piste: no run of any contender finished; the report says why", err=True)
            sys.exit(1)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _stored(store: Store, asked: Settings, given: list[str]) -> tuple[Settings, str]:
    """The last race in a directory and its command. Options may be repeated with ``--resume``, not changed.

    Where runs are made changes nothing of them.
    """
    stored = stored_settings(store)
    for name in given:
        if name in ("on", "workers"):
            stored = replace(stored, **{name: getattr(asked, name)})
            continue
        field = "tasks" if name == "task" else name
        before, now = getattr(stored, field), getattr(asked, field)
        if now != before:
            raise click.UsageError(
                f"--resume goes on with the race in {store.path} as it was asked for, and there {name} is "
                f"{_words(before)}, not {_words(now)}; without --resume a changed race reuses what stays the same"
            )
    return stored, str(store.read_study()["command"])


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "each one's companion"
    return "what it is by default" if value is None else str(value)


def _stem(task: str) -> str:
    """A task's name for a directory: ``my_task`` of ``dir/my_task.py:small`` is ``my_task-small``."""
    if task in BUILT_IN:
        return task
    file, _, name = Path(task).name.partition(":")
    return "-".join(part for part in (file.removesuffix(".py"), name) if part)


def _latest() -> Path:
    """The directory of the last race here."""
    studies = sorted(_RESULTS.glob("*/study.json"), key=lambda path: path.stat().st_mtime)
    if not studies:
        raise click.UsageError(f"there is no race to resume in {_RESULTS.resolve()}; name its directory with --out")
    return studies[-1].parent


def _write_starter(path: Path) -> None:
    """Write the starter task, unless something is in its place."""
    legal = path.stem.replace("-", "_").isidentifier() and not path.stem.startswith(("_", "-"))
    if path.suffix != ".py" or not legal:
        raise click.UsageError(f"--new {path}: the file must be called like my_task.py, with a letter first")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.replace("{file}", str(path)).replace("{name}", path.stem))
    except FileExistsError:
        raise click.UsageError(f"--new {path}: there is such a file, and it stays as it is") from None
    except OSError as error:
        raise click.UsageError(f"--new {path}: {error.strerror}") from None
    click.echo(f"wrote {path}; it runs as it is: piste race {shlex.quote(str(path))}")


def _formats(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = _names(context, parameter, value)
    for name in names:
        if name not in piste.STATE_FORMATS:
            raise click.BadParameter(f"{name!r} is not legal; legal: {', '.join(piste.STATE_FORMATS)}")
    return names


@command.command(name="memory", short_help="Show what optimizers cost on a model.")
@click.argument("task", required=False, metavar="[TASK.py[:name]]")
@click.option("--model", "factory", metavar="MODULE:FACTORY", help="A function that returns the model.")
@click.option(
    "--optimizers", default="sgd_momentum,adamw,lion,adan,ranger", show_default=True, callback=_names, help="Names."
)
@click.option(
    "--state",
    default=",".join(piste.STATE_FORMATS),
    show_default=True,
    callback=_formats,
    help="Formats of moments.",
)
@click.option("--weights", type=click.Choice(piste.WEIGHT_FORMATS), default="plain", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights. [default: the model's own]")
@click.option("--bandwidth", type=_Size("/s"), metavar="GB/s", help="Such as 4.8TB/s. [default: measured here]")
@click.option("--fit", type=_Size(), metavar="GiB", help="Mark what fits into so much, such as 24GiB.")
@_debug
def _memory(
    task: str | None,
    factory: str | None,
    optimizers: tuple[str, ...],
    state: tuple[str, ...],
    weights: str,
    dtype: str | None,
    bandwidth: float | None,
    fit: float | None,
    debug: bool,
) -> None:
    """Show state, peak and traffic of optimizers on the model of TASK (a built-in one, or a file), or of --model.

    Nothing of the model's size is allocated: a model that does not fit here can be asked about.
    """
    console = Console()
    with _explained(debug):
        name, model = footprint.load_model(task, factory)
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        names = [name for contender in make_contenders(optimizers, ()) for name in [contender.optimizer]]
        with console.status("measuring the memory's bandwidth"):
            speed = bandwidth or footprint.measured_bandwidth()
        found = footprint.rows(model, names, state, weights, console)
        footprint.show(console, name, found, speed, bandwidth is not None, fit)
        if all(row.cost is None for row in found):
            sys.exit(1)


@command.command(name="list", short_help="List the names that piste.create takes.")
@click.argument("pattern", default="*")
def _list(pattern: str) -> None:
    """List presets and wrappers that fit PATTERN, with their sources.

    PATTERN is a name with * and ? (case and hyphens make no difference), an arXiv number, or a name that other lists
    have, such as "efficient sam".
    """
    names, wrappers = find(pattern)
    if not (names or wrappers):
        click.echo(f"piste: no name fits {pattern!r}; piste list shows all", err=True)
        sys.exit(1)
    show_list(Console(), names, wrappers)


@command.command(name="show", short_help="Show one of those names: equations, settings, advice.")
@click.argument("name")
def _show_one(name: str) -> None:
    """Show what NAME means: its cost, settings, equations, when to use it.

    NAME is that of a preset or a wrapper (case and hyphens make no difference), an arXiv number, or a name that other
    lists have.
    """
    names, wrappers = find(name)
    found = [*names, *wrappers]
    if not found or any(mark in name for mark in "*?"):
        similar = difflib.get_close_matches(name.lower(), [*piste.list_optimizers(), *piste.list_wrappers()], n=3)
        hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        click.echo(f"piste: no preset or wrapper {name!r}{hint}; piste list shows all", err=True)
        sys.exit(1)
    console = Console()
    for number, each in enumerate(found):
        if number:
            console.rule()
        show(console, each)


@command.command(name="report", short_help="Write the report of a race again.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kinds",
    type=click.Choice(["html", *report.FORMATS]),
    multiple=True,
    default=["html"],
    show_default=True,
    help="What to write into DIRECTORY; may be repeated.",
)
@click.option(
    "--to", "sinks", multiple=True, metavar="SINK", help="Hand the runs on: tensorboard:DIR, mlflow:URI, wandb:PROJECT."
)
@_debug
def _report(directory: Path, kinds: tuple[str, ...], sinks: tuple[str, ...], debug: bool) -> None:
    """Show the standings of the race in DIRECTORY and write its report, from what is kept there."""
    with _explained(debug, directory):
        store = Store(directory)
        result = stored_result(store)
        for line in store.damaged:
            click.echo(f"piste: {line}", err=True)
        if "html" in kinds:
            _show(Console(), store, result)
        for kind in kinds:
            for path in report.export(result, kind, directory) if kind != "html" else ():
                click.echo(f"wrote {path}")
        for sink in sinks:
            click.echo(f"sent {report.send(result, sink)}")


def _show(console: Console, store: Store, result: StudyResult) -> None:
    """Write the report and show the result, the latter even where no room is left for the former."""
    try:
        with store.explained():
            path = report.write(result, store.report)
    except StoreError:
        show_result(console, result, None)
        raise
    show_result(console, result, path)


command.add_command(advise)
