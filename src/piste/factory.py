"""The way from a name to an optimizer on a model, and to the schedule that goes with it.

>>> import piste, torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
>>> optimizer = piste.create("ranger", model, lr=4e-3)
>>> [(group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
[(0.01, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from piste import optimizers, schedules
from piste.checks import check_choice, kind_of, refuse_unknown
from piste.groups import GROUP_OPTIONS, param_groups
from piste.optimizers.ranger21_schedule import told
from piste.preset import Preset, decoupled
from piste.presets import presets
from piste.registry import preset_of
from piste.wrappings import WRAPPINGS

__all__ = ["create", "create_with_schedule", "schedule_for"]

logger = logging.getLogger("piste")


def create(name: str | Preset, model_or_params: nn.Module | Iterable[Any], **overrides: Any) -> torch.optim.Optimizer:
    """An optimizer on a model, from a preset: its class, its settings, its treatment of norms and biases.

    Args:
        name: a preset's or a class's name, whatever its case, hyphens and underscores; or a :class:`Preset`. A wrapper
            may stand before it, as in ``"sam+adamw"`` or ``"lookahead+sgd_momentum"``; ``piste list`` shows them.
        model_or_params: the model; or what optimizer classes take (tensors, groups, pairs). Bare parameters do not say
            what they are, so all of them are decayed.
        **overrides: arguments of the class (``lr=``, ``weight_decay=``, ``engine=``, …), those of a wrapper (``rho=``)
            and, with a model, those of ``piste.param_groups`` (``layer_decay=``, ``decay_norm_and_bias=``, ``table=``,
            …), instead of the preset's.
            ``domain="vision" | "nlp" | "rl"`` sets the eps of AdaBelief and RangerAdaBelief for that field.
            Without ``lr=`` the learning rate is the preset's own where it has one (``adamw_no_decay``), else
            ``lr_prior.center``, in the middle of the range where one looks for a good one. That is a start, not an
            optimum; the class's default, meant for no preset in particular, may lie outside of that range. Classes
            whose ``lr`` is None by default set it themselves.

    Returns:
        An optimizer of the preset's class. Only where that is a class of torch which cannot do what ``true_wd`` asks
        (SGD and RMSprop with decoupled decay), and there is decay, the piste class of the same name stands in.

    Raises:
        TypeError: ``name`` is neither text nor a preset, or ``model_or_params`` neither a model nor an iterable.
        ValueError: an unknown name or override, with the nearest known ones; ``betas=`` for a preset with
            ``set_betas=False``; a value out of its range.

    Not needed where the class and its arguments are known: ``piste.AdamW(piste.param_groups(model), lr=1e-3)`` is the
    same without the preset.

    >>> import torch, piste
    >>> optimizer = piste.create("rangeradabelief", torch.nn.Linear(4, 2), lr=2e-3, domain="nlp")
    >>> optimizer.param_groups[0]["eps"]
    1e-16

    Sources: each preset names its own.
    """
    preset = preset_of(name)
    if preset.wrappings:
        return _wrapped(preset, model_or_params, overrides)
    is_model = isinstance(model_or_params, nn.Module)
    settings, grouping = _settled(preset, overrides, is_model)
    if preset.arguments.get("lr") is not None:
        settings.setdefault("lr", preset.lr_prior.center)
    decay = settings.get("weight_decay", preset.arguments.get("weight_decay", 0.0))
    if isinstance(model_or_params, nn.Module):
        if grouping.get("layer_decay") is not None:
            grouping["lr"] = settings.get("lr")
        params = _grouped(preset.optimizer, model_or_params, decay, grouping, scaled="scale" in settings)
    else:
        if isinstance(model_or_params, torch.Tensor) or not isinstance(model_or_params, Iterable):
            given = "one tensor" if isinstance(model_or_params, torch.Tensor) else kind_of(model_or_params)
            raise TypeError(
                f"model_or_params is {given}; legal: a model (an instance of nn.Module), or an iterable of tensors, "
                "pairs or groups"
            )
        params = list(model_or_params)
        _warn_of_lost_distinction(preset, params, decay)
    decays = any(weight_decay != 0 for weight_decay in _decays(params, decay))
    optimizer, decoupling = decoupled(preset.optimizer, preset.wd.true_wd, needed=decays)
    made: torch.optim.Optimizer = optimizer(params, **(decoupling | settings))
    if not preset.set_betas:
        for group in made.param_groups:
            group["cycle_momentum"] = False  # piste.schedules reads it
    return made


def create_with_schedule(
    name: str | Preset,
    model_or_params: nn.Module | Iterable[Any],
    total_steps: int,
    *,
    schedule: str | None = None,
    **overrides: Any,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """An optimizer and the schedule that goes with it, for a run of known length.

    Optimizers with a schedule of their own (Ranger21) are told ``total_steps`` and get a constant one from outside.

    Args:
        name: as for :func:`create`.
        model_or_params: as for :func:`create`.
        total_steps: optimizer steps of the whole run, 1 or more.
        schedule: the name of a function in ``piste.schedules``; None for the preset's companion.
        **overrides: as for :func:`create`.

    Returns:
        The optimizer and its schedule, to be stepped after every optimizer step.

    Raises:
        TypeError, ValueError: as :func:`create`; ``schedule`` is unknown, ``total_steps`` is no positive whole number.

    Not for runs of unknown length: take ``piste.schedules.constant`` or ``untuned_warmup``.

    >>> import torch, piste
    >>> optimizer, schedule = piste.create_with_schedule("ranger21", torch.nn.Linear(4, 2), 1_000, lr=1e-3)
    >>> optimizer.param_groups[0]["total_steps"], schedule.get_last_lr()
    (1000, [0.001, 0.001])

    Sources: each preset names its own.
    """
    optimizer = create(name, model_or_params, **overrides)
    return optimizer, schedule_for(name, optimizer, total_steps, schedule=schedule)


def schedule_for(
    name: str | Preset, optimizer: torch.optim.Optimizer, total_steps: int, *, schedule: str | None = None
) -> LRScheduler:
    """The schedule that goes with an optimizer, for trainers that know the length of a run later than the optimizer.

    Args:
        name: what :func:`create` made the optimizer from.
        optimizer: what it made, or a framework's wrapper round it. If it has a schedule of its own (Ranger21) and gets
            a constant one from outside, it is told ``total_steps``.
        total_steps: optimizer steps of the whole run, 1 or more.
        schedule: the name of a function in ``piste.schedules``; None for the preset's companion.

    Returns:
        The schedule, to be stepped after every optimizer step.

    Raises:
        TypeError: ``name`` is neither text nor a preset.
        ValueError: ``name`` or ``schedule`` is unknown; ``total_steps`` is no positive whole number, or not the product
            of the ``epochs=`` and ``batches_per_epoch=`` that Ranger21 was given.

    Not needed where the length is known at once: :func:`create_with_schedule` makes both.

    >>> import torch, piste
    >>> optimizer = piste.create("ranger21", torch.nn.Linear(4, 2), lr=1e-3)
    >>> schedule = piste.schedule_for("ranger21", optimizer, 1_000)
    >>> optimizer.param_groups[0]["total_steps"]
    1000

    Sources: each preset names its own.
    """
    preset = preset_of(name)
    chosen = schedules.named(preset.schedule if schedule is None else schedule)
    lengths: list[Mapping[str, Any]] = [{} for _ in optimizer.param_groups]
    if chosen is schedules.constant and issubclass(preset.optimizer, optimizers.Ranger21):
        lengths = [told(group, total_steps) for group in optimizer.param_groups]
    made = chosen(optimizer, total_steps)
    for group, length in zip(optimizer.param_groups, lengths, strict=True):
        group.update(length)
    return made


def _wrapped(
    preset: Preset, model_or_params: nn.Module | Iterable[Any], overrides: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """What is inside, made first, with the outermost wrapper round it."""
    wrapping, inner = WRAPPINGS[preset.wrappings[0]], replace(preset, wrappings=preset.wrappings[1:])
    owner, mine = f"create({preset.name!r})", wrapping.arguments
    for_inside = [*preset.arguments, *_grouping_of(preset), "domain", *_arguments_of_wrappings(inner)]
    refuse_unknown(owner, overrides, [*mine, *for_inside])
    for name in overrides:
        if name in mine and name in for_inside:
            raise ValueError(
                f"{owner} got {name}={overrides[name]!r}, which {wrapping.name} and what is inside both take; legal: "
                f"make the inner one first, and piste.{wrapping.wrapper.__name__}(optimizer, {name}=...) round it"
            )
    settings = dict(wrapping.settings) | {k: v for k, v in overrides.items() if k in mine}
    missing = [name for name, default in mine.items() if default is inspect.Parameter.empty and name not in settings]
    if missing:
        raise ValueError(f"{owner} needs {' and '.join(f'{name}=' for name in missing)}, for {wrapping.name}")
    if wrapping.takes_model and isinstance(model_or_params, nn.Module):
        settings["model"] = model_or_params
    elif wrapping.needs_model:
        raise ValueError(f"{owner} got bare parameters; legal: the model itself, which {wrapping.name} runs")
    optimizer = create(inner, model_or_params, **{k: v for k, v in overrides.items() if k not in mine})
    return wrapping.wrapper(optimizer, **settings)


def _grouped(
    optimizer: type[torch.optim.Optimizer],
    model: nn.Module,
    decay: Any,
    grouping: Mapping[str, Any],
    *,
    scaled: bool,
) -> list[Any]:
    """Parameter groups of a model, sorted further by classes that ask modules what their weights are."""
    if issubclass(optimizer, optimizers.Muon):
        routing = {name: grouping[name] for name in _ROUTING if name in grouping}
        plain = {name: value for name, value in grouping.items() if name not in routing}
        return optimizer.groups(model, param_groups(model, weight_decay=decay, **plain), **routing)
    groups = param_groups(model, weight_decay=decay, **grouping)
    return optimizer.groups(model, groups) if issubclass(optimizer, optimizers.Amos) and not scaled else groups


#: the options of ``Muon.groups``; its table stands in for that of ``param_groups``
_ROUTING = tuple(
    name for name in inspect.signature(optimizers.Muon.groups).parameters if name not in ("model", "groups")
)


def _arguments_of_wrappings(preset: Preset) -> list[str]:
    return [name for wrapping in preset.wrappings for name in WRAPPINGS[wrapping].arguments]


def _settled(preset: Preset, overrides: Mapping[str, Any], is_model: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the class and arguments of ``param_groups``, from the preset and what overrides it."""
    owner = f"create({preset.name!r})"
    for_groups = [name for name in _grouping_of(preset) if name not in ("weight_decay", "lr")]
    if not preset.set_betas and "betas" in overrides:
        raise ValueError(
            f"{owner} got betas={overrides['betas']!r}; legal: no betas, as the preset has set_betas=False"
        )
    refuse_unknown(owner, overrides, [*preset.arguments, *for_groups, "domain"])
    settings = dict(preset.hyperparameters)
    if overrides.get("domain") is not None:
        settings |= _of_domain(owner, preset, overrides)
    grouping = {} if not is_model else {"decay_norm_and_bias": preset.wd.bn_wd}
    for option, value in overrides.items():
        if option in for_groups and not is_model:
            raise ValueError(f"{owner} got {option}={value!r} with bare parameters; legal: only with a model")
        if option != "domain":
            (grouping if option in for_groups else settings)[option] = value
    return settings, grouping


def _grouping_of(preset: Preset) -> list[str]:
    """The options that a preset's class has for the groups of a model."""
    return [*GROUP_OPTIONS, *(_ROUTING if issubclass(preset.optimizer, optimizers.Muon) else ())]


def _of_domain(owner: str, preset: Preset, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    domain = overrides["domain"]
    if not preset.domains:
        having = [name for name, each in presets.items() if each.domains]
        raise ValueError(f"{owner} got domain={domain!r}; legal: only for presets with domains: {', '.join(having)}")
    check_choice("domain", domain, preset.domains)
    for setting in preset.domains[domain]:
        if setting in overrides:
            raise ValueError(f"{owner} got both domain= and {setting}=, and domain= sets {setting}; legal: one of them")
    return preset.domains[domain]


def _decays(params: Iterable[Any], default: Any) -> list[Any]:
    return [param.get("weight_decay", default) if isinstance(param, dict) else default for param in params]


def _warn_of_lost_distinction(preset: Preset, params: list[Any], decay: Any) -> None:
    grouped = any(isinstance(param, dict) for param in params)
    if not (preset.wd.bn_wd or grouped or decay == 0):
        logger.warning(
            "create(%r): bare parameters do not say which are norms and biases, so all are decayed; "
            "pass the model, or piste.param_groups(model)",
            preset.name,
        )
