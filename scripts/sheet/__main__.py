"""The three steps to docs/sheet.md: ``python -m scripts.sheet race FOLDER``, ``keep FOLDER``, ``page``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from scripts.sheet.page import PAGE, page
from scripts.sheet.races import RACES, keep, kept


@click.group()
def sheet() -> None:
    """The cheat-sheet, raced (hours on two cores; a race that was stopped goes on where it was)."""


@sheet.command()
@click.argument("folder", type=click.Path(path_type=Path))
def race(folder: Path) -> None:
    """Run all races into FOLDER."""
    for number, one in enumerate(RACES, 1):
        click.echo(f"race {number} of {len(RACES)}: {one.folder}")
        subprocess.run([Path(sys.executable).with_name("piste"), "race", *one.arguments(folder)], check=True)


@sheet.command("keep")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def keep_(folder: Path) -> None:
    """Write down beside the page what the races in FOLDER came to."""
    keep(folder)


@sheet.command("page")
def page_() -> None:
    """Write docs/sheet.md from what was written down."""
    PAGE.write_text(page(*kept()))


sheet()
