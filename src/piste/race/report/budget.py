"""What a smaller budget of trials would have found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.analysis import Analysis
from piste.race.result import TaskResult
from piste.race.search import BudgetCurve

from .figure import BASIN_HEIGHT, Picture, blank, rounded, titled
from .palette import Look


def budget(task: TaskResult, found: Analysis, looks: Mapping[str, Look], identifier: str) -> Picture:
    """The best validation score to expect of one trial, of two, and so on."""
    figure = blank(height=BASIN_HEIGHT)
    for name, curve in found.budgets.items():
        for trace in _traces(name, curve, looks[name]):
            figure.add_trace(trace)
    most = max((len(curve.expected) for curve in found.budgets.values()), default=0)
    low = min((min(curve.expected) for curve in found.budgets.values()), default=0.0)
    figure.update_layout(
        titled("trials"),
        title={"text": f"Expected best validation {words.label(task.metric_name)}"},
        # few trials get a tick each
        xaxis={"range": [1 - 0.03 * most, most + 0.03 * most]} | ({"dtick": 1} if most <= 12 else {}),
        yaxis={"type": "linear" if task.higher_is_better or low <= 0 else "log", "nticks": 5},
    )
    return Picture(
        identifier,
        "budget",
        "What a smaller budget would have found",
        "The best of so many trials, on average over all ways to choose them from those made; without extensions. The "
        "band is a 95 % bootstrap over trials. A trial that did not finish counts as the untrained model.",
        _alt(found),
        figure,
        [],
        "" if most > 1 else "Fewer than two trials each: there is no budget to vary.",
    )


def _traces(name: str, curve: BudgetCurve, look: Look) -> list[Any]:
    common = {"name": words.label(name), "meta": look.slot}
    trials = [*range(1, len(curve.expected) + 1)]
    band = go.Scatter(
        common,
        x=[*trials, *trials[::-1]],
        y=[rounded(value) for value in (*curve.low, *curve.high[::-1])],
        mode="none",
        fill="toself",
        fillcolor=look.colour,
        opacity=0.13,
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        common,
        x=trials,
        y=[rounded(value) for value in curve.expected],
        mode="lines+markers",
        line={"color": look.colour, "width": 2, "dash": look.dash},
        marker={"symbol": look.marker, "size": 8, "color": look.colour},
        hovertemplate="best of %{x}: %{y:.4~g}",
    )
    return [band, line]


def _alt(found: Analysis) -> str:
    parts = [
        f"{words.single_line(name)}: {words.number(curve.expected[0])} from one trial, "
        f"{words.number(curve.expected[-1])} from {len(curve.expected)}"
        for name, curve in found.budgets.items()
    ]
    return f"Line chart of the expected best score against the number of trials. {'; '.join(parts)}."
