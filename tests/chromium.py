"""A real browser for the tests that open a page.

Needs Debian's ``chromium`` (or another Chromium on the path). Without one such tests are skipped, but never in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

__all__ = ["browser_path", "chromium"]

# Without these the browser itself, not the page, may call home.
QUIET = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI must open pages in a browser")
    pytest.skip(f"{what} is missing: no page was opened in a browser")  # a developer's machine may have none


def browser_path() -> str:
    """Where the browser is; without one, the end of this test."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        _missing("Chromium (Debian: apt-get install chromium)")
    return path


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser object, for the length of the block."""
    path = browser_path()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright (pip install playwright)")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=QUIET, timeout=300_000)
        yield found
        found.close()
