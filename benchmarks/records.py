"""``python -m benchmarks.records``: how long a race with many recorded runs takes to open.

One short run of a built-in task is made, and written under as many seeds as there are to be records; what is timed is
:meth:`piste.race.store.Store.load`, which reads each file, verifies its checksum and its name, and makes the record.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.measure import clock, seconds
from benchmarks.overhead import trial_key
from piste.race.contenders import make_contenders
from piste.race.store import Store
from piste.race.task import load_task
from piste.race.training import run

AT_MOST = 2.0


def opening_seconds(folder: Path, records: int, rounds: int) -> list[float]:
    """Seconds of each opening."""
    task = load_task("quadratic_axis").task
    (contender,) = make_contenders(["adamw"], [])
    made = run(task, task.data(), contender, trial_key(task, contender, 0.01, 50), lambda step: None)
    store = Store(folder)
    store.runs.mkdir(parents=True)
    for seed in range(records):
        key = replace(made.key, seed=seed)
        (store.runs / f"{key.id}.json").write_text(replace(made, key=key, id=key.id).to_json(), encoding="utf-8")
    taken = []
    for _ in range(rounds):
        begun = seconds()
        found = Store(folder).load()
        taken.append(seconds() - begun)
        if len(found) != records:
            raise RuntimeError(f"{records} records were written and {len(found)} found")
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="recorded runs (default: 10,000)")
    parser.add_argument("--rounds", type=int, default=5, help="openings (default: 5)")
    parser.add_argument("--processor-time", action="store_true", help="for machines that others use at the same time")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, clock(of_processor=asked.processor_time):
        taken = opening_seconds(Path(folder), asked.records, asked.rounds)
    Console(width=120).print(
        f"{asked.records:,} records open in {statistics.median(taken):.2f} s "
        f"({min(taken):.2f} to {max(taken):.2f}; for 10,000 at most {AT_MOST:g} s are wanted)",
        highlight=False,
    )


if __name__ == "__main__":
    main()
