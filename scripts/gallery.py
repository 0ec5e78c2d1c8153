"""``python -m scripts.gallery``: draws the way of every optimizer down three hills, for ``docs/gallery``.

An illustration and no evidence: two numbers without noise say nothing about a network. Needs plotly, and Chromium
through Playwright.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from rich.console import Console
from rich.progress import track

import piste
from benchmarks.picture import photograph
from piste.registry import OPTIMIZERS

PAGE = Path(__file__).parent.parent / "docs" / "gallery"
COLUMNS = 6
CELL = 215  # pixels
RATES = [float(f"{10**x:.2g}") for x in np.linspace(-4, 1, 21)]


@dataclass(frozen=True)
class Hill:
    """A function of two numbers, where a run starts, where it should end, and what is drawn of it."""

    name: str
    height: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    start: tuple[float, float]
    lowest: tuple[float, float]
    window: tuple[float, float, float, float]  # left, right, bottom, top
    steps: int


def rosenbrock(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rastrigin(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 20 + x**2 - 10 * torch.cos(2 * math.pi * x) + y**2 - 10 * torch.cos(2 * math.pi * y)


def rotated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A valley a hundred times as long as it is wide, turned by 30 degrees: no single rate per weight fits it."""
    along, across = math.cos(math.pi / 6) * x + math.sin(math.pi / 6) * y, math.cos(math.pi / 6) * y - x / 2
    return 0.01 * along**2 + across**2


HILLS = (
    Hill("Rosenbrock's valley", rosenbrock, (-1.5, 2.0), (1.0, 1.0), (-2.0, 2.0, -1.0, 3.0), 400),
    Hill("Rastrigin's egg box", rastrigin, (-2.0, 3.2), (0.0, 0.0), (-4.0, 4.0, -4.0, 4.0), 400),
    Hill("a rotated, ill-conditioned bowl", rotated, (-3.5, 1.0), (0.0, 0.0), (-4.0, 4.0, -4.0, 4.0), 200),
)


#: they are shown a matrix of 2 x 1, of which Muon has to be told, for a vector is none of their business
BY_MATRIX = {"Muon": {"rule": "muon"}, "NorMuon": {"rule": "muon"}, "PSGDKron": {}, "Shampoo": {}, "SOAP": {}}


def walk(name: str, lr: float, hill: Hill) -> np.ndarray:
    """The points that one run visits, the start among them; it ends early where it leaves all bounds."""
    start = torch.tensor(hill.start, dtype=torch.float64)
    weight = torch.nn.Parameter(start[:, None] if name in BY_MATRIX else start)
    own = {"total_steps": hill.steps} if "total_steps" in piste.presets[name.lower()].arguments else {}
    own |= BY_MATRIX.get(name, {})
    optimizer = piste.create(name, [weight], lr=lr, weight_decay=0.0, engine="reference", **own)
    points = [start.numpy().copy()]
    for _ in range(hill.steps):
        optimizer.zero_grad()
        hill.height(*weight.flatten()).backward()
        optimizer.step()
        points.append(weight.detach().flatten().numpy().copy())
        if not np.abs(points[-1]).max() < 1e3:
            break
    return np.array(points)


def best_walk(name: str, hill: Hill) -> tuple[float, np.ndarray]:
    """The run that ends lowest, over all learning rates; one that stays on the map, if there is any."""
    left, right, bottom, top = hill.window

    def end(points: np.ndarray) -> tuple[bool, float]:
        height = float(hill.height(*torch.tensor(points[-1])))
        stays = bool((points >= (left, bottom)).all() and (points <= (right, top)).all())
        return not stays, height if math.isfinite(height) and len(points) > hill.steps else math.inf

    return min(((lr, walk(name, lr, hill)) for lr in RATES), key=lambda found: end(found[1]))


def figure(hill: Hill, walks: dict[str, tuple[float, np.ndarray]]) -> go.Figure:
    """One small map for each optimizer."""
    rows = math.ceil(len(walks) / COLUMNS)
    titles = [f"{name}, lr {lr:g}" for name, (lr, _) in walks.items()]
    gap = 0.25 / rows
    drawn = make_subplots(rows, COLUMNS, subplot_titles=titles, horizontal_spacing=0.012, vertical_spacing=gap)
    left, right, bottom, top = hill.window
    xs, ys = np.linspace(left, right, 70), np.linspace(bottom, top, 70)
    heights = np.log1p(hill.height(torch.tensor(xs)[None, :], torch.tensor(ys)[:, None]).numpy())
    for i, (_, points) in enumerate(walks.values()):
        where = {"row": i // COLUMNS + 1, "col": i % COLUMNS + 1}
        drawn.add_contour(x=xs, y=ys, z=heights, colorscale="Blues", showscale=False, line_width=0, **where)
        drawn.add_scatter(
            x=points[:, 0], y=points[:, 1], mode="lines", line={"color": "#d62728", "width": 1.2}, **where
        )
        ends = np.array([points[0], hill.lowest, points[-1]])
        looks = {"symbol": ["circle-open", "star", "circle"], "size": 7, "color": ["#333333", "#ff9900", "#d62728"]}
        drawn.add_scatter(x=ends[:, 0], y=ends[:, 1], mode="markers", marker=looks, **where)
    drawn.update_xaxes(range=[left, right], showticklabels=False)
    drawn.update_yaxes(range=[bottom, top], showticklabels=False)
    drawn.update_annotations(font_size=11)
    drawn.update_layout(
        title=f"{hill.name}: {hill.steps} steps, each at its best learning rate. An illustration and no evidence.",
        template="plotly_white",
        showlegend=False,
        width=COLUMNS * CELL,
        height=rows * CELL + 80,
        margin={"l": 15, "r": 15, "t": 80, "b": 15},
    )
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Draw the hills."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gallery", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="the folder for the pictures")
    parser.add_argument("--hill", choices=[h.height.__name__ for h in HILLS], action="append", help="(default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: as many as cores)")
    asked = parser.parse_args(arguments)
    names = sorted((info.name for info in OPTIMIZERS), key=str.lower)
    console = Console()
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(asked.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for hill in (h for h in HILLS if h.height.__name__ in (asked.hill or [h.height.__name__])):
            found = pool.imap(partial(best_walk, hill=hill), names)
            walks = dict(zip(names, track(found, hill.name, len(names), console=console), strict=True))
            picture = asked.out / f"{hill.height.__name__}.png"
            photograph(figure(hill, walks), picture)
            console.print(f"wrote {picture}")


if __name__ == "__main__":
    main()
