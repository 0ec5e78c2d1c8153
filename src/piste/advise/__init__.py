"""What the literature, and the cheat-sheet that piste began with, have to say about a model and what trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from piste.advise.finding import SEVERITIES, Finding, Rule
from piste.advise.rules import RULES
from piste.advise.setup import Setup
from piste.wrappers import ModelEMA

__all__ = ["RULES", "SEVERITIES", "Finding", "Rule", "Setup", "advise", "judge"]


def advise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    precision: str = "fp32",
    scaler: bool = True,
    total_steps: int | None = None,
    schedule_steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    domain: str = "",
    clip_norm: float | None = None,
    ema: ModelEMA | None = None,
    evaluated: nn.Module | None = None,
    memory: int | None = None,
) -> list[Finding]:
    """Look for what is wrong, or could be better, in how a model is trained.

    The objects are read, and neither run nor changed. The more is told, the more can be found; what is not told is not
    guessed, but for the field of application: convolutions mean vision, else embeddings mean language.

    Args:
        model: the model as it will be trained.
        optimizer: of piste, of torch or of any other library, with its wrappers.
        scheduler: of learning rates, as made for this optimizer; None for a constant rate.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``.
        scaler: False for ``precision="fp16"`` without a ``GradScaler``.
        total_steps: steps of the optimizer in the whole run.
        schedule_steps: those of the scheduler, where it is stepped once an epoch; None for ``total_steps``.
        epochs: how many times each example is seen.
        batch_size: examples to a step, over all devices.
        domain: ``"vision"``, ``"nlp"`` or ``"rl"``.
        clip_norm: to which gradients are clipped before the step.
        ema: the average that is kept of the model.
        evaluated: the module that is evaluated, where that is the model itself in spite of ``ema``.
        memory: bytes that weights, gradients and the optimizer may take.

    Returns:
        What was found, the most serious first; an empty list where all is well.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer.
        ValueError: another argument is out of its range.

    Not a judge of results: what is best on a problem, a race decides.

    >>> import piste, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
    >>> optimizer = piste.RAdam(model.parameters(), weight_decay=0.1)
    >>> for finding in piste.advise(model, optimizer, piste.schedules.one_cycle(optimizer, 6000)):
    ...     print(finding.severity, finding.title)
    warning Norm scales and biases are decayed
    warning Weight decay is an L2 term inside Adam
    >>> optimizer, schedule = piste.create_with_schedule("ranger", model, 6000)
    >>> piste.advise(model, optimizer, schedule, total_steps=6000)
    []

    Sources: each finding names its own.
    """
    return judge(
        Setup(
            model,
            optimizer,
            scheduler,
            precision=precision,
            scaler=scaler,
            total_steps=total_steps,
            schedule_steps=schedule_steps,
            epochs=epochs,
            batch_size=batch_size,
            domain=domain,
            clip_norm=clip_norm,
            ema=ema,
            evaluated=evaluated,
            memory=memory,
        )
    )


def judge(setup: Setup) -> list[Finding]:
    """What all rules find in a setup, the most serious first."""
    order = list(SEVERITIES)
    found = [finding for rule in RULES for finding in [rule(setup)] if finding is not None]
    return sorted(found, key=lambda finding: order.index(finding.severity))
