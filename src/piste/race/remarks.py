"""What has to be said of a race beyond its standings, by whoever planned it: sweeps, edges, scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from piste.race import script
from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.protocol import Lane, Plan, Records, Tuning, best_trial
from piste.race.record import TUNE, RunRecord
from piste.race.space import Dimension
from piste.race.words import listing, short


def remarks(plan: Plan, known: Sequence[Lane], records: Records, used: Sequence[RunRecord]) -> list[str]:
    """Sentences for the report.

    Args:
        plan: of the race.
        known: how far every contender is on every task.
        records: by id.
        used: those that the result rests on.
    """
    found = list(plan.remarks)
    for card in plan.cards:
        searches = [(each.contender, each.search) for each in known if each.card is card]
        for contender, search in searches:
            found += _swept(plan, card, contender, search, records)
        found += _lost(card, searches, records)
        found += _edges(card, searches)
    return found + script.notes(used)


def _swept(plan: Plan, card: TaskCard, contender: Contender, search: Tuning, records: Records) -> Iterator[str]:
    """How each value of a sweep did, at its best learning rate."""
    keys = [key for key in search.runs if key.phase == TUNE]
    trials = [records[key.id] for key in keys if key.id in records]
    for dimension in contender.space:
        if not dimension.values:
            continue
        results = [_best_with(card, contender, dimension, value, trials) for value in dimension.values]
        yield (
            f"{card.name}: {dimension.name} of {contender.name}, best validation {card.metric_name} of one seed over "
            f"{plan.trials} learning rates or more: {listing(results, len(results))}."
        )


def _best_with(
    card: TaskCard, contender: Contender, dimension: Dimension, value: float, trials: Sequence[RunRecord]
) -> str:
    own = [trial for trial in trials if contender.value(dimension.name, trial.key.hyperparameters) == value]
    best = best_trial(card, own)
    return f"{value:g}: " + ("all lost" if best is None else short(best.curve.valid_metric[-1], 4))


def _lost(card: TaskCard, searches: Sequence[tuple[Contender, Tuning]], records: Records) -> Iterator[str]:
    """Who has no result because no trial came to its end, and what became of most of them."""
    for contender, search in searches:
        trials = [records[key.id] for key in search.runs if key.id in records]
        if trials and not search.missing and not any(trial.finished for trial in trials):
            (most, _), *_ = Counter(f"{trial.status}: {trial.message}" for trial in trials).most_common(1)
            yield f"{card.name}: all {len(trials)} trials of {contender.name} were lost; {most.rstrip('.')}."


def _edges(card: TaskCard, searches: Sequence[tuple[Contender, Tuning]]) -> Iterator[str]:
    """Where the best of another dimension than the learning rate, which is reported on its own, is at an end."""
    ends: dict[tuple[str, str], list[str]] = {}
    for contender, search in searches:
        for name, edge in search.edges.items():
            if name != "lr":
                ends.setdefault((name, edge), []).append(contender.name)
    for (name, edge), names in ends.items():
        yield f"{card.name}: the best {name} is the {edge}est tried for {listing(names)}; a better one may lie beyond."
