"""The report as Markdown and as LaTeX, for papers and pull requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import jinja2

from piste.race.words import single_line

from .page import Page

_LATEX: Final = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{INFINITY}": r"$\infty$",
    "\N{MICRO SIGN}": r"\textmu{}",
}


def markdown(text: str) -> str:
    """``text`` in one line of which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", single_line(text))


def latex(text: str) -> str:
    """``text`` in one line of which no character means anything to LaTeX."""
    return "".join(_LATEX.get(character, character) for character in single_line(text))


def document(page: Page, template: str) -> str:
    """A page as text.

    Args:
        page: what to show.
        template: ``"report.md.jinja"`` or ``"report.tex.jinja"``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # not HTML: each format has a filter of its own
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(md=markdown, tex=latex)
    return environment.get_template(template).render(page=page).strip() + "\n"
