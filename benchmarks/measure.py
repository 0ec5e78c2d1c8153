"""How it is measured: peers in turn within one process, medians over rounds; memory by counting allocations."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Optimizers, Shapes, parameters
from piste.execution import plans_built

WARM_UP = 8  # steps: past RAdam's switch, and every buffer touched


def interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, A B A B, so that what disturbs the machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_seconds(optimizers: Optimizers, shapes: Shapes, rounds: int) -> dict[str, float]:
    """Median time of a step of each optimizer on weights of its own."""
    made = {name: make(parameters(shapes)) for name, make in optimizers.items()}
    for optimizer in made.values():
        for _ in range(WARM_UP):
            optimizer.step()
    return interleaved({name: optimizer.step for name, optimizer in made.items()}, rounds)


def peak_extra_bytes(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], shapes: Shapes) -> int:
    """The most memory that a step holds beyond what was held before it.

    torch's profiler reports every allocation and release of the CPU allocator in order; their running sum has a
    highest point.
    """
    optimizer = make(parameters(shapes))
    for _ in range(WARM_UP):
        optimizer.step()
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    held = highest = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Some builds of torch's profiler announce themselves on the standard error of the process."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def import_seconds(rounds: int) -> dict[str, float]:
    """Median time of ``import piste`` after ``import torch``, in fresh interpreters."""
    script = "import torch, time; t = time.perf_counter(); import piste; print(time.perf_counter() - t)"
    made = [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(rounds)]
    return {"import piste, after torch": statistics.median(made)}


def waking_ratio(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], layers: int, rounds: int
) -> tuple[float, float, int]:
    """Layers that each wake at another step against layers that all step from the start.

    Returns:
        Ratio of step times while the last ones wake, ratio once all are awake, plans built after the tenth step.
    """
    dense, waking = parameters([(16,)] * layers), parameters([(16,)] * layers)
    gradients = [p.grad for p in waking]
    for p in waking:
        p.grad = None
    ours = {"dense": make(dense), "waking": make(waking)}
    seconds: dict[str, list[float]] = {"dense": [], "waking": []}
    plans = 0
    for step in range(layers + rounds):
        if step < layers:
            waking[step].grad = gradients[step]
        for name, optimizer in ours.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
        if step == 9:
            plans = plans_built()

    def ratio(part: slice) -> float:
        return statistics.median(seconds["waking"][part]) / statistics.median(seconds["dense"][part])

    late = min(rounds, layers // 2)
    return ratio(slice(layers - late, layers)), ratio(slice(layers, None)), plans_built() - plans


def scheduled_ratio(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], rounds: int) -> float:
    """Steps before each of which lr and betas change, against steps under constant ones."""
    made = {name: make(parameters([(16,)] * 300)) for name in ("constant", "scheduled")}
    for optimizer in made.values():
        for _ in range(WARM_UP):
            optimizer.step()
    count = 0

    def scheduled() -> None:
        nonlocal count
        count += 1
        for group in made["scheduled"].param_groups:
            group["lr"] = 1e-4 / count
            group["betas"] = (0.9 - 1e-5 * count, 0.999 - 1e-6 * count)
        made["scheduled"].step()

    found = interleaved({"constant": made["constant"].step, "scheduled": scheduled}, rounds)
    return found["scheduled"] / found["constant"]
