"""``python -m benchmarks.picture``: draws what ``benchmarks.race`` found, as ``docs/images/benchmarks.png``.

Needs plotly, and Chromium through Playwright, as the tests of the report do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright

from benchmarks.race import OUT

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "benchmarks.png"
WIDTH, HEIGHT = 1100, 520
COLOURS = {
    "piste cpp": "#d62728",
    "torch fused": "#1f77b4",
    "torch foreach": "#6baed6",
    "torch loop": "#c6dbef",
    "pytorch_optimizer": "#74c476",
    "torch-optimi": "#31a354",
    "timm": "#a1d99b",
    "ranger-adabelief": "#006d2c",
}


def figure(results: dict[str, Any], name: str) -> go.Figure:
    """Bars of each contender's time per algorithm, as multiples of what the memory needs."""
    rows = [row for row in results["lists"][name] if row["speed"]]
    drawn = go.Figure()
    for peer, colour in COLOURS.items():
        found = [(row, row["speed"].get(peer, {}).get("median")) for row in rows]
        heights = [
            row["floor"]["median"] * (1 if peer == "piste cpp" else speed)
            for row, speed in found
            if speed is not None or peer == "piste cpp"
        ]
        labels = [row["algorithm"] for row, speed in found if speed is not None or peer == "piste cpp"]
        text = [f"{height:.1f}" for height in heights]
        drawn.add_bar(name=peer, x=labels, y=heights, marker_color=colour, text=text, textposition="outside")
    drawn.add_hline(y=1, line_dash="dash", annotation_text="the memory's pace", annotation_position="top right")
    drawn.update_layout(
        title=f"Time of a step on {name}, as a multiple of what its bytes need (lower is faster)",
        template="plotly_white",
        barmode="group",
        width=WIDTH,
        height=HEIGHT,
        legend={"orientation": "h", "y": -0.12},
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
    )
    drawn.update_yaxes(title="times the memory's pace")
    return drawn


def photograph(drawn: go.Figure, picture: Path) -> None:
    """Write a figure as PNG, in its own size, as a browser draws it."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "figure.html"
        page_file.write_text(drawn.to_html(include_plotlyjs=True), encoding="utf-8")
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": drawn.layout.width + 20, "height": drawn.layout.height + 20})
        page.goto(page_file.as_uri())
        page.wait_for_selector(".plot-container")
        page.screenshot(path=str(picture))
        browser.close()


def main(arguments: list[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("--results", type=Path, default=OUT / "race.json", help="what benchmarks.race wrote")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    asked = parser.parse_args(arguments)
    results = json.loads(asked.results.read_text())
    name = next(iter(results["lists"]))
    photograph(figure(results, name), asked.out)


if __name__ == "__main__":
    main()
