"""The three pictures of a task: loss curves, learning-rate basin, differences from the leader.

Figures are built with plotly and handed to the page as plain data. Colours are CSS variables: the page puts in the
values of its light or dark theme. Every text that comes from a user goes through ``words.label``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.record import CONFIRM, TUNE, Curve, RunRecord, Standing, TaskResult

from .palette import Look

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# A diverging run would squeeze all others into one line, so the loss axis ends at this many times the first loss.
BLOW_UP: Final = 2.0
BASIN_HEIGHT: Final = 400
DIGITS: Final = 5  # of the numbers in pictures; the raw data keep all
# Relative to the figure's height: the strip over the basin in which runs without a result are crossed.
STRIP: Final = (0.9, 1.0)

Series = list[float | None]


@dataclass(frozen=True)
class Option:
    """One setting of a switch: what replaces the traces' x or y, and changes of the layout."""

    label: str
    x: list[Series] | None = None
    y: list[Series] | None = None
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A choice the reader has; the figure as built shows the first option."""

    name: str
    options: list[Option]


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Args:
        id: unique in the page.
        kind: ``"curves"``, ``"basin"`` or ``"differences"``.
        title: heading.
        caption: how to read it.
        alt: what it shows, for those who cannot see it.
        figure: the plotly figure.
        switches: what the reader may change.
        empty: why there is nothing to draw, or ``""``.
    """

    id: str
    kind: str
    title: str
    caption: str
    alt: str
    figure: go.Figure
    switches: list[Switch] = field(default_factory=list)
    empty: str = ""

    def data(self) -> dict[str, Any]:
        """All the page needs to draw it, as plain JSON data without non-finite numbers."""
        figure = self.figure.to_plotly_json()
        switches = [
            {"name": switch.name, "options": [{"x": o.x, "y": o.y, "layout": o.layout} for o in switch.options]}
            for switch in self.switches
        ]
        content: dict[str, Any] = _drawable(
            {"id": self.id, "data": figure["data"], "layout": figure["layout"], "switches": switches}
        )
        return content


def pictures(task: TaskResult, records: Iterable[RunRecord], looks: dict[str, Look], identifier: str) -> list[Picture]:
    """The pictures of one task; ``records`` are the runs on it."""
    runs = list(records)
    return [
        curves(task, runs, looks, f"{identifier}-curves"),
        basin(task, runs, looks, f"{identifier}-basin"),
        differences(task, looks, f"{identifier}-differences"),
    ]


# Loss curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Something recorded along a run.

    Args:
        name: ready for a picture.
        read: gets it from a curve.
        worst: plus or minus infinity.
        is_loss: drawn on a log scale where it can be.
        ceiling: what lies above is cut off, infinity for nothing.
    """

    name: str
    read: Callable[[Curve], list[float]]
    worst: float
    is_loss: bool
    ceiling: float


def measures(task: TaskResult, runs: list[RunRecord]) -> list[Measure]:
    """What can be drawn against steps: the losses, and the metric where it is more than the loss."""
    found = [
        _measure("Validation loss", lambda curve: curve.valid_loss, runs),
        _measure("Training loss", lambda curve: curve.train_loss, runs),
    ]
    if any(_differ(run.curve.valid_loss, run.curve.valid_metric) for run in runs):
        worst = -math.inf if task.higher_is_better else math.inf
        name = words.label(f"Validation {task.metric_name}")
        found.append(_measure(name, lambda curve: curve.valid_metric, runs, worst, is_loss=False))
    return found


def _measure(
    name: str,
    read: Callable[[Curve], list[float]],
    runs: list[RunRecord],
    worst: float = math.inf,
    *,
    is_loss: bool = True,
) -> Measure:
    starts = [values[0] for run in runs if (values := read(run.curve))]
    highest = max((value for value in starts if math.isfinite(value) and value > 0), default=math.inf)
    return Measure(name, read, worst, is_loss, BLOW_UP * highest if worst > 0 else math.inf)


def curves(task: TaskResult, runs: list[RunRecord], looks: dict[str, Look], identifier: str) -> Picture:
    """Loss against steps and against time, one thick median a contender and one thin line a seed."""
    confirm = [run for run in runs if run.key.phase == CONFIRM and run.curve.step]
    groups = {s.contender: [run for run in confirm if run.key.contender == s.contender] for s in task.standings}
    groups = {name: group for name, group in groups.items() if group}
    seconds = [time for run in confirm for time in run.curve.train_seconds]
    factor, unit = _time_unit(max(filter(math.isfinite, seconds), default=0.0))

    def time(curve: Curve) -> list[float]:
        return [value * factor for value in curve.train_seconds]

    def step(curve: Curve) -> list[float]:
        return [float(value) for value in curve.step]

    shown = measures(task, confirm)
    figure = _figure(height=440)
    horizontal: list[list[Series]] = [[], []]
    vertical: list[list[Series]] = [[] for _ in shown]
    for name, group in groups.items():
        for trace, points in _curve_traces(name, group, looks[name]):
            for target, position in zip(horizontal, (step, time), strict=True):
                target.append(points(position, shown[0])[0])
            for values, measure in zip(vertical, shown, strict=True):
                values.append(points(step, measure)[1])
            figure.add_trace(trace.update(x=horizontal[0][-1], y=vertical[0][-1]))

    across = Switch(
        "Against",
        [
            Option("steps", x=horizontal[0], layout=_titled("optimizer steps")),
            Option("time", x=horizontal[1], layout=_titled(f"training time ({unit}), evaluation left out")),
        ],
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


Points = Callable[[Callable[[Curve], list[float]], Measure], tuple[Series, Series]]


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
    traces: list[tuple[Any, Points]] = []
    if len(group) > 1:
        traces.append((seeds, lambda position, measure: _all_seeds(group, position, measure)))
    traces.append((median, lambda position, measure: _median(group, position, measure)))
    broken = [run for run in group if not run.finished]
    if broken:
        traces.append((ended, lambda position, measure: _last_points(broken, position, measure)))
    return traces


def _all_seeds(
    group: list[RunRecord], position: Callable[[Curve], list[float]], measure: Measure
) -> tuple[Series, Series]:
    """All runs in one trace, a gap between two."""
    xs: Series = []
    ys: Series = []
    for run in group:
        xs += [*map(_rounded, position(run.curve)), None]
        ys += [*map(_rounded, measure.read(run.curve)), None]
    return xs, ys


def _median(
    group: list[RunRecord], position: Callable[[Curve], list[float]], measure: Measure
) -> tuple[Series, Series]:
    """The median over seeds. A run that has ended early, or is at nan, counts as the worst from there on."""
    places: dict[int, list[float]] = {}
    values: dict[int, list[float]] = {}
    for run in group:
        for step, place, value in zip(run.curve.step, position(run.curve), measure.read(run.curve), strict=True):
            places.setdefault(step, []).append(place)
            values.setdefault(step, []).append(measure.worst if math.isnan(value) else value)
    steps = sorted(values)
    for run in group:
        if not run.finished:
            for step in steps:
                if step > run.curve.step[-1]:
                    values[step].append(measure.worst)
    return (
        [_rounded(statistics.median(places[step])) for step in steps],
        [_rounded(statistics.median(values[step])) for step in steps],
    )


def _last_points(
    group: list[RunRecord], position: Callable[[Curve], list[float]], measure: Measure
) -> tuple[Series, Series]:
    """Where each run was last seen within the picture."""
    xs: Series = []
    ys: Series = []
    for run in group:
        points = zip(position(run.curve), measure.read(run.curve), strict=True)
        seen = [(x, y) for x, y in points if math.isfinite(y) and y <= measure.ceiling]
        xs.append(_rounded(seen[-1][0]) if seen else None)
        ys.append(_rounded(seen[-1][1]) if seen else None)
    return xs, ys


def _measure_layout(measure: Measure, values: list[Series]) -> dict[str, Any]:
    finite = [y for series in values for y in series if y is not None]
    logarithmic = _logarithmic(measure, finite)
    text = f"{measure.name} (log scale)" if logarithmic else measure.name
    axis = _value_axis(logarithmic, [y for y in finite if y <= measure.ceiling])
    axis |= {"autorange": True, "range": None}
    if finite and max(finite) > measure.ceiling:
        low, high = (math.log10(end) if logarithmic else end for end in (min(finite), measure.ceiling))
        axis |= {"autorange": False, "range": [low - 0.05 * (high - low), high]}
        text += ", blow-ups cut off"
    return {"yaxis": axis, "title": {"text": text}}


def _logarithmic(measure: Measure, finite: list[float]) -> bool:
    return measure.is_loss and bool(finite) and min(finite) > 0


def _value_axis(logarithmic: bool, finite: list[float]) -> dict[str, Any]:
    """Kind of the axis, and few enough tick labels for a log scale not to crowd them below the powers of ten."""
    decades = math.log10(max(finite) / min(finite)) if logarithmic and finite else 0.0
    return {"type": "log" if logarithmic else "linear", "nticks": 3 if decades >= 0.9 else 0}


def _curves_caption(groups: dict[str, list[RunRecord]], task: TaskResult) -> str:
    seeds = max((len(group) for group in groups.values()), default=0)
    sentences = [
        "Confirmation runs at each contender's best learning rate.",
        f"Thick: the median of {words.count(seeds, 'seed')}. Thin: every seed. Nothing is smoothed."
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
    return f"Line chart of the validation loss during training. {'; '.join(ends)}." if ends else "Empty chart."


# Learning-rate basin -------------------------------------------------------------------------------------------------


def basin(task: TaskResult, runs: list[RunRecord], looks: dict[str, Look], identifier: str) -> Picture:
    """Final loss of every tuning trial against its learning rate; runs without a result crossed above."""
    tune = [run for run in runs if run.key.phase == TUNE and "lr" in run.key.hyperparameters]
    # what chose the learning rates comes first
    shown = [measure for measure in measures(task, tune) if measure.name != "Training loss"][::-1]
    broken = [run for run in tune if _final(run, shown[0]) is None]
    ranked = [s for s in task.standings if any(run.key.contender == s.contender for run in tune)]
    figure = _figure(height=BASIN_HEIGHT)
    absolute: list[Series] = []
    relative: list[Series] = []
    vertical: list[list[Series]] = [[] for _ in shown]
    for row, standing in enumerate(ranked):
        group = sorted((r for r in tune if r.key.contender == standing.contender), key=lambda run: run.key.lr)
        best = standing.best_hyperparameters.get("lr", math.nan)
        for trace, members in _basin_traces(standing, group, looks[standing.contender], best, shown[0]):
            lrs = [run.key.lr for run in members]
            absolute.append([_rounded(lr) for lr in lrs])
            relative.append([_rounded(lr / best) for lr in lrs])
            in_strip = trace.yaxis == "y2"
            for values, measure in zip(vertical, shown, strict=True):
                values.append([float(-row) if in_strip else _final(run, measure) for run in members])
            figure.add_trace(trace.update(x=absolute[-1], y=vertical[0][-1]))

    across = Switch(
        "Learning rate",
        [
            Option("as it is", x=absolute, layout={"xaxis": {"title": {"text": "learning rate (log scale)"}}}),
            Option(
                "relative to own best",
                x=relative,
                layout={
                    "xaxis": {"title": {"text": "learning rate, in units of the contender's own best (log scale)"}}
                },
            ),
        ],
    )
    up = Switch(
        "Show",
        [
            Option(f"{measure.name} at the end", y=values, layout=_basin_layout(measure, values, figure))
            for measure, values in zip(shown, vertical, strict=True)
        ],
    )
    for switch in (across, up):
        figure.update_layout(switch.options[0].layout)
    figure.update_xaxes(type="log", nticks=_lr_ticks(absolute))
    if broken:
        _add_strip(figure, len(ranked))
    return Picture(
        identifier,
        "basin",
        "How sensitive to the learning rate",
        _basin_caption(task, broken, ranked),
        _basin_alt(ranked),
        figure,
        [across, up],
        "" if tune else "No tuning run was recorded.",
    )


def _basin_traces(
    standing: Standing, group: list[RunRecord], look: Look, best: float, measure: Measure
) -> list[tuple[Any, list[RunRecord]]]:
    """Trials that finished, the best of them ringed, and those that did not."""
    common = {"name": words.label(standing.contender), "meta": look.slot}
    good = [run for run in group if _final(run, measure) is not None]
    chosen = [run for run in good if math.isclose(run.key.lr, best, rel_tol=1e-9)][:1]
    bad = [run for run in group if _final(run, measure) is None]
    line = go.Scatter(
        common,
        mode="lines+markers",
        line={"color": look.colour, "width": 2, "dash": look.dash},
        marker={"symbol": look.marker, "size": 8, "color": look.colour},
        hovertemplate="lr %{x:.4~g}: %{y:.4~g}",
    )
    ring = go.Scatter(
        common,
        mode="markers+text",
        text=[{"low": "◂ edge", "high": "edge ▸"}.get(standing.edge, "")] * len(chosen),
        textposition={"low": "bottom right", "high": "bottom left"}.get(standing.edge, "bottom center"),
        marker={"symbol": "circle-open", "size": 18, "color": look.colour, "line": {"width": 2.5}},
        hovertemplate="chosen: lr %{x:.4~g}, %{y:.4~g}",
        showlegend=False,
    )
    crosses = go.Scatter(
        common,
        mode="markers",
        yaxis="y2",
        marker={"symbol": "x", "size": 8, "color": look.colour},
        customdata=[words.label(f"{run.status.replace('_', ' ')}: {run.message}".rstrip(": "), 90) for run in bad],
        hovertemplate="lr %{x:.4~g}: %{customdata}",
        showlegend=False,
    )
    traces = [(line, good), (ring, chosen), (crosses, bad)]
    return [(trace, members) for trace, members in traces if members]


def _basin_layout(measure: Measure, values: list[Series], figure: go.Figure) -> dict[str, Any]:
    finite = [
        y
        for trace, series in zip(figure.data, values, strict=True)
        if trace.yaxis != "y2"
        for y in series
        if y is not None
    ]
    logarithmic = _logarithmic(measure, finite)
    text = f"{measure.name} at the end" + (" (log scale)" if logarithmic else "")
    return {"yaxis": _value_axis(logarithmic, finite), "title": {"text": text}}


def _lr_ticks(lrs: list[Series]) -> int:
    """At most so many labels that only powers of ten get one, or 1, 2, 5 in a narrow range."""
    known = [lr for series in lrs for lr in series if lr is not None]
    return max(4, int(math.log10(max(known) / min(known)))) if known else 4


def _add_strip(figure: go.Figure, rows: int) -> None:
    low, high = STRIP
    figure.update_layout(
        yaxis={"domain": [0, low - 0.03]},
        yaxis2={
            "domain": [low, high],
            "range": [-rows + 0.3, 0.7],
            "visible": False,
            "fixedrange": True,
        },
    )
    figure.add_shape(
        type="rect", xref="paper", yref="paper", x0=0, x1=1, y0=low, y1=high, line_width=0,
        fillcolor="var(--bad-soft)", layer="below",
    )  # fmt: skip
    figure.add_annotation(
        text="did not finish", xref="paper", yref="paper", x=0.006, y=high, xanchor="left", yanchor="top",
        showarrow=False, font={"size": 11, "color": "var(--bad)"},
    )  # fmt: skip


def _basin_caption(task: TaskResult, broken: list[RunRecord], ranked: list[Standing]) -> str:
    place = "top" if task.higher_is_better else "bottom"
    sentences = [
        "One mark for each tuning trial; the ring is the rate chosen.",
        f"A wide, flat {place} forgives a wrong guess.",
    ]
    if broken:
        sentences.append("Crosses above: trials that diverged or failed.")
    for edge, side in (("high", "highest"), ("low", "lowest")):
        names = [words.single_line(standing.contender) for standing in ranked if standing.edge == edge]
        if names:
            sentences.append(f"{words.listing(names)} did best at the {side} rate tried: a better one may lie beyond.")
    return " ".join(sentences)


def _basin_alt(ranked: list[Standing]) -> str:
    parts = []
    for standing in ranked:
        best = standing.best_hyperparameters.get("lr")
        found = f"best at {words.number(best)}" if best is not None else "no trial survived"
        lost = f", {standing.diverged_trials} of {standing.trials} did not finish" if standing.diverged_trials else ""
        parts.append(f"{words.single_line(standing.contender)}: {found}{lost}")
    return (
        f"Scatter chart of the final loss against the learning rate. {'; '.join(parts)}." if parts else "Empty chart."
    )


# Differences ---------------------------------------------------------------------------------------------------------


def differences(task: TaskResult, looks: dict[str, Look], identifier: str) -> Picture:
    """Forest plot: how far each contender is behind the leader, over common seeds, with its interval."""
    standings = task.standings
    figure = _figure(height=max(BASIN_HEIGHT, 84 + 54 * len(standings)))
    for row, standing in enumerate(standings):
        figure.add_trace(_difference_trace(standing, -row, looks[standing.contender], leader=row == 0))
        figure.add_annotation(
            text=_difference_label(standing, leader=row == 0),
            xref="paper", x=0, xanchor="left", y=-row, yanchor="bottom", yshift=9, showarrow=False,
            font={"size": 12}, bgcolor="var(--card)", borderpad=1,
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": "var(--muted)", "width": 1, "dash": "dot"})
    ends = [0.0] + [
        end for s in standings for end in (s.difference, s.difference_low, s.difference_high) if math.isfinite(end)
    ]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    reach = [min(ends) - margin, max(ends) + margin]
    name = words.label(task.metric_name)
    figure.update_layout(
        margin={"l": 12, "t": 12},
        xaxis={
            # worse is always to the right
            "range": reach[::-1] if task.higher_is_better else reach,
            "title": {"text": f"{name} minus the leader's, worse \N{RIGHTWARDS ARROW}"},
            "tickformat": "~g",
        },
        yaxis={"visible": False, "range": [-len(standings) + 0.55, 0.95], "fixedrange": True},
    )
    return Picture(
        identifier,
        "differences",
        "Behind the leader, and how surely",
        _differences_caption(standings),
        _differences_alt(standings),
        figure,
        [],
        "" if any(standing.scores for standing in standings) else "No contender was scored.",
    )


def _difference_trace(standing: Standing, row: int, look: Look, *, leader: bool) -> Any:
    known = math.isfinite(standing.difference)
    hollow = standing.tied and not leader
    bounds = [standing.difference_low, standing.difference_high]
    error = {"type": "data", "symmetric": False, "color": look.colour, "thickness": 2.5, "width": 6, "visible": False}
    if known and not leader and all(map(math.isfinite, bounds)):
        # rounding may put an end a hair past the mean; plotly draws negative lengths on the wrong side
        after = max(0.0, standing.difference_high - standing.difference)
        before = max(0.0, standing.difference - standing.difference_low)
        error.update(visible=True, array=[after], arrayminus=[before])
    return go.Scatter(
        x=[standing.difference if known else None],
        y=[row],
        mode="markers",
        name=words.label(standing.contender),
        error_x=error,
        marker={
            "symbol": f"{look.marker}-open" if hollow else look.marker,
            "size": 12,
            "color": look.colour,
            "line": {"width": 2.5 if hollow else 0},
        },
        hovertemplate="%{x:.4~g}",
        showlegend=False,
    )


def _difference_label(standing: Standing, *, leader: bool) -> str:
    name = words.label(standing.contender)
    if not math.isfinite(standing.difference):
        return f"{name} · no result"
    if leader:
        return f"<b>{name}</b> · leader"
    if len(standing.scores) == 1:
        return f"{name} · one seed"
    return f"{name} · tied" if standing.tied else name


def _differences_caption(standings: Sequence[Standing]) -> str:
    if standings and len(standings[0].scores) == 1:
        return "One seed each: there is no interval, and no telling a difference from chance."
    return (
        "Mean paired difference over common seeds with its bootstrap interval. Hollow: tied, no difference from the "
        "leader was found. Filled: worse than the leader."
    )


def _differences_alt(standings: Sequence[Standing]) -> str:
    if not standings:
        return "Empty chart."
    parts = []
    for standing in standings[1:]:
        far = f"{words.number(standing.difference)}"
        between = f"{words.number(standing.difference_low)} to {words.number(standing.difference_high)}"
        state = "tied" if standing.tied else "not tied"
        parts.append(f"{words.single_line(standing.contender)}: {far}, interval {between}, {state}")
    return f"Differences from the leader, {words.single_line(standings[0].contender)}. {'; '.join(parts)}."


# Common ground -------------------------------------------------------------------------------------------------------


def _figure(height: int) -> go.Figure:
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--grid)",
        "zeroline": False,
        "automargin": True,
        "tickformat": "~g",
        "title": {"font": {"size": 12, "color": "var(--muted)"}, "standoff": 8},
    }
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 44, "r": 14, "t": 30, "b": 44},
            "font": {"family": FONT, "size": 12, "color": "var(--ink)"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yanchor": "top", "yref": "container",
                      "pad": {"l": 6, "t": 8}, "font": {"size": 12, "color": "var(--muted)"}},
            "hoverlabel": {"namelength": -1, "bgcolor": "var(--card)", "font": {"color": "var(--ink)"}},
            "showlegend": False,
            "legend": {"orientation": "h", "y": -0.2},
            "xaxis": axis,
            "yaxis": axis,
        }
    )  # fmt: skip


def _titled(text: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": text}, "rangemode": "tozero"}}


def _time_unit(longest: float) -> tuple[float, str]:
    if longest > 7200:
        return 1 / 3600, "hours"
    return (1 / 60, "minutes") if longest > 180 else (1.0, "seconds")


def _final(run: RunRecord, measure: Measure) -> float | None:
    """The value at the end of a run that finished; None if it did not, or ended at nan."""
    values = measure.read(run.curve)
    return _rounded(values[-1]) if run.finished and values else None


def _differ(one: list[float], other: list[float]) -> bool:
    return any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=False))


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _drawable(value: Any) -> Any:
    """Plain JSON data, with None for numbers that no axis can show."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _drawable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_drawable(item) for item in value]
    return value
