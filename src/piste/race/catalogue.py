"""What ``piste list`` and ``piste show`` say of presets."""

from __future__ import annotations

import inspect
import re
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import piste
from piste import Preset

__all__ = ["show_list", "show_preset"]

_HEADINGS = ("name", "class", *piste.STATE_FORMATS, "passes", "schedule", "lr prior")
#: reStructuredText that a terminal has no use for: roles and double backquotes round a name, the directive for formulas
_ROLES = re.compile(r":[a-z]+:`~?([^`]+)`")
_LITERALS = re.compile(r"``([^`]+)``")
_FORMULA = re.compile(r"^\.\. math::\n", re.MULTILINE)


def show_list(console: Console, names: list[str]) -> None:
    """One line for each preset, with what it is and where it comes from below."""
    rows = [_HEADINGS, *map(_row, names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        heading = row is _HEADINGS
        console.print(line, style="dim" if heading else "bold", markup=False, highlight=False, soft_wrap=True)
        if not heading:
            preset = piste.presets[row[0]]
            console.print(Padding(Text(preset.description), (0, 0, 0, 4)))
            console.print(Padding(Text(f"Source: {preset.source}", style="dim"), (0, 0, 0, 4)))
    console.print(
        Text(
            "fp32 to 4bit: bytes of state per float32 weight under state=, measured on a matrix; -: no such state; "
            "passes: gradient evaluations a step",
            style="dim",
        )
    )


def _row(name: str) -> tuple[str, ...]:
    preset = piste.presets[name]
    sizes = [_bytes(name, state) for state in piste.STATE_FORMATS]
    passes = str(preset.gradient_evaluations)
    return name, preset.optimizer.__name__, *sizes, passes, preset.schedule, _range(preset)


def _bytes(name: str, state: str) -> str:
    try:
        return f"{piste.state_bytes(name, state=state):.3g}"
    except ValueError:
        return "-"


def _range(preset: Preset) -> str:
    prior = preset.lr_prior
    low, high = prior.center / 10**prior.decades_below, prior.center * 10**prior.decades_above
    return f"{low:.2g} … {high:.2g}"


def show_preset(console: Console, name: str) -> None:
    """Everything about one preset: what it costs, its settings against its class's, equations and advice."""
    preset = piste.presets[name]
    console.print(Text.assemble((name, "bold"), f"  {preset.optimizer.__module__}.{preset.optimizer.__name__}"))
    console.print(Text(preset.description))
    console.print()
    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(name, preset).items():
        facts.add_row(Text(label, style="dim"), Text(value))
    console.print(facts)
    console.print()
    console.print(_settings(preset))
    console.print()
    console.print(Text(_plain(inspect.getdoc(preset.optimizer) or "")))


def _facts(name: str, preset: Preset) -> dict[str, str]:
    norms = "every parameter" if preset.wd.bn_wd else "not of norms and biases"
    facts = {
        "state": ", ".join(f"{state} {_bytes(name, state)}" for state in piste.STATE_FORMATS)
        + " bytes per float32 weight, measured on a matrix",
        "gradient evaluations": f"{preset.gradient_evaluations} a step",
        "weight decay": f"{'decoupled' if preset.wd.true_wd else 'L2'}, {norms}",
        "schedule": preset.schedule,
        "learning rate": f"{preset.lr_prior.center:g} to start with; races look in {_range(preset)}",
        "source": preset.source,
    }
    for domain, settings in preset.domains.items():
        facts[f'domain="{domain}"'] = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    return facts


def _settings(preset: Preset) -> Table:
    """Every argument of the class itself, with what the preset makes of it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("argument", "class", "preset"):
        table.add_column(heading, header_style="dim")
    for argument, default in _own_arguments(preset.optimizer).items():
        ours = preset.hyperparameters.get(argument, default)
        changed = argument in preset.hyperparameters
        table.add_row(argument, repr(default), Text(repr(ours), style="bold") if changed else "")
    return table


def _own_arguments(optimizer: type[Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _plain(text: str) -> str:
    """A docstring for the terminal; formulas stay in LaTeX, which says exactly what is meant."""
    return _LITERALS.sub(r"\1", _ROLES.sub(r"\1", _FORMULA.sub("", text)))
