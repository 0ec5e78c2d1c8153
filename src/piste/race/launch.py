"""Run a script as ``python script.py`` would, seeded before its first line; see ``piste.race.script``.

python -m piste.race.launch REPORTS SEED SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path

import torch

from piste.race import environment
from piste.race.attempt import one_line
from piste.race.seeds import seed_everything


def main() -> None:
    """Run the script; what ends it, and the peak of memory, go to the file of reports."""
    reports, seed, script, *arguments = sys.argv[1:]
    _hold_on_to_lifeline()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_everything(int(seed))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        _write(reports, {"error": one_line(error)})
        raise
    finally:
        _write(reports, {"peak_bytes": environment.peak_bytes(device)})


def _hold_on_to_lifeline() -> None:
    """End with the process that started this one. The script gets an empty standard input in its place."""
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait() -> None:
        while os.read(lifeline, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write(reports: str, content: dict[str, object]) -> None:
    with Path(reports).open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
