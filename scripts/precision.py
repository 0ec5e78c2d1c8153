"""``python -m scripts.precision maps | slow | training``: the measurements behind docs/precision.md, as tables.

``maps`` stores the two moments of Adam by many maps, on synthetic gradients whose sizes differ within every block;
``slow``, its last table, is about averages that move by a ten-thousandth in a step.
``training`` trains the race's transformer and a wider copy of its ViT with state and weights in every format, from
equal weights and batches, and draws ``docs/precision/weights.png``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import plotly.graph_objects as go
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import piste
from benchmarks.picture import photograph
from piste.coding import decode, encode, fresh
from piste.race.data import training_batches
from piste.race.seeds import derived_seed, seed_everything
from piste.race.tasks import char_transformer, digits
from piste.race.training import evaluate, fresh_model
from piste.storage import State, codec_for

PAGE = Path(__file__).parent.parent / "docs" / "precision"
Map = Callable[[Tensor, int], Tensor]  # numbers in blocks, and the number of the step -> what comes back of them

# ---------------------------------------------------------------------------------------------------------------------
# Maps


def ours(role: Any, form: str, *, rounding: str = "golden") -> Map:
    """The library's codec; with its thresholds, rounded to the nearest, or with thresholds drawn at random."""
    codec = codec_for(State(role), torch.empty(64, 64), form)
    assert codec is not None

    def store(x: Tensor, step: int) -> Tensor:
        codes, rest = fresh(codec, x.view(-1))
        moved = step if rounding == "golden" else None
        if rounding == "random":
            with mock.patch(
                "piste.coding.torch.full", lambda *a, **k: torch.randint(0, 65536, a[0], dtype=torch.int32)
            ):
                encode(codec, x, codes, rest, step=None)
        else:
            encode(codec, x, codes, rest, step=moved)
        return decode(codec, codes, rest, tuple(x.shape))

    return store


def by_table(levels: list[float]) -> Map:
    """The nearest of some levels, relative to the block's largest magnitude."""
    table = torch.tensor(sorted(levels), dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2

    def store(x: Tensor, step: int) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-38)
        return table[torch.bucketize(x / scale, middles)] * scale

    return store


def dynamic(*, signed: bool, zero: bool) -> list[float]:
    """The dynamic tree map of Dettmers et al.: a decade for each leading zero, and even steps within it."""
    levels = [1.0] + ([0.0] if zero else [])
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)).tolist()
        levels += means + ([-m for m in means] if signed else [])
    return levels


def e4m3() -> list[float]:
    """Eight-bit floats with four bits of exponent, subnormal ones and zero among them."""
    return [(1 + m / 8) * 2.0**e / 448 for e in range(-6, 9) for m in range(8)] + [
        m / 8 * 2.0**-6 / 448 for m in range(8)
    ]


def signed(levels: list[float]) -> list[float]:
    return sorted({*levels, *(-x for x in levels)})


def log2(x: Tensor, step: int) -> Tensor:
    """255 even steps in the logarithm, over 32 octaves."""
    top = x.amax(1, keepdim=True).clamp_min(1e-38)
    code = (-(x / top).clamp_min(1e-38).log2() / 32 * 255).round().clamp(0, 255)
    return top * torch.exp2(-code * 32 / 255)


def exact(x: Tensor, step: int) -> Tensor:
    return x


SECOND: dict[str, tuple[int, Map]] = {
    "bf16, ours": (256, ours("second_moment", "bf16")),
    "bf16, to the nearest": (256, lambda x, step: x.bfloat16().float()),
    "**8bit, ours**": (256, ours("second_moment", "8bit")),
    "8bit, ours to the nearest": (256, ours("second_moment", "8bit", rounding="nearest")),
    "8bit, ours at random": (256, ours("second_moment", "8bit", rounding="random")),
    "dynamic (bitsandbytes)": (256, by_table(dynamic(signed=False, zero=True))),
    "dynamic without zero": (256, by_table(dynamic(signed=False, zero=False))),
    "linear": (256, by_table([i / 255 for i in range(256)])),
    "e4m3": (256, by_table(e4m3())),
    "square root, no zero": (256, by_table([(i / 255) ** 2 for i in range(1, 256)])),
    "log2 over 32 octaves": (256, log2),
    "**4bit, ours**": (128, ours("second_moment", "4bit")),
    "4bit, ours to the nearest": (128, ours("second_moment", "4bit", rounding="nearest")),
    "4bit linear without zero (Li et al.)": (128, by_table([i / 16 for i in range(1, 17)])),
}
FIRST: dict[str, tuple[int, Map]] = {
    "bf16, ours": (256, ours("moment", "bf16")),
    "**8bit, ours**": (256, ours("moment", "8bit")),
    "8bit, ours to the nearest": (256, ours("moment", "8bit", rounding="nearest")),
    "8bit, ours at random": (256, ours("moment", "8bit", rounding="random")),
    "dynamic (bitsandbytes)": (256, by_table(dynamic(signed=True, zero=True))),
    "linear": (256, by_table(signed([i / 127 for i in range(128)]))),
    "e4m3": (256, by_table(signed(e4m3()))),
    "square root": (256, by_table(signed([(i / 127) ** 2 for i in range(128)]))),
    "**4bit, ours**": (128, ours("moment", "4bit")),
    "4bit, ours to the nearest": (128, ours("moment", "4bit", rounding="nearest")),
    "4bit linear": (128, by_table(signed([i / 7 for i in range(8)]))),
    "4bit square root": (128, by_table(signed([(i / 7) ** 2 for i in range(8)]))),
}
BOTH: dict[str, tuple[int, Map, Map]] = {
    "bf16, ours": (256, ours("moment", "bf16"), ours("second_moment", "bf16")),
    "**8bit, ours**": (256, ours("moment", "8bit"), ours("second_moment", "8bit")),
    "dynamic (bitsandbytes)": (256, FIRST["dynamic (bitsandbytes)"][1], SECOND["dynamic (bitsandbytes)"][1]),
    "dynamic, v without zero": (256, FIRST["dynamic (bitsandbytes)"][1], SECOND["dynamic without zero"][1]),
    "linear": (256, FIRST["linear"][1], SECOND["linear"][1]),
    "e4m3": (256, FIRST["e4m3"][1], SECOND["e4m3"][1]),
    "square root, v without zero": (256, FIRST["square root"][1], SECOND["square root, no zero"][1]),
    "**4bit, ours**": (128, ours("moment", "4bit"), ours("second_moment", "4bit")),
    "4bit: m square root, v linear without zero": (
        128,
        FIRST["4bit square root"][1],
        SECOND["4bit linear without zero (Li et al.)"][1],
    ),
}


def update_error(
    block: int, first: Map, second: Map, spread: float, steps: int, *, drift: bool = False
) -> tuple[float, float]:
    """RMS error of Adam's update over its RMS, and the largest update over the largest exact one."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(65536 // block, block, generator=generator)

    sizes = torch.exp(spread * draw())
    m, v, exact_m, exact_v = (torch.zeros_like(sizes) for _ in range(4))
    beta1, beta2 = 0.9, 0.999
    wrong = right = 0.0
    worst = 0.0
    for t in range(1, steps + 1):
        if drift and t == steps // 2:
            sizes = sizes * torch.exp(draw())
        g = sizes * draw()
        for a, b in ((m, v), (exact_m, exact_v)):
            a.lerp_(g, 1 - beta1)
            b.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if t % 10 == 0 or t <= 10:
            u, exact_u = (
                a / (1 - beta1**t) / ((b / (1 - beta2**t)).sqrt() + 1e-8) for a, b in ((m, v), (exact_m, exact_v))
            )
            wrong += float((u - exact_u).square().mean())
            right += float(exact_u.square().mean())
            worst = max(worst, float(u.abs().max() / exact_u.abs().max()))
        m, v = first(m, t), second(v, t)
    return math.sqrt(wrong / right), worst


def maps(console: Console) -> None:
    """Print the tables of maps."""
    rows = [("v alone, 3,000 steps", name, block, exact, store, 3000) for name, (block, store) in SECOND.items()]
    rows += [("m alone, 400 steps", name, block, store, exact, 400) for name, (block, store) in FIRST.items()]
    rows += [("both, 3,000 steps", name, *maps_, 3000) for name, maps_ in BOTH.items()]
    title = ""
    for what, name, block, first, second, steps in rows:
        if what != title:
            print(f"\n| {what} | s = 0.5 | s = 1 | s = 2 | drift |\n|---|---|---|---|---|")
            title = what
        cells = [update_error(block, first, second, s, steps) for s in (0.5, 1.0, 2.0)]
        cells.append(update_error(block, first, second, 1.0, steps, drift=True))
        print(f"| {name} | " + " | ".join(f"{error:.3g} / {worst:.3g}" for error, worst in cells) + " |", flush=True)
    slow_averages()


def slow_averages() -> None:
    """Print how far stored averages of 0.9999 are from exact ones, when each number is on its way to another value."""
    after = (100, 1000, 10_000, 30_000)
    print(
        f"\n| slow average, RMS error of its logarithm | {' | '.join(f'{t:,} steps' for t in after)} |\n"
        + "|---" * 5
        + "|"
    )
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.exp(0.5 * torch.randn(8, 256, generator=generator)) for _ in range(2))
    for name, (_, store) in SECOND.items():
        x, found = start.clone(), []
        for t in range(1, after[-1] + 1):
            x = store(x.lerp(target, 1e-4), t)
            if t in after:
                reached = target + (start - target) * (1 - 1e-4) ** t
                found.append(float((x.clamp_min(1e-9) / reached).log().square().mean().sqrt()))
        print(f"| {name} | " + " | ".join(f"{error:.3f}" for error in found) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Case:
    """An optimizer in one precision."""

    optimizer: str
    state: str = "fp32"
    weights: str = "plain"
    bfloat16: bool = False
    lr: float | None = None
    constant: bool = False

    def title(self, *, alone: bool) -> str:
        """What distinguishes it, where states are all alike or are not."""
        if alone:
            return f"bf16 weights, {self.weights}" if self.bfloat16 else "float32 weights"
        return f"state {self.state}"


def train(task: Any, case: Case, seed: int, steps: int) -> tuple[float, list[float], float]:
    """Validation loss at the end, the training losses, and the share of the weights whose state is in codes."""
    splits = task.data()
    model = fresh_model(task, seed, torch.device("cpu"))
    if case.bfloat16:
        model.to(torch.bfloat16)
    lr = case.lr or piste.presets[case.optimizer].lr_prior.center
    domain = {"domain": task.domain} if task.domain in piste.presets[case.optimizer].domains else {}
    optimizer: Any = piste.create(case.optimizer, model, lr=lr, state=case.state, weights=case.weights, **domain)
    schedule = None if case.constant else piste.schedules.one_cycle(optimizer, steps)
    losses = []
    cast = torch.bfloat16 if case.bfloat16 else torch.float32

    def ready(batch: Any) -> Any:
        return tuple(x.to(cast) if x.is_floating_point() else x for x in batch)

    batches = training_batches(splits.train, task.batch_size, derived_seed(seed, "batches"))
    for number, batch in enumerate(islice(batches, steps)):
        seed_everything(derived_seed(seed, f"step {number}"))
        optimizer.zero_grad()
        loss = task.loss(model, ready(batch))
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(float(loss))
    coded = sum(
        p.numel() for p in model.parameters() if any(x.dtype in (torch.int8, torch.uint8) for x in _kept(optimizer, p))
    )
    total = sum(p.numel() for p in model.parameters())
    with torch.no_grad():  # weights that stand for more are judged by what they stand for
        for p in model.parameters():
            p.data = optimizer.full_precision(p)
    return evaluate(task, model, splits.valid, torch.device("cpu"))[0], losses, coded / total


def _kept(optimizer: Any, p: Tensor) -> list[Tensor]:
    return [x for x in optimizer.state[p].values() if isinstance(x, Tensor)]


STATES = ("fp32", "bf16", "8bit", "4bit")
WEIGHTS = [Case("adamw"), *(Case("adamw", weights=form, bfloat16=True) for form in piste.WEIGHT_FORMATS)]
SLOW = [
    Case(c.optimizer, weights=c.weights, bfloat16=c.bfloat16, lr=1e-4, constant=True) for c in WEIGHTS
]  # steps that bfloat16 is too coarse for


def training(console: Console, seeds: int, only: str) -> None:
    """Print the tables of trained models, and draw the picture."""
    tasks: dict[str, tuple[Any, int]] = {
        "char_transformer": (char_transformer.char_transformer, 300),
        "digits_vit, 64 wide": (digits.digits_vit, 400),
    }
    with mock.patch.object(digits, "_WIDTH", 64):
        for name, (task, steps) in tasks.items():
            if only and only not in name:
                continue
            for optimizer in ("adamw", "ranger", "adan", "lamb", "lion"):
                cases = [Case(optimizer, state) for state in STATES]
                table(console, f"{name}, {optimizer}", task, steps, cases, seeds)
            table(console, f"{name}, AdamW, weights", task, steps, WEIGHTS, seeds)
            if name.startswith("char"):
                draw(table(console, f"{name}, AdamW at a constant 1e-4, weights", task, 4 * steps, SLOW, seeds))


def table(
    console: Console, title: str, task: Any, steps: int, cases: list[Case], seeds: int
) -> dict[str, list[list[float]]]:
    """One table: losses, their spread over seeds, and paired differences to the first case."""
    print(
        f"\n| {title} | validation loss | sd over seeds | minus the first, paired | in codes |\n|---|---|---|---|---|"
    )
    ends: list[list[float]] = []
    curves: dict[str, list[list[float]]] = {}
    for case in cases:
        name = case.title(alone=len({c.state for c in cases}) == 1)
        runs = [train(task, case, seed, steps) for seed in track(range(seeds), name, console=console, transient=True)]
        ends.append([end for end, _, _ in runs])
        curves[name] = [losses for _, losses, _ in runs]
        apart = [a - b for a, b in zip(ends[-1], ends[0], strict=True)]
        error = statistics.stdev(apart) / math.sqrt(seeds)
        print(
            f"| {name} | {statistics.mean(ends[-1]):.4f} | {statistics.stdev(ends[-1]):.4f} | "
            f"{statistics.mean(apart):+.4f} ± {error:.4f} | {runs[0][2]:.0%} |",
            flush=True,
        )
    return curves


def draw(curves: dict[str, list[list[float]]]) -> None:
    """Training loss under every format of the weights, a mean over seeds and over runs of steps."""
    drawn = go.Figure()
    for name, runs in curves.items():
        mean = torch.tensor(runs).mean(0)
        smooth = mean.unfold(0, 25, 25).mean(1)
        drawn.add_scatter(x=list(range(25, 25 * len(smooth) + 1, 25)), y=smooth.tolist(), mode="lines", name=name)
    drawn.update_layout(
        title="AdamW at a constant learning rate of 1e-4: plain bfloat16 weights stall",
        template="plotly_white",
        width=900,
        height=450,
        xaxis_title="step",
        yaxis_title="training loss",
    )
    PAGE.mkdir(parents=True, exist_ok=True)
    photograph(drawn, PAGE / "weights.png")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m scripts.precision", description=__doc__)
    parser.add_argument("what", choices=("maps", "slow", "training"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--only", default="", help="part of a task's name")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    if asked.what == "slow":
        slow_averages()
    elif asked.what == "maps":
        maps(console)
    else:
        training(console, asked.seeds, asked.only)


if __name__ == "__main__":
    main()
