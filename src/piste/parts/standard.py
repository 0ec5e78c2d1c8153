"""The frame that every optimizer shares: what the common options add around its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from piste.parts import decay
from piste.parts.prepare import ascend, centralize, centralize_direction, clip_norm, l2
from piste.parts.scale import cautious
from piste.slots import Part, Pipeline, plain

__all__ = ["check_update", "standard"]


def standard(
    group: Mapping[str, Any],
    direction: Part,
    *,
    clip: tuple[Part, ...] = (),
    finish: tuple[Part, ...] = (),
    momentum: tuple[Part, ...] = (),
    scale: tuple[Part, ...] = (),
    coupled: Part | None = l2,
    decoupled: Part | None = decay.decoupled,
    apply: Part = plain,
    after: tuple[Part, ...] = (),
) -> Pipeline:
    """A pipeline with the parts that the flags of ``group`` ask for.

    The order is: maximize, clip, L2, *clip*, centralize, *finish*, *direction*, *momentum*, cautious, *scale*,
    centralize the direction, decoupled decay, *apply*, *after*. ``decoupled`` is the part that decays when
    ``decoupled_weight_decay`` is set, ``coupled`` the one when it is not; each may fill the slot ``scale`` instead, for
    rules that decay inside the direction, and None leaves the decay to the rule.
    """
    prepare: list[Part] = []
    if group["maximize"]:
        prepare.append(ascend)
    if group["clip_norm"] is not None:
        prepare.append(clip_norm)
    decays = decoupled if group["decoupled_weight_decay"] else coupled
    if decays is not None and decays.slot == "prepare":
        prepare.append(decays)
    prepare += clip
    if group["use_gc"] and group["gc_loc"]:
        prepare.append(centralize)
    prepare += finish

    inside = (decays,) if decays is not None and decays.slot == "scale" else ()
    centered = (centralize_direction,) if group["use_gc"] and not group["gc_loc"] else ()
    return Pipeline(
        prepare=tuple(prepare),
        direction=direction,
        scale=(*momentum, *((cautious,) if group["cautious"] else ()), *inside, *centered, *scale),
        decay=(decays,) if decays is not None and decays.slot == "decay" else (),
        apply=apply,
        after=after,
    )


def check_update(name: str, group: Mapping[str, Any]) -> None:
    """Refuse what a rule without a direction apart from the weight cannot do."""
    if group["cautious"]:
        raise ValueError(
            f"{name} got cautious=True; legal: False, for its step has no direction to hold against the gradient"
        )
    if group["use_gc"] and not group["gc_loc"]:
        raise ValueError(
            f"{name} got gc_loc=False; legal: True, for its step has no direction that could be centralized"
        )
