"""The report in every format it has, as files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]
import plotly.io as pio  # type: ignore[import-untyped]

from piste.race.result import StudyResult

from .documents import document
from .exports import as_csv, as_json, tables, write_parquet
from .figure import Picture
from .page import Page, make_page
from .palette import light_colours

_SVG_WIDTH: Final = 900
_KEY_HEIGHT: Final = 80


class ExportError(ValueError):
    """A format cannot be written here; the message says what is missing."""


def export(result: StudyResult, kind: str, folder: Path) -> list[Path]:
    """Write a race in one of ``FORMATS``.

    Args:
        result: the study.
        kind: ``"md"`` and ``"latex"`` give one document, ``"json"`` all numbers in one file, ``"csv"`` and
            ``"parquet"`` a file for each table, ``"svg"`` one for each picture.
        folder: where to put them; files that are there are replaced.

    Returns:
        What was written.

    Raises:
        ValueError: ``kind`` is none of these.
        ExportError: a package that this format needs is missing.
        OSError: a file cannot be written.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind={kind!r} is not legal; legal: {', '.join(FORMATS)}")
    return FORMATS[kind](result, make_page(result), folder)


def pictures_of(page: Page) -> list[Picture]:
    """All pictures that show something, those over all tasks first."""
    over_all = [page.across.profile] if page.across else []
    return [plot for plot in (*over_all, *(p for section in page.sections for p in section.pictures)) if not plot.empty]


def _one(path: Path, text: str) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return [path]


def _csv(result: StudyResult, page: Page, folder: Path) -> list[Path]:
    made = tables(result, page.analyses)
    return [path for name, table in made.items() for path in _one(folder / "csv" / f"{name}.csv", as_csv(table))]


def _parquet(result: StudyResult, page: Page, folder: Path) -> list[Path]:
    paths = []
    (folder / "parquet").mkdir(parents=True, exist_ok=True)
    for name, table in tables(result, page.analyses).items():
        path = folder / "parquet" / f"{name}.parquet"
        try:
            write_parquet(table, path)
        except ImportError as error:
            raise ExportError("Parquet needs pyarrow: pip install pyarrow") from error
        paths.append(path)
    return paths


def _svg(result: StudyResult, page: Page, folder: Path) -> list[Path]:
    (folder / "svg").mkdir(parents=True, exist_ok=True)
    drawn = {folder / "svg" / f"{picture.id}.svg": _drawn(picture) for picture in pictures_of(page)}
    try:
        # all at once: a browser is started for each call
        pio.write_images(
            list(drawn.values()),
            list(drawn),
            format="svg",
            width=_SVG_WIDTH,
            height=[figure.layout.height + _KEY_HEIGHT for figure in drawn.values()],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ExportError(
            "SVG needs kaleido and a Chrome or Chromium: pip install 'piste[svg]' "
            f"(without it, every picture of report.html has a link to save it); {str(error).splitlines()[0]}"
        ) from error
    return list(drawn)


def _drawn(picture: Picture) -> go.Figure:
    figure = go.Figure(_painted(picture.figure.to_plotly_json()))
    figure.update_layout(showlegend=True)
    return figure


def _painted(value: Any) -> Any:
    """The figure with the colours of the light page in the place of their names."""
    if isinstance(value, str):
        found = re.fullmatch(r"var\((--[\w-]+)\)", value)
        return light_colours()[found[1]] if found else value
    if isinstance(value, dict):
        return {name: _painted(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_painted(item) for item in value]
    return value


FORMATS: Final[dict[str, Callable[[StudyResult, Page, Path], list[Path]]]] = {
    "md": lambda result, page, folder: _one(folder / "report.md", document(page, "report.md.jinja")),
    "latex": lambda result, page, folder: _one(folder / "report.tex", document(page, "report.tex.jinja")),
    "csv": _csv,
    "json": lambda result, page, folder: _one(folder / "report.json", as_json(result, page.analyses)),
    "parquet": _parquet,
    "svg": _svg,
}
