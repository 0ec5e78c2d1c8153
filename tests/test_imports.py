"""The one-way rules of docs/architecture.md, read off the syntax trees: an import counts wherever it stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
LANGUAGE = {"symbol", "plan", "ops", "bucket"}

# A layer is a folder or a file of src/piste. Each may import itself and the layers named here, nothing else of piste;
# a new file has to find its place in this table. `race`, `cli` and
# `integrations` have a rule of their own below.
MAY_IMPORT: dict[str, set[str]] = {
    "symbol": set(),
    "variants": {"symbol"},
    "plan": {"symbol", "variants"},
    "ops": {"symbol"},
    "codecs": set(),
    "coding": {"codecs"},
    "costs": set(),
    "products": set(),
    "householder": set(),
    "matrices": {"householder", "products"},
    "blocks": set(),
    "kronecker": {"blocks", "costs", "matrices", "products"},
    "renewals": {"costs", "kronecker", "matrices"},
    "orthogonal": {"costs", "matrices", "products"},
    "whitening": {"costs", "matrices", "products"},
    "sharding": set(),
    "exchange": {"sharding"},
    "shares": {"exchange"},
    "storage": {"symbol", "codecs", "coding", "sharding"},
    "selects": {"symbol", "variants"},
    "slots": {"symbol", "selects", "variants", "storage"},
    "bucket": {"symbol", "plan", "codecs", "exchange", "sharding", "storage"},
    "device_numbers": {"bucket", "ops", "symbol"},
    "capture": {"sharding", "symbol", "variants"},
    "rules": {"kronecker", "orthogonal", "renewals", "whitening", "ops", "parts", "slots", "storage", "symbol"},
    "parts": {"ops", "slots", "storage"},
    "engines": LANGUAGE | {"codecs", "coding", "device_numbers", "storage"},
    "roster": {
        *("symbol", "variants", "plan", "bucket", "codecs", "device_numbers", "sharding", "shares", "storage"),
    },
    "distribution": {"costs", "exchange", "roster", "sharding", "shares", "storage", "symbol", "variants"},
    "opaques": {"symbol", "bucket", "costs", "exchange", "sharding"},
    "execution": LANGUAGE | {"device_numbers", "engines", "opaques", "roster", "sharding", "storage"},
    "checks": {"orthogonal", "storage"},
    "checkpoint": {"checks", "codecs", "coding", "sharding", "storage", "symbol"},
    "options": {"execution"},
    "group_values": set(),
    "last_step": {"sharding"},
    "optimizer": {
        *("capture", "device_numbers", "group_values", "last_step", "options"),
        *("execution", "distribution", "roster", "checks", "checkpoint", "sharding", "slots", "storage", "symbol"),
        "variants",
    },
    "joint": {"execution", "optimizer", "roster"},
    "batchnorm": set(),
    "stable_embedding": set(),
    "wrappers": {
        *("optimizer", "execution", "roster", "checks", "checkpoint", "slots", "variants", "parts"),
        *("batchnorm", "capture", "codecs", "device_numbers", "sharding", "storage"),
    },
    "optimizers": {
        *("optimizer", "rules", "parts", "slots", "storage", "checks", "groups", "kronecker", "routing", "whitening"),
        "options",
    },
    "schedules": {"checks"},
    "groups": {"checks"},
    "routing": {"groups"},
    "wrappings": {"wrappers"},
    "lr_priors": set(),
    "preset": {"checks", "lr_priors", "optimizer", "optimizers", "options", "schedules", "wrappings"},
    "presets": {"lr_priors", "optimizers", "preset"},
    "pedigree": {"optimizer", "optimizers"},
    "registry": {"pedigree", "preset", "presets", "wrappings"},
    "factory": {*("checks", "groups", "optimizers", "preset", "presets", "registry", "schedules", "wrappings")},
    "scripting": {"factory"},
    "memory": {
        "bucket",
        "execution",
        "factory",
        "matrices",
        "optimizer",
        "optimizers",
        "plan",
        "registry",
        "storage",
        "symbol",
        "wrappers",
        "wrappings",
    },
    "advise": {
        *("checks", "groups", "memory", "optimizer", "optimizers", "options", "preset", "presets", "routing"),
        *("schedules", "wrappers"),
    },
}
LIBRARY_ENTRANCE = "__init__"
RACE = {"race", "cli", "__main__", "integrations"}  # they stand on the library as any user does


def layer(module: str) -> str:
    """The layer of `piste.engines.foreach` is `engines`, that of `piste` itself `__init__`."""
    return module.split(".")[1] if "." in module else LIBRARY_ENTRANCE


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Every (module, name, line) of piste that a file imports, anywhere in it; name is "" for `import module`."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for module, name in found:
            if module == "piste" or module.startswith("piste."):
                yield module, name, node.lineno


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """The same as module names: `from piste import ops` counts as piste.ops, `from piste import Adam` as piste."""
    for module, name, line in imports(path):
        whole = f"{module}.{name}"
        yield (whole if name and is_module(whole) else module), line


def files(*, race: bool) -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if (layer(module_of(path)) in RACE) == race)


def where(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_every_library_file_has_a_layer() -> None:
    unplaced = {layer(module_of(path)) for path in files(race=False)} - MAY_IMPORT.keys() - {LIBRARY_ENTRANCE}
    assert not unplaced, f"put {sorted(unplaced)} in MAY_IMPORT"


def test_the_table_has_no_cycle() -> None:
    settled: set[str] = set()
    while True:
        ready = {name for name, below in MAY_IMPORT.items() if below <= settled}
        if ready == settled:
            break
        settled = ready
    assert settled == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", files(race=False), ids=where)
def test_library_imports_run_one_way(path: Path) -> None:
    own = layer(module_of(path))
    allowed = MAY_IMPORT.keys() if own == LIBRARY_ENTRANCE else MAY_IMPORT.get(own, set()) | {own}
    wrong = [f"line {line}: {module}" for module, line in imported_modules(path) if layer(module) not in allowed]
    assert not wrong, f"{where(path)} may import {sorted(allowed)} of piste, and imports {wrong}"


def public_names() -> set[str]:
    """What src/piste/__init__.py re-exports (`import X as X`), read from its text."""
    tree = ast.parse((SOURCE / "piste" / "__init__.py").read_text(encoding="utf-8"))
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.name for alias in aliases if alias.asname == alias.name} | {"__version__"}


def test_public_names_are_sorted_out() -> None:
    assert {"Adam", "Lookahead", "Ranger"} <= public_names()


@pytest.mark.parametrize("path", files(race=True), ids=where)
def test_race_uses_public_names_only(path: Path) -> None:
    public = public_names()
    wrong = []
    for module, name, line in imports(path):
        if layer(module) in RACE:
            continue
        if module != "piste" or (name and name not in public and name not in RACE):
            wrong.append(f"line {line}: {name or module} from {module}")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        reads_piste = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "piste"
        if reads_piste and node.attr not in public | RACE | {"__file__"}:
            wrong.append(f"line {node.lineno}: piste.{node.attr}")
    assert not wrong, f"{where(path)} reaches past the public names of piste: {wrong}"


def fresh(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


def test_importing_piste_takes_torch_alone() -> None:
    """Whatever torch itself imports is torch's business (numpy, where it is installed); piste adds only itself."""
    script = """
        import sys, torch
        before = set(sys.modules)
        import piste
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    added = set(fresh("\n".join(line.strip() for line in script.splitlines())).split())
    foreign = {name for name in added if name not in sys.stdlib_module_names} - {"piste", "torch"}
    assert not foreign
    forbidden = {"numpy", "scipy", "rich", "click", "sklearn", "plotly", "jinja2"}
    assert not added & forbidden


def test_importing_piste_loads_no_race() -> None:
    loaded = fresh("import piste, sys; print(*[name for name in sys.modules if name.startswith('piste.')])").split()
    assert not [name for name in loaded if layer(name) in RACE]


def test_importing_piste_is_silent() -> None:
    assert fresh("import piste") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import piste.engines.foreach", [("piste.engines.foreach", 1)]),
        ("from piste import ops", [("piste.ops", 1)]),
        ("from .. import ops", [("piste.ops", 1)]),
        ("from ..engines import reference as r", [("piste.engines", 1)]),
        ("def f():\n    from piste.race import cli", [("piste.race", 2)]),
        ("import torch\nfrom pistemology import x", []),
    ],
)
def test_the_reader_sees_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: list[tuple[str, int]]
) -> None:
    """The checks above are worth what this reader sees."""
    house = tmp_path / "piste"
    (house / "engines").mkdir(parents=True)
    (house / "race").mkdir()
    (house / "ops.py").touch()
    file = house / "engines" / "here.py"
    file.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    assert list(imported_modules(file)) == expected
