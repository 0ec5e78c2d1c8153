"""What a run holds while it goes, the rules that each keeps to, and the record it becomes.

Nothing here trains: the loop stands in ``piste.race.training``, and is the same for a run by itself and for several at
once.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import piste
from piste.race import environment, record
from piste.race.contenders import Contender
from piste.race.costs import Stopwatch
from piste.race.record import Cost, Curve, RunKey, RunRecord
from piste.race.task import Task
from piste.race.words import single_line

EVALUATIONS = 8
# A mean training loss of ten times that of the untrained model, over a whole stretch between two evaluations, is
# taken for divergence. Nothing else is stopped early: ranks flip while learning rates still fall.
DIVERGED_FACTOR = 10.0
CUDA_CHECK_EVERY = 10  # steps between waits for the device, which would slow it if made at every step


@dataclass
class Times:
    """Wall times of the loop: single steps, all training, all evaluations. They are a run's where it was alone."""

    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    train: float = 0.0
    evaluation: float = 0.0


class Attempt:
    """The state of a run while it goes; what it holds when it ends, however that happens, becomes the record.

    Args:
        task: the problem.
        contender: who runs.
        key: lr, steps, seed, phase, device.
        times: of the loop that makes it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def __init__(self, task: Task, contender: Contender, key: RunKey, times: Times) -> None:
        self.task = task
        self.contender = contender
        self.key = key
        self.times = times
        self.device = torch.device(key.device)
        self.curve = Curve()
        self.losses: list[Tensor] = []  # since the last evaluation
        self.steps = 0
        self.gradient_evaluations = 0
        self.weights: list[nn.Parameter] = []
        self.parameters = 0
        self.test: tuple[float, float] | None = None
        self.status, self.message = "", ""
        environment.reset_peak(self.device)

    def equip(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """What is trained, and what trains it."""
        self.weights = list(model.parameters())
        self.parameters = sum(weight.numel() for weight in self.weights if weight.requires_grad)
        self.model, self.optimizer, self.schedule = model, optimizer, schedule

    @property
    def going(self) -> bool:
        """Whether it has not ended yet."""
        return not self.status

    def end(self, status: str, message: str = "") -> None:
        """It is over, and this is why."""
        self.status, self.message = status, message

    def fail(self, error: BaseException) -> None:
        """It is over by an error, whose traceback goes to the worker's log."""
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self.end(record.OUT_OF_MEMORY, one_line(error))
            return
        traceback.print_exception(error, file=sys.stderr)
        # The CPU allocator has no error class of its own.
        is_memory = isinstance(error, RuntimeError) and "allocate memory" in str(error)
        self.end(record.OUT_OF_MEMORY if is_memory else record.FAILED, one_line(error))

    def asks_again(self) -> bool:
        """Whether its optimizer has moved the weights and wants their gradient there before it steps."""
        optimizer = self.optimizer
        return isinstance(optimizer, piste.SAM) and optimizer.needs_two_passes and optimizer.first_step()

    def trace(self, number: int, loss: Tensor, entries: int) -> None:
        """Note learning rate and gradient norm ``entries`` times, and the loss of the first batch."""
        gradients = [weight.grad.float() for weight in self.weights if weight.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else math.nan
        self.curve.lr += entries * [float(self.optimizer.param_groups[0]["lr"])]
        self.curve.gradient_norm += entries * [norm]
        if number == 1:
            self.curve.train_loss[0] = float(loss)

    def stepped(self, number: int, loss: Tensor) -> bool:
        """A step is made; a loss that is not finite ends the run. Returns whether it goes on."""
        self.losses.append(loss)
        self.steps = number
        if self.device.type == "cpu" or number % CUDA_CHECK_EVERY == 0:
            value = float(loss)
            if not math.isfinite(value):
                self._diverge("training loss", value, number)
                return False
        return True

    def evaluated(self, number: int, loss: float, metric: float) -> None:
        """Add scores of the validation split to the curve; what they show may end the run."""
        train_loss = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        self.losses.clear()
        self.curve.step.append(number)
        self.curve.train_seconds.append(math.nan if self.key.packed else self.times.train)
        self.curve.train_loss.append(train_loss)
        self.curve.valid_loss.append(loss)
        self.curve.valid_metric.append(metric)
        first = self.curve.train_loss[0]
        for name, value in (("loss", loss), (self.task.metric_name, metric)):
            if not math.isfinite(value):
                self._diverge(f"validation {name}", value, number)
                return
        if 0 < DIVERGED_FACTOR * first < train_loss:
            rise = f"rose from {first:.3g} to {train_loss:.3g} by step {number} of {self.key.steps}"
            self.end(record.DIVERGED, f"the training loss {rise}")

    def scored(self, loss: float, metric: float) -> None:
        """The report split was looked at."""
        self.test = loss, metric
        if not all(map(math.isfinite, self.test)):
            self.end(record.DIVERGED, "the score on the report split is not finite")

    def recorded(self) -> RunRecord:
        """The record of what happened, after :meth:`end` or :meth:`fail`."""
        test_loss, test_metric = self.test if self.test and self.status == record.FINISHED else (None, None)
        made = Cost(
            **(Stopwatch() if self.key.packed else self.times.stopwatch).times(),
            state_bytes=state_bytes(self.optimizer) if hasattr(self, "optimizer") else 0,
            peak_bytes=0 if self.key.packed else environment.peak_bytes(self.device),
            gradient_evaluations=self.gradient_evaluations,
            parameters=self.parameters,
            steps=self.steps,
            examples=self.steps * self.task.batch_size,
        )
        cost = made if self.key.packed else self._timed(made)
        return new_record(self.key, self.status, self.message, self.curve, cost, test_loss, test_metric)

    def _timed(self, cost: Cost) -> Cost:
        return replace(
            cost,
            train_seconds=self.times.train,
            evaluation_seconds=self.times.evaluation,
            optimizer_total_seconds=self.steps * cost.mean_optimizer_seconds,
        )

    def _diverge(self, what: str, value: float, number: int) -> None:
        self.end(record.DIVERGED, f"the {what} became {value} at step {number} of {self.key.steps}")


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
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= 200 else f"{line[:199]}…"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps from step to step, each counted once."""
    saved = (value for key, value in optimizer.state_dict().items() if key != "param_groups")
    unsaved = getattr(optimizer, "buffers", lambda: ())()  # SAM's copies of the weights
    found = {id(tensor): tensor for tensor in (*_tensors(saved), *unsaved)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested mappings and sequences."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
