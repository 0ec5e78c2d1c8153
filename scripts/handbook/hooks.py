"""What mkdocs calls while it builds the site: the generated pages join those that are files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.handbook import pages

_OPTIMIZERS, _MORE = "Optimizers", "More"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation: pages of optimizers, and at the end whatever page nobody has placed."""
    logging.getLogger("piste").setLevel(logging.ERROR)  # presets on bare weights say what they cannot tell
    docs = Path(config.docs_dir)
    for section in config.nav or []:
        if _OPTIMIZERS in section:
            section[_OPTIMIZERS] = pages.navigation()
    placed = set(_paths(config.nav))
    loose = sorted(
        str(path.relative_to(docs)) for path in docs.rglob("*.md") if str(path.relative_to(docs)) not in placed
    )
    if loose and config.nav is not None:
        config.nav.append({_MORE: loose})
    return config


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
    """The README is the home of the site."""
    depth = page.file.src_uri.count("/")
    outside = re.escape("../" * (depth + 1) + "README.md")
    return re.sub(rf"\]\({outside}\)", f"]({'../' * depth}index.md)", markdown)
