"""One run: train a task's model with one contender at one learning rate, and record how it went.

Random numbers are common to all contenders: the seed decides initial weights and batch order, and every step draws
its dropout (or augmentation) from (seed, step) alone, whatever the optimizer drew before.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import piste
from piste.race import environment, record
from piste.race.contenders import Contender, make_optimizer
from piste.race.costs import WARM_UP_STEPS, Stopwatch
from piste.race.data import Split, Splits, evaluation_batches, to_device, training_batches
from piste.race.record import Cost, Curve, RunKey, RunRecord
from piste.race.task import Task
from piste.race.words import single_line

EVALUATIONS = 8
EVALUATION_BATCH = 256
# A mean training loss of ten times that of the untrained model, over a whole stretch between two evaluations, is
# taken for divergence. Nothing else is stopped early: ranks flip while learning rates still fall.
DIVERGED_FACTOR = 10.0
_CUDA_CHECK_EVERY = 10  # steps between waits for the device, which would slow it if made at every step

Progress = Callable[[int], None]


class DivergedError(Exception):
    """The loss is no longer finite, or far above where it started."""


def run(task: Task, splits: Splits, contender: Contender, key: RunKey, progress: Progress) -> RunRecord:
    """Make the run that ``key`` names. Whatever goes wrong inside is an outcome, not an exception.

    Args:
        task: the problem.
        splits: its data.
        contender: who runs.
        key: lr, steps, seed, phase, device.
        progress: called with the number of steps made, after each.
    """
    attempt = _Attempt(task, splits, contender, key)
    status, message = record.FINISHED, ""
    try:
        attempt.train(progress)
    except DivergedError as divergence:
        status, message = record.DIVERGED, str(divergence)
    except (MemoryError, torch.OutOfMemoryError) as error:
        status, message = record.OUT_OF_MEMORY, one_line(error)
    except (Exception, SystemExit) as error:
        status, message = _failure(error)
    return attempt.recorded(status, message)


def fresh_model(task: Task, seed: int, device: torch.device) -> nn.Module:
    """The task's model with the initial weights of this seed, made on the CPU so that devices agree."""
    seed_everything(derived_seed(seed, "weights"))
    return task.model().to(device)


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that their random numbers have nothing to do with each other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "big")


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and ``random``."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """With the weights that an optimizer means to be evaluated: schedule-free ones train with others."""
    to_evaluation, to_training = (getattr(optimizer, name, lambda: None) for name in ("eval", "train"))
    to_evaluation()
    try:
        yield
    finally:
        to_training()


def evaluate(task: Task, model: nn.Module, split: Split, device: torch.device) -> tuple[float, float]:
    """Loss and metric on a whole split, in evaluation mode; the metric is the loss where the task has none."""
    was_training = model.training
    model.eval()
    losses, metrics, count = 0.0, 0.0, 0
    with torch.no_grad():
        for batch, examples in evaluation_batches(split, EVALUATION_BATCH):
            batch = to_device(batch, device)
            losses += examples * float(task.loss(model, batch))
            if task.metric is not None:
                metrics += examples * float(task.metric(model, batch))
            count += examples
    model.train(was_training)
    loss = losses / count
    return loss, loss if task.metric is None else metrics / count


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps from step to step, each counted once."""
    saved = (value for key, value in optimizer.state_dict().items() if key != "param_groups")
    unsaved = getattr(optimizer, "buffers", lambda: ())()  # SAM's copies of the weights
    found = {id(tensor): tensor for tensor in (*_tensors(saved), *unsaved)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


class _Attempt:
    """The state of a run while it goes; what it holds when it ends, however that happens, becomes the record."""

    def __init__(self, task: Task, splits: Splits, contender: Contender, key: RunKey) -> None:
        self.task = task
        self.splits = splits
        self.contender = contender
        self.key = key
        self.device = torch.device(key.device)
        self.curve = Curve()
        self.stopwatch = Stopwatch()
        self.seconds = 0.0
        self.evaluation_seconds = 0.0
        self.steps = 0
        self.gradient_evaluations = 0
        self.parameters = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.test: tuple[float, float] | None = None
        environment.reset_peak(self.device)

    def train(self, progress: Progress) -> None:
        model = fresh_model(self.task, self.key.seed, self.device)
        self.parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        others = {name: value for name, value in self.key.hyperparameters.items() if name != "lr"}
        self.optimizer, schedule = make_optimizer(
            self.contender,
            model,
            self.key.lr,
            self.key.steps,
            self.task.domain,
            others=others,
            fixed=self.task.settings,
        )
        batches = training_batches(self.splits.train, self.task.batch_size, derived_seed(self.key.seed, "batches"))
        # A timing pass evaluates nothing: it would only make room in the caches.
        stops = set() if self.key.phase == record.TIME else evaluation_steps(self.key.steps)
        if stops:
            self._evaluate(0, model, self.optimizer, math.nan)
        losses: list[Tensor] = []
        stretch = self._clock()
        for number in range(1, self.key.steps + 1):
            seed_everything(derived_seed(self.key.seed, f"step {number}"))
            losses.append(self._step(number, model, self.optimizer, schedule, batches, traced=number in stops))
            self.steps = number
            self._check(number, losses[-1])
            progress(number)
            if number in stops:
                self.seconds += self._clock() - stretch
                self._evaluate(number, model, self.optimizer, float(torch.stack(losses).mean()))
                losses.clear()
                stretch = self._clock()
        if not stops:
            self.seconds = self._clock() - stretch
        if self.key.phase == record.CONFIRM:
            with evaluating(self.optimizer):
                self.test = evaluate(self.task, model, self.splits.report, self.device)
            if not all(map(math.isfinite, self.test)):
                raise DivergedError("the score on the report split is not finite")

    def recorded(self, status: str, message: str) -> RunRecord:
        """The record of what happened so far, under the given status."""
        test_loss, test_metric = self.test if self.test and status == record.FINISHED else (None, None)
        cost = Cost(
            **self.stopwatch.times(),
            state_bytes=state_bytes(self.optimizer) if self.optimizer else 0,
            peak_bytes=environment.peak_bytes(self.device),
            gradient_evaluations=self.gradient_evaluations,
            parameters=self.parameters,
            steps=self.steps,
            examples=self.steps * self.task.batch_size,
            train_seconds=self.seconds,
            evaluation_seconds=self.evaluation_seconds,
        )
        cost = replace(cost, optimizer_total_seconds=self.steps * cost.mean_optimizer_seconds)
        return new_record(self.key, status, message, self.curve, cost, test_loss, test_metric)

    def _step(
        self,
        number: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        batches: Iterator[Any],
        traced: bool,
    ) -> Tensor:
        timed = self.device.type == "cpu" or number <= WARM_UP_STEPS or number % _CUDA_CHECK_EVERY == 0
        start = self._clock(timed)
        optimizer.zero_grad()
        batch = to_device(next(batches), self.device)
        loss = self._evaluate_gradient(model, batch)
        if number == 1 or traced:
            start += self._trace(number, model, optimizer, loss, entries=(number == 1) + traced)
        before = self._clock(timed)
        if isinstance(optimizer, piste.SAM) and optimizer.needs_two_passes and optimizer.first_step():
            self._evaluate_gradient(model, batch)
        optimizer.step()
        after = self._clock(timed)
        schedule.step()
        if timed:
            refreshed = getattr(getattr(optimizer, "last_step", None), "renewed", False)
            self.stopwatch.add(number, self._clock() - start, after - before, refreshed=refreshed)
        return loss.detach()

    def _trace(
        self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, entries: int
    ) -> float:
        """Note learning rate and gradient norm, and the loss of the first batch; returns how long that took.

        The first step stands for the evaluation before it, and one that is evaluated after the first step for both.
        """
        if self.key.phase == record.TIME:
            return 0.0
        begun = self._clock()
        norms = [weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else math.nan
        self.curve.lr += entries * [float(optimizer.param_groups[0]["lr"])]
        self.curve.gradient_norm += entries * [norm]
        if number == 1:
            self.curve.train_loss[0] = float(loss.detach())
        return self._clock() - begun

    def _evaluate_gradient(self, model: nn.Module, batch: Any) -> Tensor:
        loss = self.task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradient_evaluations += 1
        return loss

    def _check(self, number: int, loss: Tensor) -> None:
        if self.device.type == "cpu" or number % _CUDA_CHECK_EVERY == 0:
            value = float(loss)
            if not math.isfinite(value):
                raise DivergedError(f"the training loss became {value} at step {number} of {self.key.steps}")

    def _evaluate(self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer, train_loss: float) -> None:
        begun = self._clock()
        with evaluating(optimizer):
            loss, metric = evaluate(self.task, model, self.splits.valid, self.device)
        self.evaluation_seconds += self._clock() - begun
        self.curve.step.append(number)
        self.curve.train_seconds.append(self.seconds)
        self.curve.train_loss.append(train_loss)
        self.curve.valid_loss.append(loss)
        self.curve.valid_metric.append(metric)
        for name, value in (("loss", loss), (self.task.metric_name, metric)):
            if not math.isfinite(value):
                raise DivergedError(f"the validation {name} became {value} at step {number} of {self.key.steps}")
        first = self.curve.train_loss[0]
        if 0 < DIVERGED_FACTOR * first < train_loss:
            raise DivergedError(
                f"the training loss rose from {first:.3g} to {train_loss:.3g} by step {number} of {self.key.steps}"
            )

    def _clock(self, wait: bool = True) -> float:
        """Seconds; on CUDA after everything asked of the device is done, for only then does a time mean anything."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def evaluation_steps(steps: int) -> set[int]:
    """After which steps the validation split is looked at: evenly spaced, the last step among them."""
    return {math.ceil(part * steps / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}


def new_record(
    key: RunKey,
    status: str,
    message: str,
    curve: Curve | None = None,
    cost: Cost | None = None,
    test_loss: float | None = None,
    test_metric: float | None = None,
    machine: dict[str, str] | None = None,
) -> RunRecord:
    """A record made now; on this machine, unless another is named."""
    return RunRecord(
        schema=record.SCHEMA,
        id=key.id,
        key=key,
        status=status,
        message=message,
        curve=curve or Curve(),
        test_loss=test_loss,
        test_metric=test_metric,
        cost=cost or Cost.unknown(),
        machine=machine or environment.machine(key.device),
        created=environment.now(),
    )


def one_line(error: BaseException) -> str:
    """An error as one line of at most 200 characters, none of which a terminal obeys."""
    text = single_line(str(error).split("\n", 1)[0])
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _failure(error: BaseException) -> tuple[str, str]:
    """Status and message of a run that raised. The traceback goes to the worker's log."""
    traceback.print_exception(error, file=sys.stderr)
    # The CPU allocator has no error class of its own.
    is_memory = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return (record.OUT_OF_MEMORY if is_memory else record.FAILED), one_line(error)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested mappings and sequences."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
