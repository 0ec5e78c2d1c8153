"""How numbers are stored, and how fast they are worked on."""

from __future__ import annotations

import torch

from piste.advise.finding import Found, rule
from piste.advise.setup import Setup, listed

_FUSED_ON_CPU = ("Adam", "AdamW", "SGD", "Adagrad")


def _of_dtype(setup: Setup, dtype: torch.dtype) -> list[str]:
    return [weight.name for weight in setup.low_precision if weight.tensor.dtype == dtype]


@rule("error", "The weights themselves are float16", "torch.amp documentation; GradScaler refuses float16 gradients")
def float16_weights(setup: Setup) -> Found:
    """Updates below a 4096th of a weight are lost, Adam's eps of 1e-8 is 0 in float16, and a GradScaler refuses to
    unscale float16 gradients. Keep weights in float32 and let autocast choose what is computed in half."""
    names = _of_dtype(setup, torch.float16)
    if not names:
        return None
    return listed(names), "model.float()\nwith torch.autocast(device_type, dtype=torch.bfloat16):\n    loss = ..."


@rule("warning", "bfloat16 weights lose small updates", "Zamirai et al. 2020, arXiv 2010.06192; docs/precision.md")
def bfloat16_weights(setup: Setup) -> Found:
    """A bfloat16 number has 8 bits: an update below a 512th of the weight is rounded away, and late in training nearly
    all are. Stochastic rounding keeps them on average, Kahan summation and a 16-bit remainder exactly."""
    plain = {id(t) for group, t in setup.pairs() if group.get("weights", "plain") == "plain"}
    names = [w.name for w in setup.low_precision if w.tensor.dtype == torch.bfloat16 and id(w.tensor) in plain]
    if not names or setup.setting("kahan_sum") or setup.setting("bf16_stochastic_round"):
        return None
    if setup.origin == "piste":
        return listed(names), setup.code(weights="stochastic")
    cls = f"piste.{setup.preset.optimizer.__name__}" if setup.preset else "piste.AdamW"
    return listed(names), setup.code(cls=cls, weights="stochastic", foreach=None, fused=None)


@rule("warning", "Adam's second moment stands still in bfloat16", "arithmetic; docs/precision.md")
def bfloat16_second_moment(setup: Setup) -> Found:
    """torch's optimizers store moments in the dtype of the weight. At beta2 = 0.999 a second moment should fall by a
    thousandth per step, but neighbours in bfloat16 are a 256th apart: it is rounded back, and never falls again."""
    betas = setup.setting("betas")
    if setup.origin == "piste" or not _of_dtype(setup, torch.bfloat16) or not betas or betas[-1] <= 0.996:
        return None
    cls = f"piste.{setup.preset.optimizer.__name__}" if setup.preset else "piste.AdamW"
    return f"betas={tuple(betas)} on bfloat16 weights", setup.code(
        cls=cls, weights="stochastic", foreach=None, fused=None
    )


@rule("error", "float16 autocast without a GradScaler", "torch.amp documentation")
def float16_unscaled(setup: Setup) -> Found:
    """Gradients below 3e-8 are 0 in float16, and in many models many are. A GradScaler multiplies the loss so that they
    are not, and skips steps that overflow; bfloat16 needs none."""
    if setup.precision != "fp16" or setup.scaler:
        return None
    return (
        "precision is fp16 and there is no scaler",
        "with torch.autocast(device_type, dtype=torch.bfloat16):\n    loss = ...",
    )


@rule(
    "note",
    "The optimizer runs tensor by tensor",
    "docs/benchmarks.md; PyTorch documentation of torch.optim; the cheat-sheet, foreach=True",
)
def step_not_fused(setup: Setup) -> Found:
    """A step that launches each operation for each tensor spends its time on launching. foreach works on all tensors at
    once, fused in one pass over memory; on a CPU torch takes neither unless asked."""
    if setup.origin == "piste":
        if getattr(setup.inner, "_engine_name", "auto") != "reference":
            return None
        return "engine='reference'", setup.code(engine="auto")
    if setup.origin != "torch" or setup.setting("fused"):
        return None
    fusible = type(setup.inner).__name__ in _FUSED_ON_CPU
    on_cpu = all(tensor.device.type == "cpu" for _, tensor in setup.pairs())
    if setup.setting("foreach") is False or (on_cpu and fusible and setup.setting("foreach") is None):
        asked = {"foreach": None, "fused": True} if fusible else {"foreach": True}
        return f"foreach={setup.setting('foreach')}, fused={setup.setting('fused')}", setup.code(**asked)
    return None


RULES = (float16_weights, bfloat16_weights, bfloat16_second_moment, float16_unscaled, step_not_fused)
