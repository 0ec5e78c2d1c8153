"""piste in timm: after :func:`register`, ``timm.optim.create_optimizer_v2(model, opt="piste.ranger")``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import piste
from piste.integrations.framework import framework

with framework("timm"):
    from timm.optim._optim_factory import OptimInfo, default_registry

__all__ = ["register"]


#: what timm says for momentum when nobody has said anything
_UNTOUCHED = 0.9


def register(*names: str | piste.Preset) -> list[str]:
    """Make optimizers of piste known to timm, as ``"piste.<name>"``.

    A second call changes nothing. timm takes what stands before an underscore for something else, so names have hyphens
    in their place: ``"piste.sgd-nesterov"``; with an underscore timm's own ``nesterov`` would be made, without a word.

    What timm decides, and what the preset does:

    * weight decay is timm's argument, 0 by default, and so is what is not decayed (``filter_bias_and_bn``, the model's
      ``no_weight_decay()``); what decay means (``true_wd``) is the preset's;
    * ``lr=None`` is the preset's learning rate;
    * ``momentum=0.9``, timm's default, leaves the preset's; another value is used, or refused where there is none;
    * other arguments are those of :func:`piste.create` with bare parameters. None is dropped in silence, also not
      ``eps`` and ``betas``;
    * ``layer_decay`` writes ``lr_scale`` into groups, which timm's schedulers multiply into ``lr``, and only they.

    timm's groups have no names, and say nothing of modules. ``param_group_fn=piste.param_groups`` (with ``partial`` for
    its arguments) makes ours, ``param_group_fn=piste.Amos.groups`` those of Amos.

    Args:
        *names: as for :func:`piste.create`, presets of your own included. None for all presets, and all of them in each
            wrapper that needs nothing but a loss.

    Returns:
        The names as timm knows them, sorted.

    Raises:
        TypeError, ValueError: a name is unknown.

    Two-pass optimizers (``"piste.sam+adamw"``) refuse the step of timm's loop; :func:`piste.sharpness_step` takes its
    place.

    Example:
        >>> import timm, torch
        >>> from piste.integrations.timm import register
        >>> register("ranger", "sgd_nesterov")
        ['piste.ranger', 'piste.sgd-nesterov']
        >>> optimizer = timm.optim.create_optimizer_v2(torch.nn.Linear(3, 1), "piste.ranger", lr=4e-3, weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0, 0.1]

    Source: timm 1.0.
    """
    found = {f"piste.{preset.name.replace('_', '-')}": preset for preset in map(piste.preset_of, names or _all())}
    for name, preset in found.items():
        if _registered(name) != preset:
            default_registry.register(_info(name, preset))
    return sorted(found)


def _all() -> Iterator[str]:
    yield from piste.presets
    for wrapping in piste.WRAPPINGS.values():
        if not wrapping.needs:
            yield from (f"{wrapping.name}+{name}" for name in piste.presets)


def _registered(name: str) -> piste.Preset | None:
    """The preset that a name stands for in timm's registry."""
    if name not in default_registry.list_optimizers():
        return None
    known = default_registry.get_optimizer_info(name).opt_class
    return known.args[0] if isinstance(known, partial) and known.func is _create else None


def _info(name: str, preset: piste.Preset) -> OptimInfo:
    return OptimInfo(
        name,
        partial(_create, preset),  # type: ignore[arg-type]  # any callable is called
        preset.description,
        has_eps=True,  # else timm drops what was given
        has_betas=True,
        has_momentum="momentum" in preset.arguments,
    )


def _create(preset: piste.Preset, params: Any, **given: Any) -> torch.optim.Optimizer:
    """The optimizer, for the arguments that timm gives to a class."""
    if given.get("momentum") == _UNTOUCHED:
        del given["momentum"]
    if preset.optimizer is piste.SGD:
        preset = replace(preset, optimizer=SGD)
    return piste.create(preset, params, **given)


class SGD(piste.SGD):
    """SGD whose groups' ``lr_scale`` is left to timm's schedulers, which multiply it into ``lr``."""

    reads_lr_scale = False
