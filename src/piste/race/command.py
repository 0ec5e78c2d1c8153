"""The command, with ``piste race`` and ``piste report``; other commands come from files of their own."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import piste
from piste.race import report
from piste.race.advice import advise
from piste.race.catalogue import list_names, show_name, show_tasks
from piste.race.executors import LOCAL, PLACES
from piste.race.footprint import memory
from piste.race.limits import Limits
from piste.race.options import Port, Size, debug_option, explained, finite, listed, place, sweeps, time_span
from piste.race.result import StudyResult
from piste.race.sampling import SAMPLERS
from piste.race.serve import served
from piste.race.settings import Settings
from piste.race.starter import write_starter
from piste.race.store import Store, StoreError
from piste.race.study import InterruptedRaceError, race, stored_result, stored_settings
from piste.race.task import BUILT_IN
from piste.race.terminal import show_result, view_for
from piste.race.verdict import recommended

__all__ = ["command"]

_TASKS = ("char_transformer", "digits")
_OPTIMIZERS = "sgd_momentum,adamw,ranger,rangeradabelief"
_RESULTS = Path("piste-race")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(piste.__version__, prog_name="piste")
def command() -> None:
    """Optimizers for PyTorch, raced honestly on your own problem."""


@command.command(name="race", short_help="Race optimizers on a task.")
@click.argument("task", required=False, metavar="[TASK.py[:name]]")
@click.argument("arguments", nargs=-1, metavar="[-- ARGS]")
@click.option(
    "--optimizers", default=_OPTIMIZERS, show_default=True, callback=listed, help="Names, with commas; or cheatsheet."
)
@click.option(
    "--schedules", default="", callback=listed, help="Crossed with the optimizers. [default: each one's companion]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of a run. [default: the task's]")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Confirmation runs each.")
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True, help="Settings tried, each.")
@click.option(
    "--sweep", "sweeps", multiple=True, callback=sweeps, metavar="NAME[=V,V…]", help="eps, rho, or any with values."
)
@click.option("--sampler", type=click.Choice(SAMPLERS), default=SAMPLERS[0], show_default=True, help="Of trials.")
@click.option("--screens", type=click.IntRange(0, 4), default=0, show_default=True, help="Halvings on short schedules.")
@click.option("--timing", type=click.IntRange(min=0), default=3, show_default=True, help="Rounds of timing passes.")
@click.option("--pack", is_flag=True, help="Train trials of small models together: faster, equal to rounding.")
@click.option("--target", type=float, callback=finite, help="Score to be timed. [default: what tuned baselines reach]")
@click.option("--agnostic", is_flag=True, help="No settings by field: the same for every task.")
@click.option("--budget", callback=time_span, metavar="TIME", help="Plan the race to fit, such as 10m or 1h30m.")
@click.option("--script", type=click.Path(), help="Race a script of yours; its arguments stand after --.")
@click.option("--metric", default="loss", show_default=True, help="What of a script's reports is the score.")
@click.option("--higher-is-better", is_flag=True, help="The direction of that.")
@click.option(
    "--on", default=LOCAL, show_default=True, callback=place, metavar="PLACE", help=f"Where runs are made: {PLACES}."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Runs side by side. [default: as many as there is room for]"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, …")
@click.option(
    "--timeout", callback=time_span, metavar="TIME", help="Longest run. [default: 20 times the expected, at least 10m]"
)
@click.option("--memory", type=Size(), metavar="GiB", help="Most memory of a run. [default: its share, if it is short]")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of results. [default: piste-race/<tasks>]")
@click.option("--resume", is_flag=True, help="Go on with the last race in --out, as it was asked for.")
@click.option(
    "--serve", is_flag=False, flag_value="0", type=Port(), metavar="[PORT]", help="Show the report in a browser, live."
)
@click.option("--stay", is_flag=True, help="Serve on after the end, until Ctrl-C.")
@click.option("--new", type=click.Path(path_type=Path), metavar="FILE.py", help="Write a task to start from, and end.")
@click.option("--list-tasks", is_flag=True, help="Show the built-in tasks, and end.")
@debug_option
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
        write_starter(new)
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
    with explained(debug, out):
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
@debug_option
def _report(directory: Path, kinds: tuple[str, ...], sinks: tuple[str, ...], debug: bool) -> None:
    """Show the standings of the race in DIRECTORY and write its report, from what is kept there."""
    with explained(debug, directory):
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


for each in (advise, list_names, memory, show_name):
    command.add_command(each)
