"""``python -m benchmarks.packing``: trials trained together (``piste race --pack``) against trials trained alone.

Both ways make the same trials, in turn, on one thread. Printed are runs a second and their ratio, and what arithmetic
alone leaves to gain: the time that the matrix products of a step take at the speed that they reach here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Ratio, clock, interleaved, ratio, seconds
from benchmarks.overhead import trial_key
from piste.race.contenders import make_contenders
from piste.race.data import training_batches
from piste.race.packed import run_pack, why_not
from piste.race.task import Task, load_task
from piste.race.tasks.digits import CLASSES
from piste.race.training import fresh_model, run

TASKS = ("digits_mlp", "digits", "digits_vae", "mnist1d_mlp", "quadratic_axis")
_SIZE, _PRODUCTS = 256, 50


def product_seconds(task: Task) -> float:
    """Seconds that a step's matrix products take, at the rate of products of 32 x 256 x 256 on this thread."""
    model = fresh_model(task, 0, torch.device("cpu"))
    batch = next(training_batches(task.data().train, task.batch_size, 0))
    with FlopCounterMode(display=False) as counted:
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    a, b = torch.randn(32, _SIZE), torch.randn(_SIZE, _SIZE)
    taken = []
    for _ in range(_PRODUCTS):
        begun = seconds()
        a @ b
        taken.append(seconds() - begun)
    return float(counted.get_total_flops()) * min(taken) / (2 * 32 * _SIZE * _SIZE)


def narrowed(task: Task, width: int) -> Task:
    """The perceptron of ``digits_mlp`` with another width than its 256."""

    def model() -> nn.Module:
        inner = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        return nn.Sequential(nn.Flatten(), *inner, nn.Linear(width, CLASSES))

    return replace(task, name=f"{task.name}_{width}", model=model)


def compare(task: Task, optimizer: str, trials: int, steps: int, rounds: int) -> tuple[Ratio, float, float]:
    """How many times the runs a second, the seconds of a trial alone, and the least that products leave of them."""
    data = task.data()
    refused = why_not(task, data, torch.device("cpu"))
    if refused:
        raise ValueError(f"trials on {task.name} cannot be packed: {refused}")
    (contender,) = make_contenders([optimizer], [])
    lrs = [contender.lr_center * 10 ** (-place / trials) for place in range(trials)]
    keys = [trial_key(task, contender, lr, steps, packed=True) for lr in lrs]
    jobs = {
        "together": lambda: run_pack(task, data, contender, keys, lambda step: None),
        "alone": lambda: [run(task, data, contender, key, lambda step: None) for key in keys],
    }
    interleaved(jobs, 1)  # compiles and fills the caches
    taken = interleaved(jobs, rounds)
    alone = min(taken["alone"]) / trials
    return ratio(taken["alone"], taken["together"]), alone, steps * product_seconds(task) / alone


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", help="a task; may be repeated")
    width = "digits_mlp with hidden layers of this width in the place of 256; may be repeated"
    parser.add_argument("--width", action="append", type=int, default=[], help=width)
    parser.add_argument("--optimizer", default="adamw", help="who trains (default: adamw)")
    parser.add_argument("--trials", type=int, default=16, help="of a pack (default: 16)")
    parser.add_argument("--steps", type=int, default=60, help="of a run (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="packs, in turn with runs alone (default: 5)")
    parser.add_argument("--processor-time", action="store_true", help="for machines that others use at the same time")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=140)
    tasks = [load_task(name).task for name in asked.task or (() if asked.width else TASKS)]
    tasks += [narrowed(load_task("digits_mlp").task, width) for width in asked.width]
    for task in tasks:
        with clock(of_processor=asked.processor_time):
            found, alone, products = compare(task, asked.optimizer, asked.trials, asked.steps, asked.rounds)
        console.print(
            f"{task.name}, {asked.optimizer}, {asked.trials} trials: {found.median:.2f} times the runs a second "
            f"(quartiles {found.low:.2f} to {found.high:.2f}); {1 / alone:.1f} a second alone, of which products alone "
            f"need {products:.0%}",
            highlight=False,
        )


if __name__ == "__main__":
    main()
