"""How calmly a run goes: the norm of the gradient along the way, and all settings that were tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.analysis import equal_trials, final_scores, untrained_score
from piste.race.record import CONFIRM, RunRecord
from piste.race.result import TaskResult

from .figure import BASIN_HEIGHT, Picture, Series, blank, rounded, titled
from .palette import Look


def stability(
    task: TaskResult, runs: Sequence[RunRecord], looks: Mapping[str, Look], identifier: str
) -> Picture | None:
    """The norm of the gradient against steps, median and largest over seeds; None where it was not recorded."""
    traced = [run for run in runs if run.key.phase == CONFIRM and any(map(math.isfinite, run.curve.gradient_norm))]
    if not traced:
        return None
    figure = blank(height=BASIN_HEIGHT)
    for standing in task.standings:
        group = [run for run in traced if run.key.contender == standing.contender]
        if not group:
            continue
        look = looks[standing.contender]
        for read, width, opacity in ((max, 1, 0.5), (statistics.median, 2.5, 1.0)):
            steps, norms = _over_seeds(group, read)
            figure.add_trace(
                go.Scatter(
                    name=words.label(standing.contender), meta=look.slot, x=steps, y=norms, mode="lines",
                    opacity=opacity, line={"color": look.colour, "width": width, "dash": look.dash},
                    hovertemplate="%{x:.4~g}: %{y:.3~g}", showlegend=width > 1,
                )
            )  # fmt: skip
    figure.update_layout(titled("optimizer steps"), title={"text": "Gradient norm (log scale)"})
    figure.update_yaxes(type="log", nticks=5)
    return Picture(
        identifier,
        "stability",
        "How calmly it goes",
        "Euclidean norm of the whole gradient before the optimizer sees it. Thick: median of seeds; thin: the largest. "
        "A norm that keeps growing, or jumps, comes before a loss that does.",
        f"Line chart of the gradient norm during training. {'; '.join(_ends(task, traced))}.",
        figure,
    )


def _over_seeds(group: Sequence[RunRecord], read: object) -> tuple[Series, Series]:
    norms: dict[int, list[float]] = {}
    for run in group:
        for step, norm in zip(run.curve.step, run.curve.gradient_norm, strict=False):
            if math.isfinite(norm):
                norms.setdefault(step, []).append(norm)
    assert callable(read)
    return [float(step) for step in sorted(norms)], [rounded(read(norms[step])) for step in sorted(norms)]


def _ends(task: TaskResult, traced: Sequence[RunRecord]) -> list[str]:
    found = []
    for standing in task.standings:
        norms = [norm for run in traced if run.key.contender == standing.contender for norm in run.curve.gradient_norm]
        finite = [norm for norm in norms if math.isfinite(norm)]
        if finite:
            found.append(f"{words.single_line(standing.contender)}: at most {words.number(max(finite))}")
    return found


def settings(task: TaskResult, runs: Sequence[RunRecord], looks: Mapping[str, Look], identifier: str) -> Picture | None:
    """Parallel coordinates of all trials; None where nothing but the learning rate was searched."""
    trials = equal_trials(task, runs)
    made = [run for group in trials.values() for run in group]
    names = list(dict.fromkeys(name for run in made for name in run.key.hyperparameters))
    varied = [name for name in names if len({run.key.hyperparameters.get(name) for run in made}) > 1]
    if len(varied) < 2:
        return None
    worst = untrained_score(runs, task.higher_is_better)
    columns = {name: [run.key.hyperparameters.get(name, math.nan) for run in made] for name in varied}
    columns[task.metric_name] = final_scores(made, worst)
    scaled = {name: _scaled(values) for name, values in columns.items()}
    texts = [[f"{words.label(name)} {words.short(value)}" for value in values] for name, values in columns.items()]
    figure = blank(height=BASIN_HEIGHT)
    first = 0
    for name, group in trials.items():
        look = looks[name]
        scores = final_scores(group, worst)
        best = (max if task.higher_is_better else min)(scores)
        for thick in (False, True):
            places = [first + place for place, score in enumerate(scores) if (score == best) == thick]
            if not places:
                continue
            # One trace for many lines, with a gap between two: a page of thousands of traces would not open.
            figure.add_trace(
                go.Scatter(
                    name=words.label(name), meta=look.slot, mode="lines+markers", showlegend=False,
                    x=[*range(len(scaled)), None] * len(places),
                    y=[y for place in places for y in (*(rounded(values[place]) for values in scaled.values()), None)],
                    opacity=1.0 if thick else 0.3,
                    line={"color": look.colour, "width": 3 if thick else 1, "dash": look.dash},
                    marker={"symbol": look.marker, "size": 6, "color": look.colour},
                    text=[text for place in places for text in (*(column[place] for column in texts), "")],
                    hovertemplate="%{text}",
                )
            )  # fmt: skip
        first += len(group)
    figure.update_layout(
        xaxis={
            "tickvals": [*range(len(columns))],
            "ticktext": [f"{words.label(name)}<br>{_span(values)}" for name, values in columns.items()],
            "range": [-0.2, len(columns) - 0.8],
        },
        yaxis={"visible": False, "range": [-0.05, 1.05]},
        title={"text": "From the lowest value tried to the highest"},
    )
    return Picture(
        identifier,
        "settings",
        "All settings that were tried",
        "A line for each trial through its settings to its score; thick: the best of a contender. Settings that span "
        "more than a factor of ten are on a log scale.",
        f"Parallel coordinates of {len(made)} trials over {', '.join(map(words.single_line, columns))}.",
        figure,
    )


def _scaled(values: list[float]) -> list[float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if low > 0 and high > 10 * low:
        values, low, high = [math.log(value) for value in values], math.log(low), math.log(high)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _span(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{words.short(min(finite))} to {words.short(max(finite))}"
