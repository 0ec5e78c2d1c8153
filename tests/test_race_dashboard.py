"""The keys of the live table: what each does, what is left of the table on a low terminal, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from test_race_end_to_end import command, write
from test_race_protocol import bowl, plan_for, raced

import piste
from piste.race.dashboard import ORDERS, Dashboard
from piste.race.driver import State
from piste.race.keys import Keys, decoded
from piste.race.progress import rows
from piste.race.protocol import next_runs
from piste.race.wishes import STOPPED, Add, Stop
from piste.race.worker import Run


def state_of(names: str = "adamw,sgd_momentum,lion", *, tasks: int = 1, done: bool = False) -> State:
    """A race of which one run goes on, at its beginning or with all trials made."""
    plan = plan_for(names, trials=2)
    plan = replace(plan, cards=tuple(replace(plan.cards[0], name=f"task {number}") for number in range(tasks)))
    records = {key: run for key, run in raced(plan, bowl)[0].items() if done and run.key.phase == "tune"}
    card, contender, key = next_runs(plan, records)[0]
    return State(plan, rows(plan, records), [(Run(card.reference, contender, key), 2)], time.monotonic(), 75.0)


def lines_of(dashboard: Dashboard, state: State, *, width: int = 80, height: int = 24, keys: bool = True) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(dashboard.picture(state, console, keys))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def press(dashboard: Dashboard, state: State, *keys: str) -> str:
    for key in keys:
        dashboard.press(key, state)
    return "\n".join(lines_of(dashboard, state))


def order_of(text: str, names: list[str]) -> list[str]:
    return sorted(names, key=text.index)


# Keys


def test_keys_have_names_and_what_means_nothing_is_left_out() -> None:
    assert decoded("sA\x1b[A\x1bOB\x1b[1;5C\x1b[200~é\r\n\x7f\x01\t\x1b") == [
        *("s", "A", "up", "down", "é", "enter", "enter", "backspace", "escape"),
    ]


def test_s_sorts_by_one_column_after_the_other() -> None:
    dashboard, state = Dashboard(), state_of(done=True)
    names = ["adamw+", "sgd_momentum+", "lion+"]
    state.rows = [replace(row, score=score) for row, score in zip(state.rows, (0.3, float("nan"), 0.1), strict=True)]
    expected = {
        "": names,
        "contender": ["adamw+", "lion+", "sgd_momentum+"],
        "best lr": ["lion+", "adamw+", "sgd_momentum+"],
        "score": ["lion+", "adamw+", "sgd_momentum+"],
        "lost": names,
    }
    assert list(expected) == [name for name, _ in ORDERS]
    for column in [*expected, ""]:
        assert order_of("\n".join(lines_of(dashboard, state)), names) == expected[column], column
        dashboard.press("s", state)
    best_first = replace(state.rows[0].card, higher_is_better=True)
    state.rows = [replace(row, card=best_first) for row in state.rows]
    press(dashboard, state, "s", "s")
    assert order_of("\n".join(lines_of(dashboard, state)), names) == ["adamw+", "lion+", "sgd_momentum+"]


def test_h_hides_the_selected_contender_and_says_that_it_still_races() -> None:
    dashboard, state = Dashboard(), state_of(tasks=2)
    assert "select a contender first" in press(dashboard, state, "h")
    text = press(dashboard, state, "down", "down", "h")
    assert "sgd_momentum+one_cycle is hidden; it still races" in text
    assert "1 contender hidden, still racing: H shows all" in text
    assert text.count("sgd_momentum+") == 1  # in the message
    assert text.count("> lion+one_cycle") == 1  # the next one is selected, on one of the tasks
    text = press(dashboard, state, "h", "h")
    assert "3 contenders hidden" in text
    assert press(dashboard, state, "up", "down", "H").count("one_cycle") == 6


def test_x_asks_before_it_stops_the_run_of_the_selected_contender() -> None:
    dashboard, state = Dashboard(), state_of()
    (job, _), *_ = state.running
    assert "select a contender first" in press(dashboard, state, "x")
    assert "stop adamw+one_cycle on task 0, lr 0.002, seed 0, 2%? It counts" in press(dashboard, state, "j", "x")
    assert "the run goes on" in press(dashboard, state, "n")
    assert dashboard.wishes == []
    press(dashboard, state, "x", "y")
    assert dashboard.wishes == [Stop(job.key.id)]
    assert "sgd_momentum+one_cycle makes no run at the moment" in press(dashboard, state, "down", "x")


def test_trials_of_a_pack_are_one_entry_and_its_others_are_said_to_begin_anew() -> None:
    dashboard, state = Dashboard(), state_of()
    ((job, step),) = state.running
    one, other = (replace(job, key=replace(job.key, hyperparameters={"lr": lr}, packed=True)) for lr in (0.1, 0.2))
    state.running = [(one, step), (other, step), (job, step)]
    assert " 2%, 2 at 2%" in press(dashboard, state)
    assert "Trials that are trained with it begin anew. y/n" in " ".join(press(dashboard, state, "j", "x").split())


def test_a_takes_a_name_in_which_keys_are_letters() -> None:
    dashboard, state = Dashboard(), state_of()
    assert "add which optimizer? qsx" in press(dashboard, state, "a", *"qsxh", "backspace", "up")
    press(dashboard, state, "escape")
    assert dashboard.wishes == []
    press(dashboard, state, "a", *"sgdx", "backspace", "enter", "a", "enter")
    assert dashboard.wishes == [Add("sgd")]


def test_q_is_one_ctrl_c_and_the_question_mark_lists_the_keys() -> None:
    ended: list[bool] = []
    dashboard, state = Dashboard(lambda: ended.append(True)), state_of()
    text = press(dashboard, state, "?")
    assert "add an optimizer: as many trials and seeds as the others" in text
    assert "end as Ctrl-C does" in text
    assert "end as Ctrl-C does" not in press(dashboard, state, "?")
    press(dashboard, state, "q")
    assert ended == [True]


@pytest.mark.parametrize("height", [14, 24, 40])
@pytest.mark.parametrize("keys", [(), ("?",), ("down",) * 25, ("a",), ("s", "up", "h")])
def test_thirty_contenders_fit_a_low_terminal_of_eighty_columns(height: int, keys: tuple[str, ...]) -> None:
    names = [name for name in piste.list_optimizers() if len(name) < 20][:30]
    dashboard, state = Dashboard(), state_of(",".join(names))
    press(dashboard, state, *keys)
    lines = lines_of(dashboard, state, height=height)
    assert len(lines) < height
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "of 150 runs" in lines[0]
    table = [line for line in lines if "0/2" in line]
    shown = len({name for name in names for line in table if line.lstrip("> ").startswith(f"{name}+")})
    left = 30 - ("h" in keys) - shown
    assert any(f"… and {left} more (↑ ↓)" in line for line in lines) == (left > 0)
    if len(keys) == 25:
        assert any(line.startswith(f"> {names[24]}+") for line in lines)


def test_without_keys_none_are_offered() -> None:
    text = "\n".join(lines_of(Dashboard(), state_of(), keys=False))
    assert "help" not in text
    assert "lion+one_cycle" in text


def test_what_is_no_terminal_has_no_keys(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        keys = Keys(file.fileno())
        assert not keys.present
        assert keys.read() == []
        keys.close()


def test_a_terminal_of_other_processes_is_left_alone() -> None:
    """Whoever reads from a terminal in the background is stopped by the system."""
    master, slave = pty.openpty()
    try:
        keys, before = Keys(slave), termios.tcgetattr(slave)
        assert keys.present
        os.write(master, b"q\n")
        assert keys.read() == []  # this process has another terminal, or none
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


# A real terminal

PATIENCE = 300.0  # seconds, for what takes a few; nothing waits for it but a failing test

# A process that opens a terminal, and has none, makes it its own.
ON_A_TERMINAL = "import os; os.open(os.ttyname(0), os.O_RDWR); "


class Terminal:
    """A screen of 80 columns with a program on it."""

    def __init__(self, program: list[str], folder: Path) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, 80)) if sys.version_info >= (3, 11) else None
        self.modes = termios.tcgetattr(self.slave)
        self.screen = pyte.Screen(80, 24)
        self.stream = pyte.ByteStream(self.screen)
        self.said = b""
        environment = {**os.environ, "TERM": "xterm", "LINES": "24", "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            program,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            cwd=folder,
            env=environment,
        )

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def shows(self, words: str) -> None:
        """Wait for words on the screen."""
        end = time.monotonic() + PATIENCE
        while words not in "\n".join(self.screen.display):
            assert time.monotonic() < end, f"{words!r} not on the screen:\n" + "\n".join(self.screen.display)
            self.read()

    def read(self) -> None:
        if select.select([self.master], [], [], 0.1)[0]:
            self.stream.feed(os.read(self.master, 65536))

    def ended(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end
            self.read()
        return self.process.returncode


@contextmanager
def on_a_terminal(program: list[str], folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(program, folder)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
        os.close(terminal.slave)


@pytest.mark.slow
def test_a_race_on_a_terminal_is_steered_by_keys_and_gives_the_terminal_back(tmp_path: Path) -> None:
    task = write(tmp_path, "time.sleep(0.02)", steps=100_000)  # no run ends by itself
    asked = command(tmp_path, str(task), "--optimizers", "sgd,adamw", "--trials", "2", "--seeds", "1")
    asked[2] = ON_A_TERMINAL + asked[2]
    with on_a_terminal(asked, tmp_path) as terminal:
        terminal.shows("? help")
        terminal.press("?")
        terminal.shows("add an optimizer: as many")
        terminal.press("?j")
        terminal.shows("> sgd+")
        terminal.press("\x1b[Bh")
        terminal.shows("1 contender hidden, still racing")
        terminal.press("Haliom\r")
        terminal.shows("not added: no optimizer 'liom', did you mean lion")
        terminal.press("alion\r")
        terminal.shows("added: lion+one_cycle; 3 more runs")
        terminal.press("kkkx")
        terminal.shows("y/n")
        assert termios.tcgetattr(terminal.slave) != terminal.modes
        terminal.press("y")
        terminal.shows(f"failed, {STOPPED}")
        terminal.press("q")
        assert terminal.ended() == 130
        terminal.shows("Go on with")
        assert termios.tcgetattr(terminal.slave) == terminal.modes
        assert not terminal.screen.cursor.hidden
    made = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*.json")]
    assert [(run["status"], run["message"], run["key"]["optimizer"]) for run in made] == [("failed", STOPPED, "sgd")]
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert study["settings"]["optimizers"] == ["sgd", "adamw", "lion"]
    assert study["title"] == "3 contenders on linear"


@pytest.mark.slow
def test_an_error_gives_the_terminal_back(tmp_path: Path) -> None:
    """Something in the driver breaks in the middle of the live table: stopping a run, which is exchanged here."""
    task = write(tmp_path, "time.sleep(0.02)", steps=100_000)
    asked = command(tmp_path, str(task), "--optimizers", "sgd", "--trials", "1", "--seeds", "1")
    broken = (
        "import piste.race.driver as d\ndef _stop(self, wish): raise OSError(5, 'broken')\nd.Driver._stop = _stop\n"
    )
    asked[2] = ON_A_TERMINAL + "\n" + broken + asked[2]
    with on_a_terminal(asked, tmp_path) as terminal:
        terminal.shows(" 0%")  # a run has begun
        terminal.press("jx")
        terminal.shows("y/n")
        terminal.press("y")
        assert terminal.ended() == 1
        terminal.shows("broken")
        assert termios.tcgetattr(terminal.slave) == terminal.modes
        assert not terminal.screen.cursor.hidden
