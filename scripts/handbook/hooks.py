"""What mkdocs calls while it builds the site: the generated pages join those that are files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.handbook import pages

_OPTIMIZERS, _MORE = "Optimizers", "More"
#: pages that have their place in the navigation and may not be written yet
_AWAITED = ("race.md", "report.md", "tasks.md")
#: pages beside ``docs``, under their names on the site
_OF_THE_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation: pages of optimizers, and at the end whatever page nobody has placed."""
    logging.getLogger("piste").setLevel(logging.ERROR)  # presets on bare weights say what they cannot tell
    docs = Path(config.docs_dir)
    for section in config.nav or []:
        if _OPTIMIZERS in section:
            section[_OPTIMIZERS] = pages.navigation()
    config.nav = _without(config.nav, {page for page in _AWAITED if not (docs / page).exists()})
    placed = set(_paths(config.nav))
    loose = sorted(
        str(path.relative_to(docs)) for path in docs.rglob("*.md") if str(path.relative_to(docs)) not in placed
    )
    if loose and config.nav is not None:
        config.nav.append({_MORE: loose})
    return config


def _without(nav: Any, absent: set[str]) -> Any:
    """The navigation without some pages, and without sections that are then empty."""
    if isinstance(nav, dict):
        return {name: kept for name, part in nav.items() if (kept := _without(part, absent))}
    if isinstance(nav, list):
        return [kept for part in nav if (kept := _without(part, absent))]
    return None if nav in absent else nav


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [path for part in parts for path in _paths(part)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in pages.generated():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to pages beside ``docs`` lead to where the site has them."""
    depth = page.file.src_uri.count("/")
    for outside, inside in _OF_THE_ROOT.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{outside}", f"]({'../' * depth}{inside}")
    return markdown
