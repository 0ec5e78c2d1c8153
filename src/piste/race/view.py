"""What a race shows in the terminal: a live table where there is one, plain lines where the output goes elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from piste.race.inspection import TaskCard
from piste.race.progress import Row, duration
from piste.race.record import CONFIRM, RunRecord
from piste.race.study import State

_BAR_WIDTH = 30
_LINE_SECONDS = 1.0  # at most one plain line in this time


def describe_plan(console: Console, state: State, damaged: Sequence[str]) -> None:
    """Print what is going to be raced and how long that may take."""
    plan = state.plan
    for card in plan.cards:
        console.print(Text.assemble((card.name, "bold"), f"  {_card_words(card, plan.steps_of(card))}"), soft_wrap=True)
    console.print(Text.assemble(("contenders", "bold"), "  ", ", ".join(who.name for who in plan.contenders)))
    console.print(
        f"Each contender tries {_count(plan.trials, 'learning rate')}; its best one runs again on "
        f"{_count(plan.seeds, 'fresh seed')}, scored on data that chose nothing.",
        soft_wrap=True,
    )
    for line in damaged:
        console.print(Text(f"{line}; set aside, its run is made again", style="yellow"), soft_wrap=True)
    missing = state.total - state.made
    kept = f", {state.made} of them kept from before" if state.made else ""
    time_left = f"about {duration(state.seconds_left)}" if missing else "nothing left to run"
    console.print(f"{_count(state.total, 'run')}{kept} on {plan.device}: {time_left}.\n", soft_wrap=True)


class LiveView:
    """A table that is redrawn in place, for a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def looking(self, tasks: Sequence[str]) -> None:
        """Show that the tasks are being loaded."""
        words = Text(f"starting workers and trying {', '.join(_short(task) for task in tasks)} …")
        self._show(Spinner("dots", words))

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """Print the plan, then the table under it."""
        self.end()
        describe_plan(self.console, state, damaged)
        if state.made < state.total:
            self._show(_board(state))

    def finished(self, state: State, made: RunRecord) -> None:
        """Redraw; a lost run also leaves a line above the table."""
        if not made.finished:
            self.console.print(Text(_run_line(made), style="yellow"), soft_wrap=True)
        self.tick(state)

    def tick(self, state: State) -> None:
        """Redraw."""
        if self.live is not None:
            self.live.update(_board(state))

    def end(self) -> None:
        """Leave the terminal as it was found."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _show(self, content: RenderableType) -> None:
        self.live = Live(content, console=self.console, transient=True, refresh_per_second=8)
        self.live.start()


class PlainView:
    """A line now and then, for files, pipes and continuous integration."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last = -math.inf

    def looking(self, tasks: Sequence[str]) -> None:
        """Say that the tasks are being loaded."""
        self._line(f"Starting workers and trying {', '.join(_short(task) for task in tasks)} ...")

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """Print the plan."""
        describe_plan(self.console, state, damaged)

    def finished(self, state: State, made: RunRecord) -> None:
        """Print how far the race is; every lost run and otherwise not more than one line a second."""
        now = time.monotonic()
        is_last = state.made == state.total
        if made.finished and not is_last and now - self.last < _LINE_SECONDS:
            return
        self.last = now
        left = "" if is_last else f", about {duration(state.seconds_left)} left"
        self._line(f"[{state.made}/{state.total}] {duration(now - state.started)}{left}: {_run_line(made)}")

    def tick(self, state: State) -> None:
        """Nothing: only runs make lines."""

    def end(self) -> None:
        """Nothing to tidy up."""

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _board(state: State) -> RenderableType:
    """Progress, then one row a contender."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task")
    table.add_column("contender")
    table.add_column("trials")
    table.add_column("best lr", justify="right")
    table.add_column("confirmed")
    table.add_column("score", justify="right")
    table.add_column("lost", justify="right")
    running = {(job.key.task, job.key.contender, job.key.phase) for job, _ in state.running}
    best = _leading(state)
    shown = ""
    for row in state.rows:
        if shown and shown != row.card.name:
            table.add_section()
        name = "" if row.card.name == shown else row.card.name
        shown = row.card.name
        active = any(who[:2] == (row.card.name, row.contender.name) for who in running)
        table.add_row(*_cells(row, name, active, row is best.get(row.card.name)))
    return Group(_progress_line(state), Text(), table)


def _cells(row: Row, task: str, active: bool, leads: bool) -> list[RenderableType]:
    score = "" if math.isnan(row.score) else _score_words(row)
    return [
        Text(task, style="bold"),
        Text(row.contender.name, style="cyan" if active else ""),
        _dots(row.trials_made, row.trials),
        "" if row.lr is None else f"{row.lr:.2g}",
        _dots(row.confirmed, row.seeds),
        Text(score, style="green" if leads else ""),
        Text(str(row.lost), style="yellow") if row.lost else "",
    ]


def _score_words(row: Row) -> str:
    """A score on the validation split stands in brackets until there is one on the report split."""
    return f"{row.score:.4g}" if row.confirmed else f"({row.score:.4g})"


def _leading(state: State) -> dict[str, Row]:
    """The best mean score of each task, where runs have been confirmed."""
    best: dict[str, Row] = {}
    for row in state.rows:
        if not row.confirmed or math.isnan(row.score):
            continue
        other = best.get(row.card.name)
        if other is None or (row.score > other.score) == row.card.higher_is_better:
            best[row.card.name] = row
    return best


def _dots(made: int, total: int) -> Text:
    return Text.assemble(("●" * made, "green"), ("·" * max(0, total - made), "dim"))


def _progress_line(state: State) -> RenderableType:
    elapsed = duration(time.monotonic() - state.started)
    end = time.strftime("%H:%M:%S", time.localtime(time.time() + state.seconds_left))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(
        ProgressBar(total=state.total, completed=state.made, width=_BAR_WIDTH),
        f"{state.made}/{state.total} runs",
        f"{elapsed} gone",
        f"about {duration(state.seconds_left)} left (until {end})",
    )
    return grid


def _run_line(made: RunRecord) -> str:
    key = made.key
    which = f"seed {key.seed}" if key.phase == CONFIRM else "trial"
    if made.finished:
        outcome = f"validation loss {made.curve.valid_loss[-1]:.4g}"
    else:
        outcome = f"{made.status.replace('_', ' ')}: {made.message}"
    return f"{key.task} {key.contender} {which} lr {key.lr:g}: {outcome}"


def _card_words(card: TaskCard, steps: int) -> str:
    about = f"{card.description}; " if card.description else ""
    train, valid, report = card.examples
    return (
        f"{about}{card.parameters:,} weights, {steps} steps a run, {train:,} examples to train on, "
        f"{valid:,} to choose by, {report:,} to score on"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _short(task: str) -> str:
    return task.replace("\\", "/").rpartition("/")[2]
