"""What a race shows in a terminal while it goes, and at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console, JustifyMethod, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from piste.race.dashboard import Dashboard, number
from piste.race.driver import State
from piste.race.keys import Keys
from piste.race.progress import duration
from piste.race.protocol import Plan
from piste.race.record import TIME, Cost, RunRecord
from piste.race.result import Standing, StudyResult, TaskResult
from piste.race.tables import fitting
from piste.race.verdict import recommended
from piste.race.wishes import Wish
from piste.race.words import count, listing, single_line, size

__all__ = ["LiveView", "PlainView", "show_result", "view_for"]


def view_for(console: Console) -> LiveView | PlainView:
    """A table that is drawn again and again on a terminal that can do so, a line a run elsewhere."""
    redrawn = console.is_terminal and not console.is_dumb_terminal
    return LiveView(console) if redrawn else PlainView(console)


def chosen(hyperparameters: Mapping[str, float]) -> str:
    """``lr 0.1 eps 1e-08``."""
    return " ".join(f"{name} {value:g}" for name, value in hyperparameters.items())


class PlainView:
    """One line for every run, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""
        self._say(f"looking at {' and '.join(tasks)} …")

    def measuring(self, words: str) -> None:
        """Something is measured for the budget."""
        self._say(f"measuring {words} …")

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""
        for line in (*damaged, *plan_lines(state)):
            self._say(line)

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""
        key = made.key
        if not made.finished:
            outcome = f"{made.status}: {made.message}"
        elif key.phase == TIME:
            outcome = f"{made.cost.step_seconds * 1e3:.3g} ms a step"
        else:
            outcome = number(made.curve.valid_metric[-1])
        run = f"{key.task}  {key.contender}  {chosen(key.hyperparameters)}  seed {key.seed}  {key.phase}"
        self._say(f"[{state.made}/{state.total}] {run}: {outcome}   ({duration(state.seconds_left)} left)")

    def tick(self, state: State) -> None:
        """Time has passed."""

    def wishes(self) -> Sequence[Wish]:
        """Nothing can be asked through a pipe."""
        return ()

    def said(self, words: str) -> None:
        """What became of a wish that was made elsewhere."""
        self._say(words)

    def end(self) -> None:
        """No more runs, for whatever reason."""

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A table of all contenders, with what is running, how far it is and when it will end; and keys to change it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.status = console.status("")
        self.keys = Keys()
        self.dashboard = Dashboard()
        self.pressed = False

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""
        self.status.update(f"looking at {escape(' and '.join(tasks))}")
        self.status.start()

    def measuring(self, words: str) -> None:
        """Something is measured for the budget."""
        self.status.update(f"measuring {words} …")

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""
        self.status.stop()
        for line in damaged:
            self.console.print(line, style="yellow", markup=False)
        for line in plan_lines(state):
            self.console.print(line, markup=False, highlight=False)
        self.state = state
        self.live = Live(self._picture(state), console=self.console, refresh_per_second=4, transient=True)
        self.live.start()

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""
        if not made.finished and self.live is not None:
            key = made.key
            setting = chosen(key.hyperparameters)
            line = f"{key.task}  {key.contender}  {setting}  seed {key.seed}: {made.status}, {made.message}"
            self.live.console.print(line, style="yellow", markup=False, highlight=False)

    def tick(self, state: State) -> None:
        """Time has passed."""
        self.state = state
        if self.live is not None:
            self.live.update(self._picture(state), refresh=self.pressed)
            self.pressed = False

    def wishes(self) -> Sequence[Wish]:
        """What was asked for by key."""
        for key in self.keys.read():
            self.pressed = True
            self.dashboard.press(key, self.state)
        asked, self.dashboard.wishes = self.dashboard.wishes, []
        return asked

    def said(self, words: str) -> None:
        """What became of a wish."""
        self.dashboard.message = words

    def end(self) -> None:
        """No more runs, for whatever reason."""
        self.keys.close()
        self.status.stop()
        if self.live is not None:
            self.live.stop()

    def _picture(self, state: State) -> RenderableType:
        return self.dashboard.picture(state, self.console, self.keys.present)


def plan_lines(state: State) -> list[str]:
    """What the race is going to do."""
    plan = state.plan
    lines = []
    for card in plan.cards:
        about = f" ({single_line(card.description)})" if card.description else ""
        steps = plan.steps_of(card)
        size_of = f"{card.parameters:,} weights, {steps} steps a run" if steps else "as long as the script says"
        lines.append(f"task {card.name}{about}: {size_of}")
    lines.append(f"contenders: {', '.join(c.name for c in plan.contenders)}")
    each = f"{_trials(plan)} and {count(plan.seeds, 'fresh seed')} for each contender on each task"
    lines.append(f"plan: {each}, {state.total} runs or a few more, on {plan.device}")
    if plan.timing:
        lines.append(f"then {count(plan.timing, 'round')} of timing passes, one at a time")
    lines += plan.remarks
    if state.made:
        lines.append(f"{state.made} of them are there already")
    known = all(plan.steps_of(card) for card in plan.cards)
    lines.append(f"estimated time: {duration(state.seconds_left) if known else 'known after the first runs'}")
    return lines


def _trials(plan: Plan) -> str:
    """``5 learning rates``, or ``20 trials of lr, weight_decay and eps``."""
    names = list(dict.fromkeys(dimension.name for contender in plan.contenders for dimension in contender.space))
    if not names:
        return count(plan.trials_each, "learning rate")
    return f"{count(plan.trials_each, 'trial')} of {listing(['lr', *names], 9)}"


def show_result(console: Console, result: StudyResult, report: Path | None) -> None:
    """Standings, verdicts, and where the report is, if there is one."""
    for task in result.results:
        console.print()
        console.print(_standings(task, console))
        console.print(Text(task.verdict, style="bold"))
        for caveat in task.caveats:
            console.print(Text(caveat))
    console.print()
    for note in result.notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False)
    if report is not None:
        console.print(f"report: {report.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _standings(task: TaskResult, console: Console) -> Table:
    """The table of a task, without the columns that are needed least where the terminal is too narrow for them."""
    choice = recommended(task.standings)
    names = _short_names(task.standings)
    rows = [
        _standing(standing, name, leader=standing is task.standings[0], chosen=standing is choice)
        for standing, name in zip(task.standings, names, strict=True)
    ]
    columns = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    return fitting(console, columns, _LEAST_NEEDED, partial(_table, task, rows))[0]


def _table(task: TaskResult, rows: Sequence[Mapping[str, str | Text]], columns: Sequence[str]) -> Table:
    direction = "higher" if task.higher_is_better else "lower"
    title = Text(f"{task.task}: {single_line(task.metric_name)}, {direction} is better", style="bold")
    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        if column == "contender":
            # rich narrows columns that may wrap before all others: names are cut, never a number.
            table.add_column(column, overflow="ellipsis")
        else:
            least = max(len(str(row[column])) for row in rows)
            justify: JustifyMethod = "right" if column else "left"
            table.add_column(column, justify=justify, no_wrap=True, min_width=least)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


_LEAST_NEEDED = ("to the leader", "state", "ms/step")


def _short_names(standings: Sequence[Standing]) -> list[str]:
    """The optimizer alone where each races with one schedule."""
    optimizers = [standing.optimizer for standing in standings]
    once = len(set(optimizers)) == len(optimizers)
    return optimizers if once else [standing.contender for standing in standings]


def _step_time(cost: Cost) -> str:
    """Milliseconds with refreshes shared out; behind them those of the optimizer alone, ordinarily + in a refresh."""
    if math.isnan(cost.step_seconds):
        return "-"
    apart = f" ({cost.optimizer_seconds * 1e3:.3g} + {cost.refresh_seconds * 1e3:.3g})" if cost.refresh_share else ""
    return f"{cost.mean_step_seconds * 1e3:.3g}{apart}"


def _standing(standing: Standing, name: str, *, leader: bool, chosen: bool) -> dict[str, str | Text]:
    one_seed = len(standing.scores) == 1
    mark = ("best" if one_seed else "take") if chosen else "tied" if standing.tied and not one_seed else ""
    lost = len(standing.failures)
    known = not math.isnan(standing.mean)
    bounds = "" if math.isnan(standing.low) else f" [{standing.low:.4g}, {standing.high:.4g}]"
    gap = f"{standing.difference:+.3g} [{standing.difference_low:+.3g}, {standing.difference_high:+.3g}]"
    lr = standing.best_hyperparameters.get("lr", math.nan)
    return {
        "": Text(mark, style="green" if chosen else "cyan"),
        "contender": Text(name, style="bold" if chosen else ""),
        "lr": number(lr) + {"low": " ↓", "high": " ↑"}.get(standing.edge, ""),
        "mean [95 %]": Text(f"{standing.mean:.4g}{bounds}" if known else "-"),
        "to the leader": Text("" if leader or math.isnan(standing.difference_low) else gap),
        "ms/step": _step_time(standing.cost),
        "state": size(standing.cost.state_bytes),
        "lost": Text(str(lost), style="yellow") if lost else "",
    }
