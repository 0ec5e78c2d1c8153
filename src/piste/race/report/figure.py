"""What all pictures of the report have in common: figures as plain data, with their words and switches.

Figures are built with plotly and handed to the page as plain data. Colours are CSS variables: the page puts in the
values of its light or dark theme. Every text that comes from a user goes through ``words.label``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
BASIN_HEIGHT: Final = 400
DIGITS: Final = 5  # of the numbers in pictures; the raw data keep all

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
        content: dict[str, Any] = drawable(
            {
                "id": self.id,
                "title": self.title,
                "data": figure["data"],
                "layout": figure["layout"],
                "switches": switches,
            }
        )
        return content


def described(what: str, parts: Sequence[str]) -> str:
    """What a chart shows, for those who cannot see it: what it is, then each of its lines or points."""
    return f"{what}. {'; '.join(parts)}." if parts else "Empty chart."


def blank(height: int) -> go.Figure:
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


def titled(text: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": text}, "rangemode": "tozero"}}


def above_row(row: int, text: str, **more: Any) -> dict[str, Any]:
    """An annotation at the left end of a row of bars, above it; rows are numbered downwards."""
    place = {"xref": "paper", "x": 0, "xanchor": "left", "y": -row, "yanchor": "bottom"}
    return {"text": text, **place, "showarrow": False, "font": {"size": 12}, **more}


def time_unit(longest: float) -> tuple[float, str]:
    if longest > 7200:
        return 1 / 3600, "hours"
    return (1 / 60, "minutes") if longest > 180 else (1.0, "seconds")


def rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def drawable(value: Any) -> Any:
    """Plain JSON data, with None for numbers that no axis can show."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: drawable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [drawable(item) for item in value]
    return value
