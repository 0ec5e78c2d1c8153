"""Docstrings of piste as Markdown: its sections apart, its formulas as MathML, which browsers set without a script."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latex2mathml.converter import convert

__all__ = ["Docstring", "inline", "parse"]

_SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Example|Examples):$")
_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")
_BETWEEN_FORMULAS = re.compile(r",\s*\\q?quad\b|\\\\(?=\s)")
_OPENING, _CLOSING = re.compile(r"\\[bB]igg?l?(?=[\[(])"), re.compile(r"\\[bB]igg?r?(?=[\])])")
_PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")

Link = Callable[[str], str]


@dataclass
class Docstring:
    """A docstring in pieces, all of them Markdown but the example."""

    lead: str = ""
    body: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)
    example: str = ""
    source: str = ""


def parse(thing: Any, link: Link) -> Docstring:
    """The docstring of a class or function; ``link`` makes Markdown of a name that it refers to."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading[1]
            sections[current] = []
        elif line and not line.startswith(" ") and current:
            current = ""
            sections[""].append("")
            sections[""].append(line)
        else:
            sections[current].append(line)
    paragraphs = _paragraphs(sections[""])
    sources = [text for text in paragraphs if re.match(r"Sources?:", text)]
    rest = [text for text in paragraphs if text not in sources]
    body = [_formula(text) if text.startswith(".. math::") else inline(text, link) for text in rest]
    return Docstring(
        lead=body[0] if body else "",
        body="\n\n".join(body[1:]),
        arguments={name: inline(text, link) for name, text in _entries(sections.get("Args", [])).items()},
        raises={name: inline(text, link) for name, text in _entries(sections.get("Raises", [])).items()},
        example=_example(sections.get("Example", sections.get("Examples", []))),
        source=" ".join(inline(re.sub(r"^Sources?:\s*", "", text), link) for text in sources),
    )


def _paragraphs(lines: list[str]) -> list[str]:
    """Blocks between empty lines; a formula ends where the indentation does."""
    found: list[list[str]] = [[]]
    for line in lines:
        in_formula = bool(found[-1]) and found[-1][0].startswith(".. math::")
        if not line.strip() or (in_formula and not line.startswith(" ")) or line.startswith(".. math::"):
            found.append([])
        if line.strip():
            found[-1].append(line)
    return [text for text in map("\n".join, found) if text]


def _entries(lines: list[str]) -> dict[str, str]:
    """``name: text`` with indented continuations; several names before one colon stay together."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n".join(["", *lines])).splitlines():
        start = re.match(r"(\*{0,2}\w[\w, ]*):\s*(.*)", line)
        if start and not line.startswith(" "):
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _example(lines: list[str]) -> str:
    """The example without its prompts; what it prints becomes a comment."""
    shown = []
    for line in inspect.cleandoc("\n".join(["", *lines])).splitlines():
        code = re.match(r"(?:>>>|\.\.\.)(?: (.*)|$)", line)
        shown.append((code[1] or "") if code else f"# {line}" if line.strip() else "")
    return "\n".join(shown).strip()


def inline(text: str, link: Link) -> str:
    """Roles, literals, inline formulas and papers of a paragraph."""
    # in a span, as Markdown takes a <math> that begins a line for a block
    text = _MATH.sub(lambda match: f"<span>{convert(_fenced(match[1]))}</span>", text)
    text = _ROLE.sub(lambda match: link(match[1]), text)
    text = _LITERAL.sub(r"`\1`", text)
    return papers(text)


def papers(text: str) -> str:
    """arXiv numbers as links."""
    return _PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _formula(text: str) -> str:
    """A displayed formula, one line for each equation of it."""
    latex = _fenced(" ".join(text.removeprefix(".. math::").split()))
    lines = [convert(part, display="block") for part in _apart(latex)]
    return '<div class="formula">\n' + "\n".join(lines) + "\n</div>"


def _fenced(latex: str) -> str:
    """The same with fences that are as high as what they enclose: browsers set those of a given size unevenly."""
    latex = latex.replace(r"\lVert", r"\left\|").replace(r"\rVert", r"\right\|").replace(r"\_", "_")
    return _CLOSING.sub(r"\\right", _OPENING.sub(r"\\left", latex))


def _apart(latex: str) -> list[str]:
    """The equations between which there is a comma and a wide space, outside of all braces and environments."""
    found, start = [], 0
    for cut in _BETWEEN_FORMULAS.finditer(latex):
        before = latex[: cut.start()]
        opened = len(re.findall(r"\{|\\begin\b|\\left\b", before))
        closed = len(re.findall(r"\}|\\end\b|\\right\b", before))
        if opened == closed:
            found.append(latex[start : cut.start()])
            start = cut.end()
    parts = [part.strip() for part in [*found, latex[start:]]]
    return [part if r"\begin" in part else part.replace("&", "") for part in parts if part]


def links_of(pages: Mapping[str, str]) -> Link:
    """A linker to pages by the last part of a name; what has no page is shown as code."""

    def link(name: str) -> str:
        short = name.removeprefix("piste.").split(".")[0]
        shown = name.removeprefix("piste.").removeprefix("optimizer.")
        return f"[`{shown}`]({pages[short]})" if short in pages else f"`{name}`"

    return link
