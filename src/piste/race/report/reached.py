"""What it takes to reach a target, for every target from easy to hard."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.analysis import Analysis
from piste.race.result import TaskResult
from piste.race.targets import SECONDS, STEPS

from .figure import BASIN_HEIGHT, Option, Picture, Series, Switch, blank, rounded
from .palette import Look


def reached(task: TaskResult, found: Analysis, looks: Mapping[str, Look], identifier: str) -> Picture:
    """Median steps, gradient evaluations or seconds to each target; a line ends where most seeds miss."""
    figure = blank(height=BASIN_HEIGHT)
    drawn = {
        name for by_name in found.needed.values() for name, each in by_name.items() if any(map(math.isfinite, each))
    }
    names = [standing.contender for standing in task.standings if standing.contender in drawn]
    goals = [rounded(goal) for goal in found.targets]
    for name in names:
        look = looks[name]
        figure.add_trace(
            go.Scatter(
                name=words.label(name),
                meta=look.slot,
                x=goals,
                y=_series(found.needed[STEPS][name]),
                mode="lines+markers",
                line={"color": look.colour, "width": 2, "dash": look.dash, "shape": "vh"},
                marker={"symbol": look.marker, "size": 7, "color": look.colour, "maxdisplayed": 8},
                hovertemplate="%{x:.4~g} after %{y:.4~g}",
            )
        )
    metric = words.label(f"Validation {task.metric_name}")
    logarithmic = not task.higher_is_better and bool(found.targets) and min(found.targets) > 0
    figure.update_layout(
        xaxis={
            "type": "log" if logarithmic else "linear",
            "nticks": 6,
            # harder is always to the right
            "autorange": True if task.higher_is_better else "reversed",
            "title": {"text": f"target: {metric}, harder \N{RIGHTWARDS ARROW}"},
        },
        yaxis={"rangemode": "tozero"},
    )
    if found.target is not None:
        figure.add_vline(
            x=found.target.value,
            line={"color": "var(--muted)", "width": 1, "dash": "dot"},
        )
    switch = Switch(
        "Count",
        [
            Option(
                "time" if what == SECONDS else what,
                y=[_series(needed[name]) for name in names],
                layout={"title": {"text": f"{what.capitalize()} to the target, median of seeds"}},
            )
            for what, needed in found.needed.items()
        ],
    )
    figure.update_layout(switch.options[0].layout)
    return Picture(
        identifier,
        "reached",
        "What a target takes",
        _caption(found),
        _alt(task, found),
        figure,
        [switch],
        "" if names else "No run got beyond its start.",
    )


def _series(needed: list[float]) -> Series:
    return [rounded(value) for value in needed]


def _caption(found: Analysis) -> str:
    target = f" Dotted: {words.number(found.target.value)}, {found.target.source}." if found.target else ""
    return (
        "Every target at once, so that no single one decides. A line ends where half of the seeds miss (misses are "
        f"censored, not left out; Kaplan and Meier). Targets are met at evaluations.{target}"
    )


def _alt(task: TaskResult, found: Analysis) -> str:
    if found.target is None:
        return "Line chart without lines: nothing was reached."
    parts = []
    for standing in task.standings:
        reaches = found.at_target[STEPS].get(standing.contender, [])
        met = [each.at for each in reaches if each.met]
        after = f"{len(met)} of {len(reaches)} seeds" + (
            f", the first after {words.number(min(met))} steps" if met else ""
        )
        parts.append(f"{words.single_line(standing.contender)}: {after}")
    value = words.number(found.target.value)
    return f"Line chart of the steps to every target. The target {value} is met by: {'; '.join(parts)}."
