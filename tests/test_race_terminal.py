"""What a race shows on terminals of several widths: numbers are never cut, and nothing is taken for markup."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from report_studies import standing
from rich.console import Console

from piste.race.contenders import make_contenders
from piste.race.costs import WARM_UP_STEPS, Stopwatch
from piste.race.driver import State
from piste.race.inspection import TaskCard
from piste.race.progress import rows
from piste.race.protocol import Plan, next_runs
from piste.race.record import Cost
from piste.race.result import StudyResult, TaskResult
from piste.race.terminal import LiveView, PlainView, show_result, view_for
from piste.race.worker import Run

COST = Cost(0.0123, 0.001, 120_000, 10**6, 10, 5)
LONG = ["rangeradabelief+flat_cosine", "sgd_nesterov+flat_cosine", "sgd_nesterov+one_cycle"]


def shown(width: int, *names: str, scores: tuple[float, ...] = (0.97311, 0.98122), **changes: object) -> list[str]:
    """The lines that stand on a terminal of this width after a race of one task."""
    made = [standing(name, list(scores), list(scores), COST, tied=True, **changes) for name in names]
    for each in made[1:]:
        object.__setattr__(each, "difference", -0.00123)
        object.__setattr__(each, "difference_low", -0.00456)
        object.__setattr__(each, "difference_high", 0.00789)
    result = StudyResult("", "", [TaskResult("task", "loss", False, made, "The verdict.")], [], [], {}, "")
    console = Console(file=io.StringIO(), width=width)
    show_result(console, result, Path("report.html"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (140, []),
        (100, ["to the leader"]),
        (80, ["to the leader", "state"]),
        (70, ["to the leader", "ms/step", "state"]),
    ],
)
def test_columns_go_where_there_is_no_room_and_numbers_stay_whole(width: int, gone: list[str]) -> None:
    lines = shown(width, *LONG)
    (header,) = [line for line in lines if "contender" in line]
    everything = ["contender", "lr", "mean [95 %]", "to the leader", "ms/step", "state"]
    assert [column for column in everything if column not in header] == gone
    assert not any("…" in line for line in lines)
    assert all(len(line.rstrip()) <= width for line in lines if not line.startswith("report: "))
    assert sum("0.9772 [0.9" in line for line in lines) == 3
    assert "report: " in lines[-1]


def test_lost_runs_are_shown_on_any_width_and_only_where_there_are_some() -> None:
    for width in (70, 140):
        assert not any("lost" in line for line in shown(width, *LONG))
        assert any(line.rstrip().endswith("lost") for line in shown(width, *LONG, failures=["trial", "seed 1"]))


def test_on_the_narrowest_terminal_names_are_cut_and_numbers_are_not() -> None:
    lines = shown(56, *LONG, failures=["trial"])
    assert sum("…" in line for line in lines) == 3
    assert sum(line.rstrip().endswith("0.001  0.9772 [0.9723, 0.982]     1") for line in lines) == 3


def test_one_seed_has_a_best_and_no_ties() -> None:
    """And no interval: rich would take one of nan for markup and swallow it."""
    nan = dict.fromkeys(("low", "high"), math.nan)
    text = "\n".join(shown(140, *LONG, scores=(0.97311,), **nan))
    assert "best" in text
    assert "tied" not in text
    assert "take" not in text
    assert "0.9731 " in text
    assert "[nan" not in text


def test_the_live_table_fits_eighty_columns() -> None:
    cards = [
        TaskCard(f"/{name}.py", name, "f00d", "", "loss", False, 10, 5, (60, 20, 20), 0.001, 0.001)
        for name in ("char_transformer", "digits")
    ]
    contenders = make_contenders(("rangeradabelief", "sgd_nesterov"), ("flat_cosine", "one_cycle"))
    plan = Plan(tuple(cards), contenders, None, 5, 5, "cpu", {})
    running = [(Run(card.reference, who, key), 7) for card, who, key in next_runs(plan, {})[:2]]
    state = State(plan, rows(plan, {}), running, 0.0, 75.0)
    for width, now in ((80, "70%"), (140, "lr 0.")):
        console = Console(file=io.StringIO(), width=width)
        console.print(LiveView(console)._picture(state))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "…" not in text
        assert text.count("rangeradabelief+flat_cosine") == 2
        assert text.count("char_transformer") == 1
        assert "0 of 80 runs, about 1:15 left" in text.splitlines()[0]
        assert text.count(now) == 2


@pytest.mark.parametrize(("terminal", "kind"), [("xterm", LiveView), ("dumb", PlainView), (None, PlainView)])
def test_only_a_terminal_that_can_redraw_gets_a_live_table(terminal: str | None, kind: type) -> None:
    environment = {} if terminal is None else {"TERM": terminal}
    console = Console(file=io.StringIO(), force_terminal=terminal is not None, _environ=environment)
    assert type(view_for(console)) is kind


def test_columns_that_hold_nothing_are_left_out() -> None:
    unknown = dict.fromkeys(("mean", "low", "high", "difference", "difference_low", "difference_high"), math.nan)
    text = "\n".join(shown(140, LONG[0], cost=Cost.unknown(), **unknown))
    assert "to the leader" not in text
    assert "nan" not in text


def test_refreshes_are_shared_out_and_shown_apart() -> None:
    """Nine steps of 13 ms, 3 of them the optimizer's, and one whose optimizer takes 53: 18 ms a step."""
    timer = Stopwatch()
    for number in range(10):
        own = 0.053 if number == 4 else 0.003
        timer.add(WARM_UP_STEPS + 1 + number, 0.010 + own, own, refreshed=number == 4)
    cost = Cost(**timer.times(), state_bytes=8, peak_bytes=0, gradient_evaluations=10, parameters=2)
    assert cost.step_seconds == pytest.approx(0.013)
    assert cost.refresh_share == pytest.approx(0.1)
    assert cost.worst_optimizer_seconds == cost.refresh_seconds == 0.053
    assert cost.mean_optimizer_seconds == pytest.approx(0.008)
    assert cost.mean_step_seconds == pytest.approx(0.018)
    made = [standing("soap", [0.9, 0.9], [0.9, 0.9], cost)]
    console = Console(file=io.StringIO(), width=140)
    show_result(console, StudyResult("", "", [TaskResult("task", "loss", False, made, "")], [], [], {}, ""), Path("r"))
    assert isinstance(console.file, io.StringIO)
    assert "18 (3 + 53)" in console.file.getvalue()
