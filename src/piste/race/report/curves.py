"""Loss along the way: against steps, gradient evaluations or time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.analysis import same_machine
from piste.race.record import CONFIRM, RunRecord
from piste.race.result import TaskResult
from piste.race.targets import EVALUATIONS, SECONDS, STEPS, passes_a_step, spent

from .figure import Option, Picture, Series, Switch, blank, described, rounded, time_unit, titled
from .measures import Measure, is_logarithmic, measures, value_axis
from .palette import Look

MOST_LINES = 20  # thin ones, of a contender


def curves(task: TaskResult, runs: list[RunRecord], looks: dict[str, Look], identifier: str) -> Picture:
    """Loss against steps and against time, one thick median a contender and one thin line a seed."""
    confirm = [run for run in runs if run.key.phase == CONFIRM and run.curve.step]
    groups = {s.contender: [run for run in confirm if run.key.contender == s.contender] for s in task.standings}
    groups = {name: group for name, group in groups.items() if group}
    axes = _axes(confirm)
    shown = measures(task, confirm)
    figure = blank(height=440)
    horizontal: list[list[Series]] = [[] for _ in axes]
    vertical: list[list[Series]] = [[] for _ in shown]
    for name, group in groups.items():
        for trace, points in _curve_traces(name, group, looks[name]):
            for target, axis in zip(horizontal, axes, strict=True):
                target.append(points(axis.read, shown[0])[0])
            for values, measure in zip(vertical, shown, strict=True):
                values.append(points(axes[0].read, measure)[1])
            figure.add_trace(trace.update(x=horizontal[0][-1], y=vertical[0][-1]))

    across = Switch(
        "Against", [Option(axis.name, x=x, layout=titled(axis.title)) for axis, x in zip(axes, horizontal, strict=True)]
    )
    up = Switch(
        "Show",
        [
            Option(measure.name, y=values, layout=_measure_layout(measure, values))
            for measure, values in zip(shown, vertical, strict=True)
        ],
    )
    for switch in (across, up):
        figure.update_layout(switch.options[0].layout)
    return Picture(
        identifier,
        "curves",
        "Loss along the way",
        _curves_caption(groups, task),
        _curves_alt(groups),
        figure,
        [across, up],
        "" if groups else "No confirmation run left a curve.",
    )


Read = Callable[[RunRecord], list[float]]
Points = Callable[[Read, Measure], tuple[Series, Series]]


@dataclass(frozen=True)
class _Axis:
    """What curves are drawn against: its name on the switch, its title, and how to read it off a run."""

    name: str
    title: str
    read: Read


def _axes(runs: list[RunRecord]) -> list[_Axis]:
    """Steps; gradient evaluations where they were counted; time where one machine timed all runs."""
    seconds = [time for run in runs for time in run.curve.train_seconds]
    factor, unit = time_unit(max(filter(math.isfinite, seconds), default=0.0))
    found = [_Axis("steps", "optimizer steps", lambda run: spent(run, STEPS))]
    if runs and not any(math.isnan(passes_a_step(run)) for run in runs):
        found.append(_Axis("gradient evaluations", "gradient evaluations", lambda run: spent(run, EVALUATIONS)))
    if same_machine(runs):
        title = f"training time ({unit}), evaluation left out"
        found.append(_Axis("time", title, lambda run: [factor * second for second in spent(run, SECONDS)]))
    return found


def _curve_traces(name: str, group: list[RunRecord], look: Look) -> list[tuple[Any, Points]]:
    """The traces of one contender, each with the function that gives its points for an axis and a measure."""
    common = {"name": words.label(name), "meta": look.slot, "line": {"color": look.colour}}
    # hovering over the thin lines would hide what the median says
    seeds = go.Scatter(common, mode="lines", line_width=1, opacity=0.35, hoverinfo="skip", showlegend=False)
    median = go.Scatter(
        common,
        mode="lines+markers",
        line={"width": 2.5, "dash": look.dash},
        marker={"symbol": look.marker, "size": 8, "color": look.colour, "maxdisplayed": 9},
        hovertemplate="%{x:.4~g}: %{y:.4~g}",
    )
    ended = go.Scatter(
        common,
        mode="markers",
        marker={"symbol": "x", "size": 11, "color": look.colour, "line": {"width": 1, "color": "var(--card)"}},
        hovertemplate="ended here: %{x:.4~g}, %{y:.4~g}",
        showlegend=False,
    )
    band = go.Scatter(
        common, mode="none", fill="toself", fillcolor=look.colour, opacity=0.13, hoverinfo="skip", showlegend=False
    )
    traces: list[tuple[Any, Points]] = []
    if len(group) > 1:
        traces.append((band, lambda position, measure: _band(group, position, measure)))
        drawn = thinned(group)
        traces.append((seeds, lambda position, measure: _all_seeds(drawn, position, measure)))
    traces.append((median, lambda position, measure: _median(group, position, measure)))
    broken = [run for run in group if not run.finished]
    if broken:
        traces.append((ended, lambda position, measure: _last_points(broken, position, measure)))
    return traces


def thinned(group: list[RunRecord]) -> list[RunRecord]:
    """Every k-th seed, however it went, so that no more lines are drawn than can be told apart."""
    return group[:: math.ceil(len(group) / MOST_LINES)]


def _band(group: list[RunRecord], position: Read, measure: Measure) -> tuple[Series, Series]:
    """From the best to the worst seed, as far as all seeds go: there along the lower side, back along the upper."""
    columns = [*zip(*(zip(position(run), measure.read(run.curve), strict=True) for run in group), strict=False)]
    known = [column for column in columns if all(math.isfinite(y) for _, y in column)]
    middles = [rounded(statistics.median(x for x, _ in column)) for column in known]
    lower, upper = ([rounded(end(y for _, y in column)) for column in known] for end in (min, max))
    return [*middles, *middles[::-1]], [*lower, *upper[::-1]]


def _all_seeds(group: list[RunRecord], position: Read, measure: Measure) -> tuple[Series, Series]:
    """All runs in one trace, a gap between two."""
    xs: Series = []
    ys: Series = []
    for run in group:
        xs += [*map(rounded, position(run)), None]
        ys += [*map(rounded, measure.read(run.curve)), None]
    return xs, ys


def _median(group: list[RunRecord], position: Read, measure: Measure) -> tuple[Series, Series]:
    """The median over seeds. A run that has ended early, or is at nan, counts as the worst from there on."""
    places: dict[int, list[float]] = {}
    values: dict[int, list[float]] = {}
    for run in group:
        for step, place, value in zip(run.curve.step, position(run), measure.read(run.curve), strict=True):
            places.setdefault(step, []).append(place)
            values.setdefault(step, []).append(measure.worst if math.isnan(value) else value)
    steps = sorted(values)
    for run in group:
        if not run.finished:
            for step in steps:
                if step > run.curve.step[-1]:
                    values[step].append(measure.worst)
    return (
        [rounded(statistics.median(places[step])) for step in steps],
        [rounded(statistics.median(values[step])) for step in steps],
    )


def _last_points(group: list[RunRecord], position: Read, measure: Measure) -> tuple[Series, Series]:
    """Where each run was last seen within the picture."""
    xs: Series = []
    ys: Series = []
    for run in group:
        points = zip(position(run), measure.read(run.curve), strict=True)
        seen = [(x, y) for x, y in points if math.isfinite(y) and y <= measure.ceiling]
        xs.append(rounded(seen[-1][0]) if seen else None)
        ys.append(rounded(seen[-1][1]) if seen else None)
    return xs, ys


def _measure_layout(measure: Measure, values: list[Series]) -> dict[str, Any]:
    finite = [y for series in values for y in series if y is not None]
    logarithmic = is_logarithmic(measure, finite)
    text = f"{measure.name} (log scale)" if logarithmic else measure.name
    axis = value_axis(logarithmic, [y for y in finite if y <= measure.ceiling])
    axis |= {"autorange": True, "range": None}
    if finite and max(finite) > measure.ceiling:
        low, high = (math.log10(end) if logarithmic else end for end in (min(finite), measure.ceiling))
        axis |= {"autorange": False, "range": [low - 0.05 * (high - low), high]}
        text += ", blow-ups cut off"
    return {"yaxis": axis, "title": {"text": text}}


def _curves_caption(groups: dict[str, list[RunRecord]], task: TaskResult) -> str:
    seeds = max((len(group) for group in groups.values()), default=0)
    thin = max((len(thinned(group)) for group in groups.values()), default=0)
    lines = "every seed" if thin == seeds else f"{thin} seeds of {seeds}, at even distances"
    sentences = [
        "Confirmation runs at each contender's best learning rate.",
        f"Thick: the median of {words.count(seeds, 'seed')}. Thin: {lines}. Shaded: from the best of all seeds to the "
        "worst. Nothing is smoothed."
        if seeds > 1
        else "One seed each: chance is not visible here.",
    ]
    if any(not run.finished for group in groups.values() for run in group):
        sentences.append("A cross marks where a run ended early; from there on it counts as the worst in the median.")
    missing = [words.single_line(s.contender) for s in task.standings if s.contender not in groups]
    if missing:
        sentences.append(f"Without a curve: {words.listing(missing)}.")
    return " ".join(sentences)


def _curves_alt(groups: dict[str, list[RunRecord]]) -> str:
    ends = []
    for name, group in groups.items():
        finals = [run.curve.valid_loss[-1] for run in group if run.finished and run.curve.valid_loss]
        end = f"ends at {words.number(statistics.median(finals))}" if finals else "did not finish"
        ends.append(f"{words.single_line(name)} {end}")
    return described("Line chart of the validation loss during training", ends)
