"""What the commands share: how the values of their options are read, and how errors are told."""

from __future__ import annotations

import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from piste.race import report
from piste.race.budget import BudgetError, parse_budget
from piste.race.contenders import ContenderError
from piste.race.driver import InterruptedRaceError
from piste.race.executors import PLACES, ExecutorError, is_place
from piste.race.planning import DeviceError, SettingsError
from piste.race.sampling import SamplerError
from piste.race.serve import ServeError
from piste.race.space import parse_sweep
from piste.race.store import Store, StoreError
from piste.race.task import TaskError

__all__ = ["Port", "Size", "bytes_of", "debug_option", "explained", "finite", "listed", "place", "sweeps", "time_span"]

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
#: a setting is wrong
_WRONG = (BudgetError, ContenderError, DeviceError, SamplerError, ServeError, SettingsError, TaskError)


def bytes_of(text: str, per_second: str = "") -> float:
    """``24GiB`` or, with ``per_second="/s"``, ``4.8TB/s``, in bytes.

    Raises:
        ValueError: the text is something else.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b{per_second}\s*", text, flags=re.IGNORECASE)
    if found is None or not float(found[1]) or (found[3] and not found[2]):
        example = "24GiB or 80GB" if not per_second else "900GB/s or 4.8TB/s"
        raise ValueError(f"{text!r} is not legal; legal: a number above 0 with its unit, such as {example}")
    base = 1024.0 if found[3] else 1000.0
    return float(found[1]) * float(base ** _UNITS[found[2].lower()])


def listed(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Names with commas between them, at least one where any were asked for."""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names and value != parameter.default:
        raise click.BadParameter(f"{value!r} holds no name; legal: {parameter.name} with commas between them")
    return names


def sweeps(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Checked here, so that a mistake is one of the command line; kept as text, to be compared and stored."""
    for text in value:
        try:
            parse_sweep(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A number that is one."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not legal; legal: a finite number")
    return value


def time_span(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """``1h30m`` in seconds."""
    try:
        return None if value is None else parse_budget(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def place(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Where runs are made, if there is such a place."""
    if not is_place(value):
        raise click.BadParameter(f"{value!r} is not legal; legal: {PLACES}")
    return value


class Size(click.ParamType[float]):
    """A number of bytes with its unit; a ``/s`` behind it where a second belongs to it."""

    def __init__(self, per_second: str = "") -> None:
        self.per_second, self.name = per_second, "bytes per second" if per_second else "bytes"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            return bytes_of(str(value), self.per_second)
        except ValueError as error:
            self.fail(str(error), parameter, context)


class Port(click.ParamType[int]):
    """A port, which may be left out."""

    name = "port"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and int(text) < 2**16):
            self.fail(
                f"{text!r} is no port; legal: 0 to 65535, or none, and then --serve stands behind the task", parameter
            )
        return int(text)


def debug_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--debug``, as all commands have it that explain their errors."""
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(function)


@contextmanager
def explained(debug: bool, out: Path | None = None) -> Iterator[None]:
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
