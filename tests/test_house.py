"""The house's own machinery: pins that are complete, environments that survive a kill, Makefile messages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints" / "dev.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_requirements() -> dict[str, str]:
    """Name to version of everything that piste[dev] and building it take here, transitive ones included."""
    waiting = [("piste", "dev"), ("hatchling", ""), ("editables", ""), ("pip", "")]
    seen: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonical(need.name), wanted) for wanted in ("", *sorted(need.extras))]
    del found["piste"]
    return found


def in_make_environment() -> bool:
    """`make test` runs in an environment made from the pins; another one may hold what it likes."""
    return (Path(sys.prefix) / "made-by-piste").exists()


@pytest.mark.skipif(not in_make_environment(), reason="only `make`'s own environment is made from the pins")
def test_every_installed_requirement_is_pinned() -> None:
    pins = {canonical(pin.name): pin.specifier for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    loose = {
        name: version
        for name, version in installed_requirements().items()
        if name not in pins or not pins[name].contains(Version(version).public, prereleases=True)
    }
    assert not loose, f"constraints/dev.txt does not pin these as installed: {loose}"


def test_pins_are_exact_and_cover_every_python() -> None:
    for pin in PINS:
        assert [one.operator for one in pin.specifier] == ["=="], str(pin)
    by_name: dict[str, list[Requirement]] = {}
    for pin in PINS:
        by_name.setdefault(canonical(pin.name), []).append(pin)
    for python in ("3.10", "3.11", "3.12", "3.13"):
        for name, pins in by_name.items():
            valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
            assert len(valid) == 1, f"{name} on Python {python}: {[str(pin) for pin in valid]}"


def test_the_lowest_torch_is_told_once() -> None:
    """pyproject.toml and scripts/environment.py have to agree on the oldest torch."""
    needed = next(Requirement(text) for text in importlib.metadata.requires("piste") or [] if text.startswith("torch"))
    oldest = ".".join(map(str, load_script().OLDEST_TORCH))
    assert str(needed.specifier) == f">={oldest}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_can_be_imported(name: str) -> None:
    """Most take too long for tests to run; what they ask of the library when they are read, it has to have."""
    importlib.import_module(f"scripts.{name}")


# -- scripts/environment.py -----------------------------------------------------------------------------------------


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("piste_environment", ROOT / "scripts" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclass-free classes still look their module up
    spec.loader.exec_module(script)
    return script


script = load_script()


class Fake(script.Environment):  # type: ignore[misc, name-defined]
    """Makes no environment and installs nothing; records what would be done and can break off at any step."""

    def __init__(self, home: Path, fails_at: str = "") -> None:
        super().__init__(home, "race", "")
        self.fails_at = fails_at
        self.done: list[str] = []

    def step(self, name: str) -> None:
        self.done.append(name)
        (self.home / name).touch()
        if name == self.fails_at:
            raise KeyboardInterrupt

    def sound(self) -> bool:
        return (self.home / "create").exists() and bool(self.stamp())

    def create(self, *, see_system: bool) -> None:
        self.step("create around" if see_system else "create")

    def install(self) -> None:
        self.step("install")

    def install_around(self, torch: object) -> None:
        self.step("install around")
        raise script.SetupError("this torch is no good")

    def check(self) -> None:
        self.step("check")


def make(environment: Fake) -> list[str]:
    script.make(environment, reuse_torch=False, exact_python=False)
    return environment.done


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    assert make(Fake(tmp_path / "env")) == ["create", "install", "check"]
    assert make(Fake(tmp_path / "env")) == []


@pytest.mark.parametrize("step", ["create", "install", "check"])
def test_an_interrupted_environment_is_made_again(tmp_path: Path, step: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(Fake(tmp_path / "env", fails_at=step))
    (tmp_path / "env" / "half").mkdir()
    assert make(Fake(tmp_path / "env")) == ["create", "install", "check"]
    assert not (tmp_path / "env" / "half").exists()
    assert make(Fake(tmp_path / "env")) == []


def test_new_pins_update_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Fake(tmp_path / "env"))
    monkeypatch.setattr(Fake, "wanted_stamp", lambda self: "newer")
    assert make(Fake(tmp_path / "env")) == ["install", "check"]
    assert make(Fake(tmp_path / "env")) == []


def test_an_interrupted_update_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Fake(tmp_path / "env"))
    monkeypatch.setattr(Fake, "wanted_stamp", lambda self: "newer")
    with pytest.raises(KeyboardInterrupt):
        make(Fake(tmp_path / "env", fails_at="install"))
    assert make(Fake(tmp_path / "env")) == ["create", "install", "check"]


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "env"
    home.mkdir()
    (home / "precious").touch()
    with pytest.raises(script.SetupError, match="was not made by this Makefile"):
        make(Fake(home))
    assert [path.name for path in home.iterdir()] == ["precious"]


def test_a_torch_that_does_not_fit_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = script.OuterTorch("2.7.0", str(tmp_path))
    monkeypatch.setattr(script.OuterTorch, "find", lambda: outer)
    environment = Fake(tmp_path / "env")
    script.make(environment, reuse_torch=True, exact_python=False)
    assert environment.done == ["create around", "install around", "create", "install", "check"]


def test_a_moved_environment_is_unsound(tmp_path: Path) -> None:
    """Scripts inside a virtual environment carry its path."""
    here = script.Environment(tmp_path / "here", "race", "")
    here.home.mkdir()
    here.finish()
    here.home.rename(tmp_path / "there")
    assert not script.Environment(tmp_path / "there", "race", "").sound()


def test_an_environment_without_torch_is_unsound(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    environment = script.Environment(tmp_path / "env", "race", "")
    environment.finish()
    assert not environment.sound()
    packages = environment.site_packages()
    (packages / "torch.py").touch()
    assert environment.sound()
    assert environment.python_version() == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_the_outer_torch_is_found() -> None:
    found = script.OuterTorch.find()
    assert found.version == importlib.metadata.version("torch")
    assert (Path(found.folder) / "torch" / "__init__.py").exists()


def test_an_old_outer_torch_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "OLDEST_TORCH", (99, 0))
    assert script.OuterTorch.find() is None
    assert "is older than 99.0" in capsys.readouterr().out


# -- Makefile -------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-C", str(ROOT), *arguments], env=environment | variables, capture_output=True, text=True
    )


@needs_make
@pytest.mark.parametrize("python", ["old", "missing"])
def test_an_unsuitable_python_is_named(tmp_path: Path, python: str) -> None:
    if python == "old":
        (tmp_path / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n')
        (tmp_path / "old").chmod(0o755)
    done = run_make("race", PYTHON=str(tmp_path / python))
    assert done.returncode != 0
    assert "piste: Python 3.10 or newer is needed" in done.stderr
    assert ("Python 3.8.1" if python == "old" else "not found") in done.stderr


@needs_make
def test_clean_keeps_a_strangers_environment(tmp_path: Path) -> None:
    """`make clean` in a copy: with its own environment, with somebody's own, and with race results."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (".venv", ".venv-race", "piste-race"):
        (tmp_path / name).mkdir()
    (tmp_path / ".venv" / "made-by-piste").touch()
    done = run_make("-C", str(tmp_path), "clean")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv-race", "Makefile", "piste-race"]
