"""The lints of a race: small functions from the evidence to words, none of them where all is well."""

from __future__ import annotations

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import piste
from piste.race.protocol import FEWEST_TRIALS_TO_EXTEND, MOST_EXTENSIONS, Lane, Plan, Records, Tuning, lanes
from piste.race.record import CONFIRM, TUNE, RunRecord
from piste.race.wishes import STOPPED
from piste.race.words import count, listing

FEW_SEEDS: Final = 5
FEW_TRIALS: Final = 4
# Optimizers that readers know; a race without a tuned one of them has no anchor.
BASELINES: Final = ("adam", "adamw", "sgd_momentum", "sgd_nesterov", "torch.Adam", "torch.AdamW")
# Weights of a model below which a task is a toy.
_TOY = 100
# Contenders that a note names; the others are counted.
NAMED: Final = 3
# Devices may differ in the last digits of the untrained loss.
_SAME_START = 1e-4


@dataclass(frozen=True)
class Evidence:
    """What a race is judged by.

    Args:
        plan: what was to be done.
        records: all that is kept.
        used: the runs of this race among them.
        missing: runs that have not been made.
        workers: runs that went side by side.
        known: how far every contender is, where that was worked out before.
    """

    plan: Plan
    records: Records
    used: list[RunRecord]
    missing: int
    workers: int
    known: Sequence[Lane] | None = None

    @cached_property
    def confirmed(self) -> list[RunRecord]:
        """Runs that were scored."""
        return [run for run in self.used if run.key.phase == CONFIRM]

    @cached_property
    def tuned(self) -> list[RunRecord]:
        """Runs that chose settings."""
        return [run for run in self.used if run.key.phase == TUNE]

    @property
    def optimizers(self) -> list[str]:
        """Every optimizer that races, once."""
        return list(dict.fromkeys(contender.optimizer for contender in self.plan.contenders))

    @cached_property
    def searches(self) -> list[tuple[str, dict[str, Tuning]]]:
        """Of each task, how far the searches of all contenders came."""
        found: dict[str, dict[str, Tuning]] = {card.name: {} for card in self.plan.cards}
        for each in lanes(self.plan, self.records) if self.known is None else self.known:
            found[each.card.name][each.contender.name] = each.search
        return list(found.items())


# Tuning --------------------------------------------------------------------------------------------------------------


def untuned(evidence: Evidence) -> str:
    """Rates that nobody searched for, or that were taken from another optimizer."""
    if evidence.plan.trials < FEW_TRIALS:
        return f"Few trials ({evidence.plan.trials}): the learning rates are coarse, and with them the comparison."
    tried = _by_contender(evidence.tuned, lambda run: run.key.lr)
    if len(tried) > 1 and len(set.union(*tried.values())) == 1:
        return "One and the same learning rate was taken for all: nobody's was searched for."
    return ""


def no_baseline(evidence: Evidence) -> str:
    """A race of newcomers among themselves."""
    if len(evidence.optimizers) < 2 or set(evidence.optimizers) & set(BASELINES):
        return ""
    return "Neither Adam or AdamW nor SGD with momentum raced: there is no known optimizer to hold the others against."


def unequal_budgets(evidence: Evidence) -> str:
    """Some were given more trials, steps or seeds than others."""
    for card in evidence.plan.cards:
        runs = [run for run in evidence.used if run.key.task == card.name]
        for phase, what in ((TUNE, "trials"), (CONFIRM, "confirmed runs")):
            of_phase = [run for run in runs if run.key.phase == phase]
            steps = _by_contender(of_phase, lambda run: run.key.steps)
            if len(set(map(frozenset, steps.values()))) > 1:
                return f"{card.name}: {what} were not all of equally many steps."
        by_name = Counter(run.key.contender for run in runs if run.key.phase == TUNE)
        counts = [by_name[contender.name] for contender in evidence.plan.contenders]
        # every dimension may be extended
        slack = MOST_EXTENSIONS * max(1 + len(contender.space) for contender in evidence.plan.contenders)
        if not evidence.missing and max(counts, default=0) - min(counts, default=0) > slack:
            return f"{card.name}: contenders were given from {min(counts)} to {max(counts)} trials."
    return ""


def best_at_edge(evidence: Evidence) -> str:
    """The best setting is the last one that was tried: a better one may lie beyond."""
    lines = []
    for card, found in evidence.searches:
        at_edge = {name: state for name, state in found.items() if state.edge}
        if at_edge:
            lines.append(f"{card}: {_still_at_edge(at_edge)}; {_beyond(evidence.plan)}.")
    return " ".join(lines)


def frozen_for_some(evidence: Evidence) -> str:
    """Settings that were searched for one optimizer and left alone for another."""
    searched = _by_contender(evidence.tuned, lambda run: frozenset(run.key.hyperparameters))
    kinds = {frozenset().union(*names) for names in searched.values()}
    if len(kinds) < 2:
        return ""
    some = sorted(frozenset().union(*kinds) - frozenset.intersection(*kinds))
    were = "was" if len(some) == 1 else "were"
    return f"{listing(some)} {were} searched for some contenders and left as set for others."


def trials_too_short(evidence: Evidence) -> str:
    """Settings chosen in shorter runs than those that were scored."""
    for card in evidence.plan.cards:
        tuned, confirmed = (
            {run.key.steps for run in runs if run.key.task == card.name}
            for runs in (evidence.tuned, evidence.confirmed)
        )
        if tuned and confirmed and max(tuned) < max(confirmed):
            return (
                f"{card.name}: learning rates were chosen in runs of {max(tuned):,} steps and scored in runs of "
                f"{max(confirmed):,}; what is best for the short ones need not be for the long ones."
            )
    return ""


# Scoring -------------------------------------------------------------------------------------------------------------


def same_seeds(evidence: Evidence) -> str:
    """Choosing and scoring on the same seeds: the winner's curse."""
    both = {run.key.seed for run in evidence.tuned} & {run.key.seed for run in evidence.confirmed}
    if not both:
        return ""
    return f"Seeds {listing(sorted(map(str, both)))} both chose the learning rates and scored them: the scores flatter."


def few_seeds(evidence: Evidence) -> str:
    """Too few seeds to tell a difference from chance."""
    if evidence.plan.seeds >= FEW_SEEDS:
        return ""
    return f"Few seeds ({evidence.plan.seeds}): only large differences can be found. {FEW_SEEDS} or more are better."


def report_split_peeked(evidence: Evidence) -> str:
    """A trial was scored on the split that is for the report alone."""
    if all(run.test_metric is None for run in evidence.tuned):
        return ""
    return "Trials were scored on the report split, which may have chosen the learning rates: the scores flatter."


def stopped_early(evidence: Evidence) -> str:
    """Runs that count as finished without having been trained to their end, and those that somebody stopped."""
    short = [run for run in evidence.used if run.finished and run.curve.step and run.curve.step[-1] < run.key.steps]
    if short:
        return f"{count(len(short), 'run')} ended before the last step: ranks flip while learning rates still fall."
    by_hand = [run for run in evidence.used if run.message == STOPPED and not run.finished]
    if by_hand:
        names = listing(sorted({run.key.contender for run in by_hand}), NAMED)
        return f"{count(len(by_hand), 'run')} of {names} stopped by hand, which counts as lost: somebody chose."
    return ""


def other_start(evidence: Evidence) -> str:
    """Contenders that did not begin with the same weights on a seed."""
    starts: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in evidence.used:
        untrained = run.curve.step[:1] == [0]  # a script's own reports begin after some steps
        if untrained and math.isfinite(run.curve.valid_loss[0]):
            starts[run.key.task, run.key.seed].append(run.curve.valid_loss[0])
    wrong = sorted({task for (task, _), values in starts.items() if _spread(values) > _SAME_START})
    if not wrong:
        return ""
    return f"{listing(wrong)}: contenders did not start from the same weights on a seed; pairs do not cancel luck."


# Cost ----------------------------------------------------------------------------------------------------------------


def cost_hidden_by_steps(evidence: Evidence) -> str:
    """Whose steps make more gradient evaluations than others': they were given equal steps, not equal evaluations."""
    finished = [run for run in (*evidence.tuned, *evidence.confirmed) if run.finished]
    made = [(run, run.key.steps or run.cost.steps) for run in finished]  # a script says itself how many it makes
    passes = {run.key.contender: run.cost.gradient_evaluations / steps for run, steps in made if steps}
    fewest = min(passes.values(), default=0)
    more = {name: many for name, many in sorted(passes.items()) if many > fewest}
    if not more:
        return ""
    words = listing([f"{name} {many:.3g}" for name, many in more.items()], NAMED)
    return (
        f"Gradient evaluations a step: {words}, the others {fewest:.3g}. All were given equal steps; what the others "
        "do with as many evaluations, a race of longer runs tells."
    )


def contended_times(evidence: Evidence) -> str:
    """Step times that other runs, or another machine, had a share in."""
    if len({run.fingerprint for run in evidence.used}) > 1:
        return "The runs come from more than one machine: times are those of one of them, or unknown."
    if evidence.workers > 1 and not evidence.plan.timing:
        return (
            f"Step times were taken while {evidence.workers} runs went side by side: compare them with each other, "
            "not with those of an idle machine."
        )
    return ""


def other_implementation(evidence: Evidence) -> str:
    """Times that compare programs, not optimizers: torch's own classes beside those of piste, or several versions."""
    of_torch = [name for name in evidence.optimizers if name.startswith("torch.")]
    if 0 < len(of_torch) < len(evidence.optimizers):
        return f"{listing(of_torch)} ran as torch has it, the others on engines of piste: step times compare programs."
    # those of timing passes name the machine, too
    versions = {tuple(sorted(run.key.versions.items())) for run in (*evidence.tuned, *evidence.confirmed)}
    return "The runs come from several versions of python, torch or piste." if len(versions) > 1 else ""


# Settings ------------------------------------------------------------------------------------------------------------


def other_decay(evidence: Evidence) -> str:
    """Weight decay that means one thing for some and another for others."""
    kinds = {name: "decoupled" if decay.true_wd else "L2" for name, decay in _decayed(evidence)}
    return _differing("Weight decay is {} for {}", kinds)


def other_groups(evidence: Evidence) -> str:
    """Norms and biases that some optimizers decay and others spare."""
    places = ("on matrices alone", "on norms and biases too")
    kinds = {name: places[decay.bn_wd] for name, decay in _decayed(evidence)}
    return _differing("Weight decay is {} for {}", kinds)


def other_clipping(evidence: Evidence) -> str:
    """Gradients that are clipped for some."""
    kinds = {name: "clipped" if _setting(name, "clip_norm") else "left as they are" for name in evidence.optimizers}
    return _differing("Gradients are {} for {}", kinds)


def toy(evidence: Evidence) -> str:
    """A function of two variables is a picture and no evidence."""
    weights = {card.name: card.parameters for card in evidence.plan.cards}
    for run in evidence.used:  # how large a script's model is, its runs say
        weights[run.key.task] = max(weights[run.key.task], run.cost.parameters)
    small = [name for name, many in weights.items() if 0 < many < _TOY]
    if not small:
        return ""
    return f"{listing(small)}: fewer than {_TOY} weights. What wins here need not win on any model that is of use."


def _differing(words: str, kinds: dict[str, str]) -> str:
    """``words`` for each kind with its optimizers, if there is more than one kind."""
    if len(set(kinds.values())) < 2:
        return ""
    parts: list[str] = []
    for kind in sorted(set(kinds.values())):
        names = listing([name for name, own in kinds.items() if own == kind], NAMED)
        parts.append(words.format(kind, names) if not parts else f"{kind} for {names}")
    return f"{', '.join(parts)}: part of any difference may be that."


def _decayed(evidence: Evidence) -> list[tuple[str, Any]]:
    """The presets with weight decay, and what it means there."""
    return [(name, piste.presets[name].wd) for name in evidence.optimizers if _setting(name, "weight_decay")]


def _setting(name: str, setting: str) -> Any:
    """What a preset says of a setting, or else its class; None where neither knows it, or the name is no preset."""
    if name not in piste.presets:
        return None
    preset = piste.presets[name]
    parameter = inspect.signature(preset.optimizer).parameters.get(setting)
    return preset.hyperparameters.get(setting, parameter.default if parameter else None)


# The search for a learning rate --------------------------------------------------------------------------------------


def _still_at_edge(found: dict[str, Tuning]) -> str:
    most = max(state.extensions for state in found.values())
    reach = f" after {count(most, 'extension')} of the range" if most else ""
    by_edge = {edge: [name for name, state in found.items() if state.edge == edge] for edge in ("high", "low")}
    parts = [f"the {edge}est tried{reach} for {listing(names, NAMED)}" for edge, names in by_edge.items() if names]
    return f"the best lr is {', '.join(parts)}"


def _beyond(plan: Plan) -> str:
    if plan.trials < FEWEST_TRIALS_TO_EXTEND:
        return f"{FEWEST_TRIALS_TO_EXTEND} trials or more extend the range"
    return "a better one may lie beyond"


def _by_contender(runs: Iterable[RunRecord], read: Callable[[RunRecord], Any]) -> dict[str, set[Any]]:
    """The different values of each contender."""
    found: dict[str, set[Any]] = defaultdict(set)
    for run in runs:
        found[run.key.contender].add(read(run))
    return dict(found)


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / (max(map(abs, values)) or 1.0)
