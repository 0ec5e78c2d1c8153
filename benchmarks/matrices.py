"""``python -m benchmarks.matrices``: Shampoo, SOAP, Muon and PSGD against all who implement them.

A step that works roots or bases out anew takes many times as long as the others, so what is timed are windows of whole
periods: each holds exactly one refresh, and a window's time over its steps is what a step costs. Contenders take their
windows in turn on the same weights and gradients. Beside the times stands what an ordinary step multiplies, and at what
pace; a plain product of 1,024 x 1,024, timed in the same run, tells what pace the processor has, and so how fast an
implementation that takes these products can be.

Peers that cannot be imported are left out: HeavyBall and kron_torch are on PyPI (both want opt_einsum); the authors'
SOAP (``soap.py`` of nikhilvyas/SOAP) and Meta's Shampoo (facebookresearch/optimizers) are not, a checkout of each on
``PYTHONPATH`` makes them importable. Writes ``benchmarks/out/matrices.json``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import piste
from benchmarks.algorithms import Make, package
from benchmarks.cases import Shapes, parameters
from benchmarks.measure import contenders, ratio

OUT = Path(__file__).parent / "out" / "matrices.json"

Clock = Callable[[], float]


def _layer(width: int) -> Shapes:
    """A block of a transformer."""
    norms: Shapes = [(width,)] * 4
    return [
        *norms,
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]


def _bottlenecks() -> Shapes:
    """The stem of a ResNet-50, one block of each of its first three widths, and a head."""
    shapes: Shapes = [(64, 3, 7, 7), (64,)]
    for width, inside in ((64, 256), (128, 512), (256, 1024)):
        for shape in ((width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
            shapes += [shape, (shape[0],)]
    return [*shapes, (100, 1024), (100,)]


LISTS: dict[str, Shapes] = {
    "GPT-like: one block of width 384": _layer(384),
    "ResNet-50-like: stem, three blocks, head": _bottlenecks(),
    "24 matrices of width 512": [(512, 512)] * 24,
}
GPT, RESNET, SQUARES = LISTS


@dataclass(frozen=True)
class Case:
    """One algorithm under one schedule.

    Args:
        name: of piste's class, with what is set.
        period: steps from one refresh to the next; the one that follows a refresh has none.
        ours: makes piste's, by what is set.
        peers: makers of all others; None where the package is not there.
        lists: names of the lists of weights on which it is measured.
        at_least: the speed against each peer that is promised; the first of ``ours`` has to keep it.
        flat: convolutions are given as matrices, for who takes nothing else.
        vectors: weights of one axis are given, too.
    """

    name: str
    period: int
    ours: dict[str, Make]
    peers: dict[str, Make | None]
    lists: tuple[str, ...]
    at_least: dict[str, float] = field(default_factory=dict)
    flat: bool = False
    vectors: bool = True

    def shapes(self, name: str) -> Shapes:
        """The weights of a list that this algorithm takes."""
        shapes = [s for s in LISTS[name] if self.vectors or len(s) > 1]
        return [(s[0], torch.Size(s[1:]).numel()) for s in shapes] if self.flat else shapes


def _ours(name: str, **settings: Any) -> Make:
    return lambda params: getattr(piste, name)(params, **settings)


def _meta(every: int) -> Make | None:
    made = package("distributed_shampoo", "DistributedShampoo")
    if made is None:
        return None

    def make(params: list[torch.nn.Parameter]) -> Any:
        theirs = importlib.import_module("distributed_shampoo")
        return theirs.DistributedShampoo(
            params,
            lr=1e-4,
            betas=(0.9, 0.999),
            precondition_frequency=every,
            start_preconditioning_step=every,
            grafting_config=theirs.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
        )

    return make


def _shampoo(every: int) -> list[Case]:
    """Both forms, each against who has it, at its settings; pytorch_optimizer's leaves vectors as they are."""
    google: dict[str, Any] = {
        "form": "google",
        "graft": "sgd",
        "block_size": 512,
        "eps": 1e-6,
        "nesterov": True,
        "start": 1,
        "every": every,
        "lr": 1e-4,
    }
    theirs = package(
        "pytorch_optimizer",
        "ScalableShampoo",
        lr=1e-4,
        preconditioning_compute_steps=every,
        start_preconditioning_step=1,
    )
    return [
        Case(
            f"Shampoo (Meta), refresh every {every}",
            every,
            {"piste": _ours("Shampoo", every=every, start=every, lr=1e-4)},
            {"facebookresearch": _meta(every)},
            (GPT, RESNET),
            {"facebookresearch": 1.0},
        ),
        Case(
            f"Shampoo (Google), refresh every {every}",
            every,
            {"piste": _ours("Shampoo", **google)},
            {"pytorch_optimizer": theirs},
            (GPT, RESNET),
            {"pytorch_optimizer": 2.0},
            vectors=False,
        ),
    ]


def _heavyball(name: str, **settings: Any) -> Make | None:
    """As it runs without compiling."""
    if importlib.util.find_spec("heavyball") is None:
        return None

    def make(params: list[torch.nn.Parameter]) -> Any:
        importlib.import_module("heavyball.utils").compile_mode = None
        return getattr(importlib.import_module("heavyball"), name)(params, lr=1e-4, consume_grad=False, **settings)

    return make


def _soap() -> Case:
    """HeavyBall's at the settings of the authors'."""
    theirs: dict[str, Any] = {"betas": (0.95, 0.95), "precondition_frequency": 10, "max_precond_dim": 10_000}
    return Case(
        "SOAP, refresh every 10",
        10,
        {"piste": _ours("SOAP", lr=1e-4)},
        {
            "authors'": package("soap", "SOAP", lr=1e-4),
            "HeavyBall eager": _heavyball("SOAP", merge_dims=False, **theirs),
        },
        (GPT, RESNET),
        {"authors'": 1.5, "HeavyBall eager": 1.5},
    )


def _psgd() -> Case:
    """Factors updated in every tenth step, from the first one on."""
    every = 0.1
    ours = {"flat_start": 0, "probability_decay": 1e3, "least_probability": every}
    return Case(
        "PSGDKron, update every 10",
        10,
        {"piste": _ours("PSGDKron", lr=1e-4, **ours)},
        {
            "kron_torch": package("kron_torch", "Kron", lr=1e-4, preconditioner_update_probability=every),
            "HeavyBall eager": _heavyball("PSGDKron", preconditioner_update_probability=every, merge_dims=True),
        },
        (GPT, RESNET),
    )


CASES = (
    *_shampoo(10),
    *_shampoo(100),
    _soap(),
    _psgd(),
    Case(
        "Muon",
        1,
        {
            "piste": _ours("Muon", lr=1e-3, rule="muon"),
            "piste bf16": _ours("Muon", lr=1e-3, rule="muon", precision="bf16"),
            "piste deflated": _ours("Muon", lr=1e-3, rule="muon", iteration="deflated"),
            "piste deflated bf16": _ours("Muon", lr=1e-3, rule="muon", iteration="deflated", precision="bf16"),
        },
        {"torch (bf16)": lambda params: torch.optim.Muon(params, lr=1e-3)},
        (GPT, RESNET, SQUARES),
        {"torch (bf16)": 2.0},
        flat=True,
        vectors=False,
    ),
)


def _window(step: Callable[[], object], count: int, clock: Clock) -> list[float]:
    """Seconds of each of so many steps."""
    seconds = []
    for _ in range(count):
        start = clock()
        step()
        seconds.append(clock() - start)
    return seconds


def _operations(step: Callable[[], object]) -> float:
    """Of products in a step without a refresh: the less of two steps that follow one another."""
    counted = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            step()
        counted.append(counter.get_total_flops())
    return float(min(counted))


def peaks(clock: Clock) -> dict[str, float]:
    """Operations a second of one product of 1,024 x 1,024, the best of nine."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, out = torch.randn(1024, 1024).to(dtype), torch.empty(1024, 1024, dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = (
            2
            * 1024**3
            / min(
                chain.from_iterable(_window(lambda a=a, out=out: torch.mm(a, a, out=out), 1, clock) for _ in range(9))
            )
        )
    return found


def compare(case: Case, name: str, rounds: int, clock: Clock, console: Console) -> dict[str, Any]:
    """Times of windows, and speeds of ours against each peer."""
    shapes = case.shapes(name)
    # the first period is behind them
    steps = contenders(case.ours | case.peers, lambda: parameters(shapes), case.period + 1, console)
    windows: dict[str, list[list[float]]] = {who: [] for who in steps}
    names = list(steps)
    for turn in range(rounds):
        for who in names[turn % len(names) :] + names[: turn % len(names)]:
            windows[who].append(_window(steps[who], case.period, clock))
    means = {who: [statistics.fmean(window) for window in taken] for who, taken in windows.items()}
    ours = next(iter(case.ours))
    return {
        "case": case.name,
        "milliseconds": {who: 1e3 * statistics.median(taken) for who, taken in means.items()},
        "ordinary": {who: 1e3 * statistics.median(chain.from_iterable(taken)) for who, taken in windows.items()},
        "worst": {who: 1e3 * statistics.median(map(max, taken)) for who, taken in windows.items()},
        "operations": {who: _operations(step) for who, step in steps.items()},
        "speed": {who: ratio(taken, means[ours])._asdict() for who, taken in means.items() if who != ours},
        "at_least": case.at_least,
    }


def _show(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{name}: milliseconds", title_justify="left", box=None)
    for column in (
        "algorithm",
        "who",
        "a step, refresh shared out",
        "an ordinary step",
        "the worst",
        "GFLOP of an ordinary one",
        "GFLOP/s",
        "piste is",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("algorithm", "who") else "right")
    for row in rows:
        for who, taken in row["milliseconds"].items():
            operations, ordinary = row["operations"][who], row["ordinary"][who]
            speed = row["speed"].get(who)
            least = row["at_least"].get(who)
            kept = "" if least is None else f">= {least:g} {'kept' if speed['median'] >= least else 'MISSED'}"
            table.add_row(
                row["case"], who, f"{taken:.1f}", f"{ordinary:.1f}", f"{row['worst'][who]:.1f}",
                f"{operations / 1e9:.3g}", f"{operations / 1e6 / ordinary:.0f}",
                f"{speed['median']:.2f} x" if speed else "", kept,
            )  # fmt: skip
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrices", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed periods of each (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread: for machines that others use at the same time"
    )
    parser.add_argument("--list", choices=LISTS, action="append", help="some lists of weights only (default: all)")
    parser.add_argument("--case", choices=[c.name for c in CASES], action="append", help="some cases only")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the figures")
    asked = parser.parse_args(arguments)
    threads = 1 if asked.processor_time else asked.threads
    clock = time.process_time if asked.processor_time else time.perf_counter
    torch.set_num_threads(threads)
    console = Console(width=200)
    console.print(f"torch {torch.__version__}, {threads} threads, medians over {asked.rounds} interleaved periods")
    peak = peaks(clock)
    console.print(
        "a plain product: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in peak.items())
    )
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": threads,
        "clock": clock.__name__,
        "peaks": peak,
        "lists": {},
    }
    for name in asked.list or LISTS:
        rows = results["lists"][name] = []
        for case in CASES:
            if name in case.lists and case.name in (asked.case or [case.name]):
                with console.status(f"{case.name} on {name}"):
                    rows.append(compare(case, name, asked.rounds, clock, console))
        _show(console, name, rows)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {asked.out}")


if __name__ == "__main__":
    main()
