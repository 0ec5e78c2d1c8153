"""The end of a race in the terminal: standings, verdicts, what to mind, where the report is."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from piste.race.record import Standing, StudyResult, TaskResult


def print_result(console: Console, result: StudyResult, report: Path) -> None:
    """Print tables, notes, verdicts and the path of the report, the most important last."""
    for task in result.results:
        console.print(_table(task))
        _print_failures(console, task)
        console.print()
    if result.notes:
        console.print(Text("To mind", style="bold"))
        for note in result.notes:
            console.print(Text(f"  {note}", style="yellow"))
        console.print()
    console.print(Text("Verdict", style="bold"))
    for task in result.results:
        console.print(Text(f"  {task.verdict}", style="green"))
    console.print()
    # Unbroken, so that it can be copied or clicked.
    console.print(Text.assemble(("Report", "bold"), f"  {report}"), soft_wrap=True)


def _table(task: TaskResult) -> Table:
    direction = "higher is better" if task.higher_is_better else "lower is better"
    table = Table(
        title=Text.assemble((task.task, "bold"), f": {task.metric_name} on the report split, {direction}"),
        title_justify="left",
        title_style="",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    table.add_column("")
    table.add_column("contender", no_wrap=True)
    for heading in (task.metric_name, "95% interval", "behind the leader", "lr", "step ms", "optimizer", "state MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("lost", justify="right")
    for place, standing in enumerate(task.standings):
        mark = "=" if standing.tied and _is_tie(task) else str(place + 1)
        table.add_row(mark, *_cells(standing, place == 0), style="green" if standing.tied else "")
    return table


def _is_tie(task: TaskResult) -> bool:
    return sum(standing.tied for standing in task.standings) > 1


def _cells(standing: Standing, leads: bool) -> list[str]:
    cost = standing.cost
    share = cost.optimizer_seconds / cost.step_seconds if cost.step_seconds else math.nan
    lr = standing.best_hyperparameters.get("lr", math.nan)
    lost = f"{standing.diverged_trials}+{len(standing.failures) - standing.diverged_trials}"
    return [
        standing.contender,
        _number(standing.mean),
        "" if math.isnan(standing.low) else f"{_number(standing.low)} .. {_number(standing.high)}",
        "" if leads else _behind(standing),
        _number(lr, 3) + {"low": " (lowest)", "high": " (highest)"}.get(standing.edge, ""),
        _number(1000 * cost.step_seconds, 3),
        "-" if math.isnan(share) else f"{share:.0%}",
        _number(cost.state_bytes / 2**20, 2),
        lost if standing.failures else "",
    ]


def _behind(standing: Standing) -> str:
    if math.isnan(standing.difference):
        return "-"
    text = f"{standing.difference:+.3g}"
    if math.isnan(standing.difference_low):
        return text
    return f"{text} ({standing.difference_low:+.2g} .. {standing.difference_high:+.2g})"


def _print_failures(console: Console, task: TaskResult) -> None:
    """One line a distinct reason, so that ten runs lost for one reason are one line."""
    for standing in task.standings:
        for failure in standing.failures:
            console.print(Text(f"  lost: {standing.contender}, {failure}", style="yellow"))


def _number(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}g}"
