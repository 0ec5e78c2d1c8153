"""``python -m benchmarks``: measures, prints a table, writes ``benchmarks/out/results.json``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.cases import CASES, MEMORY, SHAPES

OUT = Path(__file__).parent / "out" / "results.json"
FEWEST_SPEED, MOST_OVERHEAD, MOST_IMPORT, MOST_WAKING = 0.9, 1.3, 0.05, 1.5
MOST_SCHEDULED = 1.1  # no slowdown, but for the noise of the machine
TINY = "300 tensors of 16"
PARTS = ("speed", "memory", "overheads")


def _table(title: str, *columns: str) -> Table:
    """A table whose first two columns are words."""
    table = Table(title=title, title_justify="left", box=None)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < 2 else "right")
    return table


def speed(console: Console, rounds: int, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Step times, as ratios to torch's foreach."""
    peers = ("piste foreach", "quartiles", "piste cpp", "torch fused", "torch loop", "piste reference")
    table = _table("speed, torch foreach = 1 (higher is faster)", "optimizer", "weights", *peers, "target")
    results = []
    for case in CASES:
        for name, shape in shapes.items():
            with console.status(f"{case.name} on {name}"):
                seconds = measure.step_seconds(case.optimizers(), shape, rounds)
            ratios = {peer: measure.ratio(seconds["torch foreach"], taken) for peer, taken in seconds.items()}
            ours = ratios["piste foreach"]
            least = 1 / MOST_OVERHEAD if name == TINY else FEWEST_SPEED
            kept = "" if not case.target else "kept" if ours.median >= least else "MISSED"
            shown = {peer: f"{found.median:.2f}" for peer, found in ratios.items()}
            shown["quartiles"] = f"{ours.low:.2f}-{ours.high:.2f}"
            table.add_row(
                case.name, name, *[shown.get(peer, "") for peer in peers], f">= {least:.2f} {kept}" if kept else ""
            )
            speeds = {peer: found._asdict() for peer, found in ratios.items()}
            results.append({"case": case.name, "weights": name, "seconds": seconds, "speed": speeds, "target": kept})
    console.print(table)
    return results


def memory(console: Console, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Extra memory of a step, as a share of the weights'."""
    peers = ("torch foreach", "piste foreach")
    table = _table("peak extra memory of a step, weights = 1", "optimizer", "weights", *peers, "target")
    results = []
    for name, optimizers in MEMORY.items():
        for label, shape in shapes.items():
            weights = 4 * sum(torch.Size(s).numel() for s in shape)
            with console.status(f"memory of {name} on {label}"):
                peak = {peer: measure.peak_extra_bytes(optimizers[peer], shape) for peer in peers}
            kept = "kept" if peak["piste foreach"] <= peak["torch foreach"] else "MISSED"
            table.add_row(name, label, *[f"{peak[peer] / weights:.3f}" for peer in peers], kept)
            results.append({"case": name, "weights": label, "bytes": peak, "target": kept})
    console.print(table)
    return results


def overheads(console: Console, rounds: int, layers: int) -> dict[str, Any]:
    """What a step costs besides arithmetic."""
    ours = {case.name: case.optimizers()["piste foreach"] for case in CASES}
    table = _table("overheads", "what", "found", "target")
    with console.status("import time"):
        imported = measure.import_seconds(min(rounds, 11))
    seconds, of_torch = imported["import piste, after torch"], imported["import torch"]
    shown = f"{seconds * 1e3:.0f} ms, {seconds / of_torch:.1%} of torch's own"
    table.add_row("import piste, after torch", shown, _mark(seconds < MOST_IMPORT, f"< {MOST_IMPORT * 1e3:.0f} ms"))
    found: dict[str, Any] = {"import_seconds": imported}
    for name in ("AdamW", "SGD"):
        with console.status(f"{layers} layers waking under {name}"):
            result = measure.waking_ratio(ours[name], layers, rounds)
        label = f"{name}: {layers} layers with step numbers of their own, against dense steps"
        shown = f"{result.waking.median:.2f} waking, {result.awake.median:.2f} awake, {result.plans} plans"
        good = max(result.waking.median, result.awake.median) <= MOST_WAKING and result.plans == 0
        table.add_row(label, shown, _mark(good, f"<= {MOST_WAKING}, 0 plans"))
        found[f"waking_{name}"] = {
            "waking": result.waking._asdict(),
            "awake": result.awake._asdict(),
            "plans": result.plans,
        }
    with console.status("a schedule"):
        scheduled, plans = measure.scheduled_ratio(ours["AdamW"], rounds)
    table.add_row(
        "AdamW: lr and betas changed before every step, against constant ones",
        f"{scheduled.median:.2f}, {plans} plans",
        _mark(scheduled.median <= MOST_SCHEDULED and plans == 0, f"<= {MOST_SCHEDULED}, 0 plans"),
    )
    console.print(table)
    return found | {"scheduled": scheduled._asdict() | {"plans": plans}}


def _mark(good: bool, target: str) -> str:
    return f"{target} {'kept' if good else 'MISSED'}"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="timed steps of each peer (default: 31)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    parser.add_argument("--weights", choices=[*SHAPES, "all"], default="all", help="one list of weights only")
    parser.add_argument("--only", choices=PARTS, action="append", help="some parts only (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where to write the figures (default: {OUT})")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    console = Console()
    shapes = SHAPES if asked.weights == "all" else {asked.weights: SHAPES[asked.weights]}
    console.print(f"torch {torch.__version__}, {asked.threads} threads, medians over {asked.rounds} interleaved steps")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": asked.threads,
    }
    parts = asked.only or PARTS
    if "speed" in parts:
        results["speed"] = speed(console, asked.rounds, shapes)
    if "memory" in parts:
        results["memory"] = memory(console, shapes)
    if "overheads" in parts:
        results["overheads"] = overheads(console, asked.rounds, layers=min(300, 10 * asked.rounds))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {asked.out}")


if __name__ == "__main__":
    main()
