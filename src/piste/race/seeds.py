"""Random numbers common to all contenders: what is drawn in a step follows from (seed, step) alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection

import numpy as np
import torch

_PROBED = 2  # steps after which it is known whether a task draws from numpy and random
_FRESH = np.random.RandomState(0), random.Random(0)  # generators that nobody else draws from
_AHEAD = 256  # seeds worked out at once: among other work each takes ten times as long


class LateDrawError(Exception):
    """After steps that drew nothing from numpy and ``random``, one did, and these had not been seeded for it."""


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that their random numbers have nothing to do with each other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "big")


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and ``random``."""
    torch.manual_seed(seed)
    _seed_others(seed)


class StepSeeds:
    """Seeds torch, numpy and ``random`` for every step of a run, at little cost where they are not drawn from.

    ``torch.manual_seed`` thinks of all devices, those too that were never used, which takes a tenth of a millisecond.
    numpy and ``random`` are left as they are while nothing draws from them. Whether something does is found out in the
    first steps and verified before each evaluation; a run in which they turn out to be needed after all has to be made
    again with ``sparing=False``.

    Args:
        seed: of the run.
        steps: how many there are.
        stops: after which ones something else is done that may draw.
        device: where the run draws.
        sparing: False to seed everything in every step.
    """

    def __init__(self, seed: int, steps: int, stops: Collection[int], device: torch.device, sparing: bool) -> None:
        self.seed = seed
        self.steps = steps
        self.stops = stops
        self.seed_torch = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        self.sparing = sparing
        self.ahead: list[int] = []
        self.last: int | None = None  # what numpy and random were seeded with, if they can be as they were then

    def begin(self, number: int) -> None:
        """Seed for this step.

        Raises:
            LateDrawError: see :class:`StepSeeds`.
        """
        if not self.ahead:
            numbers = range(min(self.steps, number + _AHEAD - 1), number - 1, -1)
            self.ahead = [derived_seed(self.seed, f"step {each}") for each in numbers]
        seed = self.ahead.pop()
        self.seed_torch(seed)
        after_stop = number - 1 in self.stops
        if self.sparing and number > _PROBED + 1 and number not in self.stops and not after_stop:
            return
        if self.sparing and self.last is not None and not after_stop and _drawn_since(self.last):
            if number > _PROBED + 1:
                raise LateDrawError
            self.sparing = False
        _seed_others(seed)
        self.last = seed


def _seed_others(seed: int) -> None:
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _drawn_since(seed: int) -> bool:
    """Whether somebody has drawn from numpy or ``random`` since they were seeded with this. Draws itself."""
    _FRESH[0].seed(seed % 2**32)
    _FRESH[1].seed(seed)
    return (_FRESH[0].random_sample(), _FRESH[1].random()) != (np.random.random_sample(), random.random())
