"""What quality costs: the Pareto front of score and price, and where the time of a step goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go  # type: ignore[import-untyped]

from piste.race import words
from piste.race.result import Standing, TaskResult

from .figure import BASIN_HEIGHT, Option, Picture, Series, Switch, above_row, blank, described, rounded
from .palette import Look


@dataclass(frozen=True)
class _Price:
    """Something that is paid: its name on the switch, the axis title, and how to read it off a standing."""

    name: str
    title: str
    read: Callable[[Standing], float]


_PRICES = (
    _Price("step time", "milliseconds a step", lambda standing: 1000 * standing.cost.mean_step_seconds),
    _Price("optimizer state", "optimizer state (MiB)", lambda standing: standing.cost.state_bytes / 2**20),
    _Price("peak memory", "peak memory (MiB)", lambda standing: standing.cost.peak_bytes / 2**20 or math.nan),
    _Price(
        "gradient evaluations",
        "gradient evaluations of a run",
        lambda standing: standing.cost.gradient_evaluations or math.nan,
    ),
)


def pareto(task: TaskResult, looks: Mapping[str, Look], identifier: str) -> Picture:
    """Score against price; who is neither beaten in both is joined by a line."""
    scored = [standing for standing in task.standings if math.isfinite(standing.mean) and standing.cost.parameters]
    prices = [price for price in _PRICES if any(math.isfinite(price.read(standing)) for standing in scored)]
    figure = blank(height=BASIN_HEIGHT)
    xs: list[list[Series]] = [[] for _ in prices]
    ys: list[list[Series]] = [[] for _ in prices]
    for place, price in enumerate(prices):
        front = _front(scored, price, task.higher_is_better)
        xs[place].append([rounded(price.read(standing)) for standing in front])
        ys[place].append([rounded(standing.mean) for standing in front])
        for standing in scored:
            xs[place].append([rounded(price.read(standing))])
            ys[place].append([rounded(standing.mean)])
    if prices:
        figure.add_trace(
            go.Scatter(
                name="front", x=xs[0][0], y=ys[0][0], mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            )
        )  # fmt: skip
    for place, standing in enumerate(scored, start=1):
        figure.add_trace(_point(standing, xs[0][place], looks[standing.contender], leader=place == 1))
    switch = Switch(
        "Price",
        [
            Option(
                price.name,
                x=x,
                y=y,
                layout={"xaxis": {"title": {"text": f"{price.title}, dearer \N{RIGHTWARDS ARROW}"}}},
            )
            for price, x, y in zip(prices, xs, ys, strict=True)
        ],
    )
    better = "higher" if task.higher_is_better else "lower"
    figure.update_layout(
        title={"text": f"{words.label(task.metric_name)}, {better} is better"}, xaxis={"rangemode": "tozero"}
    )
    if prices:
        figure.update_layout(switch.options[0].layout)
    return Picture(
        identifier,
        "pareto",
        "What quality costs",
        "Mean score with its interval against what was paid; hollow: tied with the leader. The dotted line joins those "
        "that nobody beats in both; differences within an interval are none.",
        _pareto_alt(scored),
        figure,
        [switch],
        "" if scored else "No contender was scored.",
    )


def _point(standing: Standing, x: Series, look: Look, *, leader: bool) -> go.Scatter:
    hollow = standing.tied and not leader
    after, before = max(0.0, standing.high - standing.mean), max(0.0, standing.mean - standing.low)
    known = math.isfinite(after) and math.isfinite(before)
    return go.Scatter(
        name=words.label(standing.contender),
        meta=look.slot,
        x=x,
        y=[rounded(standing.mean)],
        mode="markers",
        error_y={
            "type": "data", "symmetric": False, "visible": known, "color": look.colour, "thickness": 2, "width": 5,
            "array": [rounded(after)], "arrayminus": [rounded(before)],
        },
        marker={
            "symbol": f"{look.marker}-open" if hollow else look.marker, "size": 12, "color": look.colour,
            "line": {"width": 2.5 if hollow else 0},
        },
        hovertemplate="%{x:.4~g}: %{y:.4~g}",
    )  # fmt: skip


def _front(scored: Sequence[Standing], price: _Price, higher_is_better: bool) -> list[Standing]:
    """Who has no other that is as cheap and better, from cheap to dear."""
    sign = -1.0 if higher_is_better else 1.0
    known = [standing for standing in scored if math.isfinite(price.read(standing))]
    front: list[Standing] = []
    for standing in sorted(known, key=lambda each: (price.read(each), sign * each.mean)):
        if not front or sign * standing.mean < sign * front[-1].mean:
            front.append(standing)
    return front


def _pareto_alt(scored: Sequence[Standing]) -> str:
    parts = [
        f"{words.single_line(standing.contender)}: {words.number(standing.mean)} at "
        f"{words.duration(standing.cost.mean_step_seconds)} a step and {words.size(standing.cost.state_bytes)} of state"
        for standing in scored
    ]
    return described("Scatter chart of the score against its price", parts)


def breakdown(task: TaskResult, looks: Mapping[str, Look], identifier: str) -> Picture:
    """Bars of the time of a step: the gradient, and the optimizer."""
    timed = [standing for standing in task.standings if math.isfinite(standing.cost.mean_step_seconds)]
    longest = max((standing.cost.mean_step_seconds for standing in timed), default=0.0)
    factor, unit = (1e6, "µs") if longest < 1e-3 else (1e3, "ms") if longest < 1 else (1.0, "s")
    figure = blank(height=max(200, 84 + 54 * len(timed)))
    labels = []
    for row, standing in enumerate(timed):
        look = looks[standing.contender]
        rest = standing.cost.mean_step_seconds - standing.cost.mean_optimizer_seconds
        for part, seconds, opacity in (
            ("gradient", rest, 0.35),
            ("optimizer", standing.cost.mean_optimizer_seconds, 1.0),
        ):
            figure.add_trace(
                go.Bar(
                    name=words.label(standing.contender), meta=look.slot, orientation="h", width=0.36,
                    x=[rounded(factor * seconds)], y=[-row], opacity=opacity, showlegend=False,
                    marker={"color": look.colour}, hovertemplate=f"{part}: %{{x:.3~g}} {unit}",
                )
            )  # fmt: skip
        share = words.percent(standing.cost.mean_optimizer_seconds / standing.cost.mean_step_seconds)
        taken = words.duration(standing.cost.mean_step_seconds)
        text = f"{words.label(standing.contender)} · {taken}, optimizer {share}"
        labels.append(above_row(row, text, yshift=10))
    figure.update_layout(
        annotations=labels,
        barmode="stack",
        margin={"l": 12, "t": 12},
        xaxis={"title": {"text": f"{unit} a step"}, "rangemode": "tozero"},
        yaxis={"visible": False, "range": [-len(timed) + 0.5, 0.95], "fixedrange": True},
    )
    return Picture(
        identifier,
        "breakdown",
        "Where the time of a step goes",
        "Pale: one gradient (data, forward and backward pass). Solid: what the optimizer adds, a second pass included.",
        _breakdown_alt(timed),
        figure,
        [],
        "" if timed else "No step was timed.",
    )


def _breakdown_alt(timed: Sequence[Standing]) -> str:
    parts = [
        f"{words.single_line(standing.contender)}: {words.duration(standing.cost.mean_step_seconds)}, of these "
        f"{words.duration(standing.cost.mean_optimizer_seconds)} in the optimizer"
        for standing in timed
    ]
    return described("Bar chart of the time of a step", parts)
