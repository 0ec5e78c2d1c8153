"""A look at a task before it is raced: does every part give what it should, and how long does a step take?"""

from __future__ import annotations

import hashlib
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piste.race import environment
from piste.race.attempt import EVALUATIONS, one_line
from piste.race.canonical import canonical_json
from piste.race.data import Splits, fingerprint, length, to_device, training_batches
from piste.race.packed import why_not
from piste.race.seeds import seed_everything
from piste.race.task import LoadedTask, Task, TaskError
from piste.race.training import evaluate, fresh_model

_TIMED_STEPS = 5


@dataclass(frozen=True)
class TaskCard:
    """What the driver of a race knows about a task; the task itself lives in the worker processes.

    Args:
        reference: how the workers find it: a built-in name, or ``/path/my_task.py:name``.
        name: the task's name.
        task_hash: hash of its source, settings and a fingerprint of its data.
        description: one line.
        metric_name: what the scores are.
        higher_is_better: their direction.
        steps: steps of one run by default.
        parameters: trained weights of the model.
        examples: number of training, validation and report examples.
        step_seconds: wall time of one training step here, for the estimate of the race's duration.
        evaluation_seconds: wall time of one look at the validation split.
        peak_bytes: memory that the worker's process needed for that, Python included; 0 where it is unknown.
        packs: whether its trials are trained together.
        not_packed: why not, where that was asked for.
    """

    reference: str
    name: str
    task_hash: str
    description: str
    metric_name: str
    higher_is_better: bool
    steps: int
    parameters: int
    examples: tuple[int, int, int]
    step_seconds: float
    evaluation_seconds: float
    peak_bytes: int = 0
    packs: bool = False
    not_packed: str = ""

    def run_seconds(self, steps: int) -> float:
        """A guess of how long a run takes."""
        return steps * self.step_seconds + (EVALUATIONS + 2) * self.evaluation_seconds


def load_data(task: Task) -> Splits:
    """The task's data, checked.

    Raises:
        TaskError: ``data`` raises, or gives something other than ``Splits``.
    """
    # Synthetic data is the same in every process.
    seed_everything(0)
    with _blaming(task, "data()"):
        splits: object = task.data()
    if not isinstance(splits, Splits):
        raise TaskError(f"task {task.name}: data() must return piste.race.Splits, not {type(splits).__name__}")
    count = length(splits.train)
    if count < task.batch_size:
        raise TaskError(f"task {task.name}: batch_size is {task.batch_size}, but there are {count} training examples")
    return splits


def task_hash(loaded: LoadedTask, splits: Splits) -> str:
    """What a run of this task depends on, as one hash: source file, settings, data."""
    task = loaded.task
    seed_everything(0)
    with _blaming(task, "reading the data"):
        data = fingerprint(splits)
    settings = repr(sorted(task.settings.items()))
    about = [task.name, task.version, task.batch_size, task.metric_name, task.domain, settings]
    parts = [loaded.source_hash, *about, data]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:20]


def inspect_task(
    reference: str, task: Task, task_hash: str, splits: Splits, device: torch.device, *, pack: bool = False
) -> TaskCard:
    """Run every part of a task once and time it; where ``pack`` asks for it, see whether its trials can be packed.

    Raises:
        TaskError: a part raises or gives something it should not; the message says which.
    """
    model = _checked_model(task, device)
    step_seconds = _check_loss(task, model, splits, device)
    evaluation_seconds = _check_evaluation(task, model, splits, device)
    not_packed = why_not(task, splits, device) if pack else ""
    return TaskCard(
        reference=reference,
        name=task.name,
        task_hash=task_hash,
        description=task.description,
        metric_name=task.metric_name,
        higher_is_better=task.higher_is_better,
        steps=task.steps,
        parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        examples=(length(splits.train), length(splits.valid), length(splits.report)),
        step_seconds=step_seconds,
        evaluation_seconds=evaluation_seconds,
        peak_bytes=environment.peak_bytes(device),
        packs=pack and not not_packed,
        not_packed=not_packed,
    )


def _checked_model(task: Task, device: torch.device) -> nn.Module:
    with _blaming(task, "model()"):
        made: object = task.model()
        again: object = task.model()
    if not isinstance(made, nn.Module):
        raise TaskError(f"task {task.name}: model() must return a torch.nn.Module, not {type(made).__name__}")
    if made is again:
        raise TaskError(
            f"task {task.name}: model() must make a new model at every call; it returned the same one twice"
        )
    if not any(weight.requires_grad for weight in made.parameters()):
        raise TaskError(f"task {task.name}: the model has no weights to train")
    with _blaming(task, "model()"):
        first, second = (fresh_model(task, 0, device) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)):
        raise TaskError(
            f"task {task.name}: model() gives other initial weights after the same torch.manual_seed; "
            "contenders could not start from the same ones"
        )
    return first


def _check_loss(task: Task, model: nn.Module, splits: Splits, device: torch.device) -> float:
    """Make a few training steps; returns the seconds of one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8)
    with _blaming(task, "reading the training data"):
        batches = training_batches(splits.train, task.batch_size, seed=0)
        batch = next(batches)
    seconds = math.inf
    for _ in range(_TIMED_STEPS):
        start = time.perf_counter()
        with _blaming(task, "loss(model, batch)"):
            loss: object = task.loss(model, to_device(batch, device))
        _check_scalar(task, loss)
        with _blaming(task, "the gradient of the loss"):
            loss.backward()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        batch = next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def _check_scalar(task: Task, loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"task {task.name}: loss(model, batch) must return a scalar tensor, not {shape}")
    if not loss.requires_grad:
        raise TaskError(f"task {task.name}: the loss does not depend on the model's weights (it has no gradient)")
    if not math.isfinite(float(loss.detach())):
        raise TaskError(f"task {task.name}: the loss of the untrained model is {float(loss.detach())}")


def _check_evaluation(task: Task, model: nn.Module, splits: Splits, device: torch.device) -> float:
    """Evaluate once; returns the seconds it took."""
    what = "metric(model, batch)" if task.metric is not None else "loss(model, batch) in evaluation mode"
    start = time.perf_counter()
    with _blaming(task, what, hint="; it must return one number"):
        values = evaluate(task, model, splits.valid, device)
    seconds = time.perf_counter() - start
    if not all(map(math.isfinite, values)):
        raise TaskError(
            f"task {task.name}: on the validation split the untrained model's {task.metric_name} is not finite"
        )
    return seconds


@contextmanager
def _blaming(task: Task, what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises into one message that names the task, the part and the line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TaskError(f"task {task.name}: {what} raises {one_line(error)}{_place(task, error)}{hint}") from error


def _place(task: Task, error: BaseException) -> str:
    """The deepest line of the user's own file that an error passed through."""
    functions: list[Any] = [task.model, task.data, task.loss, task.metric]
    files = {function.__code__.co_filename for function in functions if hasattr(function, "__code__")}
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
