"""The command: what it says to people, above all when something is wrong."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from report_studies import plain_study
from rich.console import Console

import piste
from piste.race import command as race_command
from piste.race.catalogue import show_list
from piste.race.command import command
from piste.race.planning import resolve_device
from piste.race.task import load_task


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["race", "--help"], ["list", "-h"], ["show", "-h"], ["report", "-h"], ["memory", "-h"]]
)
def test_help_is_there(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_list_shows_what_create_takes() -> None:
    result = run("list", "sgd*")
    rows = [line.split() for line in result.output.splitlines() if line.startswith("sgd")]
    assert [row[0] for row in rows] == piste.list_optimizers("sgd*")
    assert [row[2:7] for row in rows] == [["0"] * 4 + ["1"], *[["4", "2", "1.02", "0.516", "1"]] * 2]
    for line in ("SGD with momentum: the one to beat", "Source: the cheat-sheet's optimizer_config_mapping"):
        assert line in result.output
    missing = run("list", "zzz")
    assert missing.exit_code == 1
    assert "no name fits 'zzz'" in missing.output


def test_show_tells_all_of_one_preset() -> None:
    result = run("show", "SGD-Nesterov")
    assert result.exit_code == 0, result.output
    for words in (
        "piste.optimizers.sgd.SGD",
        "fp32 4, bf16 2, 8bit 1.02, 4bit 0.516 bytes per float32 weight",
        "decoupled, not of norms and biases",
        "Sutskever et al. 2013",
        r"\mu b_{t-1}",
        "When to use",
    ):
        assert words in " ".join(result.output.split()), words
    nesterov = next(line.split() for line in result.output.splitlines() if line.startswith("nesterov"))
    assert nesterov == ["nesterov", "False", "True"]
    assert "``" not in result.output
    assert ".. math::" not in result.output


@pytest.mark.parametrize("name", ["muon", "prodigy", "shampoo", "sam"])
def test_show_fills_the_width_of_a_terminal_and_loses_no_word(name: str) -> None:
    about = piste.WRAPPINGS[name].wrapper if name == "sam" else piste.presets[name].optimizer
    text = CliRunner(env={"COLUMNS": "80"}).invoke(command, ["show", name]).output
    words = re.sub(r":[a-z]+:`~?|`|\.\. math::", "", inspect.getdoc(about) or "").split()
    assert text.split()[-len(words) :] == words
    start = text.index("Args:")
    for line, after in pairwise(text[start : text.index("Example:")].splitlines()):
        goes_on = after.startswith("        ")  # under an argument, because the word had no room in the line before
        assert not goes_on or len(line.rstrip()) + 1 + len(after.split()[0]) > 80 - 4
        assert not line.endswith(" ")


def test_show_of_an_unknown_name_says_which_is_near() -> None:
    result = run("show", "adamx")
    assert result.exit_code == 1
    assert "no preset or wrapper 'adamx' (did you mean" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], "there is no file nothing.py (piste race --new nothing.py"),
        (["digit"], "did you mean digits?"),
        (["--optimizers", "rnger"], "ranger"),
        (["--optimizers", "adamw,adamw"], "adamw"),
        (["--optimizers", ","], "optimizer"),
        (["--schedules", "flat_cosin"], "flat_cosine"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--seeds", "many"], "'many' is not a valid integer"),
        (["--resume"], "there is no race to resume"),
        (["--resume", "--steps", "3"], "there is no race to resume"),
        (["digits", "--resume"], "there is no race in piste-race/digits"),
        (["--resume", "--out", "nowhere"], "there is no race in nowhere"),
        (["--new", "my task.txt"], "must be called like my_task.py"),
        (["--new", "_task.py"], "must be called like my_task.py, with a letter first"),
        (["--new", "nowhere/my_task.py"], "No such file or directory"),
        (["--sweep", "lr=1"], "lr is always tuned"),
        (["--sweep", "momentum"], "momentum has no list of its own"),
        (["--sweep", "nesterow=1,2"], "no contender has a number 'nesterow' to sweep"),
        (["--sweep", "eps=-1"], "--sweep eps=-1 is not legal for adamw+one_cycle: AdamW got eps=-1.0; legal"),
        (["--sweep", "eps=-1", "--optimizers", "torch.Adam"], "--sweep eps=-1 is not legal for torch.Adam"),
        (["--target", "nan"], "nan is not legal; legal: a finite number"),
        (["--metric", "accuracy"], "--metric goes with --script"),
        (["--higher-is-better"], "--higher-is-better goes with --script"),
        (["--budget", "soon"], "legal: a time such as 90s"),
        (["--screens", "1", "--sampler", "tpe"], "exclude each other"),
        (["--script", "nothing.py"], "there is no script"),
        (["--script", "nothing.py", "--steps", "3"], "--steps and --script exclude each other"),
        (["digits", "nothing.py"], "one task at a time, not digits nothing.py"),
        (["--device", "meta"], "device 'meta' cannot be used here: Tensor.item() cannot be called on meta tensors"),
        (["--device", ""], "device '' cannot be used here: Device string must not be empty"),
    ],
)
def test_mistakes_end_in_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("race", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.glob("**/*.json")) == []


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("race", "nothing.py", "--debug").output


def test_new_writes_a_starter_and_overwrites_nothing() -> None:
    result = run("race", "--new", "mine.py")
    assert result.exit_code == 0
    assert "piste race mine.py" in result.output
    before = Path("mine.py").read_text()
    assert 'name="mine"' in before
    again = run("race", "--new", "mine.py")
    assert again.exit_code == 2
    assert "stays as it is" in again.output
    assert Path("mine.py").read_text() == before


def test_a_directory_that_cannot_be_written() -> None:
    Path("file").write_text("")
    result = run("race", "digits", "--out", "file/race")
    assert result.exit_code == 1
    assert "cannot be used" in result.output


STRANGE = ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": {"tasks": 1}, "plan": {"cards": 3}}', "\x00"]


@pytest.mark.parametrize("arguments", [["report", "race"], ["race", "--resume", "--out", "race"]])
@pytest.mark.parametrize("content", STRANGE)
def test_a_study_that_is_damaged_or_of_another_shape(content: str, arguments: list[str]) -> None:
    """Whole JSON of another shape (of an older version, say) is refused like half a file."""
    Path("race").mkdir()
    Path("race/study.json").write_text(content)
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("\n") == 1
    assert "study.json" in result.output
    assert "repeat the command that started" in result.output
    assert Path("race/study.json").read_text() == content
    assert "Traceback" in run(*arguments, "--debug").output


def test_a_result_is_shown_where_its_report_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(race_command, "stored_result", lambda store: plain_study())
    monkeypatch.setattr(race_command.report, "write", full)
    result = run("report", ".")
    assert result.exit_code == 1
    assert plain_study().results[0].task in result.output
    assert "No space left on device; free some space and repeat the command" in result.output
    assert "report: " not in result.output


def test_report_of_nothing() -> None:
    result = run("report", "nowhere")
    assert result.exit_code == 1
    assert "there is no race in nowhere" in result.output


@pytest.mark.parametrize("name", ["größe", "日本", "a-b"])
def test_a_starter_under_any_legal_name_is_a_task(name: str) -> None:
    assert run("race", "--new", f"{name}.py").exit_code == 0
    assert load_task(f"{name}.py").task.name == name


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_output_that_cannot_take_every_character_gets_a_question_mark(encoding: str) -> None:
    """Windows pipes are cp1252; some containers have no locale at all."""
    main = "import sys; sys.argv = ['piste', 'list', 'sgd']; from piste.cli import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", main], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    between = "?" if encoding == "ascii" else "…"
    assert f"0.05 {between} 5" in done.stdout.decode(encoding)


def test_a_device_is_called_by_one_name() -> None:
    """Otherwise the same runs would be made again under another name."""
    assert resolve_device("cpu") == resolve_device("cpu:0") == "cpu"


def test_without_the_extra_it_says_how_to_get_it() -> None:
    script = "import sys; sys.modules['click'] = None; sys.argv = ['piste']; from piste.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "piste: the command needs click, which comes with: pip install 'piste[race]'"


def test_python_m_piste_is_the_command() -> None:
    """Where the script is not on the path."""
    done = subprocess.run([sys.executable, "-m", "piste", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "race" in done.stdout


def test_a_list_on_a_narrow_terminal_goes_without_a_column_and_breaks_no_line() -> None:
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    show_list(console, ["adamw", "rangeradabelief_nogc"], [])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["name", "fp32", "bf16", "8bit", "4bit", "schedule", "lr", "prior"]
    assert lines[1].endswith("0.0002 … 0.02")
