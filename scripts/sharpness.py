"""The measurement behind docs/sharpness.md: does SAM help where labels are wrong, and at what price?

    python -m scripts.sharpness

Three contenders on the built-in task ``digits_noise``: SGD with momentum, the same with SAM, and SGD with twice the
steps, which costs as many gradient evaluations as SAM. Each chooses its settings by the validation split over as many
trials as the others, and is scored on fresh seeds on the report split; differences are taken seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.stats import bootstrap
from torch import nn

import piste
from piste.race.data import Splits, training_batches
from piste.race.tasks.digits import digits_noise as task
from piste.race.training import evaluate, fresh_model

TUNING_SEEDS, SEEDS = (0, 1), tuple(range(100, 110))
RATES = (0.003, 0.01, 0.03, 0.1)
RADII = (0.05, 0.1, 0.2, 0.5)  # the larger half of the cheat-sheet's list
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Contender:
    """A name that ``piste.create`` takes, with its steps and the settings it may choose from."""

    label: str
    optimizer: str
    steps: int
    settings: tuple[dict[str, float], ...]


def contenders() -> tuple[Contender, ...]:
    rates = np.geomspace(RATES[0], RATES[-1], len(RATES) * len(RADII))
    plain = tuple({"lr": round(float(rate), 4)} for rate in rates)
    both = tuple({"lr": rate, "rho": radius} for rate, radius in itertools.product(RATES, RADII))
    return (
        Contender("SGD", "sgd_momentum", task.steps, plain),
        Contender("SGD, twice the steps", "sgd_momentum", 2 * task.steps, plain),
        Contender("SAM round SGD", "sam+sgd_momentum", task.steps, both),
    )


def trained(contender: Contender, settings: dict[str, float], seed: int, splits: Splits) -> nn.Module:
    """The model after a run; weights and batches follow from the seed alone."""
    model = fresh_model(task, seed, CPU)
    optimizer, schedule = piste.create_with_schedule(contender.optimizer, model, contender.steps, **settings)
    batches: Iterator[Any] = training_batches(splits.train, task.batch_size, seed)
    for _ in range(contender.steps):
        batch = next(batches)
        if isinstance(optimizer, piste.SAM):
            piste.sharpness_step(optimizer, model, task.loss, batch)
        else:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        schedule.step()
    return model


def main() -> None:
    splits, all_of_them, scores = task.data(), contenders(), {}
    runs = sum(len(c.settings) * len(TUNING_SEEDS) + len(SEEDS) for c in all_of_them)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=runs)

        def accuracy(contender: Contender, settings: dict[str, float], seed: int, split: Any) -> float:
            score = evaluate(task, trained(contender, settings, seed, splits), split, CPU)[1]
            progress.advance(bar)
            return score

        for contender in all_of_them:
            tuned = [
                np.mean([accuracy(contender, settings, seed, splits.valid) for seed in TUNING_SEEDS])
                for settings in contender.settings
            ]
            best = contender.settings[int(np.argmax(tuned))]
            scores[contender.label] = np.array([accuracy(contender, best, seed, splits.report) for seed in SEEDS])
            console.print(f"{contender.label}: {best}, {interval(scores[contender.label])}")
    for label in ("SGD", "SGD, twice the steps"):
        console.print(f"SAM round SGD minus {label}: {interval(scores['SAM round SGD'] - scores[label])}")


def interval(values: Any) -> str:
    """The mean with its bootstrap interval of 95 %."""
    found = bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return f"{values.mean():.4f} [{found.low:.4f}, {found.high:.4f}]"


if __name__ == "__main__":
    main()
