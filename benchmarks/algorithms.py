"""Every algorithm with all who implement it, and the bytes that it cannot do without."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import piste
from benchmarks.cases import Shapes, resnet50

Make = Callable[[list[torch.nn.Parameter]], Any]


def gpt(width: int, layers: int, context: int) -> Shapes:
    """The weights of a GPT with GPT-2's vocabulary."""
    layer: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (context, width), *(layers * layer), (width,), (width,)]


LISTS: dict[str, Shapes] = {
    "GPT-2 small: 148 tensors, 124 M": gpt(768, 12, 1024),
    "ResNet-50: 161 tensors, 26 M": resnet50(),
    "one matrix, 32 M": [(1 << 12, 1 << 13)],
    "1,000 tensors of 1,024": [(1024,)] * 1000,
}
#: lists that do not fit into the caches, where time is a question of memory
LARGE = tuple(name for name in LISTS if "1,000" not in name)


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Args:
        name: of piste's class, with what is set.
        ours: makes piste's.
        bytes_per_weight: what a step of the *rule* has to move for a float32 weight: each of gradient, weight and
            states read once, each that changes written once, and again for every pass that has to wait for a
            reduction over what the first one read.
        peers: makers of all others, by package; None where the package is not installed.
        at_least: the least speed against the fastest peer that is promised on large lists.
    """

    name: str
    ours: Make
    bytes_per_weight: float
    peers: dict[str, Make | None] = field(default_factory=dict)
    at_least: float = 0.0


def _bytes(states: int, *, again: float = 0.0) -> float:
    """Gradient read, weight and states read and written."""
    return 4 + 8 + 8 * states + again


class _Compiled:
    """A torch optimizer whose step went through ``torch.compile``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = torch.compile(optimizer.step)


def _torch(name: str, *, fused: bool = False, **settings: Any) -> dict[str, Make | None]:
    cls = getattr(torch.optim, name)
    made: dict[str, Make | None] = {
        "torch loop": lambda params: cls(params, foreach=False, **settings),
        "torch foreach": lambda params: cls(params, foreach=True, **settings),
        "torch compile": lambda params: _Compiled(cls(params, foreach=True, **settings)),
    }
    if fused:
        made["torch fused"] = lambda params: cls(params, fused=True, **settings)
    return made


def package(module: str, name: str, **settings: Any) -> Make | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    return lambda params: getattr(importlib.import_module(module), name)(params, **settings)


def _pytorch_optimizer(name: str, **settings: Any) -> dict[str, Make | None]:
    return {"pytorch_optimizer": package("pytorch_optimizer", name, **settings)}


def _optimi(name: str, **settings: Any) -> dict[str, Make | None]:
    return {"torch-optimi": package("optimi", name, **settings)}


def _timm(module: str, name: str, **settings: Any) -> dict[str, Make | None]:
    """timm's own ``__init__`` needs torchvision; its optimizers need torch alone."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return {"timm": None}
    root = Path(found.submodule_search_locations[0])

    def make(params: list[torch.nn.Parameter]) -> Any:
        with mock.patch.dict(sys.modules):
            for shell, path in {"timm": root, "timm.optim": root / "optim"}.items():
                sys.modules[shell] = types.ModuleType(shell)
                sys.modules[shell].__path__ = [str(path)]
            return getattr(importlib.import_module(f"timm.optim.{module}"), name)(params, **settings)

    return {"timm": make}


LR = {"lr": 1e-4}
MOMENTUM = LR | {"momentum": 0.9}


def _schedule_free(name: str) -> dict[str, Make | None]:
    """The authors' package, whose optimizers have to be told that training begins."""
    made = package("schedulefree", name, **LR)

    def make(params: list[torch.nn.Parameter]) -> Any:
        optimizer = made(params) if made is not None else None
        optimizer.train()  # type: ignore[union-attr]
        return optimizer

    return {"schedulefree": None if made is None else make}


def _ours(name: str, **settings: Any) -> Make:
    return lambda params: getattr(piste, name)(params, engine="cpp", **settings)


def _in_codes(name: str, states: int, eight: str, four: str = "") -> list[Algorithm]:
    """An optimizer with state in 8 and 4 bits, against its own with float32 state and those that store so too."""
    float32: dict[str, Make | None] = {"piste fp32": _ours(name, **LR)}
    made = []
    for form, bits, theirs in (("8bit", 8, eight), ("4bit", 4, four)):
        peers = {"bitsandbytes": package("bitsandbytes.optim", theirs, **LR)} if bits == 8 else {}
        if name == "AdamW":
            peers["torchao"] = package("torchao.optim", theirs, **LR)
        made.append(
            Algorithm(f"{name}, {form}", _ours(name, state=form, **LR), 12 + states * bits / 4, float32 | peers)
        )
    return made


ALGORITHMS = (
    Algorithm(
        "AdamW",
        _ours("AdamW", **LR),
        _bytes(2),
        _torch("AdamW", fused=True, **LR) | _timm("adamw", "AdamWLegacy", **LR) | _optimi("AdamW", **LR),
        0.95,
    ),
    Algorithm(
        "SGD, momentum",
        _ours("SGD", **MOMENTUM),
        _bytes(1),
        _torch("SGD", fused=True, **MOMENTUM) | _optimi("SGD", **MOMENTUM),
        0.95,
    ),
    *_in_codes("AdamW", states=2, eight="AdamW8bit", four="AdamW4bit"),
    *_in_codes("Lion", states=1, eight="Lion8bit"),
    Algorithm("AdamW, clip_norm", _ours("AdamW", clip_norm=1.0, **LR), _bytes(2, again=4)),
    Algorithm(
        "RAdam",
        _ours("RAdam", **LR),
        _bytes(2),
        _torch("RAdam", **LR)
        | _timm("radam", "RAdamLegacy", **LR)
        | _optimi("RAdam", **LR)
        | _pytorch_optimizer("RAdam", **LR),
        4.0,
    ),
    Algorithm(
        "AdaBelief",
        _ours("AdaBelief", **LR),
        _bytes(2),
        _timm("adabelief", "AdaBelief", **LR) | _pytorch_optimizer("AdaBelief", rectify=True, **LR),
        4.0,
    ),
    Algorithm(
        "RangerAdaBelief",
        _ours("RangerAdaBelief", **LR),
        _bytes(2, again=4 + 8 / 6),
        {"ranger-adabelief": package("ranger_adabelief", "RangerAdaBelief", **LR)},
        4.0,
    ),
    Algorithm(
        "Ranger",
        _ours("Ranger", **LR),
        _bytes(2, again=4 + 8 / 6),  # centralization needs the mean of the gradient first; every sixth step syncs
        _pytorch_optimizer("Ranger", **LR) | _optimi("Ranger", **LR),
        2.0,
    ),
    Algorithm(
        "RMSprop, momentum",
        _ours("RMSprop", **MOMENTUM),
        _bytes(2),
        _torch("RMSprop", **MOMENTUM) | _timm("rmsprop_tf", "RMSpropTF", **MOMENTUM),
    ),
    # sums of rows first (g, p, and v, whose mean follows from them), then the gradient's deviation (g), then the rest;
    # of the two momenta one is read only; Lookahead every fifth step
    Algorithm(
        "Ranger21",
        _ours("Ranger21", **LR),
        _bytes(4, again=4 + 4 + 4 + 4 - 4 + 8 / 5),
        _pytorch_optimizer("Ranger21", num_iterations=1_000_000, **LR),
        2.5,
    ),
    Algorithm("Adan", _ours("Adan", **LR), _bytes(4), _timm("adan", "Adan", **LR) | _optimi("Adan", **LR), 2.5),
    Algorithm(
        "Lamb",
        _ours("Lamb", **LR),
        _bytes(2, again=4 + 8),  # the norm of the step first: weight and moments are read once more
        _timm("lamb", "Lamb", max_grad_norm=None, **LR),
        2.5,
    ),
    Algorithm(
        "NovoGrad",
        _ours("NovoGrad", **LR),
        _bytes(1, again=4),
        _timm("nvnovograd", "NvNovoGrad", **LR) | _pytorch_optimizer("NovoGrad", **LR),
        2.5,
    ),
    Algorithm(
        "SM3",
        _ours("SM3", **LR),
        _bytes(1),
        _pytorch_optimizer("SM3", momentum=0.9, **LR),
        2.5,
    ),
    Algorithm(
        "Lion",
        _ours("Lion", **LR),
        _bytes(1),
        _timm("lion", "Lion", **LR) | _optimi("Lion", **LR) | _pytorch_optimizer("Lion", **LR),
        2.5,
    ),
    Algorithm("MADGRAD", _ours("MADGRAD", **LR), _bytes(2, again=4), _timm("madgrad", "MADGRAD", **LR), 2.5),
    Algorithm("MirrorMADGRAD", _ours("MirrorMADGRAD", **LR), _bytes(2)),
    Algorithm("PNM", _ours("PNM", **LR), _bytes(1, again=4), _pytorch_optimizer("PNM", **LR), 2.5),
    Algorithm("AdaPNM", _ours("AdaPNM", **LR), _bytes(3, again=4), _pytorch_optimizer("AdaPNM", **LR), 2.5),
    Algorithm("Ralamb", _ours("Ralamb", **LR), _bytes(2, again=4 + 8)),
    Algorithm("RangerLars", _ours("RangerLars", **LR), _bytes(2, again=4 + 8 + 8 / 6)),
    Algorithm("LookaheadAdam", _ours("LookaheadAdam", **LR), _bytes(2, again=8 / 6)),
    Algorithm("AdEMAMix", _ours("AdEMAMix", **LR), _bytes(3), _pytorch_optimizer("AdEMAMix", **LR), 2.5),
    Algorithm(
        "LaProp",
        _ours("LaProp", **LR),
        _bytes(2),
        _timm("laprop", "LaProp", **LR) | _pytorch_optimizer("LaProp", **LR),
        2.5,
    ),
    Algorithm("ADOPT", _ours("ADOPT", **LR), _bytes(2), _timm("adopt", "Adopt", **LR), 2.5),
    Algorithm(
        "NAdamW",
        _ours("NAdamW", **LR),
        _bytes(2),
        _torch("NAdam", decoupled_weight_decay=True, **LR) | _timm("nadamw", "NAdamW", **LR),
        2.5,
    ),
    Algorithm(
        "StableAdamW",
        _ours("StableAdamW", **LR),
        _bytes(2, again=4 + 4),  # gradient and v tell the surprise first
        _optimi("StableAdamW", **LR) | _pytorch_optimizer("StableAdamW", **LR),
        2.5,
    ),
    Algorithm("ScheduleFreeSGD", _ours("ScheduleFreeSGD", **LR), _bytes(1), _schedule_free("SGDScheduleFree"), 2.5),
    Algorithm(
        "ScheduleFreeAdamW", _ours("ScheduleFreeAdamW", **LR), _bytes(2), _schedule_free("AdamWScheduleFree"), 2.5
    ),
    Algorithm(
        "ScheduleFreeRAdam", _ours("ScheduleFreeRAdam", **LR), _bytes(2), _schedule_free("RAdamScheduleFree"), 2.5
    ),
    Algorithm(
        "Prodigy",
        _ours("Prodigy"),
        _bytes(3, again=4 + 4 + 4),  # g, s, x0 and p give the estimate; then g and p once more, with both moments
        {"prodigyopt": package("prodigyopt", "Prodigy")},
        2.5,
    ),
    # the sums of squares, the normalised gradient's and the weight's size, and the step: g, then g and p, then g and p
    Algorithm(
        "Adafactor",
        _ours("Adafactor", lr=1e-3),
        _bytes(0, again=4 + 4 + 4),
        {"torch foreach": lambda params: torch.optim.Adafactor(params, lr=1e-3, foreach=True)}
        | _timm("adafactor", "Adafactor", lr=1e-3),
        2.5,
    ),
    Algorithm("Amos", _ours("Amos", lr=1e-3), _bytes(0, again=4), _pytorch_optimizer("Amos", lr=1e-3), 2.5),
    Algorithm(
        "AdamW, cautious",
        _ours("AdamW", cautious=True, **LR),
        _bytes(2, again=4 + 8),  # the share that agrees is known after a pass over gradient and momentum
        _timm("adamw", "AdamWLegacy", caution=True, **LR),
        2.5,
    ),
)
