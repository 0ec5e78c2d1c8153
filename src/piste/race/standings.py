"""From records to results: scores and standings of every task, and with them what else there is to say."""

from __future__ import annotations

import math
from collections.abc import Iterable

from piste.race import costs
from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.lints import Evidence
from piste.race.protocol import Lane, Plan, Records, Tuning, asked_of, lane, lanes
from piste.race.record import TUNE, RunRecord
from piste.race.remarks import remarks
from piste.race.result import Standing, StudyResult, TaskResult
from piste.race.search import counted
from piste.race.sins import audit, notes
from piste.race.statistics import Comparison, compare
from piste.race.verdict import caveats, verdict


def study_result(
    plan: Plan, records: Records, *, title: str, created: str, command: str, workers: int, machine: dict[str, str]
) -> StudyResult:
    """All that can be said from the records so far; a race cut short gives a result that says so."""
    known = lanes(plan, records)
    ids = [key.id for _, _, key in asked_of(known)]
    used = [records[id_] for id_ in ids if id_ in records]
    missing = len(ids) - len(used)
    evidence = Evidence(plan, records, used, missing, workers, known)
    findings = audit(evidence)
    return StudyResult(
        title=title,
        created=created,
        results=[_task_result(card, _on(card, known), records, plan.target) for card in plan.cards],
        records=used,
        notes=[*remarks(plan, known, records, used), *notes(evidence, findings)],
        machine=machine,
        command=command,
        findings=findings,
    )


def task_result(plan: Plan, card: TaskCard, records: Records) -> TaskResult:
    """Standings and verdict on one task."""
    return _task_result(card, [lane(plan, card, who, records) for who in plan.contenders], records, plan.target)


def _on(card: TaskCard, known: Iterable[Lane]) -> list[Lane]:
    return [each for each in known if each.card is card]


def _task_result(card: TaskCard, known: Iterable[Lane], records: Records, target: float | None) -> TaskResult:
    lanes_of = {each.contender.name: each for each in known}
    tunings = {name: each.search for name, each in lanes_of.items()}
    confirmed = {name: [records.get(key.id) for key in each.confirmations] for name, each in lanes_of.items()}
    keys = [key for state in tunings.values() for key in state.runs]
    made = [records[key.id] for key in keys if key.id in records]
    made += [run for runs in confirmed.values() for run in runs if run is not None]
    scores = _scores(confirmed, _worst_score(card, made))
    compared = compare(scores, card.higher_is_better) if scores else {}
    leader = next(iter(compared), None)
    contenders = {name: each.contender for name, each in lanes_of.items()}
    ranked = [*compared, *(name for name in contenders if name not in compared)]
    passes = {name: [records[key.id] for key in each.timings if key.id in records] for name, each in lanes_of.items()}
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
    searches = {name: _searched(card, state, records) for name, state in tunings.items()}
    about = verdict(card.name, card.metric_name, card.higher_is_better, standings)
    beside = caveats(standings, searches, card.higher_is_better)
    return TaskResult(card.name, card.metric_name, card.higher_is_better, standings, about, target, caveats=beside)


def _searched(card: TaskCard, state: Tuning, records: Records) -> list[float]:
    """Validation scores in the order of the trials; the worst untrained one for those that were lost."""
    tried = [key for key in state.runs if key.phase == TUNE]
    trials = [records[key.id] for key in tried[: len(tried) - state.extensions] if key.id in records]
    scores = [trial.curve.valid_metric[-1] if trial.finished else math.nan for trial in trials]
    untrained = [trial.curve.valid_metric[0] for trial in trials if trial.curve.valid_metric]
    sign = -1.0 if card.higher_is_better else 1.0
    worst = max((sign * value for value in untrained if math.isfinite(value)), default=math.nan)
    return counted(scores, sign * worst)


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
