"""A pole on a cart, kept upright by a policy that learns from its own episodes.

The cart is that of Barto, Sutton & Anderson with the usual constants: a push of 10 N to the left or right at each of at
most 200 steps of 20 ms; an episode ends when the pole leans by 12 degrees or the cart leaves 2.4 m. An example is a
start; a batch plays one episode from each of its starts, all side by side. The gradient is REINFORCE's with rewards to
go, their mean and spread over the batch taken out; the loss's *value* is the mean share of the 200 steps that was lost.

Sources: Barto, Sutton & Anderson 1983; Williams 1992 (REINFORCE).
Known result: solved (195 of 200 steps) within a few hundred updates by Adam, with a scatter between seeds that is
larger than most differences between optimizers: take twenty seeds or more, and believe no difference of five.
Cost: about 6 s a run on one core.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.task import Task

LONGEST = 200
GRAVITY, CART, POLE, HALF_LENGTH, PUSH, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, STEEPEST = 2.4, math.radians(12)
_STARTS = 0.05  # each of position, speed, angle and its speed starts within this of zero


def moved(state: Tensor, push: Tensor) -> Tensor:
    """States (place, speed, angle, angular speed; shape (..., 4)) one step later, under pushes in newtons."""
    place, speed, angle, turning = state.unbind(-1)
    sine, cosine = angle.sin(), angle.cos()
    total = CART + POLE
    thrust = (push + POLE * HALF_LENGTH * turning.square() * sine) / total
    spin = (GRAVITY * sine - cosine * thrust) / (HALF_LENGTH * (4 / 3 - POLE * cosine.square() / total))
    pull = thrust - POLE * HALF_LENGTH * spin * cosine / total
    return torch.stack(
        [place + SECONDS * speed, speed + SECONDS * pull, angle + SECONDS * turning, turning + SECONDS * spin], dim=-1
    )


def upright(state: Tensor) -> Tensor:
    """Which of the states go on."""
    return (state[..., 0].abs() <= FARTHEST) & (state[..., 2].abs() <= STEEPEST)


@torch.no_grad()
def episodes(policy: nn.Module, start: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Play one from each start.

    Args:
        policy: gives the logits of left and right.
        start: shape (episodes, 4).
        draw: what actions are drawn with; None: torch's own generator.

    Returns:
        States met, shape (steps, episodes, 4); actions taken; and which of them count, for the pole still stood.
    """
    state, alive = start, torch.ones(len(start), dtype=torch.bool, device=start.device)
    states, actions, counted = [], [], []
    for _ in range(LONGEST):
        chance = policy(state).softmax(dim=-1)[:, 1]
        action = (torch.rand(len(state), generator=draw).to(chance) < chance).long()
        states.append(state)
        actions.append(action)
        counted.append(alive)
        state = moved(state, PUSH * (2 * action - 1).to(state.dtype))
        alive = alive & upright(state)
        if not alive.any():
            break
    return torch.stack(states), torch.stack(actions), torch.stack(counted)


def _played(model: nn.Module, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In evaluation, chance is the same every time."""
    return episodes(model, start, None if model.training else torch.Generator().manual_seed(0))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    (start,) = batch
    states, actions, counted = _played(model, start)
    to_go = counted.flip(0).cumsum(0).flip(0)[counted].to(states.dtype)
    advantage = (to_go - to_go.mean()) / to_go.std(correction=0).clamp_min(1e-6)
    chosen = model(states[counted]).log_softmax(dim=-1).gather(1, actions[counted][:, None])[:, 0]
    surrogate = -(advantage * chosen).mean()
    lost = 1 - counted.sum(0).to(states.dtype).mean() / LONGEST
    loss: Tensor = lost + surrogate - surrogate.detach()
    return loss


def _steps_stood(model: nn.Module, batch: Any) -> Tensor:
    (start,) = batch
    return _played(model, start)[2].sum(0).to(start.dtype).mean()


def _data() -> Splits:
    draw = torch.Generator().manual_seed(0)
    parts = [(_STARTS * (2 * torch.rand(count, 4, generator=draw) - 1),) for count in (4_096, 64, 256)]
    return Splits(*parts)


cartpole = Task(
    name="cartpole",
    model=lambda: nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)),
    data=_data,
    loss=_loss,
    metric=_steps_stood,
    metric_name="steps stood",
    higher_is_better=True,
    steps=150,
    batch_size=16,
    domain="rl",
    description="REINFORCE balances a pole, of 200 steps; very noisy: take --seeds 20 or more",
)
