"""The race lints itself: each way in which comparisons of optimizers go wrong, and whether this one did.

What can be looked for has a lint; what this design makes impossible has a reason instead, said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from piste.race import lints
from piste.race.lints import Evidence
from piste.race.protocol import Tuning
from piste.race.record import FINISHED
from piste.race.result import CLEAR, COMMITTED, EXCLUDED, Finding
from piste.race.words import listing

Lint = Callable[[Evidence], str]

SINS: Final[tuple[tuple[str, Lint | str], ...]] = (
    ("untuned contenders", lints.untuned),
    ("no known baseline", lints.no_baseline),
    ("unequal budgets", lints.unequal_budgets),
    ("the best at the edge of what was tried", lints.best_at_edge),
    ("chosen and scored on the same seeds", lints.same_seeds),
    ("too few seeds", lints.few_seeds),
    ("chosen on the report split", lints.report_split_peeked),
    ("compared in the middle of a schedule", lints.trials_too_short),
    ("steps that hide their cost", lints.cost_hidden_by_steps),
    ("times from a busy machine", lints.contended_times),
    ("weight decay of different kinds", lints.other_decay),
    ("settings searched for some only", lints.frozen_for_some),
    ("evaluated in the wrong mode", "Model and optimizer are put into evaluation mode for every look at a split."),
    ("other initial weights or batches", lints.other_start),
    ("smoothed curves, cropped axes", "Curves show every evaluation as it was; what an axis cuts off is said on it."),
    ("diverged runs left out of means", "A run that did not finish counts as the worst score seen on its task."),
    ("a mean plus or minus a deviation", "Intervals are bootstrapped over seeds and widened for their number."),
    ("runs stopped when it suited", lints.stopped_early),
    ("training losses compared", "Scores come from the report split, in evaluation mode, never from training."),
    ("other groups of weights", lints.other_groups),
    ("ranks averaged over few tasks", "No average of ranks is taken; every task has its own verdict."),
    ("another implementation for some", lints.other_implementation),
    ("clipping for some only", lints.other_clipping),
    ("other batch sizes", "The batch size belongs to the task, whose hash every run carries."),
    ("toy functions as evidence", lints.toy),
)  # fmt: skip


def audit(evidence: Evidence) -> list[Finding]:
    """One finding for each sin."""
    found = []
    for sin, lint in SINS:
        if isinstance(lint, str):
            found.append(Finding(sin, EXCLUDED, lint))
        else:
            words = lint(evidence)
            found.append(Finding(sin, COMMITTED if words else CLEAR, words))
    return found


def notes(evidence: Evidence, findings: Iterable[Finding]) -> list[str]:
    """What the race holds against itself: the sins it committed, and what else limits it."""
    found = []
    if evidence.missing:
        found.append(
            f"The race is not finished: {evidence.missing} or more runs are missing. Repeat the command to go on."
        )
    found += [finding.words for finding in findings if finding.state == COMMITTED]
    lost = [run for run in evidence.confirmed if run.status != FINISHED]
    if lost:
        found.append(
            f"{len(lost)} confirmation runs did not finish; each counts as the worst score seen on its task, "
            "the untrained model's included."
        )
    return [*found, *_extensions(evidence)]


def _extensions(evidence: Evidence) -> list[str]:
    """Where the search was extended with success: a line a task."""
    lines = []
    for card, found in evidence.searches:
        extended = {name: state for name, state in found.items() if state.extensions and not state.edge}
        if extended:
            lines.append(f"{card}: {_extended(extended)}.")
    return lines


def _extended(found: dict[str, Tuning]) -> str:
    counts = sorted({state.extensions for state in found.values()})
    each = " each" if len(found) > 1 else ""
    trials = " or ".join(map(str, counts)) + (" trial" if counts == [1] else " trials")
    was = "was" if counts == [1] else "were"
    return f"the best lr of {listing(list(found), lints.NAMED)} was at an edge, so {trials}{each} {was} added beyond it"
