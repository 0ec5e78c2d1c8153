"""From records to results: scores, standings, the verdict, and what the race holds against itself."""

from __future__ import annotations

import math

from piste.race import costs
from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.power import unresolved
from piste.race.protocol import (
    FEWEST_TRIALS_TO_EXTEND,
    Plan,
    Records,
    Tuning,
    confirmations,
    keys_so_far,
    timings,
    tuning,
)
from piste.race.record import CONFIRM, FINISHED, TUNE, RunRecord, Standing, StudyResult, TaskResult
from piste.race.remarks import remarks
from piste.race.statistics import Comparison, compare
from piste.race.words import count, listing, size

FEW_SEEDS = 5
FEW_TRIALS = 4
# Step times closer than this are the same; then the smaller optimizer state is the cheaper one.
_SAME_TIME = 0.05
# Contenders that a verdict or a note names; the others are counted, and stand in the table.
_NAMED = 3


def study_result(
    plan: Plan, records: Records, *, title: str, created: str, command: str, workers: int, machine: dict[str, str]
) -> StudyResult:
    """All that can be said from the records so far; a race cut short gives a result that says so."""
    used = [records[key.id] for _, _, key in keys_so_far(plan, records) if key.id in records]
    missing = sum(key.id not in records for _, _, key in keys_so_far(plan, records))
    return StudyResult(
        title=title,
        created=created,
        results=[task_result(plan, card, records) for card in plan.cards],
        records=used,
        notes=_notes(plan, records, used, missing, workers),
        machine=machine,
        command=command,
    )


def task_result(plan: Plan, card: TaskCard, records: Records) -> TaskResult:
    """Standings and verdict on one task."""
    tunings = {contender.name: tuning(plan, card, contender, records) for contender in plan.contenders}
    confirmed = {
        contender.name: _confirmed(plan, card, contender, tunings[contender.name], records)
        for contender in plan.contenders
    }
    keys = [key for state in tunings.values() for key in state.runs]
    made = [records[key.id] for key in keys if key.id in records]
    made += [run for runs in confirmed.values() for run in runs if run is not None]
    scores = _scores(confirmed, _worst_score(card, made))
    compared = compare(scores, card.higher_is_better) if scores else {}
    leader = next(iter(compared), None)
    contenders = {contender.name: contender for contender in plan.contenders}
    ranked = [*compared, *(name for name in contenders if name not in compared)]
    passes = {name: _timed(plan, card, contenders[name], tunings[name], records) for name in contenders}
    machine = costs.home([*made, *(run for runs in passes.values() for run in runs)])
    standings = [
        _standing(
            *(contenders[name], tunings[name], confirmed[name], scores.get(name), compared.get(name), records),
            *(passes[name], machine),
        )
        for name in ranked
    ]
    standings = [_without_false_tie(standing, confirmed, leader) for standing in standings]
    # Leader first, then its group, then the others, each by score.
    standings.sort(key=lambda standing: (standing.contender != leader, not standing.tied))
    verdict = _verdict(card, standings, plan.seeds)
    return TaskResult(card.name, card.metric_name, card.higher_is_better, standings, verdict, plan.target)


def recommended(standings: list[Standing]) -> Standing | None:
    """The cheapest of the leader's group: least time a step, and of equally fast ones the least state.

    From a single seed, which cannot tell a tie, it is the one that scored best.
    """
    if standings and len(standings[0].scores) == 1:
        return standings[0]
    group = [standing for standing in standings if standing.tied]
    if not group:
        return None
    times = [standing.cost.step_seconds for standing in group if not math.isnan(standing.cost.step_seconds)]
    limit = min(times, default=math.inf) * (1 + _SAME_TIME)
    fast = [standing for standing in group if standing.cost.step_seconds <= limit] or group
    return min(fast, key=lambda standing: standing.cost.state_bytes)  # of equal ones the first, which scored best


def _confirmed(
    plan: Plan, card: TaskCard, contender: Contender, state: Tuning, records: Records
) -> list[RunRecord | None]:
    """The confirmation runs in seed order, None where one has not been made."""
    if state.best is None:
        return []
    return [records.get(key.id) for key in confirmations(plan, card, contender, state.best.key.hyperparameters)]


def _timed(plan: Plan, card: TaskCard, contender: Contender, state: Tuning, records: Records) -> list[RunRecord]:
    """The timing passes that have been made."""
    if state.best is None:
        return []
    keys = timings(plan, card, contender, state.best.key.hyperparameters)
    return [records[key.id] for key in keys if key.id in records]


def _scores(confirmed: dict[str, list[RunRecord | None]], worst: float) -> dict[str, list[float]]:
    """One score a seed for every contender, over the seeds that all of them have been run on."""
    racing = {name: runs for name, runs in confirmed.items() if runs}
    if not racing:
        return {}
    columns = [column for column in zip(*racing.values(), strict=True) if None not in column]
    rows = zip(*columns, strict=True) if columns else ()
    return {name: [_score(run, worst) for run in row if run] for name, row in zip(racing, rows, strict=False)}


def _score(record: RunRecord, worst: float) -> float:
    return record.test_metric if record.finished and record.test_metric is not None else worst


def _worst_score(card: TaskCard, records: list[RunRecord]) -> float:
    """What a run that did not finish counts as: the worst seen on the task, the untrained models' included."""
    seen = [record.test_metric for record in records if record.test_metric is not None]
    seen += [record.curve.valid_metric[0] for record in records if record.curve.valid_metric]
    finite = [value for value in seen if math.isfinite(value)]
    if not finite:
        return 0.0
    return min(finite) if card.higher_is_better else max(finite)


def _standing(
    contender: Contender,
    state: Tuning,
    confirmed: list[RunRecord | None],
    scores: list[float] | None,
    compared: Comparison | None,
    records: Records,
    passes: list[RunRecord],
    machine: str,
) -> Standing:
    trials = [records[key.id] for key in state.runs if key.id in records]
    confirmations_made = [record for record in confirmed if record is not None]
    nan = math.nan
    numbers = compared or Comparison(nan, nan, nan, nan, nan, nan, nan, False)
    return Standing(
        contender=contender.name,
        optimizer=contender.optimizer,
        schedule=contender.schedule,
        best_hyperparameters={} if state.best is None else dict(state.best.key.hyperparameters),
        edge=state.edge,
        trials=len(trials),
        diverged_trials=sum(not trial.finished for trial in trials),
        seeds=len(confirmations_made),
        scores=scores or [],
        mean=numbers.mean,
        low=numbers.low,
        high=numbers.high,
        difference=numbers.difference,
        difference_low=numbers.difference_low,
        difference_high=numbers.difference_high,
        tied=numbers.tied,
        cost=costs.pooled([*trials, *confirmations_made, *passes], machine),
        failures=[_failure(record) for record in (*trials, *confirmations_made) if not record.finished],
    )


def _without_false_tie(
    standing: Standing, confirmed: dict[str, list[RunRecord | None]], leader: str | None
) -> Standing:
    """A contender with a lost confirmation run is no equal of a leader without one, however wide its interval."""
    if standing.contender == leader or leader is None or not standing.tied:
        return standing
    lost = [run for run in confirmed[standing.contender] if run is not None and not run.finished]
    lost_by_leader = [run for run in confirmed[leader] if run is not None and not run.finished]
    if len(lost) <= len(lost_by_leader):
        return standing
    return Standing(**{**vars(standing), "tied": False})


def _failure(record: RunRecord) -> str:
    which = "trial" if record.key.phase == TUNE else f"seed {record.key.seed}"
    return f"{which} at lr {record.key.lr:g}: {record.status.replace('_', ' ')}, {record.message}"


def _verdict(card: TaskCard, standings: list[Standing], seeds: int) -> str:
    leader = standings[0] if standings and standings[0].scores else None
    if leader is None:
        return f"No verdict on {card.name}: no contender has been confirmed on every seed."
    best = recommended(standings)
    at = f"{card.metric_name} {_number(leader.mean)}"
    if len(leader.scores) < 2:
        return (
            f"{leader.contender} scored best on {card.name} ({at}), but one seed cannot tell a difference from chance; "
            "race with --seeds 5 for a verdict."
        )
    others = [standing for standing in standings if standing.tied and standing is not leader]
    if len(standings) == 1:
        return f"{leader.contender} reached {at} [{_interval(leader)}] on {card.name}; it raced alone."
    if not others:
        return _win(card, leader, standings[1], at)
    assert best is not None
    group = [standing.contender for standing in standings if standing.tied]
    between = f"the {len(group)} best" if len(group) > _NAMED else "them"
    return (
        f"No difference found on {card.name} between {listing(group, _NAMED)} "
        f"({at} [{_interval(leader)}] for the best mean). "
        f"Take {best.contender}, the cheapest of {between}: {_cost_words(best)}.{_behind(standings)}"
        f"{_unresolved(standings)}"
    )


def _win(card: TaskCard, leader: Standing, second: Standing, at: str) -> str:
    text = f"{leader.contender} wins on {card.name}: {at} [{_interval(leader)}] at lr {_lr(leader)}"
    if not second.scores:
        return f"{text}; no other contender finished."
    if second.failures and second.difference_low <= 0 <= second.difference_high:
        return f"{text}; the next, {second.contender}, lost runs. It costs {_cost_words(leader)}."
    ahead = "higher" if card.higher_is_better else "lower"
    low, high = sorted((abs(second.difference_low), abs(second.difference_high)))
    return (
        f"{text}, {_number(abs(second.difference))} [{_number(low)}, {_number(high)}] {ahead} than the next, "
        f"{second.contender}. It costs {_cost_words(leader)}."
    )


def _unresolved(standings: list[Standing]) -> str:
    words = unresolved(standings)
    return f" {words}" if words else ""


def _behind(standings: list[Standing]) -> str:
    names = [standing.contender for standing in standings if not standing.tied]
    return f" Behind them: {listing(names, _NAMED)}." if names else ""


def _cost_words(standing: Standing) -> str:
    cost = standing.cost
    return f"{1000 * cost.step_seconds:.3g} ms a step, {size(cost.state_bytes)} of optimizer state"


def _interval(standing: Standing) -> str:
    return f"{_number(standing.low)}, {_number(standing.high)}"


def _lr(standing: Standing) -> str:
    return f"{standing.best_hyperparameters['lr']:g}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _notes(plan: Plan, records: Records, used: list[RunRecord], missing: int, workers: int) -> list[str]:
    notes = remarks(plan, records, used)
    if missing:
        notes.append(f"The race is not finished: {missing} or more runs are missing. Repeat the command to go on.")
    if plan.seeds < FEW_SEEDS:
        notes.append(f"Few seeds ({plan.seeds}): only large differences can be found. {FEW_SEEDS} or more are better.")
    if plan.trials < FEW_TRIALS:
        notes.append(f"Few trials ({plan.trials}): the learning rates are coarse, and with them the comparison.")
    if workers > 1 and not plan.timing:
        notes.append(
            f"Step times were taken while {workers} runs went side by side: compare them with each other, "
            "not with those of an idle machine."
        )
    notes += [*_search_notes(plan, records), *_passes_notes(used)]
    lost = [record for record in used if record.key.phase == CONFIRM and record.status != FINISHED]
    if lost:
        notes.append(
            f"{len(lost)} confirmation runs did not finish; each counts as the worst score seen on its task, "
            "the untrained model's included."
        )
    if len({record.fingerprint for record in used}) > 1:
        notes.append("The runs come from more than one machine: times are those of one of them, or unknown.")
    return notes


def _passes_notes(used: list[RunRecord]) -> list[str]:
    """Whose steps make more gradient evaluations than others': they were given equal steps, not equal evaluations."""
    finished = [record for record in used if record.status == FINISHED and record.key.steps]
    passes = {record.key.contender: record.cost.gradient_evaluations / record.key.steps for record in finished}
    fewest = min(passes.values(), default=0)
    more = {name: many for name, many in sorted(passes.items()) if many > fewest}
    if not more:
        return []
    words = listing([f"{name} {many:.3g}" for name, many in more.items()], _NAMED)
    return [
        f"Gradient evaluations a step: {words}, the others {fewest:.3g}. All were given equal steps; what the others "
        "do with as many evaluations, a race with more --steps tells."
    ]


def _search_notes(plan: Plan, records: Records) -> list[str]:
    """Where the search for a learning rate was extended, and where it still ended at an edge: a line a task each."""
    notes = []
    for card in plan.cards:
        found = {contender.name: tuning(plan, card, contender, records) for contender in plan.contenders}
        at_edge = {name: state for name, state in found.items() if state.edge}
        extended = {name: state for name, state in found.items() if state.extensions and not state.edge}
        if at_edge:
            notes.append(f"{card.name}: {_still_at_edge(at_edge)}; {_beyond(plan)}.")
        if extended:
            notes.append(f"{card.name}: {_extended(extended)}.")
    return notes


def _still_at_edge(found: dict[str, Tuning]) -> str:
    most = max(state.extensions for state in found.values())
    reach = f" after {count(most, 'extension')} of the range" if most else ""
    by_edge = {edge: [name for name, state in found.items() if state.edge == edge] for edge in ("high", "low")}
    parts = [f"the {edge}est tried{reach} for {listing(names, _NAMED)}" for edge, names in by_edge.items() if names]
    return f"the best lr is {', '.join(parts)}"


def _extended(found: dict[str, Tuning]) -> str:
    counts = sorted({state.extensions for state in found.values()})
    each = " each" if len(found) > 1 else ""
    trials = " or ".join(map(str, counts)) + (" trial" if counts == [1] else " trials")
    was = "was" if counts == [1] else "were"
    return f"the best lr of {listing(list(found), _NAMED)} was at an edge, so {trials}{each} {was} added beyond it"


def _beyond(plan: Plan) -> str:
    if plan.trials < FEWEST_TRIALS_TO_EXTEND:
        return f"{FEWEST_TRIALS_TO_EXTEND} trials or more extend the range"
    return "a better one may lie beyond"
