"""The words and numbers of the page, made from a study: all that the template shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from piste.race import words
from piste.race.record import CONFIRM, TUNE, RunRecord, Standing, StudyResult, TaskResult
from piste.race.statistics import LEVEL
from piste.race.verdict import recommended

from .palette import Look, looks
from .plots import Picture, pictures
from .recipe import recipe


@dataclass(frozen=True)
class Fact:
    """A number with its name and a remark, as a tile of a verdict card."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Strip:
    """The difference from the leader as a small picture: positions in a width of 70, worse to the right."""

    leader: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Place:
    """A line of a card's ranking."""

    name: str
    look: Look
    score: str
    remark: str
    tied: bool
    taken: bool
    strip: Strip | None


@dataclass(frozen=True)
class Row:
    """A contender in the full table."""

    name: str
    look: Look
    lr: str
    edge: str
    score: str
    score_interval: str
    difference: str
    difference_interval: str
    tied: str
    tied_group: bool
    taken: bool
    step_time: str
    optimizer_share: str
    state: str
    state_each: str
    peak: str
    gradient_evaluations: str
    trials: str
    diverged: bool
    failures: list[str]


@dataclass(frozen=True)
class Section:
    """All that is shown of one task: the card at the top and the section below.

    Args:
        id: anchor in the page.
        task: the task's name.
        metric: what was scored.
        direction: ``"lower is better"`` or ``"higher is better"``.
        mood: ``"clear"``, ``"tie"``, ``"unsure"`` (one seed) or ``"none"`` (no contender was scored).
        badge: the mood in words.
        advice: the words before the name of the contender to take.
        taken: the contender to take, or ``""``.
        lr: its learning rate.
        verdict: the race's own sentences.
        facts: tiles of the card.
        ranking: the first few contenders.
        more: how many contenders the ranking leaves out.
        code: what to copy.
        rows: the full table.
        pictures: the plots.
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
    facts: list[Fact]
    ranking: list[Place]
    more: int
    code: str
    rows: list[Row]
    pictures: list[Picture]
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
    looks: dict[str, Look] = field(default_factory=dict)


LONGEST_RANKING = 6


def make_page(result: StudyResult) -> Page:
    """What the template shows."""
    all_looks = looks(result)
    sections = []
    for index, task in enumerate(result.results, start=1):
        runs = [run for run in result.records if run.key.task == task.task]
        sections.append(_section(task, runs, all_looks, f"task-{index}"))
    return Page(
        title=result.title,
        created=words.moment(result.created),
        summary=_summary(result),
        command=result.command,
        notes=result.notes,
        sections=sections,
        method=_method(result),
        machine=result.machine,
        versions=_versions(result.records),
        run_counts=_run_counts(result.records),
        looks=all_looks,
    )


# One task ------------------------------------------------------------------------------------------------------------


def _section(task: TaskResult, runs: list[RunRecord], all_looks: dict[str, Look], identifier: str) -> Section:
    choice = recommended(task.standings)
    mood, badge, advice = _mood(task.standings, choice)
    places = _score_places(task.standings)
    difference_places = _difference_places(task.standings)
    shown = task.standings[:LONGEST_RANKING]
    ranking = [
        _place(standing, choice, all_looks[standing.contender], places, difference_places, strip)
        for standing, strip in zip(shown, _strips(shown, task.higher_is_better), strict=True)
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
        facts=_facts(choice, task, places) if choice else [],
        ranking=ranking,
        more=len(task.standings) - len(ranking),
        code=recipe(choice, _steps(runs, choice)) if choice else "",
        rows=[_row(s, choice, all_looks[s.contender], places, difference_places, task) for s in task.standings],
        pictures=pictures(task, runs, all_looks, identifier),
        key=[(s.contender, all_looks[s.contender]) for s in task.standings],
    )


def _mood(standings: list[Standing], choice: Standing | None) -> tuple[str, str, str]:
    """Mood, badge and advice."""
    group = [standing for standing in standings if standing.tied]
    if choice is None:
        return "none", "no result", "Nothing to take"
    if len(choice.scores) == 1:
        return "unsure", "one seed: unsure", "Best so far:"
    if len(group) > 1:
        return "tie", f"tie of {len(group)}", "Take"
    return "clear", "clear winner" if len(standings) > 1 else "raced alone", "Take"


def _facts(choice: Standing, task: TaskResult, places: int) -> list[Fact]:
    cost = choice.cost
    steps = [s.cost.step_seconds for s in task.standings if math.isfinite(s.cost.step_seconds)]
    return [
        Fact(
            f"{task.metric_name} on unseen data",
            words.fixed(choice.mean, places),
            f"{words.interval(choice.low, choice.high, places)} over {words.count(choice.seeds, 'seed')}".strip(),
        ),
        _sureness(choice, task),
        Fact("time for a step", words.duration(cost.step_seconds), _time_remark(cost.step_seconds, steps)),
        Fact("optimizer state", words.size(cost.state_bytes), _each_weight(cost.state_bytes, cost.parameters)),
    ]


def _sureness(choice: Standing, task: TaskResult) -> Fact:
    """How the choice stands against the rest: its ties, or its lead over the best of the others."""
    others = [standing for standing in task.standings if standing is not choice]
    scored = [standing for standing in others if standing.scores]
    tied = [standing.contender for standing in others if standing.tied]
    if len(choice.scores) == 1:
        return Fact("against the others", "cannot be told", "one seed does not show what is chance")
    if tied:
        return Fact("against the others", "no difference found", f"between it and {words.listing(tied)}")
    if not scored:
        return Fact("against the others", "no other to compare", "all others failed" if others else "none raced")
    second = scored[0]
    sign = -1 if task.higher_is_better else 1
    low, high = sorted(sign * end for end in (second.difference_low, second.difference_high))
    places = words.places_for([high - low, second.difference])
    bounds = words.interval(low, high, places)
    return Fact("ahead of the next", words.fixed(sign * second.difference, places), f"{bounds} {second.contender}")


def _time_remark(own: float, steps: list[float]) -> str:
    if not math.isfinite(own) or len(steps) < 2:
        return ""
    more = own / min(steps) - 1
    return "the shortest of all" if more < 0.005 else f"{words.percent(more)} more than the shortest"


def _each_weight(state_bytes: int, parameters: int) -> str:
    return f"{words.short(state_bytes / parameters, 2)} bytes a weight" if parameters else ""


def _strips(standings: list[Standing], higher_is_better: bool) -> list[Strip | None]:
    """One strip a standing, all to one scale; None where there is no difference to show."""
    sign = -1 if higher_is_better else 1
    known = [(sign * s.difference_low, sign * s.difference, sign * s.difference_high) for s in standings]
    ends = [0.0, *(end for ends in known for end in ends if math.isfinite(end))]
    reach = max(ends) - min(ends)

    def place(value: float) -> float:
        return round(5 + 60 * (value - min(ends)) / reach, 1)

    return [
        Strip(place(0.0), place(min(trio)), place(trio[1]), place(max(trio)))
        if reach and all(map(math.isfinite, trio))
        else None
        for trio in known
    ]


def _place(
    standing: Standing, choice: Standing | None, look: Look, places: int, difference_places: int, strip: Strip | None
) -> Place:
    if not standing.scores:
        remark = "no result"
    elif standing is choice:
        remark = "take" if len(standing.scores) > 1 else "best"
    elif standing.tied and len(standing.scores) > 1:
        remark = "tied"
    else:
        remark = words.fixed(standing.difference, difference_places, signed=True)
    score = words.fixed(standing.mean, places)
    return Place(standing.contender, look, score, remark, standing.tied, standing is choice, strip)


def _row(
    standing: Standing,
    choice: Standing | None,
    look: Look,
    places: int,
    difference_places: int,
    task: TaskResult,
) -> Row:
    cost = standing.cost
    leader = standing is task.standings[0]
    known = math.isfinite(standing.difference) and not leader
    share = cost.optimizer_seconds / cost.step_seconds if cost.step_seconds > 0 else math.nan
    measured = bool(cost.parameters)
    return Row(
        name=standing.contender,
        look=look,
        lr=words.short(standing.best_hyperparameters.get("lr"), 4),
        edge={"low": "lowest tried", "high": "highest tried"}.get(standing.edge, standing.edge),
        score=words.fixed(standing.mean, places),
        score_interval=words.interval(standing.low, standing.high, places),
        difference=words.fixed(standing.difference, difference_places, signed=True) if known else words.UNKNOWN,
        difference_interval=words.interval(
            standing.difference_low, standing.difference_high, difference_places, signed=True
        )
        if known
        else "",
        tied=_tied_word(standing, leader=leader),
        tied_group=standing.tied,
        taken=standing is choice,
        step_time=words.duration(cost.step_seconds),
        optimizer_share=words.percent(share),
        state=words.size(cost.state_bytes) if measured else words.UNKNOWN,
        state_each=_each_weight(cost.state_bytes, cost.parameters).replace(" bytes a ", " B/"),
        peak=words.size(cost.peak_bytes) if cost.peak_bytes else words.UNKNOWN,
        gradient_evaluations=f"{cost.gradient_evaluations:,}" if cost.gradient_evaluations else words.UNKNOWN,
        trials=f"{standing.diverged_trials} of {standing.trials}",
        diverged=standing.diverged_trials > 0,
        failures=standing.failures,
    )


def _tied_word(standing: Standing, *, leader: bool) -> str:
    if not standing.scores:
        return "no result"
    if leader:
        return "leader"
    if len(standing.scores) == 1:
        return "unknown"
    return "tied" if standing.tied else "no"


def _score_places(standings: list[Standing]) -> int:
    widths = [s.high - s.low for s in standings if s.high > s.low]
    return words.places_for(widths) if widths else _places_of_size([s.mean for s in standings])


def _difference_places(standings: list[Standing]) -> int:
    return words.places_for([s.difference_high - s.difference_low for s in standings])


def _places_of_size(values: list[float]) -> int:
    """Places that show three significant digits of the smallest value; for scores without a useful interval."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    return min(6, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 3


def _steps(runs: list[RunRecord], choice: Standing) -> int:
    """Steps of the confirmation runs of the contender."""
    steps = [run.key.steps for run in runs if run.key.contender == choice.contender and run.key.phase == CONFIRM]
    return max(steps or [run.key.steps for run in runs] or [1000])


# The whole study -----------------------------------------------------------------------------------------------------


def _summary(result: StudyResult) -> str:
    contenders = {standing.contender for task in result.results for standing in task.standings}
    return ", ".join(
        [
            words.count(len(contenders), "contender"),
            words.count(len(result.results), "task"),
            words.count(len(result.records), "run"),
        ]
    )


def _method(result: StudyResult) -> list[str]:
    """How the race went, in plain words, with the numbers of this race."""
    tune = [run for run in result.records if run.key.phase == TUNE]
    confirm = [run for run in result.records if run.key.phase == CONFIRM]
    trials = _span([s.trials for task in result.results for s in task.standings])
    seeds = _span([s.seeds for task in result.results for s in task.standings if s.seeds])
    tune_steps = _span([run.key.steps for run in tune])
    confirm_steps = _span([run.key.steps for run in confirm])
    return [
        f"Each contender is an optimizer with a schedule. All get the same number of trials, {trials} of {tune_steps} "
        "steps, at learning rates drawn evenly (quasi-randomly, on a log scale) from a range around each optimizer's "
        "own usual value: nobody runs at a rate that was found for another. Where the best rate is the lowest or "
        "highest tried, a trial or two are added beyond it, which is why some contenders may count more.",
        "The data are split in three. The model learns on the training split. The score on the validation split at "
        "the end of a trial, nothing else, chooses each contender's learning rate.",
        f"At that rate the contender runs again, from scratch, on {seeds} fresh seeds that tuning never used, "
        f"{confirm_steps} steps each. A seed fixes the initial weights and the order of the batches, and is the same "
        "for every contender, so that contenders can be compared pair by pair.",
        "The score shown is computed at the end of these runs on the third split, used for neither learning nor "
        "choosing. No run is stopped for looking bad, and none is left out: one that diverged or crashed counts as "
        "the worst score seen on the task.",
        f"Intervals are {100 * LEVEL:.0f} % bootstrap intervals of the mean over seeds, widened because seeds are few. "
        "Differences are taken seed by seed first. A difference from the leader is claimed only where its interval "
        "leaves out zero and a paired t test, corrected for the number of comparisons (Holm), agrees; otherwise the "
        "contender is tied with the leader, and of the tied group the cheapest is the one to take. All this is about "
        "chance between seeds on this task; it does not speak of other data or other models.",
        "Step time is the median of the measured steps of the contender's fastest run (other work on the machine only "
        "adds to it), forward and backward pass included, evaluation left out. "
        "Peak memory on a processor is that of the whole process, Python and torch included; on CUDA it is what was "
        "allocated on the device.",
    ]


def _span(values: list[int]) -> str:
    if not values:
        return "no"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _versions(records: list[RunRecord]) -> dict[str, str]:
    """Every version that took part; more than one where records of several were reused."""
    found: dict[str, list[str]] = {}
    for run in records:
        for name, version in {**run.key.versions, "device": run.key.device}.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(each) for name, each in found.items()}


def _run_counts(records: list[RunRecord]) -> list[str]:
    counts: dict[str, int] = {}
    for run in records:
        counts[run.status] = counts.get(run.status, 0) + 1
    return [f"{amount:,} {status.replace('_', ' ')}" for status, amount in counts.items()]
