"""The learning-rate basin: the end of every trial against its rate."""

from __future__ import annotations

import math
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.record import TUNE, RunRecord
from piste.race.result import Standing, TaskResult

from .figure import BASIN_HEIGHT, Option, Picture, Series, Switch, blank, described, rounded
from .measures import Measure, final, is_logarithmic, measures, value_axis
from .palette import Look

# Relative to the figure's height: the strip over the basin in which runs without a result are crossed.
STRIP: Final = (0.9, 1.0)


def basin(task: TaskResult, runs: list[RunRecord], looks: dict[str, Look], identifier: str) -> Picture:
    """Final loss of every tuning trial against its learning rate; runs without a result crossed above."""
    tune = [run for run in runs if run.key.phase == TUNE and "lr" in run.key.hyperparameters]
    # what chose the learning rates comes first
    shown = [measure for measure in measures(task, tune) if measure.name != "Training loss"][::-1]
    broken = [run for run in tune if final(run, shown[0]) is None]
    ranked = [s for s in task.standings if any(run.key.contender == s.contender for run in tune)]
    figure = blank(height=BASIN_HEIGHT)
    absolute: list[Series] = []
    relative: list[Series] = []
    vertical: list[list[Series]] = [[] for _ in shown]
    for row, standing in enumerate(ranked):
        group = sorted((r for r in tune if r.key.contender == standing.contender), key=lambda run: run.key.lr)
        best = standing.best_hyperparameters.get("lr", math.nan)
        for trace, members in _basin_traces(standing, group, looks[standing.contender], best, shown[0]):
            lrs = [run.key.lr for run in members]
            absolute.append([rounded(lr) for lr in lrs])
            relative.append([rounded(lr / best) for lr in lrs])
            in_strip = trace.yaxis == "y2"
            for values, measure in zip(vertical, shown, strict=True):
                values.append([float(-row) if in_strip else final(run, measure) for run in members])
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
    good = [run for run in group if final(run, measure) is not None]
    chosen = [run for run in good if math.isclose(run.key.lr, best, rel_tol=1e-9)][:1]
    bad = [run for run in group if final(run, measure) is None]
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
    logarithmic = is_logarithmic(measure, finite)
    text = f"{measure.name} at the end" + (" (log scale)" if logarithmic else "")
    return {"yaxis": value_axis(logarithmic, finite), "title": {"text": text}}


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
    return described("Scatter chart of the final loss against the learning rate", parts)
