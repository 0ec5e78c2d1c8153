"""Make, finish or reuse one of the Makefile's virtual environments. Standard library only: nothing is installed yet.

    python3 scripts/environment.py .venv-race --extra race --reuse-torch

An environment is finished when its stamp is written, and that is the last thing done: one that was interrupted has
no stamp and is made again. When only the pins or pyproject.toml have changed, it is brought up to date where it stands.
A folder without our marker is somebody else's and is never touched.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints" / "dev.txt"
MARKER = "made-by-piste"
STAMP = "piste-stamp"
OUTER_CONSTRAINTS = "constraints.txt"  # only in an environment that is built around the outer interpreter's torch
LOG = "install.log"
QUIET = ["--quiet", "--progress-bar", "off"]
OLDEST_TORCH = (2, 6)
# What must import for an environment to count as sound, by extra.
IMPORTS = {
    "race": ("torch", "click", "jinja2", "numpy", "plotly", "rich", "sklearn", "scipy"),
    "dev": ("torch", "click", "jinja2", "numpy", "plotly", "rich", "sklearn", "scipy", "pytest", "hypothesis"),
}


class SetupError(Exception):
    """A reason to stop that the user can do something about."""


def say(text: str) -> None:
    print(f"piste: {text}", flush=True)


class Environment:
    """One virtual environment in the folder `home`."""

    def __init__(self, home: Path, extra: str, torch_index_url: str) -> None:
        self.home = home
        self.extra = extra
        self.torch_index_url = torch_index_url
        self.python = home / "bin" / "python"

    # -- what is there ------------------------------------------------------------------------------------------

    def wanted_stamp(self) -> str:
        """Line 1: where it stands, as an environment cannot be moved. Line 2: a digest of what decides its content."""
        parts = [self.extra, *((ROOT / name).read_text() for name in ("pyproject.toml", "constraints/dev.txt"))]
        return f"{self.home}\n{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}\n"

    def stamp(self) -> str:
        with contextlib.suppress(OSError):
            return (self.home / STAMP).read_text()
        return ""

    def sound(self) -> bool:
        """Whether it was finished here, and its interpreter still runs and finds torch: a removed Python or a removed
        outer torch breaks it."""
        if self.stamp().partition("\n")[0] != str(self.home):
            return False
        script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
        with contextlib.suppress(OSError):
            return subprocess.run([self.python, "-c", script], capture_output=True).returncode == 0
        return False

    def python_version(self) -> str:
        with contextlib.suppress(OSError):
            for line in (self.home / "pyvenv.cfg").read_text().splitlines():
                key, _, value = line.partition("=")
                if key.strip() == "version":
                    return ".".join(value.strip().split(".")[:2])
        return ""

    # -- making it ----------------------------------------------------------------------------------------------

    def clear(self) -> None:
        if self.home.exists() and any(self.home.iterdir()):
            if not (self.home / MARKER).exists():
                raise SetupError(
                    f"{self.home} exists and was not made by this Makefile, so it is left alone. Move it away, or "
                    f"name another folder: make VENV=… VENV_RACE=…"
                )
            # The stamp goes first and the marker stays: killed in between, the folder is ours and unfinished.
            (self.home / STAMP).unlink(missing_ok=True)
            for child in self.home.iterdir():
                if child.name != MARKER:
                    shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / MARKER).touch()

    def create(self, *, see_system: bool) -> None:
        options = ["--system-site-packages"] if see_system else []
        done = subprocess.run(
            [sys.executable, "-m", "venv", *options, self.home], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise SetupError(f"`python -m venv` failed:\n{(done.stdout + done.stderr).strip()}")

    def pip(self, *arguments: str | Path) -> None:
        command: list[str | Path] = [self.python, "-m", "pip", "install", "--log", self.home / LOG]
        command += ["--disable-pip-version-check", *([] if sys.stdout.isatty() else QUIET)]
        # Python compiles what is imported, which is a small part of what is installed.
        command.append("--no-compile")
        # PIP_USER from a user's configuration would install outside the environment.
        done = subprocess.run([*command, *arguments], env={**os.environ, "PIP_USER": "0"})
        if done.returncode:
            raise SetupError(
                f"pip could not install {' '.join(map(str, arguments))}\n"
                f"piste: its log is {self.home / LOG}; the same make command starts again from what pip has cached"
            )

    def install(self) -> None:
        """Everything from the pinned versions. Torch comes before whatever depends on it, so that nothing but the
        pin (and the index that the user named) chooses which build of it is taken."""
        index = ["--index-url", self.torch_index_url] if self.torch_index_url else []
        say("1/3 pip")
        self.pip("-c", CONSTRAINTS, "pip")
        say(f"2/3 torch {pins()['torch']} (the largest download)")
        self.pip("-c", CONSTRAINTS, *index, "torch")
        say(f"3/3 piste[{self.extra}] and what it needs")
        self.install_piste(CONSTRAINTS)

    def install_around(self, torch: OuterTorch) -> None:
        """Everything but torch: what the outer interpreter has stays, the rest comes in the pinned versions."""
        (self.site_packages() / "piste-outer-torch.pth").write_text(f"{torch.folder}\n")
        script = "import importlib.metadata as m; print(*{d.name for d in m.distributions() if d.name}, sep='\\n')"
        present = {canonical(name) for name in self.ask(script).split()} - {"pip"}
        constraints = self.home / OUTER_CONSTRAINTS
        kept = [line for name, line in constraint_lines() if name not in present]
        constraints.write_text("\n".join([f"torch=={torch.version}", *kept, ""]))
        say("1/2 pip")
        self.pip("-c", constraints, "pip")
        say(f"2/2 piste[{self.extra}] and what it needs, without torch")
        self.install_piste(constraints)

    def install_piste(self, constraints: Path) -> None:
        # The build tool is installed first and not in isolation, because pip's build environments obey no pins.
        self.pip("-c", constraints, "hatchling", "editables")
        self.pip("-c", constraints, "--no-build-isolation", "-e", f"{ROOT}[{self.extra}]")

    def site_packages(self) -> Path:
        return Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def ask(self, script: str) -> str:
        return subprocess.run([self.python, "-c", script], check=True, capture_output=True, text=True).stdout

    def check(self) -> None:
        say("checking that everything imports")
        script = f"import importlib\nfor name in {IMPORTS[self.extra]!r}: importlib.import_module(name)\n"
        script += f"import piste\nassert piste.__file__.startswith({str(ROOT)!r}), 'another piste is in the way'"
        done = subprocess.run([self.python, "-c", script], cwd=self.home, capture_output=True, text=True)
        if done.returncode:
            raise SetupError(f"the new environment does not work:\n{done.stderr.strip()}")

    def finish(self) -> None:
        draft = self.home / f"{STAMP}.draft"
        draft.write_text(self.wanted_stamp())
        draft.replace(self.home / STAMP)


class OuterTorch:
    """The torch that the calling interpreter imports, if any."""

    def __init__(self, version: str, folder: str) -> None:
        self.version = version
        self.folder = folder

    @classmethod
    def find(cls) -> OuterTorch | None:
        script = "import importlib.metadata as m, torch; print(m.version('torch')); print(torch.__file__)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        if done.returncode:
            return None
        version, file = done.stdout.split("\n")[-3:-1]
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            say(f"torch {version} of {sys.executable} is older than {oldest}: another one is installed here")
            return None
        return cls(version, str(Path(file).resolve().parent.parent))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraint_lines() -> list[tuple[str, str]]:
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    return [(canonical(line.partition("==")[0]), line) for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    return {name: line.partition("==")[2] for name, line in constraint_lines()}


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Two makes at once would tear down each other's half-made environment: the second waits."""
    import fcntl

    with home.with_name(f"{home.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another make is at work on {home.name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(environment: Environment, *, reuse_torch: bool, exact_python: bool) -> None:
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    sound = environment.sound() and (not exact_python or environment.python_version() == mine)
    if sound and environment.stamp() == environment.wanted_stamp():
        return
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments (no ensurepip). On Debian and Ubuntu: "
            f"apt install python{mine}-venv; elsewhere name another interpreter: make PYTHON=…"
        )
    if sound and not (environment.home / OUTER_CONSTRAINTS).exists():
        update(environment)
    else:
        build(environment, mine, OuterTorch.find() if reuse_torch else None)


def update(environment: Environment) -> None:
    say(f"{environment.home.name} is of older pins: bringing it up to date")
    (environment.home / STAMP).unlink()
    environment.install()
    environment.check()
    environment.finish()


def build(environment: Environment, python_version: str, torch: OuterTorch | None) -> None:
    name = environment.home.name
    if (environment.home / MARKER).exists():
        say(f"{name} is unfinished, broken or of another Python: making it again")
    if torch is not None:
        say(f"making {name} with Python {python_version}, around the torch {torch.version} in {torch.folder}")
        try:
            environment.clear()
            environment.create(see_system=True)
            environment.install_around(torch)
            environment.check()
            environment.finish()
            return
        except (SetupError, subprocess.CalledProcessError) as problem:
            say(f"{problem}\npiste: that torch cannot be built on, so {name} gets its own")
    say(f"making {name} with Python {python_version}; this once, a few minutes")
    environment.clear()
    environment.create(see_system=False)
    environment.install()
    environment.check()
    environment.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("--extra", choices=sorted(IMPORTS), required=True)
    parser.add_argument("--reuse-torch", action="store_true", help="build on the calling interpreter's torch, if any")
    parser.add_argument("--torch-index-url", default="", help="where pip looks for torch, and for torch alone")
    parser.add_argument("--exact-python", action="store_true", help="remake an environment of another Python version")
    options = parser.parse_args()
    environment = Environment(options.home.resolve(), options.extra, options.torch_index_url)
    try:
        with alone(environment.home):
            make(environment, reuse_torch=options.reuse_torch, exact_python=options.exact_python)
    except SetupError as reason:
        print(f"piste: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("piste: interrupted; the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
