"""``piste memory``: what optimizers cost on a model, as a table."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import nn

import piste
from piste.race.contenders import make_contenders
from piste.race.options import Size, debug_option, explained, listed
from piste.race.tables import fitting
from piste.race.task import TaskError, load_task
from piste.race.words import duration, listing, single_line, size

__all__ = ["Row", "load_model", "measured_bandwidth", "memory", "rows", "show"]

_PASS_ELEMENTS, _PASSES = 1 << 25, 7  # 128 MiB a stream: more than caches hold


@dataclass(frozen=True)
class Row:
    """One optimizer in one precision: its cost, or why there is none."""

    optimizer: str
    precision: str
    cost: piste.MemoryEstimate | None
    refused: str = ""


def _formats(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = listed(context, parameter, value)
    for name in names:
        if name not in piste.STATE_FORMATS:
            raise click.BadParameter(f"{name!r} is not legal; legal: {', '.join(piste.STATE_FORMATS)}")
    return names


@click.command(name="memory", short_help="Show what optimizers cost on a model.")
@click.argument("task", required=False, metavar="[TASK.py[:name]]")
@click.option("--model", "factory", metavar="MODULE:FACTORY", help="A function that returns the model.")
@click.option(
    "--optimizers", default="sgd_momentum,adamw,lion,adan,ranger", show_default=True, callback=listed, help="Names."
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
@click.option("--bandwidth", type=Size("/s"), metavar="GB/s", help="Such as 4.8TB/s. [default: measured here]")
@click.option("--fit", type=Size(), metavar="GiB", help="Mark what fits into so much, such as 24GiB.")
@debug_option
def memory(
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
    with explained(debug):
        name, model = load_model(task, factory)
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        names = [name for contender in make_contenders(optimizers, ()) for name in [contender.optimizer]]
        with console.status("measuring the memory's bandwidth"):
            speed = bandwidth or measured_bandwidth()
        found = rows(model, names, state, weights, console)
        show(console, name, found, speed, bandwidth is not None, fit)
        if all(row.cost is None for row in found):
            sys.exit(1)


def load_model(task: str | None, factory: str | None) -> tuple[str, nn.Module]:
    """The model of a task or of ``module:function``, on the meta device where it can be made there, with its name.

    Raises:
        TaskError: neither or both were given, there is none of that name, or it does not make a module.
    """
    if (task is None) == (factory is None):
        raise TaskError("name one model: a task (a built-in one, or TASK.py), or --model module:factory")
    if task is not None:
        loaded = load_task(task).task
        return loaded.name, _made(loaded.model, loaded.name)
    module, _, name = str(factory).partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TaskError(f"--model {factory!r}: {single_line(str(error))}; legal: module:factory") from error
    finally:
        sys.path.pop(0)
    return str(factory), _made(make, str(factory))


def _made(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model = make()
    except Exception:  # models that read their own weights while they are made
        try:
            model = make()
        except Exception as error:
            raise TaskError(f"{name} raises {type(error).__name__}: {single_line(str(error))}") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name} makes a {type(model).__name__}; legal: a function that returns an nn.Module")
    return model


def rows(
    model: nn.Module, optimizers: Sequence[str], states: Sequence[str], weights: str, console: Console
) -> list[Row]:
    """A row for each optimizer and precision."""
    pairs = [(name, state) for name in optimizers for state in states]
    shown = track(pairs, "counting bytes", console=console, transient=True) if len(pairs) > 20 else pairs
    found = []
    for name, state in shown:
        try:
            found.append(Row(name, state, piste.estimate_memory(model, name, state=state, weights=weights)))
        except ValueError as error:
            why = str(error).partition("; legal:")[2].partition(", for ")[2]
            found.append(Row(name, state, None, why or str(error)))
    return found


def measured_bandwidth() -> float:
    """Bytes per second that this machine's memory moves, all threads together: two streams read, one written."""
    a, b = torch.ones(_PASS_ELEMENTS), torch.ones(_PASS_ELEMENTS)
    taken = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        a.add_(b)
        taken.append(time.perf_counter() - start)
    return 12 * _PASS_ELEMENTS / statistics.median(taken[1:])


def show(console: Console, name: str, found: Sequence[Row], bandwidth: float, given: bool, fit: float | None) -> None:
    """The table, with what all rows share above it."""
    known = next((row.cost for row in found if row.cost is not None), None)
    if known is not None:
        console.print(
            Text.assemble(
                (name, "bold"),
                f": {known.parameters:,} numbers are trained; weights {size(known.weights)}, "
                f"gradients {size(known.gradients)}",
            )
        )
    columns = [column for column in _COLUMNS if column != "fits" or fit is not None]
    if not any(row.cost is not None and (row.cost.matrices or row.cost.workspace) for row in found):
        columns = [column for column in columns if column not in ("matrices", "buffers")]
    cells = [_cells(row, bandwidth, fit) for row in found]
    table, left_out = fitting(console, columns, _LEAST_NEEDED, partial(_table, found, cells))
    console.print(table)
    refused: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row.refused:
            refused.setdefault((row.optimizer, row.refused), []).append(row.precision)
    for (optimizer, why), precisions in refused.items():
        console.print(Text(f"{optimizer} has no {', '.join(precisions)}: {why}", style="dim"))
    speed = f"{bandwidth / 1e9:,.4g} GB/s, {'as given' if given else 'measured here'}"
    limit = "" if fit is None else f"peak within {size(fit)}"
    known_as = {**_COLUMNS, "time": f"what a step moves, at {speed}", "fits": limit}
    shown = [column for column in columns if column not in left_out and known_as[column]]
    legend = "; ".join(f"{column}: {known_as[column]}" for column in shown)
    more = f"; a wider terminal shows {listing(left_out, 9)} too" if left_out else ""
    console.print(Text(f"{legend}{more}", style="dim"))


def _table(found: Sequence[Row], cells: Sequence[Mapping[str, str | Text]], columns: Sequence[str]) -> Table:
    """Every number whole, an optimizer named once."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("optimizer", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in columns:
        least = max(len(str(row[column])) for row in cells)
        table.add_column(column, justify="left" if column == "fits" else "right", no_wrap=True, min_width=least)
    before = ""
    for row, numbers in zip(found, cells, strict=True):
        table.add_row(
            row.optimizer if row.optimizer != before else "", row.precision, *(numbers[column] for column in columns)
        )
        before = row.optimizer
    return table


#: what columns say; in the order in which they stand
_COLUMNS: Mapping[str, str] = {
    "bytes": "optimizer state",
    "per number": "",
    "matrices": "what of it is factors, roots and bases",
    "buffers": "held for the length of a step, refresh included",
    "peak": "weights, gradients, state and buffers of a step, without activations",
    "moved": "read and written by a step",
    "time": "",
    "fits": "",
}
_LEAST_NEEDED = ("moved", "buffers", "per number", "matrices")


def _cells(row: Row, bandwidth: float, fit: float | None) -> dict[str, str | Text]:
    if row.cost is None:
        return {**dict.fromkeys(_COLUMNS, ""), "bytes": "-"}
    cost = row.cost
    cells: dict[str, str | Text] = {
        "bytes": size(cost.state),
        "per number": f"{cost.state / max(1, cost.parameters):.3g}",
        "matrices": size(cost.matrices),
        "buffers": size(cost.extra),
        "peak": size(cost.peak),
        "moved": size(cost.moved),
        "time": duration(cost.moved / bandwidth),
        "fits": "",
    }
    if fit is not None:
        fits = cost.peak <= fit
        cells["fits"] = Text("yes", style="green") if fits else Text(f"{size(cost.peak - fit)} over", style="red")
    return cells
