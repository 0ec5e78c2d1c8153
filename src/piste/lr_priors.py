"""Where to look for a class's learning rate, and the schedule that goes with it, each with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PRIORS", "LrPrior", "habits"]


@dataclass(frozen=True)
class LrPrior:
    """Where to look for a learning rate: a range round a centre, even in its logarithm.

    Args:
        center: the learning rate to try first, above 0.
        decades_below: how far the range reaches down, in powers of ten.
        decades_above: how far up.
    """

    center: float
    decades_below: float = 1.0
    decades_above: float = 1.0

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.center, self.decades_below, self.decades_above)))
        if not (finite and self.center > 0 and self.decades_below >= 0 and self.decades_above >= 0):
            raise ValueError(f"{self} is not legal; legal: center > 0, decades of at least 0, all finite")


def habits(class_name: str, hyperparameters: Mapping[str, Any]) -> tuple[str, LrPrior | None]:
    """Companion schedule and learning-rate range of a class; no range for classes that piste does not have."""
    schedule = "flat_cosine" if class_name.startswith("Ranger") else "one_cycle"
    prior = PRIORS.get(class_name)
    kept = hyperparameters.get("momentum", 0)
    if prior is not None and class_name in ("SGD", "RMSprop") and 0 < kept < 1:
        # Undampened momentum adds up 1 / (1 - momentum) steps, so the same pace needs a rate that much smaller.
        prior = LrPrior(float(f"{prior.center * (1 - kept):.3g}"), prior.decades_below, prior.decades_above)
    return schedule, prior


# All two decades wide, so that equal numbers of trials search equally densely. Momentum 0.9 divides those of SGD and
# RMSprop by ten. "Measured" means: best of a race on both built-in tasks, a few hundred steps long. The centre is where
# `piste.create` starts without lr=, so it stands where longer runs begin, a little below what short ones like best.
PRIORS: Mapping[str, LrPrior] = {
    # 0.1 with momentum, per 256 images (Goyal et al. 2017, arXiv 1706.02677); the best of DeepOBS (Schneider et al.
    # 2019) are 0.004 to 1.6 without momentum; measured 0.3 without (1.0 is unstable), 0.03 to 0.2 with.
    "SGD": LrPrior(0.5),
    # An Adam step without the average over gradients; 1e-3 of Hinton's lecture. Measured 2e-4 to 4e-4 with momentum.
    "RMSprop": LrPrior(2e-3),
    # 1e-3 is the paper's (Kingma & Ba 2015), 1e-3 to 3e-3 what small nets like; the best of DeepOBS 1.6e-4 to 0.04;
    # measured 2e-3 to 7e-3.
    "Adam": LrPrior(2e-3),
    "AdamW": LrPrior(2e-3),
    # Rectification is a warm-up of about 2 / (1 - beta2) steps: short runs want more than the 1e-3 of the papers (Liu
    # et al. 2019; Zhuang et al. 2020: 1e-4 to 1e-2). Measured 0.01 to 0.04.
    "RAdam": LrPrior(4e-3, 0.8, 1.2),
    "AdaBelief": LrPrior(4e-3, 0.8, 1.2),
    # 1e-3 to 4e-3 in its author's fastai runs. Measured 0.02 to 0.05: Lookahead halves the pace, too.
    "Ranger": LrPrior(6e-3, 0.8, 1.2),
    "RangerAdaBelief": LrPrior(6e-3, 0.8, 1.2),
    # Between AdamW's, which its authors start from, and Ranger's: softplus and Lookahead slow it, normalised gradients
    # with positive-negative momentum do not.
    "Ranger21": LrPrior(3e-3),
    # Adam with another order of operations, or less haste: where AdamW's is.
    **dict.fromkeys(("ADOPT", "AdEMAMix", "LaProp", "NAdamW", "StableAdamW"), LrPrior(2e-3)),
    # Ten times AdamW's, as its authors advise (5 to 10 times).
    "Adan": LrPrior(2e-2),
    # The relative change of a tensor per step; 1.8e-3 (BERT) to 1.2e-2 (ImageNet) in the paper at large batches.
    "Lamb": LrPrior(5e-3),
    # 1e-3 to 3e-2 in over9000's runs; on the update it is the relative change of a tensor per step.
    **dict.fromkeys(("Ralamb", "RangerLars"), LrPrior(5e-3)),
    # Adam's, and a little more, as Lookahead halves the pace.
    "LookaheadAdam": LrPrior(3e-3),
    # Adagrad's scale: 0.1 to 0.3 with a warm-up in the paper's runs.
    "SM3": LrPrior(0.1),
    # A third to a tenth of AdamW's (Chen et al. 2023).
    "Lion": LrPrior(3e-4),
    # "moonlight" gives its steps the size that AdamW's have late in long runs (Liu et al. 2025); early AdamW's are up
    # to five times as large. Measured 0.012 to 0.045 on three tasks, mostly after an extension of 2e-4 to 2e-2
    # (docs/quality.md), so the range ends at 0.063.
    "Muon": LrPrior(4e-3, 0.8, 1.2),
    "NorMuon": LrPrior(4e-3, 0.8, 1.2),
    # Adam's, in another basis; 3e-3 is its authors' choice for language models.
    "SOAP": LrPrior(2e-3),
    # A third of AdamW's (kron_torch): its steps have a root mean square near 1, as AdamW's have at most.
    "PSGDKron": LrPrior(6e-4),
    # Grafted to Adam's length, so where Adam's is.
    "Shampoo": LrPrior(2e-3),
    # 2.5e-4 (CIFAR-10) to 0.025 (IWSLT) in the paper; a step is about lr^(2/3) in size, so the range is wide in effect.
    "MADGRAD": LrPrior(5e-3, 1.2, 0.8),
    "MirrorMADGRAD": LrPrior(5e-3, 1.2, 0.8),
    # Undampened momentum over gradients of unit norm: 1e-2 in the paper's vision runs, with wide scatter.
    "NovoGrad": LrPrior(1e-2),
    # The relative change of a tensor per step (lr times its root mean square); 1e-2 is the most of relative steps.
    "Adafactor": LrPrior(1e-2),
    # 1 / sqrt(batches in the data): 1e-2 to 5e-2 for small data, less for large (authors' advice).
    "Amos": LrPrior(2e-2),
    # It multiplies an estimate: 1 is the authors' advice, with d_coef in its place for corrections.
    "Prodigy": LrPrior(1.0),
    # One to ten times AdamW's (authors' package; 2.5e-3 is their default).
    **dict.fromkeys(("ScheduleFreeAdamW", "ScheduleFreeRAdam"), LrPrior(4e-3)),
    # 10 to 50 times that of SGD with momentum under a schedule (authors' package).
    "ScheduleFreeSGD": LrPrior(1.0),
    # Averages instead of sums: ten times what SGD with momentum takes.
    "PNM": LrPrior(0.5),
    "AdaPNM": LrPrior(2e-3),
}
