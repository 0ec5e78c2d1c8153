"""Slow weights, averages, and which of them are evaluated."""

from __future__ import annotations

from piste.advise.finding import Found, rule
from piste.advise.setup import RANGERS, Setup

_OWN_WEIGHTS = (
    "madgrad",
    "schedulefreesgd",
    "schedulefreeadamw",
    "schedulefreeradam",
    "sgdschedulefree",
    "adamwschedulefree",
)


def _period(setup: Setup) -> int | None:
    """Steps between synchronisations of Lookahead, wrapped round the optimizer or inside of it."""
    wrapper = setup.wrapper("lookahead")
    if wrapper is not None:
        return int(getattr(wrapper, "k", wrapper.param_groups[0].get("k", 0)) or 0) or None
    inside = setup.family in (*RANGERS, "lookaheadadam") or (setup.family == "ranger21" and setup.setting("lookahead"))
    return int(setup.setting("k", 0)) or None if inside else None


@rule("note", "The run ends between two synchronisations of Lookahead", "Zhang et al. 2019, arXiv 1907.08610")
def lookahead_unfinished(setup: Setup) -> Found:
    """Lookahead's result is its slow weights, and only after a multiple of k steps are they the model's. In between,
    and at a learning rate that is still high, fast weights are evaluated, which score worse."""
    k, steps = _period(setup), setup.steps
    high = setup.trace is not None and setup.trace.ends > 0.1 and setup.family != "ranger21"
    if k is None or steps is None or steps % k == 0 or not high:
        return None
    return f"{steps:,} steps at k={k} leave {steps % k} over", f"total_steps = {steps // k * k or k}"


@rule(
    "warning",
    "A Lookahead that forgets its slow weights",
    "michaelrzhang/lookahead; timm and over9000, which start them late",
)
def lookahead_foreign(setup: Setup) -> Found:
    """The authors' wrapper saves neither slow weights nor its place in the period, so a resumed run begins anew; others
    start slow weights at the first synchronisation, which then does nothing."""
    wrapper = setup.wrapper("lookahead")
    if wrapper is None or type(wrapper).__module__.partition(".")[0] == "piste":
        return None
    return (
        f"{type(wrapper).__module__}.{type(wrapper).__name__}",
        "optimizer = piste.Lookahead(optimizer, k=5, alpha=0.8)",
    )


@rule("warning", "Lookahead twice", "the docstring of piste.Lookahead")
def lookahead_twice(setup: Setup) -> Found:
    """Ranger is rectified Adam in Lookahead already. A second one holds the weights back twice and costs one more copy
    of them."""
    if setup.wrapper("lookahead") is None or setup.family not in (*RANGERS, "ranger21", "lookaheadadam"):
        return None
    return f"Lookahead round {type(setup.inner).__name__}", setup.code("params")


@rule(
    "warning",
    "Lookahead round an optimizer that holds its own weights",
    "Defazio & Jelassi 2021, arXiv 2101.11075; Defazio et al. 2024, arXiv 2405.15682",
)
def lookahead_undone(setup: Setup) -> Found:
    """MADGRAD computes each weight from where training began and from sums of gradients, Schedule-Free from two points
    of its own. What Lookahead moves is undone in the next steps."""
    if setup.wrapper("lookahead") is None or setup.family.replace("_", "") not in _OWN_WEIGHTS:
        return None
    return f"Lookahead round {type(setup.inner).__name__}", setup.code("params")


@rule("warning", "Other weights are evaluated than those that were averaged", "Polyak & Juditsky 1992; piste.ModelEMA")
def ema_not_evaluated(setup: Setup) -> Found:
    """An average costs a copy of the model and helps nobody if the live weights are evaluated, exported and compared
    instead."""
    if setup.ema is None or setup.evaluated is not setup.model or getattr(setup.ema, "_swapped", False):
        return None
    return "the live model is evaluated", "with ema.average():\n    evaluate(model)"


@rule(
    "warning", "The average reaches back to the start of the run", "arithmetic: 1 / (1 - decay) updates; piste.ModelEMA"
)
def ema_too_slow(setup: Setup) -> Found:
    """An average over more updates than the run has is dominated by weights from its first half. Without a warm-up of
    the decay it still holds the initial ones."""
    if setup.ema is None or setup.steps is None or setup.ema.decay <= 1 - 5 / setup.steps:
        return None
    horizon = 1 / (1 - setup.ema.decay)
    return f"decay={setup.ema.decay:g} averages over {horizon:,.0f} of {setup.steps:,} steps", (
        f"ema = piste.ModelEMA(model, decay={max(0.0, 1 - 20 / setup.steps):.5g})"
    )


@rule("note", "Averaged weights with the statistics of others", "torch.optim.swa_utils.update_bn; piste.recalibrate")
def ema_batch_norm(setup: Setup) -> Found:
    """BatchNorm's running statistics are those of the live weights. Averages need statistics of their own where they
    lie apart, at a high learning rate above all."""
    if setup.ema is None or not setup.has_batch_norm or (setup.trace is not None and setup.trace.ends < 0.1):
        return None
    return "the model has BatchNorm", "with ema.average() as averaged:\n    piste.recalibrate(averaged, loader)"


@rule("warning", "Two averages of the same weights", "Defazio et al. 2024, arXiv 2405.15682")
def ema_of_schedule_free(setup: Setup) -> Found:
    """A schedule-free optimizer averages by itself, and an exponential average of its training weights is an average of
    the wrong ones."""
    if setup.ema is None or "schedulefree" not in setup.family.replace("_", ""):
        return None
    return (
        f"ModelEMA beside {type(setup.inner).__name__}",
        "optimizer.eval()  # these are the averages\nevaluate(model)",
    )


RULES = (
    *(lookahead_unfinished, lookahead_foreign, lookahead_twice, lookahead_undone),
    *(ema_not_evaluated, ema_too_slow, ema_batch_norm, ema_of_schedule_free),
)
