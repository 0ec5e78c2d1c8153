"""The command ``piste`` in processes of their own that need not import torch again.

Each is a fork of one that has imported what a race needs and done nothing else, and so are the workers of its races.
Arguments, folder, environment, output, signals and exit code are those of a command from a shell. Where a test is about
what a command starts with, or about the process that forks, it uses ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from command_process import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["piste.race.command", "piste.race.report", "piste.race.worker", "torch._dynamo"])
forkserver.ensure_running()  # before a test begins workers of its own: what forks those would have imported less


class Command:
    """A running ``piste``, as ``subprocess.Popen`` would show it.

    Args:
        arguments: after the command's name.
        folder: where it runs.
        output: file for all that it prints; None throws it away.
        before: statements for its process, before all else.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path | None = None,
        before: str = "",
    ) -> None:
        target = Path(os.devnull) if output is None else output
        given = (list(arguments), folder, target, dict(os.environ), before)
        self.process = _CONTEXT.Process(target=main, args=given)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that killed it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("piste", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def run(arguments: Sequence[str], folder: Path, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Wait for a command; all that it has printed is its ``stdout``."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        running = Command(arguments, folder, output)
        try:
            status = running.wait(timeout)
        finally:
            running.kill()
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(), "")
