"""How far everyone is behind the leader, and how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.result import Standing, TaskResult

from .figure import BASIN_HEIGHT, Picture, above_row, blank
from .palette import Look


def differences(task: TaskResult, looks: dict[str, Look], identifier: str) -> Picture:
    """Forest plot: how far each contender is behind the leader, over common seeds, with its interval."""
    standings = task.standings
    figure = blank(height=max(BASIN_HEIGHT, 84 + 54 * len(standings)))
    labels = []
    for row, standing in enumerate(standings):
        figure.add_trace(_difference_trace(standing, -row, looks[standing.contender], leader=row == 0))
        labels.append(
            above_row(row, _difference_label(standing, leader=row == 0), yshift=9, bgcolor="var(--card)", borderpad=1)
        )
    figure.update_layout(annotations=labels)  # at once: plotly looks at all of them again for each that is added
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
        return f"{name} · {words.no_result(is_open=standing.is_open)}"
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
