"""The words and numbers of the page, made from a study: all that the template shows."""

from __future__ import annotations

from dataclasses import dataclass

from piste.race import words
from piste.race.analysis import Analysis, analyse
from piste.race.record import CONFIRM, RunRecord
from piste.race.result import CLEAR, EXCLUDED, Finding, Standing, StudyResult, TaskResult
from piste.race.verdict import recommended

from .across import Across, Grid, across, chances
from .card import Fact, Place, facts, mood_of, place_of, strips
from .figure import Picture
from .method import method, run_counts, summary, versions
from .palette import Look, looks
from .plots import pictures
from .recipe import recipe
from .table import Row, difference_places, row_of, score_places


@dataclass(frozen=True)
class Section:
    """All that is shown of one task: the card at the top and the section below.

    Args:
        id: anchor in the page.
        task: the task's name.
        metric: what was scored.
        direction: ``"lower is better"`` or ``"higher is better"``.
        mood: ``"clear"``, ``"tie"``, ``"unsure"`` (one seed), ``"open"`` (not yet) or ``"none"`` (no score will
            come).
        badge: the mood in words.
        advice: the words before the name of the contender to take.
        taken: the contender to take, or ``""``.
        lr: its learning rate.
        verdict: the race's own sentences.
        caveats: what limits them.
        facts: tiles of the card.
        ranking: the first few contenders.
        more: how many contenders the ranking leaves out.
        code: what to copy.
        rows: the full table.
        pictures: the plots.
        chances: who beats whom.
        key: every contender of the task with its look.
    """

    id: str
    task: str
    metric: str
    direction: str
    mood: str
    badge: str
    advice: str
    taken: str
    lr: str
    verdict: str
    caveats: list[str]
    facts: list[Fact]
    ranking: list[Place]
    more: int
    code: str
    rows: list[Row]
    pictures: list[Picture]
    chances: Grid | None
    key: list[tuple[str, Look]]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    created: str
    summary: str
    command: str
    notes: list[str]
    sections: list[Section]
    method: list[str]
    machine: dict[str, str]
    versions: dict[str, str]
    run_counts: list[str]
    looks: dict[str, Look]
    across: Across | None
    clear: list[Finding]
    excluded: list[Finding]
    analyses: dict[str, Analysis]


LONGEST_RANKING = 6


def make_page(result: StudyResult) -> Page:
    """What the template shows."""
    all_looks = looks(result)
    runs = {task.task: [run for run in result.records if run.key.task == task.task] for task in result.results}
    analyses = {task.task: analyse(task, runs[task.task]) for task in result.results}
    sections = [
        _section(task, runs[task.task], all_looks, f"task-{index}", analyses[task.task])
        for index, task in enumerate(result.results, start=1)
    ]
    return Page(
        title=result.title,
        created=words.moment(result.created),
        summary=summary(result),
        command=result.command,
        notes=result.notes,
        sections=sections,
        method=method(result),
        machine=result.machine,
        versions=versions(result.records),
        run_counts=run_counts(result.records),
        looks=all_looks,
        across=across(result, analyses, all_looks),
        clear=[finding for finding in result.findings if finding.state == CLEAR],
        excluded=[finding for finding in result.findings if finding.state == EXCLUDED],
        analyses=analyses,
    )


def _section(
    task: TaskResult, runs: list[RunRecord], all_looks: dict[str, Look], identifier: str, found: Analysis
) -> Section:
    choice = recommended(task.standings)
    mood, badge, advice = mood_of(task.standings, choice)
    places, behind_places = score_places(task.standings), difference_places(task.standings)
    shown = task.standings[:LONGEST_RANKING]
    ranking = [
        place_of(standing, choice, all_looks[standing.contender], places, behind_places, strip)
        for standing, strip in zip(shown, strips(shown, task.higher_is_better), strict=True)
    ]
    return Section(
        id=identifier,
        task=task.task,
        metric=task.metric_name,
        direction="higher is better" if task.higher_is_better else "lower is better",
        mood=mood,
        badge=badge,
        advice=advice,
        taken=choice.contender if choice else "",
        lr=words.short(choice.best_hyperparameters.get("lr")) if choice else "",
        verdict=task.verdict,
        caveats=task.caveats,
        facts=facts(choice, task, places, found, runs) if choice else [],
        ranking=ranking,
        more=len(task.standings) - len(ranking),
        code=recipe(choice, _steps(runs, choice)) if choice else "",
        rows=[row_of(s, choice, all_looks[s.contender], places, behind_places, task) for s in task.standings],
        pictures=pictures(task, runs, all_looks, identifier, found),
        chances=chances(task, found, all_looks),
        key=[(s.contender, all_looks[s.contender]) for s in task.standings],
    )


def _steps(runs: list[RunRecord], choice: Standing) -> int:
    """Steps of the confirmation runs of the contender."""
    steps = [run.key.steps for run in runs if run.key.contender == choice.contender and run.key.phase == CONFIRM]
    return max(steps or [run.key.steps for run in runs] or [1000])
