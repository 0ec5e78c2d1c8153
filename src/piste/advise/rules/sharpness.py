"""Sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

import torch

from piste.advise.finding import Found, rule
from piste.advise.setup import Setup, listed

_SCALED_BY_WEIGHTS = 10  # rho of adaptive forms is about so many times larger


def _round(setup: Setup, **settings: Any) -> str:
    """The call of piste's wrapper round what is inside, with the present settings and some changed."""
    name = type(setup.sam).__name__ if not setup.sam_is_foreign else "SAM"
    inside = "base_optimizer" if hasattr(setup.sam, "base_optimizer") else "optimizer"
    shown = {"rho": _rho(setup)} | settings
    given = ", ".join(f"{k}={v}" for k, v in shown.items() if v is not None)
    return f"optimizer = piste.{name}(optimizer.{inside}, {given})"


def _rho(setup: Setup) -> float | None:
    found = getattr(setup.sam, "rho", None)
    found = setup.sam.param_groups[0].get("rho") if found is None else found
    return None if found is None else float(found)


@rule(
    "error",
    "A SAM of another library under float16",
    "davda54/sam issues 7 and 79; the cheat-sheet, “should likely not use FP16”",
)
def foreign_sam_float16(setup: Setup) -> Found:
    """An overflow in the first pass makes its norm infinite, and infinity times zero is written into the weights. A
    GradScaler cannot unscale twice between updates, so the usual loop fails in one way or another."""
    if not setup.sam_is_foreign or setup.precision != "fp16":
        return None
    return f"{type(setup.sam).__module__}.{type(setup.sam).__name__}", (
        f"with torch.autocast(device_type, dtype=torch.bfloat16):\n    ...\n# or\n{_round(setup, model='model')}\n"
        "piste.sharpness_step(optimizer, closure, scaler=scaler)"
    )


@rule("note", "SAM under float16", "the cheat-sheet; davda54/sam issue 7")
def sam_float16(setup: Setup) -> Found:
    """Two passes have to share one scale and be unscaled once, and every overflow costs two passes.
    piste.sharpness_step does that; bfloat16 needs none of it."""
    if setup.sam is None or setup.sam_is_foreign or setup.precision != "fp16":
        return None
    return "autocast to float16", "with torch.autocast(device_type, dtype=torch.bfloat16):\n    ..."


@rule("warning", "SAM where every example is seen once", "Composer's documentation of SAM; the cheat-sheet")
def sam_single_epoch(setup: Setup) -> Found:
    """SAM keeps a model from fitting its training examples too sharply. In a single epoch, as large language models are
    trained, there is next to nothing to overfit, and the second pass costs as much as training on fresh data."""
    if setup.sam is None or setup.epochs is None or setup.epochs > 1:
        return None
    return f"{setup.epochs:g} epochs", setup.code("params") + "  # without SAM, for twice as many steps"


@rule(
    "warning",
    "BatchNorm's statistics see both passes of SAM",
    "Foret et al. 2021, arXiv 2010.01412; davda54/sam, README",
)
def sam_batch_norm(setup: Setup) -> Found:
    """The second pass runs at weights that are never evaluated, and moves the running statistics towards them. They
    should be updated in the first pass alone; piste's wrappers do so when they know the model."""
    if setup.sam is None or not setup.has_batch_norm or getattr(setup.sam, "model", None) is not None:
        return None
    return "the model has BatchNorm", _round(setup, model="model")


@rule(
    "note",
    "rho is outside of what was found to work",
    "the cheat-sheet (0.01 … 0.5); Kwon et al. 2021, arXiv 2102.11600",
)
def sam_rho(setup: Setup) -> Found:
    """rho is the distance at which SAM looks. 0.01 to 0.5 covers what papers report; a neighbourhood that scales with
    the weights (ASAM) takes about ten times as much."""
    rho = None if setup.sam is None else _rho(setup)
    if rho is None or getattr(setup.sam, "layerwise", False):
        return None
    kind = getattr(setup.sam, "adaptive", setup.sam.param_groups[0].get("adaptive", False))
    factor = 1 if kind in (False, "sam") else _SCALED_BY_WEIGHTS
    interval = getattr(setup.sam, "interval", 1) or 1  # a rarer second pass wants a longer way
    if 0.01 * factor <= rho <= 0.5 * factor * interval:
        return None
    return f"rho={rho:g}; usual: {0.01 * factor:g} … {0.5 * factor:g}", _round(setup, rho=0.05 * factor)


@rule("warning", "SAM's way is rounded off in bfloat16 weights", "arithmetic: rho spread over all weights")
def sam_bfloat16_weights(setup: Setup) -> Found:
    """rho is shared out among all weights: 0.05 over a hundred million of them moves each by 5e-6, far below what a
    bfloat16 weight can show. SAM then looks at the place where it stands."""
    names = [weight.name for weight in setup.low_precision if weight.tensor.dtype == torch.bfloat16]
    if setup.sam is None or not names or not setup.sam_is_foreign:
        return None
    return listed(names), "model.float()\nwith torch.autocast(device_type, dtype=torch.bfloat16):\n    ..."


@rule("warning", "A checkpoint of this SAM has no momentum in it", "davda54/sam, state_dict of the wrapper alone")
def sam_checkpoint(setup: Setup) -> Found:
    """The popular wrapper keeps its own scratch copies in its state, and the moments in the optimizer inside, whose
    state is in no state_dict(). A run that is resumed starts with empty moments."""
    inside = getattr(setup.sam, "base_optimizer", None)
    if not setup.sam_is_foreign or inside is None or inside.state is setup.sam.state:
        return None
    return f"{type(setup.sam).__name__}.state_dict() holds nothing of {type(inside).__name__}", (
        f"{_round(setup)}\n# or save optimizer.base_optimizer.state_dict(), too"
    )


@rule(
    "error",
    "A wrapper and the optimizer inside it have different groups",
    "davda54/sam; PyTorch's load_state_dict, which replaces groups",
)
def groups_apart(setup: Setup) -> Found:
    """A wrapper shares its groups with the optimizer inside, until load_state_dict replaces those of one of them. From
    then on a scheduler moves the learning rate of the one that does not step."""
    for outer, inner in zip(setup.layers[:-1], setup.layers[1:], strict=True):
        pairs = zip(outer.param_groups, inner.param_groups, strict=False)
        if len(outer.param_groups) != len(inner.param_groups) or any(a is not b for a, b in pairs):
            return f"{type(outer).__name__} round {type(inner).__name__}", (
                "optimizer.base_optimizer.param_groups = optimizer.param_groups  # after load_state_dict"
            )
    return None


RULES = (
    *(foreign_sam_float16, sam_float16, sam_single_epoch, sam_batch_norm, sam_rho),
    *(sam_bfloat16_weights, sam_checkpoint, groups_apart),
)
