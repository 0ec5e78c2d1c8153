"""``python -m benchmarks.overhead``: what a race's bookkeeping costs a training loop.

Whole runs through ``piste.race.training.run`` take turns with a loop that somebody would write by hand, on the same
task, model, optimizer, schedule and batches. What is compared is the time of training alone, by one clock outside of
both: the race's own evaluations are left out, everything else that it does in a step is in.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.measure import Ratio, clock, ratio, seconds
from piste.race import record
from piste.race.attempt import evaluation_steps
from piste.race.contenders import Contender, make_contenders, make_optimizer
from piste.race.data import Splits, training_batches
from piste.race.record import RunKey
from piste.race.seeds import derived_seed
from piste.race.task import Task, load_task
from piste.race.training import Loop, evaluate, fresh_model, run

TASKS = ("digits_mlp", "char_transformer")
AT_MOST = 1.02


def bare_seconds(task: Task, splits: Splits, contender: Contender, steps: int) -> float:
    """Seconds of the loop that a person would write, who evaluates as often but keeps that out of the time."""
    device = torch.device("cpu")
    model = fresh_model(task, 0, device)
    optimizer, schedule = make_optimizer(contender, model, contender.lr_center, steps, task.domain)
    batches = training_batches(splits.train, task.batch_size, derived_seed(0, "batches"))
    evaluate(task, model, splits.valid, device)
    spent = 0.0
    for stretch in pairwise([0, *sorted(evaluation_steps(steps))]):
        begun = seconds()
        for _ in range(*stretch):
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        spent += seconds() - begun
        evaluate(task, model, splits.valid, device)
    return spent


def raced_seconds(task: Task, splits: Splits, contender: Contender, steps: int) -> float:
    """Seconds of the same steps in a race."""
    key = trial_key(task, contender, contender.lr_center, steps)
    spent = {"train": 0.0, "_evaluate": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            begun = seconds()
            result = function(*arguments)
            spent[name] += seconds() - begun
            return result

        return called

    with ExitStack() as patches:
        for name in spent:
            patches.enter_context(patch.object(Loop, name, timed(name, getattr(Loop, name))))
        made = run(task, splits, contender, key, lambda step: None)
    if not made.finished:
        raise RuntimeError(f"the run of {contender.name} on {task.name} {made.status}: {made.message}")
    return spent["train"] - spent["_evaluate"]


def trial_key(task: Task, contender: Contender, lr: float, steps: int, *, packed: bool = False) -> RunKey:
    """A trial on the CPU that belongs to no race."""
    about = (task.name, "", contender.name, contender.optimizer, contender.schedule)
    return RunKey(*about, {"lr": lr}, steps, 0, record.TUNE, "cpu", {}, packed=packed)


def overhead(name: str, optimizer: str, steps: int, rounds: int) -> tuple[Ratio, float]:
    """The race's seconds as a multiple of the bare loop's, and the bare loop's seconds of a step."""
    task = load_task(name).task
    splits = task.data()
    (contender,) = make_contenders([optimizer], [])
    jobs = (bare_seconds, raced_seconds)
    taken: dict[str, list[float]] = {job.__name__: [] for job in jobs}
    for turn in range(-1, rounds):
        for job in jobs if turn % 2 else jobs[::-1]:
            spent = job(task, splits, contender, steps)
            if turn >= 0:  # the first round compiles and fills the caches
                taken[job.__name__].append(spent)
    bare, raced = taken.values()
    return ratio(raced, bare), statistics.median(bare) / steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="one of the tasks; may be repeated")
    parser.add_argument("--optimizer", default="adamw", help="who trains (default: adamw)")
    parser.add_argument("--steps", type=int, default=200, help="of a run (default: 200)")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each, in turn (default: 15)")
    parser.add_argument("--processor-time", action="store_true", help="for machines that others use at the same time")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=120)
    for name in asked.task or TASKS:
        with clock(of_processor=asked.processor_time):
            found, step = overhead(name, asked.optimizer, asked.steps, asked.rounds)
        console.print(
            f"{name}, {asked.optimizer}: a step of {1e6 * step:.0f} us takes {found.median:.3f} times as long in a "
            f"race (quartiles {found.low:.3f} to {found.high:.3f}; at most {AT_MOST} is wanted)",
            highlight=False,
        )


if __name__ == "__main__":
    main()
