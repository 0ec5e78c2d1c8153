"""Every rule of advice is shown a setup that it must speak of and one of which it must not; and its cure is tried."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR

import piste
from piste.advise import RULES, SEVERITIES, Setup, judge

STEPS = 6000
BY_NAME = {rule.name: rule for rule in RULES}
Made = dict[str, Any]


class Words(nn.Module):
    """A small language model, with attention or without."""

    def __init__(self, attention: bool = True, vocabulary: int = 300) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 16)
        if attention:
            self.attention = nn.MultiheadAttention(16, 2)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, vocabulary)


class Patches(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 10)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def on(model: nn.Module, name: str = "adamw_no_decay", schedule: str | None = None, **told: Any) -> Made:
    """A preset on a model, under its schedule, with arguments of `advise` and overrides of `create` alike."""
    about = {key: told.pop(key) for key in list(told) if key in Setup.__dataclass_fields__}
    about.setdefault("total_steps", STEPS)
    optimizer, scheduler = piste.create_with_schedule(name, model, about["total_steps"], schedule=schedule, **told)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, **about}


def of_torch(model: nn.Module, name: str, groups: Any = None, **settings: Any) -> Made:
    made = getattr(torch.optim, name)(
        piste.param_groups(model, weight_decay=0) if groups is None else groups, **settings
    )
    return {"model": model, "optimizer": made, "scheduler": piste.schedules.one_cycle(made, STEPS, moms=None)}


def foreign(name: str, module: str = "elsewhere", base: type[Any] = torch.optim.SGD) -> type[Any]:
    """A class of another library, as far as its name and origin tell."""
    return type(name, (base,), {"__module__": module})


def from_elsewhere(name: str, model: nn.Module | None = None, module: str = "elsewhere", **group: Any) -> Made:
    model = mlp() if model is None else model
    made = foreign(name, module)(piste.param_groups(model, weight_decay=group.pop("weight_decay", 0.0)), lr=group["lr"])
    for each in made.param_groups:
        each.update(group)
    made.defaults.update(group)
    return {"model": model, "optimizer": made, "scheduler": piste.schedules.one_cycle(made, STEPS, moms=None)}


class ForeignSAM(torch.optim.Optimizer):
    """The popular wrapper's outside: groups shared, state apart."""

    def __init__(self, params: Any, base: type[Any], rho: float = 0.05, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, "adaptive": False, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups


ForeignSAM.__name__ = "SAM"


def foreign_sam(model: nn.Module, share: bool = True, **told: Any) -> Made:
    optimizer = ForeignSAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    if not share:
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    return {"model": model, "optimizer": optimizer, "total_steps": STEPS, **told}


def sam(net: nn.Module, name: str = "sgd_momentum", about: Made | None = None, **settings: Any) -> Made:
    made = on(net, name)
    return {**made, "optimizer": piste.SAM(made["optimizer"], **settings), **(about or {})}


def without(made: Made, *names: str, **instead: Any) -> Made:
    return {**{k: v for k, v in made.items() if k not in names}, **instead}


def bare(model: nn.Module, cls: type[Any], *, total_steps: int | None = STEPS, **settings: Any) -> Made:
    made = cls(piste.param_groups(model, weight_decay=settings.pop("weight_decay", 0)), **settings)
    schedule = piste.schedules.one_cycle(made, STEPS, moms=None)
    return {"model": model, "optimizer": made, "scheduler": schedule, "total_steps": total_steps}


def replaced() -> Made:
    made = on(mlp())
    return {**made, "model": mlp()}


def lacking(model: nn.Module) -> Made:
    made = piste.AdamW([p for n, p in model.named_parameters() if not n.startswith("3.")], lr=1e-3, weight_decay=0)
    return {"model": model, "optimizer": made, "scheduler": piste.schedules.one_cycle(made, STEPS)}


def partly_frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def twice(model: nn.Module) -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.05, momentum=0.9)
    return {"model": model, "optimizer": made}


def half(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return model.to(dtype)


def large(model: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return model()


def averaged(decay: float = 0.99, name: str = "adamw_no_decay", model: nn.Module | None = None, **told: Any) -> Made:
    model = mlp() if model is None else model
    return {**on(model, name), "ema": piste.ModelEMA(model, decay=decay), **told}


def looked_ahead(name: str = "sgd_momentum", schedule: str | None = None, steps: int = STEPS) -> Made:
    made = on(mlp(), name, schedule, total_steps=steps)
    return {**made, "optimizer": piste.Lookahead(made["optimizer"], k=7)}


def cosine(model: nn.Module, length: int) -> Made:
    made = piste.SGD(piste.param_groups(model, weight_decay=0), lr=0.05, momentum=0.9)
    return {"model": model, "optimizer": made, "scheduler": CosineAnnealingLR(made, length), "total_steps": STEPS}


def one_cycle_of_torch(momentum: float) -> Made:
    model = mlp()
    made = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
    return {"model": model, "optimizer": made, "scheduler": OneCycleLR(made, 0.3, total_steps=STEPS)}


def elsewhere() -> Made:
    model = mlp()
    other = piste.AdamW(model.parameters())
    return {**on(model), "scheduler": piste.schedules.one_cycle(other, STEPS)}


def in_mode(training: bool) -> Made:
    made = on(mlp(), "schedulefreeadamw")
    made["model"].train(training)
    return made


@dataclass(frozen=True)
class Row:
    """Of one rule: a setup it must speak of, one it must not; and whether its code, run, silences it."""

    wrong: Callable[[], Made]
    right: Callable[[], Made]
    mends: bool = True


ROWS: dict[str, Row] = {
    # weights
    "weights-replaced": Row(replaced, lambda: on(mlp()), mends=False),
    "weights-missing": Row(lambda: lacking(mlp()), lambda: on(partly_frozen())),
    "weights-frozen": Row(lambda: on(partly_frozen(), include_frozen=True), lambda: on(partly_frozen())),
    "weight-twice": Row(lambda: twice(mlp()), lambda: of_torch(mlp(), "SGD", lr=0.05)),
    "norms-decayed": Row(lambda: on(mlp(), "adamw"), lambda: on(mlp(), "ranger", weight_decay=0.1)),
    "embeddings-decayed": Row(
        lambda: on(Words(), "adamw_no_decay", lr=1e-3, weight_decay=0.5),
        lambda: on(Words(), "adamw_no_decay", lr=1e-3, weight_decay=0.01),
    ),
    "muon-on-embeddings": Row(lambda: bare(Words(), piste.Muon, lr=2e-3), lambda: on(Words(), "muon")),
    "embeddings-centralized": Row(lambda: on(Words(), "ranger"), lambda: on(Words(), "ranger_nogc")),
    "embeddings-quantised": Row(lambda: on(Words(), state="8bit", fp32_state=()), lambda: on(Words(), state="8bit")),
    "amos-unscaled": Row(lambda: bare(mlp(), piste.Amos, lr=0.02), lambda: on(mlp(), "amos")),
    "lamb-without-ratio": Row(
        lambda: from_elsewhere("Lamb", module="timm.optim.lamb", lr=5e-3, always_adapt=False),
        lambda: from_elsewhere("Lamb", module="timm.optim.lamb", lr=5e-3, always_adapt=False, weight_decay=0.01),
    ),
    # settings
    "lr-out-of-range": Row(lambda: on(mlp(), "sgd_momentum", lr=3.0), lambda: on(mlp(), "adamw_no_decay", lr=2e-5)),
    "adan-lr": Row(lambda: on(mlp(), "adan", lr=1e-3), lambda: on(mlp(), "adan")),
    "adan-betas": Row(
        lambda: from_elsewhere("Adan", lr=1e-2, betas=(0.02, 0.08, 0.01)),
        lambda: from_elsewhere("Adan", module="adan_pytorch.adan", lr=1e-2, betas=(0.02, 0.08, 0.01)),
        mends=False,  # in the stand-in's constructor there are no betas
    ),
    "lion-lr": Row(lambda: on(mlp(), "lion", lr=2e-3), lambda: on(mlp(), "lion")),
    "lion-decay": Row(lambda: on(mlp(), "lion", weight_decay=0.01), lambda: on(mlp(), "lion")),
    "lion-batch": Row(lambda: on(mlp(), "lion", batch_size=16), lambda: on(mlp(), "lion", batch_size=256)),
    "prodigy-lr": Row(lambda: on(mlp(), "prodigy", lr=1e-3), lambda: on(mlp(), "prodigy")),
    "prodigy-warmup": Row(
        lambda: on(mlp(), "prodigy", "one_cycle", safeguard_warmup=False), lambda: on(mlp(), "prodigy", "one_cycle")
    ),
    "adabelief-eps": Row(
        lambda: on(cnn(), "adabelief", eps=1e-16), lambda: on(cnn(), "adabelief", domain="vision", eps=1e-8)
    ),
    "adabelief-eps-too-large": Row(
        lambda: on(mlp(), "rangeradabelief", eps=1e-5), lambda: on(mlp(), "rangeradabelief")
    ),
    "adabelief-fixed-decay": Row(
        lambda: on(mlp(), "adabelief", fixed_decay=True, weight_decay=0.01),
        lambda: on(mlp(), "adabelief", weight_decay=0.01),
    ),
    "l2-in-adam": Row(
        lambda: of_torch(net := mlp(), "RAdam", piste.param_groups(net), lr=1e-3),
        lambda: of_torch(mlp(), "AdamW", lr=1e-3, weight_decay=0.1),
    ),
    "long-run-beta2": Row(
        lambda: on(Words(), total_steps=100_000), lambda: on(Words(), total_steps=100_000, betas=(0.9, 0.95))
    ),
    "rectified-short-run": Row(lambda: on(mlp(), "ranger", total_steps=300), lambda: on(mlp(), "ranger")),
    "rmsprop-eps": Row(
        lambda: of_torch(mlp(), "RMSprop", lr=2e-3, eps=1e-3), lambda: on(mlp(), "rmsprop", eps=1e-3, tf=True)
    ),
    "madgrad-decay": Row(
        lambda: on(mlp(), "madgrad", weight_decay=0.01), lambda: on(mlp(), "madgrad", weight_decay=0.001)
    ),
    "ademamix-warmup": Row(lambda: on(mlp(), "ademamix"), lambda: on(mlp(), "ademamix", warmup_steps=STEPS)),
    "sgd-without-momentum": Row(lambda: on(mlp(), "sgd", lr=0.01), lambda: on(mlp(), "sgd")),
    "ranger21-decay": Row(
        lambda: on(mlp(), "ranger21", faithful=True),
        lambda: on(mlp(), "ranger21"),
    ),
    "amos-extra-l2": Row(
        lambda: from_elsewhere("Amos", module="pytorch_optimizer.optimizer.amos", lr=1e-3, extra_l2=0.1),
        lambda: from_elsewhere("Amos", module="pytorch_optimizer.optimizer.amos", lr=1e-3, extra_l2=0.0),
    ),
    "clipped-twice": Row(
        lambda: on(mlp(), "stableadamw", clip_norm=1.0), lambda: on(mlp(), "stableadamw"), mends=False
    ),
    # schedule
    "ranger-not-flat": Row(lambda: on(mlp(), "ranger", "one_cycle"), lambda: on(mlp(), "ranger")),
    "ranger21-scheduled": Row(lambda: on(mlp(), "ranger21", "one_cycle"), lambda: on(mlp(), "ranger21")),
    "ranger21-without-length": Row(
        lambda: {"model": (model := mlp()), "optimizer": piste.create("ranger21", model)}, lambda: on(mlp(), "ranger21")
    ),
    "ranger21-clipped": Row(
        lambda: on(mlp(), "ranger21") | {"clip_norm": 1.0},
        lambda: on(mlp(), "ranger") | {"clip_norm": 1.0},
        mends=False,
    ),
    "schedule-free-scheduled": Row(
        lambda: on(mlp(), "schedulefreeadamw", "one_cycle"), lambda: on(mlp(), "schedulefreeadamw", "untuned_warmup")
    ),
    "schedule-free-mode": Row(lambda: in_mode(False), lambda: in_mode(True)),
    "schedule-free-batch-norm": Row(
        lambda: on(cnn(), "schedulefreesgd"), lambda: on(mlp(), "schedulefreesgd"), mends=False
    ),
    "warmup-missing": Row(
        lambda: on(Words(), "adamw_no_decay", "flat_cosine"), lambda: on(mlp(), "adamw_no_decay", "flat_cosine")
    ),
    "warmup-missing-in-sums": Row(lambda: on(mlp(), "sm3", "constant"), lambda: on(mlp(), "sm3")),
    "never-annealed": Row(
        lambda: on(mlp(), "adamw_no_decay", "untuned_warmup"), lambda: averaged() | {"scheduler": None}
    ),
    "schedule-length": Row(lambda: cosine(mlp(), 100), lambda: cosine(mlp(), STEPS)),
    "scheduler-elsewhere": Row(elsewhere, lambda: looked_ahead()),
    "one-cycle-momentum": Row(lambda: one_cycle_of_torch(0), lambda: one_cycle_of_torch(0.9), mends=False),
    "amos-scheduled": Row(lambda: on(mlp(), "amos", "one_cycle"), lambda: on(mlp(), "amos")),
    "adafactor-relative": Row(
        lambda: from_elsewhere("Adafactor", module="transformers.optimization", lr=1e-2, relative_step=True),
        lambda: from_elsewhere("Adafactor", module="transformers.optimization", lr=1e-2, relative_step=False),
        mends=False,
    ),
    "adafactor-compounds": Row(
        lambda: from_elsewhere(
            "Adafactor", module="fairseq.optim.adafactor", lr=1e-2, relative_step=False, scale_parameter=True
        ),
        lambda: from_elsewhere(
            "Adafactor", module="transformers.optimization", lr=1e-2, relative_step=False, scale_parameter=True
        ),
        mends=False,
    ),
    # precision
    "float16-weights": Row(lambda: on(half(mlp(), torch.float16)), lambda: on(half(mlp())), mends=False),
    "bfloat16-weights": Row(lambda: on(half(mlp())), lambda: on(half(mlp()), weights="stochastic")),
    "bfloat16-second-moment": Row(
        lambda: of_torch(half(mlp()), "AdamW", lr=1e-3),
        lambda: of_torch(half(mlp()), "AdamW", lr=1e-3, betas=(0.9, 0.95)),
    ),
    "float16-unscaled": Row(
        lambda: on(mlp(), precision="fp16", scaler=False), lambda: on(mlp(), precision="fp16"), mends=False
    ),
    "step-not-fused": Row(
        lambda: of_torch(mlp(), "RAdam", lr=1e-3, foreach=False), lambda: of_torch(mlp(), "AdamW", lr=1e-3, fused=True)
    ),
    # sharpness
    "foreign-sam-float16": Row(
        lambda: foreign_sam(mlp(), precision="fp16"), lambda: foreign_sam(mlp(), precision="bf16"), mends=False
    ),
    "sam-float16": Row(
        lambda: sam(mlp(), about={"precision": "fp16"}), lambda: sam(mlp(), about={"precision": "bf16"}), mends=False
    ),
    "sam-single-epoch": Row(
        lambda: sam(mlp(), about={"epochs": 1}), lambda: sam(mlp(), about={"epochs": 90}), mends=False
    ),
    "sam-batch-norm": Row(lambda: sam(cnn()), lambda: sam(net := cnn(), model=net)),
    "sam-rho": Row(lambda: sam(mlp(), rho=2.0), lambda: sam(mlp(), rho=2.0, adaptive="asam")),
    "sam-bfloat16-weights": Row(lambda: foreign_sam(half(mlp())), lambda: foreign_sam(mlp()), mends=False),
    "sam-checkpoint": Row(lambda: foreign_sam(mlp()), lambda: sam(mlp()), mends=False),
    "groups-apart": Row(lambda: foreign_sam(mlp(), share=False), lambda: foreign_sam(mlp())),
    # averages
    "lookahead-unfinished": Row(
        lambda: looked_ahead(schedule="constant"), lambda: looked_ahead(schedule="constant", steps=6006), mends=False
    ),
    "lookahead-foreign": Row(
        lambda: without(looked_ahead(), optimizer=_timm_lookahead(mlp())), lambda: looked_ahead(), mends=False
    ),
    "lookahead-twice": Row(lambda: looked_ahead("ranger"), lambda: looked_ahead("radam"), mends=False),
    "lookahead-undone": Row(lambda: looked_ahead("madgrad"), lambda: looked_ahead("adamw"), mends=False),
    "ema-not-evaluated": Row(
        lambda: (made := averaged()) | {"evaluated": made["model"]}, lambda: averaged(), mends=False
    ),
    "ema-too-slow": Row(lambda: averaged(0.9999), lambda: averaged(0.999), mends=False),
    "ema-batch-norm": Row(
        lambda: averaged(model=cnn()) | {"scheduler": None}, lambda: averaged(model=cnn()), mends=False
    ),
    "ema-of-schedule-free": Row(lambda: averaged(name="schedulefreeadamw"), lambda: averaged(), mends=False),
    # choice
    "adafactor-for-language": Row(
        lambda: on(large(lambda: Words(vocabulary=10_000_000)), "adafactor"),
        lambda: on(large(lambda: Words(vocabulary=10_000)), "adafactor"),
    ),
    "older-for-vision": Row(lambda: on(cnn()), lambda: on(cnn(), "sgd_nesterov"), mends=False),
    "sam-for-transformers": Row(
        lambda: on(Patches(), "adamw_no_decay"), lambda: sam(Patches(), "adamw_no_decay"), mends=False
    ),
    "madgrad-for-transformers": Row(lambda: on(Words(), "ranger21"), lambda: on(Words(), "ranger21", use_madgrad=True)),
    "lamb-for-large-batches": Row(
        lambda: on(mlp(), batch_size=16_384), lambda: on(mlp(), "lamb", batch_size=16_384), mends=False
    ),
    "eps-for-vision": Row(lambda: on(cnn()), lambda: on(cnn(), eps=0.1)),
    "memory-to-save": Row(lambda: on(mlp(), memory=900), lambda: on(mlp(), memory=10_000)),
}


class MixerBlock(nn.Module):
    """Known by its name, as in every library."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(4, 4)


class Tied(Words):
    """The head shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tokens.weight


def words_of_torch(**settings: Any) -> Made:
    model = Words()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.5, **settings)
    return {"model": model, "optimizer": optimizer, "total_steps": STEPS}


def in_8_bits(**group: Any) -> Made:
    return from_elsewhere("AdamW8bit", Words(), module="bitsandbytes.optim.adamw", lr=1e-3, **group)


def plain(optimizer: Callable[..., Any], model: nn.Module | None = None, **settings: Any) -> Made:
    """Made by hand, with no scheduler."""
    model = mlp() if model is None else model
    return {"model": model, "optimizer": optimizer(model.parameters(), **settings)}


def steady_one_cycle() -> Made:
    made = one_cycle_of_torch(0.0)
    optimizer = torch.optim.SGD(made["model"].parameters(), lr=0.3)
    schedule = OneCycleLR(optimizer, 0.3, total_steps=STEPS, cycle_momentum=False)
    return {**made, "optimizer": optimizer, "scheduler": schedule}


#: the other sides of the rules that have several: does each speak of this?
MORE: list[tuple[str, bool, Callable[[], Made]]] = [
    ("sam-for-transformers", True, lambda: on(nn.Sequential(MixerBlock()), domain="vision")),
    ("sam-for-transformers", False, lambda: on(mlp(), domain="vision")),
    ("sam-for-transformers", False, lambda: on(Patches(), epochs=1)),
    ("madgrad-for-transformers", True, lambda: on(large(lambda: Words(vocabulary=10_000_000)), "madgrad")),
    ("madgrad-for-transformers", False, lambda: on(Words(), "madgrad")),
    ("madgrad-for-transformers", False, lambda: on(large(lambda: Words(vocabulary=10_000_000)))),
    ("memory-to-save", True, lambda: on(large(lambda: Words(vocabulary=5_000_000)))),
    ("memory-to-save", False, lambda: on(large(lambda: Words(vocabulary=5_000_000)), state="8bit", fp32_state=())),
    ("memory-to-save", False, lambda: on(mlp())),
    ("embeddings-decayed", False, lambda: on(Tied(), lr=1e-3, weight_decay=0.5)),
    ("embeddings-decayed", False, words_of_torch),
    ("embeddings-decayed", False, lambda: without(on(Words(), lr=1e-3, weight_decay=0.5), "total_steps", "scheduler")),
    ("embeddings-decayed", False, lambda: on(Words(), weight_decay=0.0)),
    ("muon-on-embeddings", True, lambda: plain(foreign("Muon"), Words(), lr=0.02)),
    ("muon-on-embeddings", False, lambda: on(mlp(), "normuon")),
    ("embeddings-quantised", True, in_8_bits),
    ("embeddings-quantised", False, lambda: in_8_bits(optim_bits=32)),
    ("norms-decayed", False, lambda: bare(mlp(), piste.Amos, lr=0.02, weight_decay=0.01)),
    ("lr-out-of-range", False, lambda: on(mlp(), "lion", lr=3.0)),
    ("lr-out-of-range", True, lambda: on(mlp(), "adamw", lr=3.0)),
    ("lr-out-of-range", False, lambda: from_elsewhere("Sophia", lr=3.0)),
    ("adan-lr", True, lambda: on(mlp(), "adan", lr=2.0)),
    ("l2-in-adam", True, words_of_torch),
    ("l2-in-adam", False, lambda: words_of_torch(decoupled_weight_decay=True)),
    ("l2-in-adam", False, lambda: plain(torch.optim.Adagrad, lr=1e-2, weight_decay=0.1)),
    ("l2-in-adam", False, lambda: on(mlp(), "sgd_momentum", weight_decay=0.1, decoupled_weight_decay=False)),
    ("l2-in-adam", False, lambda: from_elsewhere("Adam", module="bitsandbytes.optim", lr=1e-3, weight_decay=0.1)),
    ("l2-in-adam", False, lambda: on(mlp(), "adam", weight_decay=1e-5)),
    ("long-run-beta2", False, lambda: on(mlp(), total_steps=100_000)),
    ("long-run-beta2", False, lambda: on(Words(attention=False), total_steps=100_000)),
    ("long-run-beta2", False, lambda: on(Words(), total_steps=1_000)),
    ("rectified-short-run", True, lambda: on(mlp(), "adabelief", total_steps=300)),
    ("rectified-short-run", False, lambda: on(mlp(), "adabelief", total_steps=300, rectify=False)),
    ("rectified-short-run", False, lambda: on(mlp(), "adamw", total_steps=300)),
    ("sgd-without-momentum", False, lambda: on(mlp(), "sgd_momentum", lr=0.01)),
    ("clipped-twice", True, lambda: {**from_elsewhere("Lamb", lr=5e-3, max_grad_norm=1.0), "clip_norm": 1.0}),
    ("clipped-twice", False, lambda: {**on(mlp(), "lamb"), "clip_norm": 1.0}),
    ("clipped-twice", False, lambda: {**on(mlp()), "clip_norm": 1.0}),
    ("ranger-not-flat", True, lambda: without(on(mlp(), "ranger"), "scheduler")),
    ("ranger-not-flat", True, lambda: on(mlp(), "ranger", "constant")),
    ("ranger-not-flat", False, lambda: without(on(mlp()), "scheduler")),
    ("ranger21-without-length", False, lambda: plain(foreign("Ranger21"), lr=1e-3)),
    ("warmup-missing", True, lambda: on(mlp(), "lamb", "flat_cosine")),
    ("warmup-missing", False, lambda: on(Words(), "radam", "flat_cosine")),
    ("warmup-missing", True, lambda: without(on(Words()), "scheduler")),
    ("never-annealed", True, lambda: without(on(mlp()), "scheduler")),
    ("never-annealed", False, lambda: on(mlp(), "schedulefreesgd")),
    ("schedule-free-scheduled", False, lambda: on(mlp(), "adamw")),
    ("scheduler-elsewhere", False, lambda: without(on(mlp()), "scheduler")),
    ("scheduler-elsewhere", False, lambda: {**on(mlp()), "scheduler": object()}),
    ("one-cycle-momentum", False, steady_one_cycle),
    ("step-not-fused", True, lambda: plain(torch.optim.AdamW)),
    ("step-not-fused", False, lambda: plain(torch.optim.RAdam)),
    ("step-not-fused", False, lambda: plain(torch.optim.AdamW, large(mlp))),
    ("step-not-fused", False, lambda: plain(torch.optim.AdamW, foreach=True)),
    ("step-not-fused", True, lambda: plain(piste.AdamW, engine="reference")),
    ("step-not-fused", False, lambda: plain(piste.AdamW)),
    ("bfloat16-weights", True, lambda: of_torch(half(mlp()), "SGD", lr=0.1)),
    ("bfloat16-second-moment", False, lambda: on(half(mlp()))),
    ("sam-rho", True, lambda: sam(mlp(), rho=0.05, adaptive="asam")),
    ("sam-rho", False, lambda: sam(mlp(), rho=0.5, interval=10)),
    ("sam-rho", False, lambda: on(mlp())),
    ("lookahead-unfinished", False, looked_ahead),
    ("lookahead-unfinished", True, lambda: on(mlp(), "ranger", "constant", total_steps=100)),
    ("lookahead-unfinished", False, lambda: on(mlp(), "ranger21", total_steps=101)),
    ("lookahead-twice", True, lambda: looked_ahead("ranger21")),
    ("lookahead-undone", True, lambda: looked_ahead("schedulefreeadamw")),
    ("weights-missing", False, replaced),
]


@pytest.mark.parametrize(("name", "speaks", "made"), MORE, ids=[f"{name}-{speaks}" for name, speaks, _ in MORE])
def test_the_other_sides_of_a_rule(name: str, speaks: bool, made: Callable[[], Made]) -> None:
    assert (BY_NAME[name](setup_of(made())) is not None) == speaks


def test_torchs_adam_is_told_of_adamw() -> None:
    finding = BY_NAME["l2-in-adam"](setup_of(words_of_torch()))
    assert finding is not None
    assert finding.fix.startswith("optimizer = torch.optim.AdamW(")


def _timm_lookahead(model: nn.Module) -> Any:
    inside = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    made = foreign("Lookahead", "timm.optim.lookahead", torch.optim.Optimizer)(model.parameters(), {"k": 6})
    made.base_optimizer, made.param_groups = inside, inside.param_groups
    return made


def setup_of(made: Made) -> Setup:
    return Setup(**made)


def test_every_rule_has_a_row() -> None:
    assert set(ROWS) == set(BY_NAME)
    assert len(BY_NAME) == len(RULES)


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_speaks(name: str) -> None:
    finding = BY_NAME[name](setup_of(ROWS[name].wrong()))
    assert finding is not None
    assert finding.rule == name
    assert finding.detail
    assert finding.severity in SEVERITIES


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_is_silent(name: str) -> None:
    assert BY_NAME[name](setup_of(ROWS[name].right())) is None


@pytest.mark.parametrize("name", ROWS)
def test_a_cure_is_code(name: str) -> None:
    """Every cure compiles, but for commands; and where it stands alone it is run, and ends the finding."""
    made = ROWS[name].wrong()
    finding = BY_NAME[name](setup_of(made))
    assert finding is not None
    if finding.fix.startswith("piste race "):
        return
    code = compile(finding.fix, name, "exec")
    if not ROWS[name].mends:
        return
    desk = {"torch": torch, "nn": nn, "piste": piste, "steps": STEPS, **made, "schedule": made.get("scheduler")}
    exec(code, desk)
    after = {**made, "model": desk["model"], "optimizer": desk["optimizer"]}
    if desk["schedule"] is not made.get("scheduler"):
        after["scheduler"] = desk["schedule"]
    elif desk["optimizer"] is not made["optimizer"]:
        after["scheduler"] = on_another(made.get("scheduler"), desk["optimizer"])
    assert BY_NAME[name](setup_of(after)) is None


def on_another(schedule: Any, optimizer: Any) -> Any:
    """The same curve on another optimizer."""
    return None if schedule is None else piste.schedules.Schedule(optimizer, schedule.curve)


#: what piste's own presets are known to be told of
KNOWN = {
    "adamw": {"norms-decayed"},  # the cheat-sheet's own configuration says bn_wd: True
    "ademamix": {"ademamix-warmup"},  # a preset cannot know how long the run is
}


@pytest.mark.parametrize("name", piste.list_optimizers())
def test_presets_have_nothing_to_be_told(name: str) -> None:
    found = judge(setup_of(on(mlp(), name)))
    assert {each.rule for each in found} == KNOWN.get(name, set())


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RMSprop", "Rprop", "SGD", "LBFGS"]
)
def test_other_optimizers_are_read_without_harm(name: str) -> None:
    model = mlp()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=torch.tensor(1e-3) if name == "Adam" else 1e-3)
    before = json.dumps(optimizer.state_dict(), default=str)
    piste.advise(model, optimizer, total_steps=100)
    assert json.dumps(optimizer.state_dict(), default=str) == before


def test_findings_come_in_the_order_of_their_severity() -> None:
    model = lacking(cnn())["model"]
    optimizer = piste.Adam([model[0].weight], lr=1e-3, weight_decay=0.1)
    severities = [finding.severity for finding in piste.advise(model, optimizer)]
    assert severities == sorted(severities, key=list(SEVERITIES).index)
    assert severities[0] == "error"
    assert severities[-1] == "suggestion"


def test_a_schedule_is_looked_at_and_left_alone() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = [LambdaLR(optimizer, lambda step: min(1, step / 10)), CosineAnnealingLR(optimizer, 90)]
    scheduler = SequentialLR(optimizer, parts, [10])
    before = (scheduler.last_epoch, optimizer.param_groups[0]["lr"], parts[1].last_epoch)
    trace = Setup(model, optimizer, scheduler, total_steps=100).trace
    assert trace is not None
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"], parts[1].last_epoch) == before
    assert len(trace.rates) == 100
    assert trace.rates[0] == 0
    assert trace.rates.index(trace.peak) == 10
    assert 0 < trace.ends < 0.01


@pytest.mark.parametrize(
    ("argument", "value"), [("precision", "fp8"), ("domain", "audio"), ("total_steps", 0), ("memory", -1)]
)
def test_arguments_out_of_range_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value!r}.*legal"):
        piste.advise(mlp(), piste.SGD([torch.zeros(1)]), **{argument: value})


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a list"):
        piste.advise([], piste.SGD([torch.zeros(1)]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer is a str"):
        piste.advise(mlp(), "adamw")  # type: ignore[arg-type]


def test_setups_are_values() -> None:
    setup = setup_of(on(mlp()))
    assert replace(setup, epochs=3).epochs == 3


def test_a_scheduler_may_be_stepped_once_an_epoch() -> None:
    made = cosine(mlp(), 30)
    assert BY_NAME["schedule-length"](setup_of(made)) is not None
    assert BY_NAME["schedule-length"](setup_of({**made, "schedule_steps": 30})) is None


def test_the_cheat_sheet_page_names_rules_that_exist() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cheatsheet.md").read_text(encoding="utf-8")
    table = page[page.index("| the sheet | the rule |") :]
    named = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", table))
    assert len(named) > 15
    assert named <= set(BY_NAME)
