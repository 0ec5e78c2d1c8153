"""``piste list`` and ``piste show``: what there is to say of presets and wrappers."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import piste
from piste import Preset
from piste.race.task import BUILT_IN, load_task

__all__ = ["find", "list_names", "show", "show_list", "show_name", "show_tasks"]

_WRAPPER_HEADINGS = ("name", "class", "more state", "passes")
_HEADINGS = ("name", "class", *piste.STATE_FORMATS, "passes", "schedule", "lr prior")
_LEAST_NEEDED = ("class", "passes", "bf16", "4bit")
#: reStructuredText that a terminal has no use for: roles and double backquotes round a name, the directive for formulas
_ROLES = re.compile(r":[a-z]+:`~?([^`]+)`")
_LITERALS = re.compile(r"``([^`]+)``")
#: what begins a line of its own in a docstring: a list, code, a directive; and an argument with its description
_STARTS = re.compile(r"\* |>>>|\.\.\.|\.\. ")
_ENTRY = re.compile(r"\*{0,2}[\w, ]+: ")
_HEADING = re.compile(r"\w+:")


@click.command(name="list", short_help="List the names that piste.create takes.")
@click.argument("pattern", default="*")
def list_names(pattern: str) -> None:
    """List presets and wrappers that fit PATTERN, with their sources.

    PATTERN is a name with * and ? (case and hyphens make no difference), an arXiv number, or a name that other lists
    have, such as "efficient sam".
    """
    names, wrappers = find(pattern)
    if not (names or wrappers):
        click.echo(f"piste: no name fits {pattern!r}; piste list shows all", err=True)
        sys.exit(1)
    show_list(Console(), names, wrappers)


@click.command(name="show", short_help="Show one of those names: equations, settings, advice.")
@click.argument("name")
def show_name(name: str) -> None:
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


def find(name: str) -> tuple[list[str], list[str]]:
    """Presets and wrappers that a name, a pattern, an arXiv number or some list's label means."""
    return piste.list_optimizers(name), [] if "+" in name else piste.list_wrappers(name)


def show_list(console: Console, names: list[str], wrappers: list[str]) -> None:
    """One line for each preset and each wrapper, with what it is and where it comes from below."""
    if names:
        _table(console, [_HEADINGS, *map(_row, names)], names)
        console.print(
            Text(
                "fp32 to 4bit: bytes of state per float32 weight under state=, measured on a matrix; -: no such state; "
                "passes: gradient evaluations a step",
                style="dim",
            )
        )
    if names and wrappers:
        console.print()
    if wrappers:
        _table(console, [_WRAPPER_HEADINGS, *map(_wrapper_row, wrappers)], wrappers)
        console.print(
            Text(
                'to stand before any of those names, as in piste.create("sam+adamw", model); more state: bytes per '
                "float32 weight beside that of the optimizer inside, measured",
                style="dim",
            )
        )


def _table(console: Console, rows: list[tuple[str, ...]], names: list[str]) -> None:
    """Rows under their heading, each with description and source of its name below."""
    below = []
    for name in names:
        wrapping = piste.WRAPPINGS.get(name)
        about = piste.presets[name] if wrapping is None else wrapping
        labels = f", “{wrapping.labels[0]}” in some lists" if wrapping is not None and wrapping.labels else ""
        below.append([Text(about.description), Text(f"Source: {about.source}{labels}", style="dim")])
    _rows(console, rows, below)


def _rows(console: Console, rows: list[tuple[str, ...]], below: list[list[Text]]) -> None:
    """A heading and rows in columns, each row with what belongs below it.

    A terminal that is too narrow goes without the columns that are needed least; a pipe gets all.
    """
    columns = list(zip(*rows, strict=True))
    for heading in _LEAST_NEEDED if console.is_terminal else ():
        if sum(max(map(len, column)) + 2 for column in columns) - 2 > console.width:
            columns = [column for column in columns if column[0] != heading]
    rows = list(zip(*columns, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    console.print(lines[0], style="dim", markup=False, highlight=False, soft_wrap=True)
    for line, texts in zip(lines[1:], below, strict=True):
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)
        for text in texts:
            console.print(Padding(text, (0, 0, 0, 4)))


def _wrapper_row(name: str) -> tuple[str, ...]:
    wrapping = piste.WRAPPINGS[name]
    more = _bytes(f"{name}+sgd", "fp32")
    return f"{name}+…", wrapping.wrapper.__name__, more, f"{wrapping.gradient_evaluations:g}"


def _row(name: str) -> tuple[str, ...]:
    preset = piste.presets[name]
    sizes = [_bytes(name, state) for state in piste.STATE_FORMATS]
    passes = f"{preset.gradient_evaluations:g}"
    return name, preset.optimizer.__name__, *sizes, passes, preset.schedule, _range(preset)


def _bytes(name: str, state: str) -> str:
    try:
        return f"{piste.state_bytes(name, state=state):.3g}"
    except (ValueError, RuntimeError):  # no such state; or a step needs more than a gradient
        return "-"


def _range(preset: Preset) -> str:
    prior = preset.lr_prior
    low, high = prior.center / 10**prior.decades_below, prior.center * 10**prior.decades_above
    return f"{low:.2g} … {high:.2g}"


def show_tasks(console: Console) -> None:
    """The built-in tasks with their length, the number that is their score, and what they are."""
    tasks = [load_task(name).task for name in BUILT_IN]
    rows = [
        (task.name, str(task.steps), f"{task.metric_name}, {'higher' if task.higher_is_better else 'lower'} is better")
        for task in tasks
    ]
    _rows(console, [("name", "steps", "score"), *rows], [[Text(task.description)] for task in tasks])


def show(console: Console, name: str) -> None:
    """Everything about a preset, or about a wrapper."""
    if name in piste.WRAPPINGS:
        _show_wrapper(console, name)
    else:
        _show_preset(console, name)


def _show_wrapper(console: Console, name: str) -> None:
    wrapping, more = piste.WRAPPINGS[name], _bytes(f"{name}+sgd", "fp32")
    console.print(Text.assemble((name, "bold"), f"  piste.{wrapping.wrapper.__name__}, round any optimizer"))
    console.print(Text(wrapping.description))
    console.print()
    facts = {
        "in a name": f'piste.create("{name}+adamw", model)',
        "more state": "" if more == "-" else f"{more} bytes per float32 weight, measured on a matrix",
        "gradient evaluations": f"{wrapping.gradient_evaluations:g} a step",
        "needs": wrapping.needs,
        "in other lists": ", ".join(f"“{label}”" for label in wrapping.labels),
        "source": wrapping.source,
        "not to be confused with": ", ".join(
            f"{other.name} ({other.source}), which some lists call “{name}”"
            for other in piste.WRAPPINGS.values()
            if name in other.labels
        ),
    }
    console.print(_grid({label: value for label, value in facts.items() if value}))
    console.print()
    defaults = {k: v for k, v in wrapping.arguments.items() if v is not inspect.Parameter.empty}
    console.print(_arguments(wrapping.arguments, defaults, wrapping.settings))
    console.print()
    _show_text(console, inspect.getdoc(wrapping.wrapper) or "")


def _show_preset(console: Console, name: str) -> None:
    """Everything about one preset: what it costs, its settings against its class's, equations and advice."""
    preset = piste.presets[name]
    console.print(Text.assemble((name, "bold"), f"  {preset.optimizer.__module__}.{preset.optimizer.__name__}"))
    console.print(Text(preset.description))
    console.print()
    console.print(_grid(_facts(name, preset)))
    console.print()
    own = _own_arguments(preset.optimizer)
    console.print(_arguments(own, own, preset.hyperparameters))
    console.print()
    _show_text(console, inspect.getdoc(preset.optimizer) or "")


def _grid(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        table.add_row(Text(label, style="dim"), Text(value))
    return table


def _facts(name: str, preset: Preset) -> dict[str, str]:
    norms = "every parameter" if preset.wd.bn_wd else "not of norms and biases"
    facts = {
        "state": ", ".join(f"{state} {_bytes(name, state)}" for state in piste.STATE_FORMATS)
        + " bytes per float32 weight, measured on a matrix",
        "gradient evaluations": f"{preset.gradient_evaluations:g} a step",
        "weight decay": f"{'decoupled' if preset.wd.true_wd else 'L2'}, {norms}",
        "schedule": preset.schedule,
        "learning rate": f"{preset.lr_prior.center:g} to start with; races look in {_range(preset)}",
        "source": preset.source,
    }
    for wrapping in preset.wrappings:
        facts[f"{wrapping}+"] = f"piste show {wrapping}"
    for domain, settings in preset.domains.items():
        facts[f'domain="{domain}"'] = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    return facts


def _arguments(names: Iterable[str], defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> Table:
    """Every argument of a class itself, with what the name it goes by here makes of it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("argument", "class", "preset"):
        table.add_column(heading, header_style="dim")
    for name in names:
        default = repr(defaults[name]) if name in defaults else "to be given"
        table.add_row(name, default, Text(repr(settings[name]), style="bold") if name in settings else "")
    return table


def _own_arguments(optimizer: type[Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _show_text(console: Console, docstring: str) -> None:
    """A docstring as wide as the terminal; formulas stay in LaTeX, which says exactly what is meant."""
    for indent, line in _flowing(docstring):
        plain = _LITERALS.sub(r"\1", _ROLES.sub(r"\1", line))
        hanging = 4 if _ENTRY.match(line) and indent else 2 if line.startswith("* ") else 0
        for number, part in enumerate(Text(plain).wrap(console, max(20, console.width - indent - hanging)) or [Text()]):
            part.rstrip()
            console.print(Text(" " * (indent + (hanging if number else 0))) + part)


def _flowing(docstring: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and entries of a docstring in one line each, with their indents; code and formulas as they stand."""
    held: tuple[int, str] | None = None
    fixed: int | None = None  # the indent of a directive, below which lines stay as they are
    for raw in [*docstring.splitlines(), ""]:
        line, indent = raw.strip(), len(raw) - len(raw.lstrip())
        if fixed is not None and line and indent <= fixed:
            fixed = None
        goes_on = held is not None and line and not _STARTS.match(line) and indent >= held[0] and fixed is None
        if goes_on and held is not None and (indent > held[0] or not (_ENTRY.match(line) and held[0])):
            held = held[0], f"{held[1]} {line}"
            continue
        if held is not None:
            yield held
            held = None
        if line.startswith(".. math::"):
            fixed = indent
        elif not line:
            yield 0, ""
        elif fixed is not None or line.startswith((">>>", "...")) or _HEADING.fullmatch(line):
            yield indent, line
        else:
            held = indent, line
