"""Tables of contenders against each other and against tasks, and the performance profile over all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.analysis import Analysis
from piste.race.result import Standing, StudyResult, TaskResult
from piste.race.statistics import LEVEL
from piste.race.targets import MOST_BEHIND, SECONDS, Profile, median_reach, profiles

from .figure import BASIN_HEIGHT, Option, Picture, Series, Switch, blank, described, rounded
from .palette import Look

# Contenders a matrix has room for.
WIDEST = 12


@dataclass(frozen=True)
class Cell:
    """A number in a shaded square.

    Args:
        text: the number.
        remark: in small print below it.
        shade: from 0, white, to 1.
        strong: whether it is more than chance.
        grey: whether it is tied, and shaded without colour.
    """

    text: str
    remark: str = ""
    shade: float = 0.0
    strong: bool = False
    grey: bool = False


@dataclass(frozen=True)
class Grid:
    """A shaded table.

    Args:
        columns: names above.
        rows: name and cells of each row, with the look of contenders.
        caption: how to read it.
        left_out: how many contenders had no room.
    """

    columns: list[str]
    rows: list[tuple[str, Look, list[Cell]]]
    caption: str
    left_out: int = 0


@dataclass(frozen=True)
class Across:
    """What several tasks say together."""

    ranks: Grid
    profile: Picture


def chances(task: TaskResult, found: Analysis, looks: Mapping[str, Look]) -> Grid | None:
    """How surely each contender beats each other; None where fewer than two were scored on two seeds."""
    scored = [standing.contender for standing in task.standings if len(standing.scores) > 1]
    names = scored[:WIDEST]
    if len(names) < 2 or not found.pairs:
        return None
    rows = [(name, looks[name], [_chance(found, name, other) for other in names]) for name in names]
    caption = (
        "Chance that the row scores better than the column on a new seed: the share of common seeds, a draw counting "
        f"half, with its {100 * LEVEL:.0f} % interval. Bold: more than chance, corrected over all pairs (Holm)."
    )
    return Grid(names, rows, caption, len(scored) - len(names))


def _chance(found: Analysis, name: str, other: str) -> Cell:
    if name == other:
        return Cell("")
    pair = found.pairs[name, other]
    return Cell(
        words.fixed(pair.chance, 2), words.interval(pair.low, pair.high, 2), pair.chance, strong=pair.p < 1 - LEVEL
    )


def across(result: StudyResult, analyses: Mapping[str, Analysis], looks: Mapping[str, Look]) -> Across | None:
    """Ranks and profile over the tasks that were scored; None for fewer than two."""
    tasks = [task for task in result.results if any(standing.scores for standing in task.standings)]
    if len(tasks) < 2:
        return None
    return Across(_ranks(tasks, looks), _profile(tasks, analyses, looks))


def _ranks(tasks: Sequence[TaskResult], looks: Mapping[str, Look]) -> Grid:
    names = list(dict.fromkeys(standing.contender for task in tasks for standing in task.standings))
    cells = {(task.task, standing.contender): cell for task in tasks for standing, cell in _ranked(task)}
    nothing = Cell(words.UNKNOWN)
    rows = [(name, looks[name], [cells.get((task.task, name), nothing) for task in tasks]) for name in names]
    caption = (
        "Place on each task by mean score. Grey: tied with the leader, so that the places among them mean nothing. No "
        "average is taken over tasks: there are too few of them for one."
    )
    return Grid([task.task for task in tasks], rows, caption)


def _ranked(task: TaskResult) -> list[tuple[Standing, Cell]]:
    scored = [standing for standing in task.standings if standing.scores]
    scored.sort(key=lambda standing: standing.mean, reverse=task.higher_is_better)
    found = []
    for place, standing in enumerate(scored, start=1):
        alone = sum(each.tied for each in scored) == 1
        tied = standing.tied and not alone
        shade = 1 - (place - 1) / max(1, len(scored) - 1)
        remark = "tied" if tied else "best" if standing.tied else ""
        found.append((standing, Cell(f"{place}", remark, shade, strong=standing.tied and alone, grey=tied)))
    return found


def _profile(tasks: Sequence[TaskResult], analyses: Mapping[str, Analysis], looks: Mapping[str, Look]) -> Picture:
    everywhere = [
        standing.contender
        for standing in tasks[0].standings
        if all(any(standing.contender == other.contender for other in task.standings) for task in tasks)
    ]
    found = [analyses[task.task] for task in tasks]
    currencies = [what for what in found[0].at_target if all(what in each.at_target for each in found)]
    lines = {
        what: profiles(
            {name: [median_reach(each.at_target[what].get(name, [])) for each in found] for name in everywhere}
        )
        for what in currencies
        if everywhere
    }
    figure = blank(height=BASIN_HEIGHT)
    drawn = {what: {name: _stairs(line) for name, line in by_name.items()} for what, by_name in lines.items()}
    options = []
    for what, by_name in drawn.items():
        options.append(
            Option(
                "time" if what == SECONDS else what,
                x=[by_name[name][0] for name in everywhere],
                y=[by_name[name][1] for name in everywhere],
                layout={"xaxis": {"title": {"text": f"{what} to the target, as a multiple of the fewest"}}},
            )
        )
    for place, name in enumerate(everywhere if options else ()):
        look = looks[name]
        figure.add_trace(
            go.Scatter(
                name=words.label(name), meta=look.slot, x=(options[0].x or [])[place], y=(options[0].y or [])[place],
                mode="lines+markers", line={"color": look.colour, "width": 2, "dash": look.dash},
                marker={"symbol": look.marker, "size": 7, "color": look.colour},
                hovertemplate="within %{x:.3~g} times: %{y:.0%} of tasks",
            )
        )  # fmt: skip
    figure.update_layout(
        title={"text": "Share of tasks"},
        xaxis={"type": "log", "range": [-0.02, math.log10(MOST_BEHIND)], "tickvals": [1, 1.25, 1.5, 2, 3, 4]},
        yaxis={"range": [-0.03, 1.05], "tickformat": ".0%"},
    )
    if options:
        figure.update_layout(options[0].layout)
    return Picture(
        "across-profile",
        "profile",
        "How often how close to the fastest",
        "The share of tasks on which a contender needs at most so many times what the fastest needs for the target of "
        "the task, in the median of seeds (Dolan and Moré 2002). Higher and further left is better; who misses a "
        "target stays below 100 %.",
        _profile_alt(lines[currencies[0]] if lines else {}),
        figure,
        [Switch("Count", options)],
        "" if options else "No contender was trained on every task.",
    )


def _stairs(line: Profile) -> tuple[Series, Series]:
    """A staircase that reaches the right end of the picture."""
    xs: Series = []
    ys: Series = []
    for factor, share in zip(line.factors, line.shares, strict=True):
        if xs:
            xs.append(rounded(factor))
            ys.append(ys[-1])
        xs.append(rounded(factor))
        ys.append(rounded(share))
    return [*xs, max(MOST_BEHIND, line.factors[-1])], [*ys, ys[-1]]


def _profile_alt(lines: Mapping[str, Profile]) -> str:
    parts = [
        f"{words.single_line(name)}: the fastest on {words.percent(line.shares[0])} of tasks, arrives on "
        f"{words.percent(line.shares[-1])}"
        for name, line in lines.items()
    ]
    return described("Performance profile over tasks", parts)
