"""``python -m benchmarks.race``: the cpp engine against every peer and against the memory.

Prints a table per list of weights and writes ``benchmarks/out/race.json`` and a picture. All contenders work on the
same weights and gradients and take their steps in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.algorithms import ALGORITHMS, LARGE, LISTS, Algorithm
from benchmarks.cases import Shapes, parameters
from benchmarks.measure import WARM_UP, contenders, interleaved, peak_extra_bytes, ratio

OUT = Path(__file__).parent / "out"
OURS = "piste cpp"
PACE_ELEMENTS = 1 << 25
FLOOR_AT_MOST = 1.25


def _pace() -> Callable[[], object]:
    """A loop that reads two streams and writes one: twelve bytes an element."""
    a, b = torch.ones(PACE_ELEMENTS), torch.ones(PACE_ELEMENTS)
    return lambda: a.add_(b)


def compare(algorithm: Algorithm, shapes: Shapes, rounds: int, compiled: bool, console: Console) -> dict[str, Any]:
    """Median times of all, the speed against each peer, and the time against the memory's."""
    weights = parameters(shapes)
    makers = {OURS: algorithm.ours} | algorithm.peers
    if not compiled:
        makers.pop("torch compile", None)
    steps = contenders(makers, lambda: weights, WARM_UP, console)
    seconds = interleaved({**steps, "pace": _pace()}, rounds)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    share = algorithm.bytes_per_weight * count / (12 * PACE_ELEMENTS)
    floor = ratio(seconds[OURS], [share * taken for taken in seconds["pace"]])
    speed = {name: ratio(taken, seconds[OURS]) for name, taken in seconds.items() if name not in (OURS, "pace")}
    return {
        "algorithm": algorithm.name,
        "bytes_per_weight": algorithm.bytes_per_weight,
        "floor": floor._asdict(),
        "speed": {name: found._asdict() for name, found in speed.items()},
        "milliseconds": {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()},
        "at_least": algorithm.at_least,
    }


def _show(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["speed"]))
    table = Table(title=f"{name}: times as fast as each peer", title_justify="left", box=None)
    for column in ("algorithm", "time / memory's", *peers):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for row in rows:
        speeds = [f"{row['speed'][peer]['median']:.2f}" if peer in row["speed"] else "" for peer in peers]
        table.add_row(row["algorithm"], f"{row['floor']['median']:.2f}" if name in LARGE else "", *speeds)
    console.print(table)


def flat(steps: int) -> dict[str, float]:
    """Do time and memory stay as they are over many steps on 300 tiny tensors, with gradients that are made anew?"""
    weights = parameters([(16,)] * 300)
    optimizer = ALGORITHMS[0].ours(weights)
    gradients = [torch.full((16,), 0.01) for _ in weights]
    taken, part = [], steps // 10
    peak_after_first = 0
    for step in range(steps):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        start = time.perf_counter()
        optimizer.step()
        taken.append(time.perf_counter() - start)
        if step == part:
            peak_after_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_after_first
    first, last = statistics.median(taken[:part]), statistics.median(taken[-part:])
    return {"microseconds": 1e6 * last, "last over first tenth": last / first, "grown KiB": grown}


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default: 9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    parser.add_argument("--list", choices=LISTS, action="append", help="some lists of weights only (default: all)")
    parser.add_argument("--algorithm", choices=[a.name for a in ALGORITHMS], action="append", help="some only")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a peer too (minutes of compilation)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the flatness check (default: 10,000)")
    parser.add_argument("--out", type=Path, default=OUT / "race.json", help="where to write the figures")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    console = Console(width=180)
    console.print(f"torch {torch.__version__}, {asked.threads} threads, medians over {asked.rounds} interleaved steps")
    chosen = [a for a in ALGORITHMS if a.name in (asked.algorithm or [a.name])]
    results: dict[str, Any] = {"torch": torch.__version__, "threads": asked.threads, "lists": {}}
    for name in asked.list or LISTS:
        rows = results["lists"][name] = []
        for algorithm in chosen:
            with console.status(f"{algorithm.name} on {name}"):
                row = compare(algorithm, LISTS[name], asked.rounds, asked.compiled, console)
                row["extra_bytes"] = peak_extra_bytes(algorithm.ours, LISTS[name])
            rows.append(row)
        _show(console, name, rows)
        worst = max(row["extra_bytes"] for row in rows)
        largest = 4 * max(torch.Size(shape).numel() for shape in LISTS[name])
        console.print(
            f"most extra memory of a step: {worst / 1024:.0f} KiB (allowed: {1024 + 0.02 * largest / 1024:.0f})"
        )
    with console.status(f"{asked.steps} steps on 300 tensors of 16"):
        results["flat"] = flat(asked.steps)
    found = results["flat"]
    console.print(
        f"300 tensors of 16: {found['microseconds']:.0f} us a step; last tenth of {asked.steps} steps over the first: "
        f"{found['last over first tenth']:.2f}; memory grown by {found['grown KiB']:.0f} KiB"
    )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {asked.out}")


if __name__ == "__main__":
    main()
