"""The command ``piste``. It comes with the extra ``race``; without it, it says how to get it."""

from __future__ import annotations

import sys
from io import TextIOWrapper

__all__ = ["main"]

_EXTRA = ("click", "jinja2", "numpy", "plotly", "rich", "scipy", "sklearn")


def main() -> None:
    """Run the command; the entry point of the installed script.

    Raises:
        SystemExit: always, with the exit status.
    """
    try:
        from piste.race.command import command
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        sys.exit(f"piste: the command needs {error.name}, which comes with: pip install 'piste[race]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # Not every terminal or pipe can take an arrow or a task's name; "?" is better than a race that ends there.
            stream.reconfigure(errors="replace")
    command()
