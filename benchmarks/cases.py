"""What is measured: lists of weights, and pairs of optimizers that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import piste

Shapes = list[tuple[int, ...]]
Optimizers = dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]


def _transformer(width: int, layers: int) -> Shapes:
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    return [(2048, width), *(layers * [*layer, (width, 4 * width), (width,), (width,), (width,)])]


def resnet50() -> Shapes:
    """The weights of a ResNet-50."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, inside, 1, 1), (4 * width,), (4 * width,)]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SHAPES: dict[str, Shapes] = {
    "300 tensors of 16": [(16,)] * 300,
    "1,000 tensors of 1,024": [(1024,)] * 1000,
    "transformer, 20 M": _transformer(512, 6),
    "ResNet-50, 25 M": resnet50(),
    "one tensor of 16 M": [(1 << 24,)],
}


@dataclass(frozen=True)
class Case:
    """One algorithm, in piste and in torch.

    Args:
        name: of the class, in both.
        settings: arguments that both take.
        target: is this one of the pairs for which a speed is promised?
    """

    name: str
    settings: dict[str, Any]
    target: bool = False

    def optimizers(self) -> Optimizers:
        """Makers of all that is compared."""
        ours, theirs, settings = getattr(piste, self.name), getattr(torch.optim, self.name), self.settings
        made: Optimizers = {
            "torch foreach": lambda params: theirs(params, foreach=True, **settings),
            "piste foreach": lambda params: ours(params, engine="foreach", **settings),
            "piste cpp": lambda params: ours(params, engine="cpp", **settings),
            "piste reference": lambda params: ours(params, engine="reference", **settings),
            "torch loop": lambda params: theirs(params, foreach=False, **settings),
        }
        if self.name in ("AdamW", "SGD"):
            made["torch fused"] = lambda params: theirs(params, fused=True, **settings)
        return made


CASES = (
    Case("AdamW", {"lr": 1e-4}, target=True),
    Case("SGD", {"lr": 1e-4, "momentum": 0.9}, target=True),
    Case("RAdam", {"lr": 1e-4}),
    Case("RMSprop", {"lr": 1e-4, "momentum": 0.9}),
)

# Where torch has no counterpart, the nearest that it has: Ranger is RAdam, which alone may hold as much, and more.
MEMORY: dict[str, Optimizers] = {
    **{case.name: case.optimizers() for case in CASES if case.target},
    "Ranger (torch: RAdam)": {
        "torch foreach": lambda params: torch.optim.RAdam(params, lr=1e-4, foreach=True),
        "piste foreach": lambda params: piste.Ranger(params, lr=1e-4, engine="foreach"),
    },
}


def parameters(shapes: Shapes) -> list[torch.nn.Parameter]:
    """Weights with gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = 0.01 * torch.randn_like(weight)
    return weights
