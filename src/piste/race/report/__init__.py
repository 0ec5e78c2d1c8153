"""The report of a race: one HTML file that holds everything it shows and needs no network.

``make_page`` turns a study into words, ``plots`` into pictures, the template into HTML; ``write`` puts the file down.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import html
import json
import os
import re
from pathlib import Path
from typing import Any, Final

import jinja2
import plotly.offline  # type: ignore[import-untyped]
from markupsafe import Markup

from piste.race.canonical import plain
from piste.race.result import StudyResult

from .exports import COLUMNS, derived_tables
from .files import FORMATS, ExportError, export, pictures_of
from .page import Page, make_page
from .palette import style
from .sinks import SINKS, send

__all__ = ["FORMATS", "SINKS", "ExportError", "export", "policy", "render", "send", "update", "write"]

_HERE: Final = Path(__file__).parent


def write(result: StudyResult, path: str | os.PathLike[str]) -> Path:
    """Write the report of a race as one HTML file.

    The file opens from disk in any browser of the last years, light or dark, on a phone or on paper. It shows the
    answer first, then the evidence, and carries all raw data. It is about 5 MB, most of it the plotting library.

    Args:
        result: the study.
        path: where to put the file; missing folders are made. A file that is there is replaced in one move, so a
            reader never finds half a report.

    Returns:
        The path.

    Raises:
        ValueError: ``path`` is a folder.
        OSError: the file cannot be written there.

    When not to use: to go on computing with the results; read the records of the race for that.

    Example:
        >>> import pathlib, tempfile
        >>> from piste.race import report
        >>> from piste.race.result import StudyResult
        >>> study = StudyResult("nothing raced", "2026-01-01T00:00:00Z", [], [], [], {}, "piste race")
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> report.write(study, folder / "report.html").name
        'report.html'
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"path must name a file to write, not a folder: {str(target)!r}")
    text = render(result)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, text)
    return target


def render(result: StudyResult, live: str = "", version: int = 0) -> str:
    """The report as text.

    Args:
        result: the study.
        live: what is said at the top of a page that a race serves while it goes; empty for a file.
        version: of such a page.
    """
    content = make_page(result)
    return (
        _environment()
        .get_template("template.html.jinja")
        .render(
            page=content,
            data=_data(result, content),
            live=live,
            version=version,
            policy=policy(bool(live)),
            style=Markup(style()),
            scripts=[Markup(script) for script in _scripts(bool(live))],
        )
    )


def update(result: StudyResult) -> str:
    """What a served page needs to show another state of the same race, as JSON."""
    content = make_page(result)
    data = _data(result, content)
    body = _environment().get_template("body.html.jinja").render(page=content, data=data)
    return json.dumps({"title": content.title, "body": body, **data}, separators=(",", ":"), allow_nan=False)


@functools.cache
def policy(live: bool) -> str:
    """The content security policy of the page: no script but these may run in it, and it loads nothing.

    Args:
        live: whether it may ask the server that it comes from.
    """
    hashes = " ".join(map(_source_hash, _scripts(live)))
    asks = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {hashes}; {asks}style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(result: StudyResult, content: Page) -> dict[str, Any]:
    """All that the page's scripts read."""
    return {
        "figures": [plot.data() for plot in pictures_of(content)],
        "study": plain(result),
        "columns": COLUMNS,
        "tables": plain(derived_tables(result, content.analyses)),
    }


def _scripts(live: bool) -> list[str]:
    return [plotly.offline.get_plotlyjs(), _file("page.js"), *([_file("live.js")] if live else [])]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unescaped"] = html.unescape  # a text made for plotly, which wants entities
    environment.filters["capitalised"] = _capitalised
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _breakable(text: str) -> Markup:
    """``text`` with a place to break the line after each ``+``."""
    return Markup("<wbr>").join(re.split(r"(?<=\+)", text))


def _source_hash(script: str) -> str:
    """The script's hash as the content security policy names it: nothing else may run in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _replace(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # a name from the command line may hold bytes that are no text; they become "?"
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
