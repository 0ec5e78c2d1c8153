"""The table of a race that is going on: what it shows, and what each key does to it. It knows no terminal."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from piste.race.driver import State
from piste.race.progress import Row, duration, part_of
from piste.race.wishes import Add, Stop, Wish
from piste.race.words import count, single_line
from piste.race.worker import Run

__all__ = ["Dashboard", "progress_words", "run_words"]

_WIDE: Final = 100  # columns of a terminal that shows the learning rates of the runs that are going on
_KEYS_LINE: Final = "s sort  ↑↓ select  h hide  x stop  a add  ? help  q end"
_HELP: Final = (
    ("s", "sort by the next column"),
    ("↑ ↓", "select a contender, also k and j"),
    ("h", "hide it, though it still races; H shows all again"),
    ("x", "stop the run that it is making, which then counts as lost"),
    ("a", "add an optimizer: as many trials and seeds as the others"),
    ("q", "end as Ctrl-C does: finished runs are kept"),
    ("?", "close this"),
)


def _planned(row: Row) -> float:
    return 0.0


def _by_rate(row: Row) -> float:
    return math.inf if row.lr is None else row.lr


def _by_score(row: Row) -> float:
    return math.inf if math.isnan(row.score) else -row.score if row.card.higher_is_better else row.score


def _by_lost(row: Row) -> float:
    return -row.lost


# What the rows of a task can be sorted by; what is equal stays in the order of the plan.
ORDERS: Final[tuple[tuple[str, Callable[[Row], float | str]], ...]] = (
    ("", _planned),
    ("contender", lambda row: row.contender.name),
    ("best lr", _by_rate),
    ("score", _by_score),
    ("lost", _by_lost),
)
_COLUMNS: Final = ("trials", "best lr", "seeds", "score", "lost")


def progress_words(state: State) -> str:
    """``12 of 40 runs, about 3:05 left``."""
    return f"{state.made} of {state.total} runs, about {duration(state.seconds_left)} left"


def run_words(job: Run, step: int) -> str:
    """``adamw+one_cycle on digits, lr 0.002, seed 0, 40%``."""
    done = f", {part_of(step, job.key.steps):.0%}" if job.key.steps else ""
    return f"{job.key.contender} on {job.key.task}, lr {job.key.lr:g}, seed {job.key.seed}{done}"


def number(value: float) -> str:
    """Four digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.4g}"


Place = tuple[str, str]


class Dashboard:
    """A table of all contenders, of which keys sort, hide, select, stop and add.

    Args:
        end: what ``q`` does; the same as Ctrl-C if left out.
    """

    def __init__(self, end: Callable[[], None] = lambda: signal.raise_signal(signal.SIGINT)) -> None:
        self.end = end
        self.wishes: list[Wish] = []
        self.message = ""
        self._order = 0
        self._selected: Place | None = None
        self._hidden: set[str] = set()
        self._help = False
        self._typed: str | None = None
        self._asked: tuple[str, Stop] | None = None

    # Keys

    def press(self, key: str, state: State) -> None:
        """Do what a key means now."""
        self.message = ""
        if self._typed is not None:
            self._type(key, self._typed)
        elif self._asked is not None:
            self._answer(key == "y", self._asked[1])
        elif key == "s":
            self._order = (self._order + 1) % len(ORDERS)
        elif key in ("up", "k", "down", "j"):
            self._select(-1 if key in ("up", "k") else 1, state)
        elif key == "h":
            self._hide(state)
        elif key == "H":
            self._hidden.clear()
        elif key == "x":
            self._ask(state)
        elif key == "a":
            self._typed = ""
        elif key in ("?", "escape"):
            self._help = key == "?" and not self._help
        elif key == "q":
            self.end()

    def _type(self, key: str, typed: str) -> None:
        if key == "enter":
            self.wishes += [Add(typed.strip())] if typed.strip() else []
            self._typed = None
        elif key == "escape":
            self._typed = None
        elif key == "backspace":
            self._typed = typed[:-1]
        elif len(key) == 1:
            self._typed = typed + key

    def _answer(self, yes: bool, wish: Stop) -> None:
        self._asked = None
        if yes:
            self.wishes.append(wish)
        else:
            self.message = "the run goes on"

    def _select(self, by: int, state: State) -> None:
        places = [_place(row) for row in self._rows(state)]
        if not places:
            self._selected = None
        elif self._selected in places:
            self._selected = places[min(max(places.index(self._selected) + by, 0), len(places) - 1)]
        else:
            self._selected = places[0 if by > 0 else -1]

    def _hide(self, state: State) -> None:
        before = self._selected
        if before is None:
            self.message = "select a contender first: ↑ ↓"
            return
        self._select(1, state)
        if self._selected == before:
            self._select(-1, state)
        self._hidden.add(before[1])
        if self._selected is not None and self._selected[1] in self._hidden:
            self._selected = None
        self.message = f"{before[1]} is hidden; it still races"

    def _ask(self, state: State) -> None:
        if self._selected is None:
            self.message = "select a contender first: ↑ ↓"
            return
        for job, step in state.running:
            if (job.key.task, job.key.contender) == self._selected:
                others = " Trials that are trained with it begin anew." if job.key.packed else ""
                words = f"stop {run_words(job, step)}? It counts as lost and is not made again.{others} y/n"
                self._asked = words, Stop(job.key.id)
                return
        self.message = f"{self._selected[1]} makes no run at the moment"

    # Picture

    def picture(self, state: State, console: Console, keys: bool = False) -> RenderableType:
        """The table as it is now, never higher than the terminal.

        Args:
            state: of the race.
            console: where it is drawn.
            keys: whether there are any.
        """
        below = self._below(keys)
        height = sum(len(Text(line.plain).wrap(console, console.width)) for line in below)
        # Progress, an empty line, the heads of columns, one line for what has no room, and one that the cursor is on.
        table = self._table(state, console.width >= _WIDE, max(2, console.height - height - 5), keys)
        # Progress on top: where a terminal is too low for all this, it is the rest that is cut.
        return Group(_progress(state, console.width), Text(), *table, *below)

    def _below(self, keys: bool) -> list[Text]:
        lines = []
        if self._hidden:
            names = count(len(self._hidden), "contender")
            lines.append(Text(f"{names} hidden, still racing: H shows all", style="dim"))
        if self.message:
            lines.append(Text(single_line(self.message), style="yellow"))
        if self._asked is not None:
            lines.append(Text(single_line(self._asked[0]), style="bold"))
        elif self._typed is not None:
            lines.append(Text(f"add which optimizer? {self._typed}▏  (Enter, or Esc)", style="bold"))
        elif self._help:
            lines += [Text(f"{key:<4} {words}", style="dim") for key, words in _HELP]
        elif keys:
            lines.append(Text(_KEYS_LINE, style="dim"))
        return lines

    def _rows(self, state: State) -> list[Row]:
        """Rows in the order in which they are shown, task by task."""
        rows = [row for row in state.rows if row.contender.name not in self._hidden]
        by_task: dict[str, list[Row]] = {}
        for row in rows:
            by_task.setdefault(row.card.name, []).append(row)
        return [row for group in by_task.values() for row in sorted(group, key=ORDERS[self._order][1])]

    def _table(self, state: State, wide: bool, room: int, keys: bool) -> list[RenderableType]:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        sorted_by = ORDERS[self._order][0]
        table.add_column(_head("contender", sorted_by), no_wrap=True)
        for title in _COLUMNS:
            table.add_column(_head(title, sorted_by), justify="right", no_wrap=True)
        table.add_column("now", no_wrap=True, style="dim")
        lines: list[str | Row] = []
        for row in self._rows(state):
            if len(state.plan.cards) > 1 and (not lines or _task_of(lines[-1]) != row.card.name):
                lines.append(row.card.name)
            lines.append(row)
        chosen = [at for at, line in enumerate(lines) if isinstance(line, Row) and _place(line) == self._selected]
        first = max(0, min((chosen or [0])[0] - room // 2, len(lines) - room))
        shown = lines[first : first + room]
        for line in shown:
            if isinstance(line, str):
                table.add_row(Text(line, style="dim"))
            else:
                picked = keys and _place(line) == self._selected
                table.add_row(*_cells(line, state, wide=wide, picked=picked), style="reverse" if picked else "")
        left = sum(isinstance(line, Row) for line in lines) - sum(isinstance(line, Row) for line in shown)
        more = f"… and {left} more" + (" (↑ ↓)" if keys else "")
        return [table, *([Text(more, style="dim")] if left else [])]


def _head(title: str, sorted_by: str) -> Text:
    return Text(title, style="bold" if title == sorted_by else "")


def _task_of(line: str | Row) -> str:
    return line if isinstance(line, str) else line.card.name


def _place(row: Row) -> Place:
    return row.card.name, row.contender.name


def _cells(row: Row, state: State, *, wide: bool, picked: bool) -> list[str | Text]:
    active = [(job, step) for job, step in state.running if (job.key.task, job.key.contender) == _place(row)]
    now = _now([run for run in active if not run[0].key.packed], wide) + _now_packed(active)
    return [
        Text(("> " if picked else "") + row.contender.name, style="bold" if active else ""),
        f"{row.trials_made}/{row.trials}",
        "-" if row.lr is None else f"{row.lr:g}",
        f"{row.confirmed}/{row.seeds}",
        number(row.score),
        Text(str(row.lost), style="yellow") if row.lost else "",
        ", ".join(now),
    ]


def _now(active: Sequence[tuple[Run, int]], wide: bool) -> list[str]:
    return [(f"lr {run.key.lr:g} " if wide else "") + f"{part_of(step, run.key.steps):.0%}" for run, step in active]


def _now_packed(active: Sequence[tuple[Run, int]]) -> list[str]:
    """Of those that are made together, which have come equally far."""
    parts = Counter(part_of(step, run.key.steps) for run, step in active if run.key.packed)
    return [f"{many} at {part:.0%}" for part, many in parts.items()]


def _progress(state: State, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 2, 0, 0))
    words = f"{progress_words(state)}, {duration(time.monotonic() - state.started)} gone"
    room = max(10, min(40, width - len(words) - 4))
    line.add_row(ProgressBar(total=max(1, state.total), completed=state.made, width=room), words)
    return line
