"""What the documentation says is run: every docstring's example, and every Python block of README and docs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import piste

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|(?:src|href)=\"(?P<source>[^\"]+)\"")
MAKE = re.compile(r"(?:^|`|\s)make (?:[A-Z_]+=\S+ )*(?P<target>[a-z][a-z-]*)")

MODULES = sorted(
    {"piste", *(found.name for found in pkgutil.walk_packages(piste.__path__, "piste."))} - {"piste.__main__"}
)
PUBLIC = sorted(name for name in vars(piste) if not name.startswith("_") and not inspect.ismodule(getattr(piste, name)))


@pytest.fixture(autouse=True)
def _a_readers_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples run in an empty folder, and draw the same random numbers every time."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    """With empty globals: an example has to import what it uses, as the reader who copies it must."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    heard: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), globs={}):
        runner.run(example, out=heard.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(heard)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_by_example(name: str) -> None:
    value = getattr(piste, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert ">>>" in (inspect.getdoc(value) or ""), f"piste.{name} has no example in its docstring"


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line, code) of each fenced block of a page in one of the languages."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if match["language"] in languages]
    return [(text.count("\n", 0, match.start("code")) + 1, match["code"]) for match in found]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")  # advice of Lightning's
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated")  # Lightning 2.6 with torch 2.13
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # likewise advice
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run(page: Path) -> None:
    """The blocks of a page are one program, run from top to bottom."""
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [match["target"] or match["source"] for match in LINK.finditer(text)]
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shell = "\n".join(code for _, code in blocks(page, "sh", "bash", "console"))
    inline = "\n".join(re.findall(r"`make [^`]+`", page.read_text(encoding="utf-8")))
    named = {match["target"] for match in MAKE.finditer(f"{shell}\n{inline}")}
    assert named <= targets


def test_the_readers_find_what_they_look_for(tmp_path: Path) -> None:
    """A reader that finds nothing would make the tests above pass on anything."""
    page = tmp_path / "page.md"
    page.write_text('text\n```python\nx = 1\n```\n[a](b.md#c) <img src="d.png">\n```sh\nmake race ARGS=1\n```\n')
    assert blocks(page, "python") == [(3, "x = 1\n")]
    assert [match["target"] or match["source"] for match in LINK.finditer(page.read_text())] == ["b.md#c", "d.png"]
    assert MAKE.search("PYTHON=python3.12 make race")["target"] == "race"  # type: ignore[index]
    assert len(MODULES) > 20
    assert {"AdamW", "Lookahead"} <= set(PUBLIC)
