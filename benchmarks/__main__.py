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

import piste
from benchmarks import measure
from benchmarks.cases import CASES, SHAPES, Case

OUT = Path(__file__).parent / "out" / "results.json"
FEWEST_SPEED, MOST_OVERHEAD, MOST_IMPORT, MOST_WAKING = 0.9, 1.3, 0.05, 1.5
TINY = "300 tensors of 16"


def speed(console: Console, rounds: int, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Step times, as ratios to torch's foreach."""
    table = Table(title="speed, torch foreach = 1 (higher is faster)", title_justify="left", box=None)
    peers = ("piste foreach", "torch loop", "torch fused")
    for column in ("optimizer", "weights", *peers, "target"):
        table.add_column(column, justify="left" if column in ("optimizer", "weights") else "right")
    results = []
    for case in CASES:
        for name, shape in shapes.items():
            with console.status(f"{case.name} on {name}"):
                seconds = measure.step_seconds(case.optimizers(), shape, rounds)
            ratios = {peer: seconds["torch foreach"] / s for peer, s in seconds.items()}
            least = 1 / MOST_OVERHEAD if name == TINY else FEWEST_SPEED
            kept = "" if not case.target else "kept" if ratios["piste foreach"] >= least else "MISSED"
            shown = [f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers]
            table.add_row(case.name, name, *shown, f">= {least:.2f} {kept}" if kept else "")
            results.append({"case": case.name, "weights": name, "seconds": seconds, "speed": ratios, "target": kept})
    console.print(table)
    return results


def memory(console: Console, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Extra memory of a step, as a share of the weights'."""
    table = Table(title="peak extra memory of a step, weights = 1", title_justify="left", box=None)
    for column in ("optimizer", "weights", "torch foreach", "piste foreach", "target"):
        table.add_column(column, justify="left" if column in ("optimizer", "weights") else "right")
    results = []
    cases: list[tuple[str, Any]] = [(case.name, case.optimizers()) for case in CASES if case.target]
    cases.append(("Ranger", {"piste foreach": lambda p: piste.Ranger(p, lr=1e-4, engine="foreach")}))
    for name, optimizers in cases:
        for label, shape in shapes.items():
            weights = 4 * sum(torch.Size(s).numel() for s in shape)
            with console.status(f"memory of {name} on {label}"):
                peak = {
                    peer: measure.peak_extra_bytes(make, shape)
                    for peer, make in optimizers.items()
                    if peer.endswith("foreach")
                }
            theirs = peak.get("torch foreach")
            kept = "" if theirs is None else "kept" if peak["piste foreach"] <= theirs else "MISSED"
            shown = ["" if theirs is None else f"{theirs / weights:.3f}", f"{peak['piste foreach'] / weights:.3f}"]
            table.add_row(name, label, *shown, kept)
            results.append({"case": name, "weights": label, "bytes": peak, "target": kept})
    console.print(table)
    return results


def overheads(console: Console, rounds: int, layers: int) -> dict[str, Any]:
    """What a step costs besides arithmetic."""
    by_name = {case.name: case for case in CASES}
    table = Table(title="overheads", title_justify="left", box=None)
    for column in ("what", "found", "target"):
        table.add_column(column)
    with console.status("import time"):
        imported = measure.import_seconds(min(rounds, 11))["import piste, after torch"]
    kept = "kept" if imported < MOST_IMPORT else "MISSED"
    table.add_row("import piste, after torch", f"{imported * 1e3:.0f} ms", f"< {MOST_IMPORT * 1e3:.0f} ms {kept}")
    found: dict[str, Any] = {"import_seconds": imported}
    for name in ("AdamW", "SGD"):
        case: Case = by_name[name]
        with console.status(f"{layers} layers waking under {name}"):
            waking, awake, plans = measure.waking_ratio(case.optimizers()["piste foreach"], layers, rounds)
        kept = "kept" if max(waking, awake) <= MOST_WAKING and plans == 0 else "MISSED"
        label = f"{name}: {layers} layers with step numbers of their own, against dense steps"
        table.add_row(label, f"{waking:.2f} waking, {awake:.2f} awake, {plans} plans", f"<= {MOST_WAKING}, 0 {kept}")
        found[f"waking_{name}"] = {"waking": waking, "awake": awake, "plans": plans}
    with console.status("a schedule"):
        ratio = measure.scheduled_ratio(by_name["AdamW"].optimizers()["piste foreach"], rounds)
    table.add_row("AdamW: lr and betas changed before every step, against constant ones", f"{ratio:.2f}", "")
    console.print(table)
    return found | {"scheduled": ratio}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="timed steps of each peer (default: 31)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    parser.add_argument("--weights", choices=[*SHAPES, "all"], default="all", help="one list of weights only")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where to write the figures (default: {OUT})")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    console = Console()
    shapes = SHAPES if asked.weights == "all" else {asked.weights: SHAPES[asked.weights]}
    console.print(f"torch {torch.__version__}, {asked.threads} threads, medians of {asked.rounds} interleaved steps")
    results = {
        "torch": torch.__version__,
        "threads": asked.threads,
        "speed": speed(console, asked.rounds, shapes),
        "memory": memory(console, shapes),
        "overheads": overheads(console, asked.rounds, layers=min(300, 10 * asked.rounds)),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {asked.out}")


if __name__ == "__main__":
    main()
