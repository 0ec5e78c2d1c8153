"""How it is measured: peers in turn within one process, ratios round by round; memory by counting allocations."""

from __future__ import annotations

import gc
import io
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Optimizers, Shapes, parameters
from piste.execution import plans_built

WARM_UP = 8  # steps: past RAdam's switch, and every buffer touched
PERIOD = 14  # steps from the first: past RAdam's switch, and Lookahead has synchronised twice

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


_clock = time.perf_counter  # what seconds() reads


def seconds() -> float:
    """Seconds since some moment: those that pass, or inside of :func:`clock` those of this process."""
    return _clock()


@contextmanager
def clock(*, of_processor: bool) -> Iterator[None]:
    """Where asked for, count seconds of this process in the place of those that pass."""
    global _clock
    _clock = time.process_time if of_processor else time.perf_counter
    try:
        yield
    finally:
        _clock = time.perf_counter


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of single rounds: how sure a figure is on a shared machine."""

    median: float
    low: float
    high: float


def interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round. Jobs take turns, so that what disturbs the machine disturbs all alike.

    Each round starts with another job: none always follows the one that leaves the caches at their worst.
    """
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds):
        start_with = turn % len(names)
        for name in names[start_with:] + names[:start_with]:
            start = seconds()
            jobs[name]()
            taken[name].append(seconds() - start)
    return taken


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """One job's seconds as a multiple of another's, round by round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    # one round has no quartiles: all three are what it found
    low, median, high = statistics.quantiles(ratios if len(ratios) > 1 else 2 * ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def step_seconds(optimizers: Optimizers, shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Times of a step of each optimizer on weights of its own."""
    made = {name: make(parameters(shapes)) for name, make in optimizers.items()}
    for optimizer in made.values():
        for _ in range(WARM_UP):
            optimizer.step()
    return interleaved({name: optimizer.step for name, optimizer in made.items()}, rounds)


def contenders(
    makers: Mapping[str, Make | None], weights: Callable[[], list[torch.nn.Parameter]], warm_up: int, console: Console
) -> dict[str, Callable[[], object]]:
    """Steps of all who could be made and whose first steps went well.

    Args:
        makers: by name; None for a peer that is not installed.
        weights: makes, or gives, what a contender trains.
        warm_up: how many first steps.
        console: hears of those that are left out.
    """
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        if make is None:
            continue
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                step = make(weights()).step
                for _ in range(warm_up):
                    step()
        except Exception as error:  # a peer that does not run here is left out, and said to be
            console.print(f"  {name} does not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        steps[name] = step
    return steps


def peak_extra_bytes(make: Make, shapes: Shapes) -> int:
    """The most memory that the first steps ever hold beyond weights, gradients and the optimizer's state.

    torch's profiler reports every allocation and release of the CPU allocator in order; their running sum has a
    highest point. It is counted from before the optimizer is made, and what ends up in ``optimizer.state`` is taken
    off at the end, so a buffer that is kept from one step to the next counts as well.
    """
    weights = parameters(shapes)
    gc.collect()  # what an earlier measurement left must not be released during this one
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer = make(weights)
        for _ in range(PERIOD):
            optimizer.step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) - _state_bytes(optimizer)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


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
    """Median times of ``import torch`` and then of ``import piste``, both in each of many fresh interpreters."""
    script = (
        "import time; t0 = time.perf_counter(); import torch; t1 = time.perf_counter(); import piste; "
        "print(t1 - t0, time.perf_counter() - t1)"
    )
    made = [subprocess.check_output([sys.executable, "-c", script], text=True).split() for _ in range(rounds)]
    torch_alone, piste_after = zip(*made, strict=True)
    return {
        "import torch": statistics.median(map(float, torch_alone)),
        "import piste, after torch": statistics.median(map(float, piste_after)),
    }


class Waking(NamedTuple):
    """Step times as multiples of the dense step's, and plans built after the tenth step."""

    waking: Ratio
    awake: Ratio
    plans: int


def waking_ratio(make: Make, layers: int, rounds: int) -> Waking:
    """Layers that each wake at another step (the last ``rounds`` of them, then all awake) against dense steps."""
    dense, waking = parameters([(16,)] * layers), parameters([(16,)] * layers)
    gradients = [p.grad for p in waking]
    for p in waking:
        p.grad = None
    jobs = {"dense": make(dense).step, "waking": make(waking).step}
    seconds: dict[str, list[float]] = {"dense": [], "waking": []}
    plans = 0
    for step in range(layers + rounds):
        if step < layers:
            waking[step].grad = gradients[step]
        for name, taken in interleaved(jobs, 1).items():
            seconds[name] += taken
        if step == 9:
            plans = plans_built()

    def part(where: slice) -> Ratio:
        return ratio(seconds["waking"][where], seconds["dense"][where])

    late = min(rounds, layers // 2)
    return Waking(part(slice(layers - late, layers)), part(slice(layers, None)), plans_built() - plans)


def scheduled_ratio(make: Make, rounds: int) -> tuple[Ratio, int]:
    """Steps before each of which lr and betas change, against steps under constant ones; and plans built meanwhile."""
    made = {name: make(parameters([(16,)] * 300)) for name in ("constant", "scheduled")}
    for optimizer in made.values():
        for _ in range(WARM_UP):
            optimizer.step()
    count, plans = 0, plans_built()

    def scheduled() -> None:
        nonlocal count
        count += 1
        for group in made["scheduled"].param_groups:
            group["lr"] = 1e-4 / count
            group["betas"] = (0.9 - 1e-5 * count, 0.999 - 1e-6 * count)
        made["scheduled"].step()

    found = interleaved({"constant": made["constant"].step, "scheduled": scheduled}, rounds)
    return ratio(found["scheduled"], found["constant"]), plans_built() - plans
