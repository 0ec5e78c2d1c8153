"""The file that ``piste race --new my_task.py`` writes: it runs as it is, with every place to change marked."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

__all__ = ["STARTER", "write_starter"]

STARTER = '''"""A task for `piste race {file}`. It runs as it is; your model, data and loss go where it says so."""

import torch
from torch import nn

from piste.race import Splits, Task


# 1. The model: a new one at every call. The race seeds torch before, so all optimizers start from the same weights.
def model():
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


# 2. The data, in three parts: `train` is trained on, `valid` chooses the learning rate, `report` makes the scores and
#    is used for nothing else. A part is a tuple of tensors of equal length, or a map-style torch Dataset.
def data():
    generator = torch.Generator().manual_seed(0)
    turn = torch.rand(3000, generator=generator) * 9
    label = torch.randint(2, (3000,), generator=generator)
    angle = turn + label * torch.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * turn[:, None] / 9
    points += 0.03 * torch.randn(points.shape, generator=generator)
    return Splits(
        train=(points[:2000], label[:2000]),
        valid=(points[2000:2500], label[2000:2500]),
        report=(points[2500:], label[2500:]),
    )


# 3. The loss that is trained: a scalar, averaged over the batch.
def loss(model, batch):
    points, label = batch
    return nn.functional.cross_entropy(model(points), label)


# 4. The number you care about, averaged over the batch (leave it out of the task to take the loss).
def accuracy(model, batch):
    points, label = batch
    return (model(points).argmax(dim=1) == label).float().mean()


task = Task(
    name="{name}",
    model=model,
    data=data,
    loss=loss,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=600,
    batch_size=64,
    description="two spirals, to be replaced by your problem",
    # domain="vision",  # or "nlp" or "rl": for optimizers with a setting by field, such as AdaBelief's eps
    # version="2",  # change it when data outside this file changes: earlier runs then no longer count
)
'''


def write_starter(path: Path) -> None:
    """Write the starter task, unless something is in its place."""
    legal = path.stem.replace("-", "_").isidentifier() and not path.stem.startswith(("_", "-"))
    if path.suffix != ".py" or not legal:
        raise click.UsageError(f"--new {path}: the file must be called like my_task.py, with a letter first")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.replace("{file}", str(path)).replace("{name}", path.stem))
    except FileExistsError:
        raise click.UsageError(f"--new {path}: there is such a file, and it stays as it is") from None
    except OSError as error:
        raise click.UsageError(f"--new {path}: {error.strerror}") from None
    click.echo(f"wrote {path}; it runs as it is: piste race {shlex.quote(str(path))}")
