"""The frame that every optimizer shares: what the common options add around its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from piste.parts import decay
from piste.parts.prepare import ascend, centralize, centralize_direction, clip_norm, l2
from piste.slots import Part, Pipeline, plain

__all__ = ["standard"]


def standard(
    group: Mapping[str, Any],
    direction: Part,
    *,
    scale: tuple[Part, ...] = (),
    decoupled: Part = decay.decoupled,
    apply: Part = plain,
    after: tuple[Part, ...] = (),
) -> Pipeline:
    """A pipeline with the parts that the flags of ``group`` ask for.

    The order is: maximize, clip, L2, centralize, *direction*, *scale*, centralize the direction, decoupled decay,
    *apply*, *after*. ``decoupled`` is the part that decays when ``decoupled_weight_decay`` is set; it may fill the
    slot ``scale`` instead, for rules that decay inside the direction.
    """
    prepare: list[Part] = []
    if group["maximize"]:
        prepare.append(ascend)
    if group["clip_norm"] is not None:
        prepare.append(clip_norm)
    if not group["decoupled_weight_decay"]:
        prepare.append(l2)
    if group["use_gc"] and group["gc_loc"]:
        prepare.append(centralize)

    own_decay = (decoupled,) if group["decoupled_weight_decay"] else ()
    inside = own_decay if decoupled.slot == "scale" else ()
    centered = (centralize_direction,) if group["use_gc"] and not group["gc_loc"] else ()
    return Pipeline(
        prepare=tuple(prepare),
        direction=direction,
        scale=(*inside, *centered, *scale),
        decay=() if inside else own_decay,
        apply=apply,
        after=after,
    )
