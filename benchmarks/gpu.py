"""``python -m benchmarks.gpu``: steps on a GPU, by device and by host time, against everybody who is installed.

All contenders of a row step the same weights in turn, within one process; a figure is the median over rounds. Device
time is that between two CUDA events round a step, host time until the call of ``step()`` returns. Writes
``docs/benchmarks-gpu.md``, with the device's name. ``--device cpu --smoke`` runs all of this on small weights with
timers of the CPU, prints the page and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import piste
from benchmarks.algorithms import LISTS as CPU_LISTS
from benchmarks.algorithms import LR, MOMENTUM, gpt, package
from benchmarks.cases import Shapes

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks-gpu.md"
WARM_UP = 14  # past RAdam's switch and two synchronisations of Lookahead; every kernel is compiled

GPT_1B = "GPT, 1.3 B"
LISTS: dict[str, Shapes] = {
    "GPT-2 small, 124 M": CPU_LISTS["GPT-2 small: 148 tensors, 124 M"],
    GPT_1B: gpt(2048, 24, 2048),
    "ResNet-50, 26 M": CPU_LISTS["ResNet-50: 161 tensors, 26 M"],
    "1,000 tensors of 1,024": CPU_LISTS["1,000 tensors of 1,024"],
}
SMALL: dict[str, Shapes] = {"three tensors": [(65, 64), (70,), (4200,)]}
FORMS = ("fp32", "bf16 weights", "8-bit state", "4-bit state")

Make = Callable[[list[torch.nn.Parameter]], Any]


@dataclass(frozen=True)
class Case:
    """One algorithm.

    Args:
        name: of piste's class.
        states: numbers that a weight keeps; each is read and written in a step.
        passes: how often the gradient is read.
        settings: of piste's class.
        torch: torch's class of the same name takes part, with ``fused=True`` where it can.
        others: names of the class in other packages.
    """

    name: str
    states: int
    settings: Mapping[str, Any]
    passes: int = 1
    torch: str = ""
    fused: bool = False
    others: Mapping[str, str] | None = None

    def bytes_per_weight(self, form: str) -> float:
        """What a step cannot but move."""
        weight = 2 if form == "bf16 weights" else 4
        state = {"8-bit state": 1.0, "4-bit state": 0.5}.get(form, 4.0)
        return weight * (self.passes + 2) + 2 * state * self.states

    def contenders(self, form: str, engine: str) -> dict[str, Make | None]:
        """Ours first; None for what is not installed."""
        ours = dict(self.settings)
        if "bit" in form:
            ours["state"] = form.partition("-")[0] + "bit"
        cls = getattr(piste, self.name)
        found: dict[str, Make | None] = {"piste": lambda params: cls(params, engine=engine, **ours)}
        plain = {k: v for k, v in self.settings.items() if k != "total_steps"}
        if "bit" in form:
            found["piste, fp32 state"] = lambda params: cls(params, engine=engine, **self.settings)
            bits = form[0]
            if bits == "8":
                found["bitsandbytes"] = package("bitsandbytes.optim", f"{self.name}8bit", **plain)
            if self.name == "AdamW":
                found["torchao"] = package("torchao.optim", f"AdamW{bits}bit", **plain)
            return found
        if self.torch:
            theirs = getattr(torch.optim, self.torch)
            found["torch foreach"] = lambda params: theirs(params, foreach=True, **plain)
            found["torch compile"] = lambda params: _Compiled(theirs(params, foreach=True, **plain))
            if self.fused:
                found["torch fused"] = lambda params: theirs(params, fused=True, **plain)
        for module, name in (self.others or {}).items():
            found[{"optimi": "torch-optimi"}.get(module, module)] = package(module, name, **plain)
        return found


class _Compiled:
    """A torch optimizer whose step went through ``torch.compile``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = torch.compile(optimizer.step)


CASES = (
    Case("AdamW", 2, LR, torch="AdamW", fused=True, others={"optimi": "AdamW"}),
    Case("SGD", 1, MOMENTUM, torch="SGD", fused=True, others={"optimi": "SGD"}),
    Case("RAdam", 2, LR, torch="RAdam", others={"optimi": "RAdam"}),
    Case("AdaBelief", 2, LR, others={"pytorch_optimizer": "AdaBelief"}),
    Case("Ranger", 2, LR, passes=2, others={"optimi": "Ranger"}),
    Case("Adan", 4, LR, others={"optimi": "Adan"}),
    Case("Lion", 1, LR, others={"optimi": "Lion"}),
    Case("Lamb", 2, LR, passes=2, others={"pytorch_optimizer": "Lamb"}),
    Case("Ranger21", 4, LR | {"total_steps": 10_000}, passes=3),
)


class Row(NamedTuple):
    """One contender.

    Attributes:
        device, host: seconds of a step.
        extra: bytes that a step holds at its worst beyond what it leaves.
    """

    contender: str
    device: float
    host: float
    extra: int


class Clock:
    """Times steps on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def step(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of device and host; nothing is under way when the step begins."""
        self.wait()
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        if not self.cuda:
            return host, host
        end.record()
        self.wait()
        return begin.elapsed_time(end) / 1e3, host

    def extra(self, work: Callable[[], Any]) -> int:
        """Bytes at the worst moment of a step, beyond those held before; 0 where nobody counts them."""
        if not self.cuda:
            work()
            return 0
        self.wait()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - held


def copy_bandwidth(clock: Clock, elements: int, rounds: int) -> float:
    """Bytes per second of a copy from one float32 tensor to another, both ways counted."""
    source = torch.ones(elements, device=clock.device)
    target = torch.empty_like(source)
    seconds = [clock.step(lambda: target.copy_(source))[0] for _ in range(rounds)]
    return 8 * elements / statistics.median(seconds)


@contextmanager
def weights(shapes: Shapes, form: str, device: torch.device) -> Iterator[list[torch.nn.Parameter]]:
    """Weights with gradients, freed at the end."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if form == "bf16 weights" else torch.float32
    made = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for p in made:
        p.grad = 0.01 * torch.randn_like(p)
    try:
        yield made
    finally:
        made.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured(
    contenders: Mapping[str, Make | None], params: list[torch.nn.Parameter], clock: Clock, rounds: int, warm_up: int
) -> list[Row]:
    """All that are installed and have room, in turn."""
    steps: dict[str, Callable[[], Any]] = {}
    extra: dict[str, int] = {}
    for name, make in contenders.items():
        if make is None:
            continue
        try:
            optimizer = make(params)
            for _ in range(warm_up):
                optimizer.step()
            extra[name] = clock.extra(optimizer.step)
            steps[name] = optimizer.step
        except (torch.OutOfMemoryError, AttributeError) as error:  # no room, or a package without this class
            print(f"  {name} takes no part: {error}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clock.step(steps[name]))
    medians = {name: tuple(map(statistics.median, zip(*taken, strict=True))) for name, taken in seconds.items()}
    return [Row(name, device, host, extra[name]) for name, (device, host) in medians.items()]


INTRODUCTION = """\
# Speed on GPUs

`make bench-gpu` writes this page: the steps of nine optimizers on four lists of weights, in four formats, against
whoever is installed of torch (foreach, fused, compiled), torch-optimi, bitsandbytes, torchao and pytorch_optimizer.
Contenders of a table step the same weights in turn, and figures are medians. *Device* is the time between two CUDA
events round a step, *host* the time until `step()` returns, *of copy* the bytes that a step cannot but move, each once
a pass, over device time, as a share of the bandwidth of a copy measured in the same run. *Extra* is the memory that a
step holds at its worst beyond what it leaves.

What is aimed at: 0.9 of copy bandwidth for element-wise rules on the model of 1.3 B weights; never slower than torch's
fused kernels; 2.5 times torch's foreach; 8-bit AdamW 1.6 times as fast as with float32 state; 600 µs of host time for
1,000 small weights; 8 MiB of extra memory.
"""
NOTHING = """
**Not run yet.** No GPU was at hand when this was written, so there are no tables: only figures of a real run go here.
"""


def page(tables: Sequence[str] | None, about: str = "") -> str:
    """The page, with its tables or without."""
    return INTRODUCTION + (NOTHING if tables is None else f"\n{about}\n" + "".join(tables))


def table(title: str, rows: list[Row], moved: float, bandwidth: float) -> str:
    """One table: ours, and the others as multiples of our device time."""
    ours = rows[0].device
    lines = [f"\n### {title}\n", "| contender | device, µs | host, µs | piste = 1 | of copy | extra, MiB |"]
    lines.append("| --- | --: | --: | --: | --: | --: |")
    for row in rows:
        share = moved / row.device / bandwidth
        lines.append(
            f"| {row.contender} | {row.device * 1e6:,.0f} | {row.host * 1e6:,.0f} | {row.device / ours:.2f} "
            f"| {share:.2f} | {row.extra / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", help="of piste; triton on a GPU, else cpp")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--optimizer", nargs="*", help="some of them only")
    parser.add_argument("--smoke", action="store_true", help="small weights, few steps, no torch.compile")
    parser.add_argument("--out", type=Path, help="where the page goes; without a GPU it is only printed")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --smoke tries the harness")
    clock, engine = Clock(device), asked.engine or ("triton" if device.type == "cuda" else "cpp")
    lists, rounds, warm_up = (SMALL, 2, 2) if asked.smoke else (LISTS, asked.rounds, WARM_UP)
    bandwidth = copy_bandwidth(clock, 1 << 12 if asked.smoke else 1 << 28, rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    about = f"{name}, torch {torch.__version__}; a copy moves {bandwidth / 1e9:,.0f} GB/s."
    print(about)
    tables = []
    for case in CASES:
        if asked.optimizer and case.name not in asked.optimizer:
            continue
        for label, shapes in lists.items():
            for form in FORMS:
                contenders = case.contenders(form, engine)
                if asked.smoke:
                    contenders.pop("torch compile", None)
                with weights(shapes, form, device) as params:
                    moved = case.bytes_per_weight(form) * sum(p.numel() for p in params)
                    rows = measured(contenders, params, clock, rounds, warm_up)
                if rows:
                    tables.append(table(f"{case.name}, {label}, {form}", rows, moved, bandwidth))
                    print(tables[-1])
    out = asked.out or (PAGE if device.type == "cuda" else None)
    if out is not None:
        out.write_text(page(tables, about), encoding="utf-8")


if __name__ == "__main__":
    main()
