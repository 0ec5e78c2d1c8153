"""One run: train a task's model with one contender at one learning rate, and record how it went.

Random numbers are common to all contenders: the seed decides initial weights and batch order, and every step draws
its dropout (or augmentation) from (seed, step) alone, whatever the optimizer drew before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import piste
from piste.race import record
from piste.race.attempt import CUDA_CHECK_EVERY, Attempt, Times, evaluation_steps
from piste.race.contenders import Contender, make_optimizer
from piste.race.costs import WARM_UP_STEPS
from piste.race.data import Split, Splits, evaluation_batches, is_on, to_device, training_batches
from piste.race.record import RunKey, RunRecord
from piste.race.seeds import LateDrawError, StepSeeds, derived_seed, seed_everything
from piste.race.task import Task

__all__ = [
    "Alone",
    "Loop",
    "Progress",
    "Together",
    "evaluate",
    "evaluating",
    "fresh_model",
    "mean_scores",
    "prepare",
    "run",
]

EVALUATION_BATCH = 256

Progress = Callable[[int], None]


def run(task: Task, splits: Splits, contender: Contender, key: RunKey, progress: Progress) -> RunRecord:
    """Make the run that ``key`` names. Whatever goes wrong inside is an outcome, not an exception.

    Args:
        task: the problem.
        splits: its data.
        contender: who runs.
        key: lr, steps, seed, phase, device.
        progress: called with the number of steps made, after each.
    """
    try:
        return _made(task, splits, contender, key, progress, sparing=True)
    except LateDrawError:
        return _made(task, splits, contender, key, progress, sparing=False)


def _made(
    task: Task, splits: Splits, contender: Contender, key: RunKey, progress: Progress, *, sparing: bool
) -> RunRecord:
    times = Times()
    attempt = Attempt(task, contender, key, times)
    try:
        prepare(attempt)
        Loop([attempt], Alone(), splits, times, sparing=sparing).train(progress)
    except LateDrawError:
        raise
    except (Exception, SystemExit) as error:
        attempt.fail(error)
    return attempt.recorded()


def prepare(attempt: Attempt) -> None:
    """Make the model with the initial weights of its seed, the optimizer and the schedule of a run."""
    task, key = attempt.task, attempt.key
    model = fresh_model(task, key.seed, attempt.device)
    others = {name: value for name, value in key.hyperparameters.items() if name != "lr"}
    made = make_optimizer(attempt.contender, model, key.lr, key.steps, task.domain, others=others, fixed=task.settings)
    attempt.equip(model, *made)


def fresh_model(task: Task, seed: int, device: torch.device) -> nn.Module:
    """The task's model with the initial weights of this seed, made on the CPU so that devices agree."""
    seed_everything(derived_seed(seed, "weights"))
    return task.model().to(device)


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

    def score(batch: Any) -> list[float]:
        loss = float(task.loss(model, batch))
        return [loss, loss if task.metric is None else float(task.metric(model, batch))]

    was_training = model.training
    model.eval()
    loss, metric = mean_scores(split, device, score)
    model.train(was_training)
    return loss, metric


def mean_scores(split: Split, device: torch.device, score: Callable[[Any], list[float]]) -> list[float]:
    """Means over the examples of a split of what ``score`` gives for a batch, without gradients."""
    sums: list[float] = []
    count = 0
    with torch.no_grad():
        for batch, examples in evaluation_batches(split, EVALUATION_BATCH):
            scores = score(to_device(batch, device))
            sums = [a + examples * b for a, b in zip(sums or len(scores) * [0.0], scores, strict=True)]
            count += examples
    return [total / count for total in sums]


class Together(Protocol):
    """How runs side by side come by their gradients and scores."""

    def gradients(self, runs: Sequence[Attempt], batch: Any, *, again: bool) -> Sequence[Tensor]:
        """Leave the gradients of a batch in the weights of these runs, and no others; returns the losses.

        Args:
            runs: all that go on; for a second pass those that asked for it.
            batch: for all of them.
            again: whether it is a second pass.
        """

    def step(self, runs: Sequence[Attempt]) -> None:
        """Have the optimizers of these runs take their steps."""

    def scores(self, runs: Sequence[Attempt], split: Split) -> Sequence[tuple[float, float]]:
        """Loss and metric of these runs on a whole split."""


class Alone:
    """One after the other, as anybody would."""

    def gradients(self, runs: Sequence[Attempt], batch: Any, *, again: bool) -> Sequence[Tensor]:
        """See :class:`Together`."""
        losses = []
        for run in runs:
            run.gradient_evaluations += 1
            if not again:
                run.optimizer.zero_grad()
            loss = run.task.loss(run.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return losses

    def step(self, runs: Sequence[Attempt]) -> None:
        """See :class:`Together`."""
        for run in runs:
            run.optimizer.step()

    def scores(self, runs: Sequence[Attempt], split: Split) -> Sequence[tuple[float, float]]:
        """See :class:`Together`."""
        return [evaluate(run.task, run.model, split, run.device) for run in runs]


class Loop:
    """Trains runs of one task, seed, length and phase, step by step, until all have ended.

    Args:
        runs: prepared, and nothing trained yet.
        together: where gradients and scores come from.
        splits: the task's data.
        times: filled as it goes.
        sparing: as for :class:`StepSeeds`.
    """

    def __init__(
        self, runs: Sequence[Attempt], together: Together, splits: Splits, times: Times, *, sparing: bool
    ) -> None:
        self.going = list(runs)
        self.together = together
        self.splits = splits
        self.times = times
        self.task, self.key, self.device = runs[0].task, runs[0].key, runs[0].device
        # A timing pass evaluates nothing: it would only make room in the caches.
        self.stops = set() if self.key.phase == record.TIME else evaluation_steps(self.key.steps)
        self.seeds = StepSeeds(self.key.seed, self.key.steps, self.stops, self.device, sparing)
        self.on_cpu = self.device.type == "cpu"
        self.moves = not is_on(splits.train, self.device)
        self.passes = 2 if any(isinstance(run.optimizer, piste.SAM) for run in runs) else 1

    def train(self, progress: Progress) -> None:
        """Make all steps, ``progress`` being told the number of each.

        Raises:
            LateDrawError: see :class:`StepSeeds`.
        """
        key = self.key
        batches = training_batches(self.splits.train, self.task.batch_size, derived_seed(key.seed, "batches"))
        if self.stops:
            self._evaluate(0)
        stretch = self._clock()
        for number in range(1, key.steps + 1):
            if not self.going:
                return
            self.seeds.begin(number)
            self._step(number, batches)
            progress(number)
            if number in self.stops:
                self.times.train += self._clock() - stretch
                self._evaluate(number)
                stretch = self._clock()
        if not self.stops:
            self.times.train = self._clock() - stretch
        if key.phase == record.CONFIRM:
            for run, score in zip(self.going, self._scores(self.splits.report), strict=True):
                run.scored(*score)
        for run in self.going:
            if run.going:
                run.end(record.FINISHED)

    def _step(self, number: int, batches: Iterator[Any]) -> None:
        going = self.going
        timed = self.on_cpu or number <= WARM_UP_STEPS or number % CUDA_CHECK_EVERY == 0
        start = self._clock() if timed else 0.0
        batch = next(batches)
        if self.moves:
            batch = to_device(batch, self.device)
        losses = self.together.gradients(going, batch, again=False)
        if number == 1 or number in self.stops:
            start += self._trace(number, losses)
        before = self._clock() if timed else 0.0
        if self.passes > 1:
            again = [run for run in going if run.asks_again()]
            if again:
                self.together.gradients(again, batch, again=True)
        self.together.step(going)
        after = self._clock() if timed else 0.0
        for run in going:
            run.schedule.step()
        if timed:
            last = getattr(going[0].optimizer, "last_step", None)
            refreshed = getattr(last, "renewed", False)
            self.times.stopwatch.add(number, self._clock() - start, after - before, refreshed=refreshed)
        ended = [run for run, loss in zip(going, losses, strict=True) if not run.stepped(number, loss)]
        if ended:
            self.going = [run for run in going if run not in ended]

    def _trace(self, number: int, losses: Sequence[Tensor]) -> float:
        """Have runs note where they are; returns how long that took.

        The first step stands for the evaluation before it, and one that is evaluated after the first step for both.
        """
        if not self.stops:
            return 0.0
        begun = self._clock()
        for run, loss in zip(self.going, losses, strict=True):
            run.trace(number, loss, entries=(number == 1) + (number in self.stops))
        return self._clock() - begun

    def _evaluate(self, number: int) -> None:
        begun = self._clock()
        scores = self._scores(self.splits.valid)
        self.times.evaluation += self._clock() - begun
        for run, score in zip(self.going, scores, strict=True):
            run.evaluated(number, *score)
        self.going = [run for run in self.going if run.going]

    def _scores(self, split: Split) -> Sequence[tuple[float, float]]:
        if not self.going:
            return []
        with ExitStack() as stack:
            for run in self.going:
                stack.enter_context(evaluating(run.optimizer))
            return self.together.scores(self.going, split)

    def _clock(self) -> float:
        """Seconds; on CUDA after everything asked of the device is done, for only then does a time mean anything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
