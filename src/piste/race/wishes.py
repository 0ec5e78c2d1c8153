"""What people may ask of a race that is going on, from the terminal or from the page that it serves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

STOPPED: Final = "stopped by hand"


@dataclass(frozen=True)
class Stop:
    """End a run that is going on; it counts as one that did not finish.

    Args:
        run: the id of its key.
    """

    run: str


@dataclass(frozen=True)
class Add:
    """Have one more optimizer race, with as many trials and seeds as the others.

    Args:
        optimizer: a name as ``--optimizers`` takes it.
    """

    optimizer: str


Wish = Stop | Add


def with_optimizers(command: str, optimizers: Sequence[str]) -> str:
    """A command line that asks for these optimizers in the place of its own."""
    words = shlex.split(command)
    end = words.index("--") if "--" in words else len(words)
    options, rest = words[:end], words[end:]
    if "--optimizers" in options:
        place = options.index("--optimizers")
        del options[place : place + 2]
    options = [word for word in options if not word.startswith("--optimizers=")]
    return shlex.join([*options, "--optimizers", ",".join(optimizers), *rest])
