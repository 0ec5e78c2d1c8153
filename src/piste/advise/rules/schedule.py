"""How the learning rate moves, and who moves it."""

from __future__ import annotations

import re

from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from piste.advise.finding import Found, rule
from piste.advise.setup import RANGERS, Setup
from piste.advise.trace import own_length

_NEEDS_WARMUP = ("adam", "adamw", "nadam", "nadamw", "adamax", "adan", "lamb", "ademamix", "laprop", "stableadamw")
_SUMS_FOR_EVER = ("sm3", "madgrad", "mirrormadgrad", "adagrad")


def _is_schedule_free(setup: Setup) -> bool:
    return "schedulefree" in setup.family.replace("_", "")


@rule(
    "warning",
    "Ranger without a flat stretch",
    "Wright 2019, lessw2020/Ranger-Deep-Learning-Optimizer; fastai fit_flat_cos; the cheat-sheet",
)
def ranger_not_flat(setup: Setup) -> Found:
    """Ranger warms itself up by rectification, and its Lookahead wants time at a high learning rate: hold it for about
    three quarters of the run, then go down a cosine. The cheat-sheet finds that better than one cycle."""
    if setup.family not in RANGERS or setup.trace is None:
        return None
    if setup.scheduler is not None and 0.3 <= setup.trace.flat < 0.98 and setup.trace.ends < 0.2:
        return None
    what = f"flat for {setup.trace.flat:.0%} of the run" if setup.scheduler is not None else "there is no schedule"
    return what, f"schedule = piste.schedules.flat_cosine(optimizer, total_steps={setup.steps or 'steps'})"


@rule("warning", "Ranger21 under a scheduler from outside", "Wright & Demeure 2021, arXiv 2106.13731; the cheat-sheet")
def ranger21_scheduled(setup: Setup) -> Found:
    """Ranger21 warms up, holds and anneals by itself. A scheduler outside multiplies into that, or (in the released
    code) is overwritten after 72 % of the run."""
    if setup.family != "ranger21" or not setup.is_scheduled:
        return None
    length = setup.steps or "steps"
    return f"{type(setup.scheduler).__name__} moves its learning rate", (
        f"optimizer, schedule = piste.create_with_schedule('ranger21', model, {length}, lr={setup.lr:g})"
    )


@rule(
    "warning", "Ranger21 does not know how long the run is", "Wright & Demeure 2021, arXiv 2106.13731; the cheat-sheet"
)
def ranger21_without_length(setup: Setup) -> Found:
    """Its warm-up and warm-down are fractions of the run. Without a length there are none, and the learning rate stays
    where it is to the end."""
    told = setup.setting("total_steps", 0) or setup.setting("num_epochs", 0)
    if setup.family != "ranger21" or setup.origin != "piste" or told or setup.is_scheduled:
        return None
    return "total_steps is None", setup.code(total_steps=setup.steps or 1000)


@rule(
    "note", "Gradients are clipped before Ranger21 clips and normalises them", "Wright & Demeure 2021, arXiv 2106.13731"
)
def ranger21_clipped(setup: Setup) -> Found:
    """Ranger21 clips each unit's gradient against its weights and then divides by the gradient's deviation: what a norm
    clip from outside has shortened is scaled back, and only the work is lost."""
    if setup.family != "ranger21" or not (setup.clip_norm or setup.setting("clip_norm")):
        return None
    return f"clip_norm={setup.clip_norm or setup.setting('clip_norm'):g}", "# without clip_grad_norm_\noptimizer.step()"


@rule("warning", "A schedule for a schedule-free optimizer", "Defazio et al. 2024, arXiv 2405.15682")
def schedule_free_scheduled(setup: Setup) -> Found:
    """Schedule-Free replaces annealing by an average, weighted by the learning rate; under a decay the late steps, the
    best ones, hardly count. A warm-up is all it takes, as warmup_steps."""
    if not _is_schedule_free(setup) or not setup.is_scheduled or (setup.trace and setup.trace.ends > 0.98):
        return None
    return f"{type(setup.scheduler).__name__} moves its learning rate", (
        "schedule = piste.schedules.constant(optimizer)  # or none"
    )


@rule("error", "Schedule-Free is in another mode than the model", "Defazio et al. 2024, arXiv 2405.15682; schedulefree")
def schedule_free_mode(setup: Setup) -> Found:
    """Its weights are those to train with, or those to evaluate, as optimizer.train() and optimizer.eval() say. Those
    to train with score worse; and a step in evaluation mode is refused. Switch with the model, also before saving."""
    mode = setup.setting("train_mode")
    if not _is_schedule_free(setup) or mode is None or bool(mode) == setup.model.training:
        return None
    word = "train" if setup.model.training else "eval"
    return (
        f"model.training is {setup.model.training}, the optimizer's train_mode {mode}",
        f"model.{word}()\noptimizer.{word}()",
    )


@rule(
    "note", "BatchNorm's statistics are not those of the weights to evaluate", "facebookresearch/schedule_free, README"
)
def schedule_free_batch_norm(setup: Setup) -> Found:
    """Running statistics belong to the weights that were trained with; a schedule-free optimizer evaluates at others.
    Compute them anew over some fifty batches before each evaluation."""
    if not _is_schedule_free(setup) or not setup.has_batch_norm:
        return None
    return "the model has BatchNorm", "optimizer.eval()\npiste.recalibrate(model, loader)"


@rule(
    "warning",
    "No warm-up",
    "Ma & Yarats 2019, arXiv 1910.04209; You et al. 2020, arXiv 1904.00962; Vaswani et al. 2017, arXiv 1706.03762",
)
def warmup_missing(setup: Setup) -> Found:
    """In its first steps Adam's second moment is an average over hardly any gradients, and steps are too long; in a
    transformer that spoils what norms and attention learn first. 2 / (1 - beta2) steps of linear warm-up need no
    tuning; LAMB's large batches need one in any model."""
    if setup.family not in _NEEDS_WARMUP or setup.trace is None or setup.trace.begins < 0.5:
        return None
    if not (setup.has_attention or setup.family == "lamb") or setup.setting("warmup_steps"):
        return None
    return _beginning(setup), (
        f"schedule = piste.schedules.one_cycle(optimizer, total_steps={setup.steps or 'steps'})\n"
        "# or, at a constant rate: piste.schedules.untuned_warmup(optimizer)"
    )


def _beginning(setup: Setup) -> str:
    return f"the learning rate begins at {setup.trace.begins:.0%} of its peak" if setup.trace else ""


@rule(
    "note",
    "Full-size first steps in sums that are kept for ever",
    "Anil et al. 2019, arXiv 1901.11150; Defazio & Jelassi 2021, arXiv 2101.11075",
)
def warmup_missing_in_sums(setup: Setup) -> Found:
    """SM3, Adagrad and MADGRAD never forget a gradient. What wild first steps add to their sums, with the learning rate
    of those steps, shortens or bends every later one; a warm-up keeps it small."""
    if setup.family not in _SUMS_FOR_EVER or setup.trace is None or setup.trace.begins < 0.5:
        return None
    return _beginning(setup), (
        f"schedule = piste.schedules.warmup_stable_decay(optimizer, total_steps={setup.steps or 'steps'}, pct_decay=0)"
    )


@rule(
    "note", "The learning rate never comes down", "Hägele et al. 2024, arXiv 2405.18392; Smith 2018, arXiv 1803.09820"
)
def never_annealed(setup: Setup) -> Found:
    """The last weights of a run at a constant rate carry the noise of a full-size step. Annealing, or an average of
    weights, takes it out, in nearly every comparison to a better result."""
    own = ("ranger21", "prodigy", "amos", "sm3", "adafactor", *RANGERS)
    if setup.family in own or _is_schedule_free(setup) or setup.trace is None or setup.ema is not None:
        return None
    if setup.trace.ends < 0.5:
        return None
    what = "no scheduler was given" if setup.scheduler is None else f"it ends at {setup.trace.ends:.0%} of its peak"
    name = setup.preset.schedule if setup.preset and setup.preset.schedule != "constant" else "one_cycle"
    return what, f"schedule = piste.schedules.{name}(optimizer, total_steps={setup.steps or 'steps'})"


def _made_for(setup: Setup, steps: int) -> str:
    """The call that makes the scheduler for a run of so many steps."""
    if isinstance(setup.scheduler, OneCycleLR):
        return f"schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={setup.lr:g}, total_steps={steps})"
    if isinstance(setup.scheduler, CosineAnnealingLR):
        return f"schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max={steps})"
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(setup.scheduler.curve).__name__.lstrip("_")).lower()
    return f"schedule = piste.schedules.{name}(optimizer, total_steps={steps})"


@rule(
    "warning",
    "The schedule was made for a run of another length",
    "PyTorch documentation of OneCycleLR and CosineAnnealingLR",
)
def schedule_length(setup: Setup) -> Found:
    """A scheduler counts its own steps. Made for fewer than it gets, a cosine rises again, OneCycleLR raises and others
    hold their last value; made for more, the rate never comes down. Mind whether it is stepped per batch or epoch."""
    length, steps = own_length(setup.scheduler), setup.schedule_steps or setup.total_steps
    if length is None or steps is None or abs(length - steps) <= 0.02 * steps:
        return None
    return f"made for {length:,} steps, and gets {steps:,}", _made_for(setup, steps)


@rule("error", "The scheduler moves another optimizer", "torch.optim.lr_scheduler; davda54/sam, on load_state_dict")
def scheduler_elsewhere(setup: Setup) -> Found:
    """A scheduler writes into the parameter groups of the optimizer it was made with. If that is not this one, nor
    shares its groups, the learning rate of this one never changes."""
    moved = getattr(setup.scheduler, "optimizer", None)
    if moved is None or not hasattr(moved, "param_groups"):
        return None
    if any(theirs is ours for theirs in moved.param_groups for ours in setup.groups):
        return None
    return f"it holds a {type(moved).__name__} that shares no group with this optimizer", (
        f"schedule = piste.schedules.one_cycle(optimizer, total_steps={setup.steps or 'steps'})  # after the optimizer"
    )


@rule(
    "warning", "OneCycleLR switches momentum on", "torch.optim.lr_scheduler.OneCycleLR, cycle_momentum=True by default"
)
def one_cycle_momentum(setup: Setup) -> Found:
    """OneCycleLR cycles the momentum between 0.85 and 0.95 also where it was 0, which makes steps about ten times
    longer. piste's one_cycle leaves a momentum of 0 alone."""
    cycles = isinstance(setup.scheduler, OneCycleLR) and setup.scheduler.cycle_momentum
    if not cycles or setup.inner.defaults.get("momentum") != 0:
        return None
    return f"momentum was 0 and is {setup.setting('momentum'):g}", (
        f"schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={setup.lr:g}, "
        f"total_steps={setup.steps or 'steps'}, cycle_momentum=False)"
    )


@rule("warning", "Amos under a decaying schedule", "Tian & Parikh 2022, arXiv 2210.11693")
def amos_scheduled(setup: Setup) -> Found:
    """Amos shortens its steps by itself as its decay accumulates; its authors hold the learning rate after a warm-up. A
    decay on top stops it early."""
    if setup.family != "amos" or setup.trace is None or not setup.is_scheduled or setup.trace.ends > 0.5:
        return None
    return f"the schedule ends at {setup.trace.ends:.0%} of its peak", "schedule = piste.schedules.constant(optimizer)"


@rule("warning", "A scheduler that Adafactor does not listen to", "transformers' Adafactor, relative_step=True")
def adafactor_relative(setup: Setup) -> Found:
    """With relative_step Adafactor takes the smaller of 0.01 and one over the root of the step number, and never looks
    at lr. A scheduler then changes nothing but the log."""
    if setup.family != "adafactor" or not setup.setting("relative_step", False) or setup.scheduler is None:
        return None
    return "relative_step=True", setup.code(lr=1e-3, relative_step=False, scale_parameter=False, warmup_init=False)


@rule("error", "fairseq's Adafactor shrinks its own learning rate", "fairseq/optim/adafactor.py")
def adafactor_compounds(setup: Setup) -> Found:
    """fairseq's Adafactor writes the scaled rate back into the group for every parameter. With scale_parameter and
    without relative_step that compounds over parameters and steps, until nothing moves."""
    ours = setup.family == "adafactor" and setup.origin == "fairseq"
    if not ours or setup.setting("relative_step", True) or not setup.setting("scale_parameter", False):
        return None
    return "scale_parameter=True with relative_step=False", setup.code(scale_parameter=False)


RULES = (
    *(ranger_not_flat, ranger21_scheduled, ranger21_without_length, ranger21_clipped),
    *(schedule_free_scheduled, schedule_free_mode, schedule_free_batch_norm),
    *(warmup_missing, warmup_missing_in_sums, never_annealed, schedule_length, scheduler_elsewhere),
    *(one_cycle_momentum, amos_scheduled, adafactor_relative, adafactor_compounds),
)
