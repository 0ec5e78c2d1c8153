"""Trials of one contender trained together: their weights stacked, forward and backward one call for all of them.

Every trial keeps a model, an optimizer and a schedule of its own, whose weights are slices of the stack; so whatever an
optimizer does (norms over the whole model, a second pass, matrices) it does within one trial. What is shared is what a
small model spends its time on: calls. The trials of a pack have one seed, hence the same batches, and what a step draws
(dropout) is drawn once for all, as each would have drawn it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import piste
from piste.race.attempt import Attempt, Times, one_line
from piste.race.contenders import Contender
from piste.race.data import Split, Splits, evaluation_batches, to_device, training_batches
from piste.race.record import RunKey, RunRecord
from piste.race.seeds import derived_seed, seed_everything
from piste.race.stack import Stack
from piste.race.task import Task
from piste.race.training import EVALUATION_BATCH, Loop, Progress, fresh_model, mean_scores, prepare

MOST_PARAMETERS = 1_000_000  # a step of larger models is spent on arithmetic and memory, which packs only crowd
_TRIED_MODELS, _TRIED_BATCHES = 3, 2
_TOLERANCE = 1e-4  # of the largest number: sums are taken in another order, and nothing else may differ


def run_pack(
    task: Task, splits: Splits, contender: Contender, keys: Sequence[RunKey], progress: Progress
) -> list[RunRecord]:
    """Make the runs of these keys together. Whatever goes wrong in one of them goes wrong in all, and is raised.

    Args:
        task: the problem; :func:`why_not` has nothing against it.
        splits: its data.
        contender: who runs.
        keys: alike in everything but the hyperparameters, and not timing passes.
        progress: called with the number of steps made, after each.
    """
    times = Times()
    attempts = [Attempt(task, contender, key, times) for key in keys]
    for attempt in attempts:
        prepare(attempt)
    Loop(attempts, Stacked(attempts), splits, times, sparing=False).train(progress)
    return [attempt.recorded() for attempt in attempts]


def why_not(task: Task, splits: Splits, device: torch.device) -> str:
    """What keeps trials of a task from being trained together, in a few words; nothing if they can be.

    Losses, gradients, buffers and scores of a few models are worked out alone and together, and compared.
    """
    parameters = sum(weight.numel() for weight in fresh_model(task, 0, device).parameters())
    if parameters > MOST_PARAMETERS:
        return f"its model has {parameters:,} parameters, and beyond {MOST_PARAMETERS:,} nothing is gained"
    alone, stacked = ([fresh_model(task, seed, device) for seed in range(_TRIED_MODELS)] for _ in range(2))
    batches = training_batches(splits.train, task.batch_size, derived_seed(0, "batches"))
    evaluated, _ = next(evaluation_batches(splits.valid, EVALUATION_BATCH))
    try:
        stack = Stack(task, stacked)
        for number in range(_TRIED_BATCHES):
            batch = to_device(next(batches), device)
            found, expected = _gradients(stack, batch, number), [_plain(task, m, batch, number) for m in alone]
            if not _alike(found, expected):
                return "its losses or gradients come out differently together"
        scores = torch.tensor(stack.scores(to_device(evaluated, device)))
        if not _alike(scores, torch.tensor([_plain_scores(task, m, to_device(evaluated, device)) for m in alone])):
            return "its scores come out differently together"
    except Exception as error:
        return one_line(error)
    return ""


class Stacked:
    """Gradients and scores of many models by one call each; see :class:`piste.race.training.Together`.

    Args:
        runs: prepared; their models' weights and buffers become slices of a stack.
    """

    def __init__(self, runs: Sequence[Attempt]) -> None:
        self.task = runs[0].task
        self.joint: piste.JointStep | None = None
        self._pack(runs)

    def gradients(self, runs: Sequence[Attempt], batch: Any, *, again: bool) -> Sequence[Tensor]:
        """All that are stacked are worked through; gradients are left in the weights of ``runs``."""
        if not again and len(runs) <= len(self.runs) // 2:
            self._pack(runs)
        losses, gradients = self.stack.gradients(batch)
        found = []
        for each in runs:
            place = self.places[each]
            each.gradient_evaluations += 1
            for weight, slices in zip(self.stack.trained[place], gradients, strict=True):
                weight.grad = None if slices is None else slices[place]
            found.append(losses[place])
        return found

    def step(self, runs: Sequence[Attempt]) -> None:
        """All in one where their optimizers allow it; see :class:`piste.JointStep`."""
        optimizers = [run.optimizer for run in runs]
        if self.joint is None or self.joint.optimizers != optimizers:
            self.joint = piste.JointStep(optimizers)
        self.joint.step()

    def scores(self, runs: Sequence[Attempt], split: Split) -> Sequence[tuple[float, float]]:
        """Each as alone, to rounding."""
        self.stack.check()

        def score(batch: Any) -> list[float]:
            return [number for pair in self.stack.scores(batch) for number in pair]

        flat = mean_scores(split, self.runs[0].device, score)
        return [(flat[2 * self.places[run]], flat[2 * self.places[run] + 1]) for run in runs]

    def _pack(self, runs: Sequence[Attempt]) -> None:
        self.runs = list(runs)
        self.places = {run: place for place, run in enumerate(runs)}
        self.stack = Stack(self.task, [run.model for run in runs])


def _gradients(stack: Stack, batch: Any, number: int) -> Tensor:
    """One row a model: its loss, its gradients, its buffers."""
    seed_everything(number)
    losses, gradients = stack.gradients(batch)
    columns = [torch.stack(list(losses))]
    columns += [torch.stack(list(slices)) for slices in gradients if slices is not None]
    columns += stack.buffers.values()
    return torch.cat([column.reshape(len(losses), -1).double() for column in columns], dim=1)


def _plain(task: Task, model: nn.Module, batch: Any, number: int) -> Tensor:
    """The same row by the way that anybody would take."""
    seed_everything(number)
    model.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    numbers = [loss.detach(), *gradients, *model.buffers()]
    return torch.cat([tensor.flatten().double() for tensor in numbers])


@torch.no_grad()
def _plain_scores(task: Task, model: nn.Module, batch: Any) -> tuple[float, float]:
    model.eval()
    loss = float(task.loss(model, batch))
    return loss, loss if task.metric is None else float(task.metric(model, batch))


def _alike(found: Tensor, expected: Sequence[Tensor] | Tensor) -> bool:
    wanted = expected if isinstance(expected, Tensor) else torch.stack(list(expected))
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().max())
    )
