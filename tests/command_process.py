"""What a process of ``commands`` does. Not there, because such a process must not begin others while it is begun."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path


def main(
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    variables: dict[str, str],
    before: str,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["piste", *arguments]
    # The server that has forked this process forks its workers, too; it is ready, as this process shows.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    from piste.cli import main as piste

    try:
        exec(before, {})
        piste()
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
