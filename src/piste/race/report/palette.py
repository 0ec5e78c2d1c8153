"""One look a contender, the same in every picture: colour, dash and marker, so that colour is never alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from piste.race.result import StudyResult

_STYLE: Final = Path(__file__).parent / "style.css"
# Chosen to stay apart under protanopia, deuteranopia and tritanopia, and to keep a contrast of 3:1 and more against
# the page (tests/test_report.py computes both). The first column is for the light page, the second for the dark one.
COLOURS: Final = (
    ("#0134ab", "#99afff"),
    ("#e26d01", "#fa9d58"),
    ("#007947", "#21a36c"),
    ("#913b73", "#e04bb4"),
    ("#635801", "#f8d11d"),
    ("#1a1b1d", "#ebebeb"),
    ("#1895ae", "#4ad3e8"),
    ("#652b1e", "#d897a4"),
)
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# No "x" among them: a cross always means a run that did not finish. The path draws the same shape round (0, 0)
# in the key beside the pictures.
MARKERS: Final = (
    ("circle", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
    ("square", "M-3.6-3.6h7.2v7.2h-7.2z"),
    ("diamond", "M0-5 5 0 0 5-5 0z"),
    ("triangle-up", "M0-4.6 4.6 3.6h-9.2z"),
    ("triangle-down", "M0 4.6 4.6-3.6h-9.2z"),
    ("pentagon", "M0-4.6 4.5-1.4 2.8 3.8h-5.6L-4.5-1.4z"),
    ("hourglass", "M-4-4h8l-8 8h8z"),
)
_STROKES: Final = {
    "solid": "none",
    "dash": "6 3",
    "dot": "1.5 3",
    "dashdot": "6 3 1.5 3",
    "longdash": "10 3",
    "longdashdot": "10 3 1.5 3",
}


def style() -> str:
    """The style sheet with the contenders' colours of both themes put in."""
    light, dark = ("\n".join(f"  --c{slot}: {pair[theme]};" for slot, pair in enumerate(COLOURS)) for theme in (0, 1))
    return _STYLE.read_text(encoding="utf-8").replace("@LIGHT@", light).replace("@DARK@", dark)


@cache
def light_colours() -> dict[str, str]:
    """The variables of the light page, for pictures that leave it."""
    light = style().partition("@media")[0]
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", light))


@dataclass(frozen=True)
class Look:
    """How one contender is drawn.

    Args:
        slot: number of the contender in the study; marks its traces in the pictures.
        colour: a CSS variable, which the page resolves for its light or dark theme.
        dash: plotly's name of the line style.
        marker: plotly's name of the symbol.
        stroke: the line style as SVG's ``stroke-dasharray``.
        shape: the symbol as an SVG path.
    """

    slot: int
    colour: str
    dash: str
    marker: str
    stroke: str
    shape: str


def looks(result: StudyResult) -> dict[str, Look]:
    """A look for every contender of the study.

    Given in the order in which they were raced, so that a look stays with a contender while standings change.
    """
    raced = (run.key.contender for run in result.records)
    ranked = (standing.contender for task in result.results for standing in task.standings)
    return {name: _look(slot) for slot, name in enumerate(_distinct((*raced, *ranked)))}


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _look(slot: int) -> Look:
    marker, shape = MARKERS[slot % len(MARKERS)]
    dash = DASHES[slot % len(DASHES)]
    return Look(slot, f"var(--c{slot % len(COLOURS)})", dash, marker, _STROKES[dash], shape)
