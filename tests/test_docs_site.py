"""The documentation site: built as `make docs` builds it, complete, and read in a real browser."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium

import piste
from piste.advise import RULES
from piste.registry import OPTIMIZERS

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

from scripts.handbook.docstrings import links_of, parse

ROOT = Path(__file__).resolve().parent.parent
PHONE = {"width": 390, "height": 844}


# -- docstrings as pages ----------------------------------------------------------------------------------------------


class Sample:
    r"""One line.

    .. math::
        a = \Big(b + c\Big)^2, \qquad d = \begin{cases} 1, \quad x \\ 2 \end{cases}

    :math:`x^2` begins a line, with :class:`~piste.AdamW` and ``code``.

    **When to use**: here.

    Args:
        lr, mu: two numbers,
            on two lines.
        **options: others.

    Raises:
        ValueError: never.

    Example:
        >>> 1 + 1
        2

    Source: Somebody, arXiv 1412.6980.
    """


def test_a_docstring_is_taken_apart() -> None:
    doc = parse(Sample, links_of({"AdamW": "adamw.md"}))
    assert doc.lead == "One line."
    assert doc.body.count("<math") == 3  # two equations, and one in the text
    assert "\n\n<span><math" in doc.body
    assert "</span> begins a line, with [`AdamW`](adamw.md) and `code`." in doc.body
    assert "**When to use**: here." in doc.body
    assert doc.arguments == {"lr, mu": "two numbers, on two lines.", "**options": "others."}
    assert doc.raises == {"ValueError": "never."}
    assert doc.example == "1 + 1\n# 2"
    assert doc.source == "Somebody, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980)."


@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
def test_every_optimizer_has_what_a_page_needs(info: Any) -> None:
    doc = parse(info.optimizer, links_of({}))
    assert "<math" in doc.body
    words = " ".join(doc.body.split())
    assert "When to use" in words
    assert "When not" in words
    assert doc.example
    assert doc.source
    assert doc.arguments
    shown = re.sub(r"<math.*?</math>", "", f"{doc.lead} {doc.body}", flags=re.DOTALL)
    assert not re.search(r":\w+:`|``|\.\. math", shown)


# -- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """One test, as it is built once."""
    built(tmp_path)
    is_complete(tmp_path)
    loads_nothing_from_elsewhere(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reads_well(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()


def built(folder: Path) -> None:
    """Strictly: a link that leads nowhere, or a page that no menu has, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def is_complete(site: Path) -> None:
    """Every optimizer has its page, every preset its line, every rule of advice its place."""
    for info in OPTIMIZERS:
        assert (site / "optimizers" / f"{info.name.lower()}.html").exists()
    names = (site / "optimizers" / "index.html").read_text(encoding="utf-8")
    assert not [name for name in piste.list_optimizers() if f"<code>{name}</code>" not in names]
    choosing = (site / "choosing.html").read_text(encoding="utf-8")
    assert not [rule.name for rule in RULES if f'id="{rule.name}"' not in choosing]


def loads_nothing_from_elsewhere(site: Path) -> None:
    """No script, picture, style or font of anybody else's."""
    pattern = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]+\"")
    found = {match[0] for page in site.rglob("*.html") for match in pattern.finditer(page.read_text(encoding="utf-8"))}
    assert not {tag for tag in found if 'rel="canonical"' not in tag}
    styles = [text for path in site.rglob("*.css") for text in [path.read_text(encoding="utf-8")]]
    assert not [text for text in styles if re.search(r"url\(['\"]?(?:https?:)?//", text)]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def reads_well(address: str) -> None:
    """No complaint, no request to anybody else, no page that a phone has to push sideways; and the search finds."""
    with chromium() as browser:
        page = browser.new_context(viewport=PHONE, color_scheme="dark").new_page()
        page.set_default_timeout(300_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(address) else None)
        for path in ("index", "choosing", "optimizers/index", "optimizers/ranger21", "optimizers/sam", "extending"):
            page.goto(f"{address}/{path}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
        page.goto(f"{address}/choosing.html#norms-decayed")
        assert page.locator("#norms-decayed").is_visible()
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{address}/index.html")
        page.locator("input[name=query]").fill("AdaBelief")
        page.locator(".md-search-result__link").first.wait_for()
        assert complaints == []
