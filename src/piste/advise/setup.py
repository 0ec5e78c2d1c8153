"""What is to be judged, and what can be read off it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from piste import optimizers
from piste.advise.trace import Trace, own_length, trace
from piste.checks import check_choice
from piste.groups import ModelWeight, is_norm, model_weights, owned_by
from piste.optimizer import Optimizer
from piste.options import Options
from piste.preset import Preset, arguments_of
from piste.presets import presets
from piste.wrappers import SAM, ModelEMA
from piste.wrappers.base import Wrapper, layers

__all__ = ["EMBEDDINGS", "RANGERS", "Group", "Setup", "listed"]

Group = dict[str, Any]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RANGERS = ("ranger", "rangeradabelief", "rangerlars", "rangerva", "rangerqh")
#: what other libraries put before and behind the name of an algorithm
_AFFIXES = re.compile(r"^(fused|paged|cpu|deepspeedcpu|nv)+|(8bit|4bit|32bit|fp8|kahan)+$")
#: where wrappers of other libraries have what they are round: Lookahead of torch_optimizer and the optimizer of
#: Accelerate, SAM of davda54 and those after it
_FOREIGN = ("optimizer", "base_optimizer")
_DECOUPLING = ("decoupled_weight_decay", "weight_decouple", "decouple", "decoupled_decay", "decouple_decay")
#: classes of piste with groups of their own for a model
_SORTED_FURTHER = ("piste.Muon", "piste.NorMuon", "piste.Amos")


@dataclass(frozen=True)
class Setup:
    """A model and what trains it; the arguments are those of :func:`piste.advise`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    precision: str = "fp32"
    scaler: bool = True
    total_steps: int | None = None
    schedule_steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    domain: str = ""
    clip_norm: float | None = None
    ema: ModelEMA | None = None
    evaluated: nn.Module | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model is a {type(self.model).__name__}; legal: an nn.Module")
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(self.optimizer).__name__}; legal: a torch.optim.Optimizer")
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        check_choice("domain", self.domain, ("", "vision", "nlp", "rl"))
        for name in ("total_steps", "schedule_steps", "epochs", "batch_size", "clip_norm", "memory"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}={value!r} is not legal; legal: a number above 0, or None")

    # the optimizer ---------------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> list[torch.optim.Optimizer]:
        """The optimizer with what it is wrapped round, the outermost first."""
        found = layers(self.optimizer)
        while (inside := _inside(found[-1])) is not None and inside not in found:
            found += layers(inside)
        return found

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer inside of all wrappers."""
        return self.layers[-1]

    @cached_property
    def family(self) -> str:
        """Its algorithm: the name of its class in small letters, without what says how it is stored or run."""
        return _AFFIXES.sub("", type(self.inner).__name__.lower())

    @property
    def origin(self) -> str:
        """Where the inner optimizer comes from: ``"piste"``, ``"torch"``, or the name of another package."""
        return type(self.inner).__module__.partition(".")[0]

    @property
    def groups(self) -> list[Group]:
        """Its parameter groups."""
        return self.inner.param_groups

    def wrapper(self, *names: str) -> Any:
        """The outermost layer whose class has one of these names (in small letters), or None."""
        return next((layer for layer in self.layers if type(layer).__name__.lower() in names), None)

    @cached_property
    def sam(self) -> Any:
        """The sharpness-aware wrapper, piste's or a foreign one, or None."""
        ours = (layer for layer in self.layers if isinstance(layer, SAM))
        theirs = (layer for layer in self.layers[:-1] if type(layer).__name__.lower().endswith("sam"))
        alone = self.inner if type(self.inner).__name__.lower().endswith("sam") else None
        return next(ours, None) or next(theirs, None) or alone

    @property
    def sam_is_foreign(self) -> bool:
        """Is there a SAM, and not one of piste?"""
        return self.sam is not None and not isinstance(self.sam, Wrapper)

    def pairs(self) -> Iterator[tuple[Group, Tensor]]:
        """Every tensor with its group."""
        for group in self.groups:
            for tensor in group["params"]:
                yield group, tensor

    def decays(self) -> Iterator[tuple[float, Tensor]]:
        """Every tensor that is decayed, and how much."""
        for group, tensor in self.pairs():
            if float(group.get("weight_decay") or 0) > 0:
                yield float(group["weight_decay"]), tensor

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of the first group."""
        return self.groups[0].get(key, default) if self.groups else default

    @property
    def weight_decay(self) -> float:
        """The largest of any group."""
        return max((float(group.get("weight_decay") or 0) for group in self.groups), default=0.0)

    @property
    def decoupled(self) -> bool | None:
        """Is decay apart from the gradient? None where that cannot be told."""
        flags = [self.setting(name, getattr(self.inner, name, None)) for name in _DECOUPLING]
        told = [bool(flag) for flag in flags if flag is not None]
        if told:
            return told[0]
        if self.family in ("adamw", "lion", "muon"):
            return True
        return False if self.origin == "torch" else None

    @cached_property
    def lr(self) -> float | None:
        """The largest learning rate that any group will see; None where the optimizer finds it itself."""
        rates = [group.get("initial_lr", group.get("lr")) for group in self.groups]
        known = [float(rate) for rate in rates if rate is not None]
        return max(known) * (self.trace.peak if self.trace else 1.0) if known else None

    @cached_property
    def preset(self) -> Preset | None:
        """The preset of piste for this algorithm that is nearest to these settings, or None."""
        found = [p for name in presets for p in [presets[name]] if p.optimizer.__name__.lower() == self.family]
        differing = [sum(self.setting(k, v) != v for k, v in p.hyperparameters.items()) for p in found]
        return min(zip(differing, found, strict=True), key=lambda pair: pair[0])[1] if found else None

    def lr_range(self) -> tuple[float, float] | None:
        """Where learning rates of this algorithm are looked for, over all its presets with this momentum."""
        kept = self.setting("momentum", 0)
        found = [presets[name] for name in presets if presets[name].optimizer.__name__.lower() == self.family]
        if self.family in ("sgd", "rmsprop"):
            found = [p for p in found if bool(p.hyperparameters.get("momentum", 0)) == bool(kept)]
        priors = [p.lr_prior for p in found]
        if not priors:
            return None
        return (
            min(prior.center / 10**prior.decades_below for prior in priors),
            max(prior.center * 10**prior.decades_above for prior in priors),
        )

    # the schedule ----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, as said or as the scheduler was made for."""
        return self.total_steps or (None if self.schedule_steps else own_length(self.scheduler))

    @cached_property
    def trace(self) -> Trace | None:
        """The learning rates to come; constant without a scheduler, None where they cannot be told."""
        if self.scheduler is None:
            return Trace((1.0,))
        return trace(self.scheduler, self.schedule_steps or self.total_steps)

    @property
    def is_scheduled(self) -> bool:
        """Does a scheduler change the learning rate?"""
        return self.scheduler is not None and not (self.trace is not None and self.trace.is_constant)

    # the model -------------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[int, ModelWeight]:
        """The model's parameters by identity."""
        return {id(weight.tensor): weight for weight in model_weights(self.model)}

    @cached_property
    def trained(self) -> list[ModelWeight]:
        """Those that are trained."""
        return [weight for weight in self.weights.values() if weight.tensor.requires_grad]

    def has(self, *types: type[nn.Module]) -> bool:
        """Is there a module of one of these types?"""
        return any(isinstance(module, types) for module in self.model.modules())

    def names_of(self, tensors: Iterable[Tensor], *types: type[nn.Module]) -> list[str]:
        """The names of those tensors that are the model's; with types, of those owned by such modules."""
        weights = [self.weights[id(tensor)] for tensor in tensors if id(tensor) in self.weights]
        return [weight.name for weight in weights if not types or owned_by(weight, types)]

    def is_vector_or_norm(self, tensor: Tensor) -> bool:
        """Is it a bias, a scale, or any other parameter of a norm?"""
        weight = self.weights.get(id(tensor))
        return weight is not None and (tensor.ndim < 2 or any(map(is_norm, weight.owners)))

    @cached_property
    def has_batch_norm(self) -> bool:
        """Are there running statistics?"""
        return self.has(_BatchNorm)

    @cached_property
    def has_attention(self) -> bool:
        """Is it a transformer of some kind?"""
        named = any(re.search("attention|attn", type(module).__name__.lower()) for module in self.model.modules())
        return named or self.has(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

    @cached_property
    def is_mixer(self) -> bool:
        """Is it an MLP-Mixer?"""
        return any("mixer" in type(module).__name__.lower() for module in self.model.modules())

    @cached_property
    def field(self) -> str:
        """The field of application: as said; else vision where there are convolutions, language where embeddings."""
        if self.domain:
            return self.domain
        return "vision" if self.has(nn.Conv2d, nn.Conv3d) else "nlp" if self.has(*EMBEDDINGS) else ""

    @cached_property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(weight.tensor.numel() for weight in self.trained)

    @cached_property
    def low_precision(self) -> list[ModelWeight]:
        """Trained weights that are themselves of 16 bits."""
        return [weight for weight in self.trained if weight.tensor.dtype in (torch.float16, torch.bfloat16)]

    # code ------------------------------------------------------------------------------------------------------------

    def made_with(self, key: str) -> Any:
        """A setting as the constructor was given it, whatever schedules have made of it since."""
        return self.inner.defaults.get(key, self.setting(key))

    def code(self, params: str = "", /, *, cls: str = "", **changed: Any) -> str:
        """The call that makes the inner optimizer, with some settings changed; None drops one."""
        kind = cls or _path(type(self.inner))
        params = params or f"piste.param_groups(model, weight_decay={self.weight_decay:g})"
        settings = {"lr": self.made_with("lr")} | self._differing() | changed
        if "param_groups" in params:
            settings.pop("weight_decay", None)  # the groups say it
            if kind in _SORTED_FURTHER:
                params = f"{kind}.groups(model, {params})"
        shown = [f"{name}={_spelled(value)}" for name, value in settings.items() if value is not None]
        return f"optimizer = {kind}({', '.join([params, *shown])})"

    def _differing(self) -> dict[str, Any]:
        """Settings that are not the class's defaults."""
        usual = arguments_of(type(self.inner)) | {"state": "fp32", "weights": "plain"}
        unsaid = {*Options.__optional_keys__, "lr"} - {"state", "weights"}
        named = {name: self.made_with(name) for name in usual if name not in unsaid and name in self.inner.defaults}
        return {name: value for name, value in named.items() if _differs(value, usual[name])}


def _inside(foreign: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """What an optimizer that is no wrapper of piste is round, if it is a wrapper."""
    held = (getattr(foreign, name, None) for name in _FOREIGN)
    return next((each for each in held if isinstance(each, torch.optim.Optimizer)), None)


def _differs(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and value != default


def _path(kind: type) -> str:
    if issubclass(kind, Optimizer) and getattr(optimizers, kind.__name__, None) is kind:
        return f"piste.{kind.__name__}"
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else kind.__name__


def _spelled(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def listed(names: Iterable[str], shown: int = 3) -> str:
    """Some of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
