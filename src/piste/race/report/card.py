"""The verdict card of a task: what to take, how surely, and at what price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from piste.race import words
from piste.race.analysis import Analysis, speed_up_to_common
from piste.race.lints import BASELINES
from piste.race.record import RunRecord
from piste.race.result import Standing, TaskResult
from piste.race.search import Sensitivity
from piste.race.targets import SpeedUp

from .palette import Look


@dataclass(frozen=True)
class Fact:
    """A number with its name and a remark, as a tile of a verdict card."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Strip:
    """The difference from the leader as a small picture: positions in a width of 70, worse to the right."""

    leader: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Place:
    """A line of a card's ranking."""

    name: str
    look: Look
    score: str
    remark: str
    tied: bool
    taken: bool
    strip: Strip | None


def mood_of(standings: list[Standing], choice: Standing | None) -> tuple[str, str, str]:
    """Mood (``"clear"``, ``"tie"``, ``"unsure"``, ``"open"`` or ``"none"``), badge and advice."""
    group = [standing for standing in standings if standing.tied]
    if choice is None and any(standing.is_open for standing in standings):
        return "open", "not yet", "No answer yet"
    if choice is None:
        return "none", "no result", "Nothing to take"
    if len(choice.scores) == 1:
        return "unsure", "one seed: unsure", "Best so far:"
    if len(group) > 1:
        return "tie", f"tie of {len(group)}", "Take"
    return "clear", "clear winner" if len(standings) > 1 else "raced alone", "Take"


def facts(choice: Standing, task: TaskResult, places: int, found: Analysis, runs: Sequence[RunRecord]) -> list[Fact]:
    """The tiles of the card, those about a target and about rates where they are known."""
    cost = choice.cost
    steps = [s.cost.mean_step_seconds for s in task.standings if math.isfinite(s.cost.mean_step_seconds)]
    return [
        Fact(
            f"{task.metric_name} on unseen data",
            words.fixed(choice.mean, places),
            f"{words.interval(choice.low, choice.high, places)} over {words.count(choice.seeds, 'seed')}".strip(),
        ),
        _sureness(choice, task),
        Fact("time for a step", words.duration(cost.mean_step_seconds), _time_remark(cost.mean_step_seconds, steps)),
        Fact("optimizer state", words.size(cost.state_bytes), each_weight(cost.state_bytes, cost.parameters)),
        *_speed(choice, task, runs),
        *_forgiveness(choice, found, places),
    ]


def _sureness(choice: Standing, task: TaskResult) -> Fact:
    """How the choice stands against the rest: its ties, or its lead over the best of the others."""
    others = [standing for standing in task.standings if standing is not choice]
    scored = [standing for standing in others if standing.scores]
    tied = [standing.contender for standing in others if standing.tied]
    if len(choice.scores) == 1:
        return Fact("against the others", "cannot be told", "one seed does not show what is chance")
    if tied:
        return Fact("against the others", "no difference found", f"between it and {words.listing(tied)}")
    if not scored:
        return Fact("against the others", "no other to compare", "all others failed" if others else "none raced")
    second = scored[0]
    sign = -1 if task.higher_is_better else 1
    low, high = sorted(sign * end for end in (second.difference_low, second.difference_high))
    places = words.places_for([high - low, second.difference])
    bounds = words.interval(low, high, places)
    return Fact("ahead of the next", words.fixed(sign * second.difference, places), f"{bounds} {second.contender}")


def _speed(choice: Standing, task: TaskResult, runs: Sequence[RunRecord]) -> list[Fact]:
    """How many steps it saves on the way to what both reach, against a baseline or else the best of the others."""
    others = [standing for standing in task.standings if standing is not choice and standing.scores]
    others.sort(key=lambda standing: standing.optimizer not in BASELINES)  # stable: the best baseline comes first
    if not others:
        return []
    other = others[0].contender
    found = speed_up_to_common(runs, choice.contender, other, task.higher_is_better)
    if found is None or not math.isfinite(found[1].factor) or not found[1].factor:
        return []
    level, speed = found
    name = f"steps to validation {task.metric_name} {words.number(level)}"
    how_many, than = _speed_words(speed)
    return [Fact(name, how_many, f"{than} {other} {_speed_bounds(speed)}".strip())]


def _speed_words(speed: SpeedUp) -> tuple[str, str]:
    """How many steps, and the word before the name of whom it is compared with."""
    if abs(math.log(speed.factor)) < 0.01:
        return "as many", "as"
    times, which = (speed.factor, "fewer") if speed.factor > 1 else (1 / speed.factor, "more")
    return f"{words.number(times, 2)} times {which}", "than"


def _speed_bounds(speed: SpeedUp) -> str:
    """The interval, turned over with the factor where the contender is the slower one."""
    if math.isnan(speed.low):
        return ""
    low, high = speed.low, speed.high
    if speed.factor < 1:
        low, high = 1 / high, 1 / low if low else math.inf
    return f"[{words.number(low, 2)}, {words.number(high, 2)}]"


def _forgiveness(choice: Standing, found: Analysis, places: int) -> list[Fact]:
    """What a wrong learning rate costs, and whether others forgive more."""
    own: Sensitivity | None = found.sensitivities.get(choice.contender)
    if own is None:
        return []
    least = min(found.sensitivities, key=lambda name: found.sensitivities[name].excess)
    best = found.sensitivities[least].excess
    compared = "the least of all" if least == choice.contender else f"{least}: {words.fixed(best, places)}"
    remark = f"on average over {words.number(own.decades, 2)} decades; {compared}"
    return [Fact("a wrong learning rate costs", words.fixed(own.excess, places), remark)]


def _time_remark(own: float, steps: list[float]) -> str:
    if not math.isfinite(own) or len(steps) < 2:
        return ""
    more = own / min(steps) - 1
    return "the shortest of all" if more < 0.005 else f"{words.percent(more)} more than the shortest"


def each_weight(state_bytes: int, parameters: int) -> str:
    """Bytes of state for each weight, in words."""
    return f"{words.short(state_bytes / parameters, 2)} bytes a weight" if parameters else ""


def strips(standings: list[Standing], higher_is_better: bool) -> list[Strip | None]:
    """One strip a standing, all to one scale; None where there is no difference to show."""
    sign = -1 if higher_is_better else 1
    known = [(sign * s.difference_low, sign * s.difference, sign * s.difference_high) for s in standings]
    ends = [0.0, *(end for ends in known for end in ends if math.isfinite(end))]
    reach = max(ends) - min(ends)

    def place(value: float) -> float:
        return round(5 + 60 * (value - min(ends)) / reach, 1)

    return [
        Strip(place(0.0), place(min(trio)), place(trio[1]), place(max(trio)))
        if reach and all(map(math.isfinite, trio))
        else None
        for trio in known
    ]


def place_of(
    standing: Standing, choice: Standing | None, look: Look, places: int, difference_places: int, strip: Strip | None
) -> Place:
    """A line of the ranking."""
    if not standing.scores:
        remark = words.no_result(is_open=standing.is_open)
    elif standing is choice:
        remark = "take" if len(standing.scores) > 1 else "best"
    elif standing.tied and len(standing.scores) > 1:
        remark = "tied"
    else:
        remark = words.fixed(standing.difference, difference_places, signed=True)
    score = words.fixed(standing.mean, places)
    return Place(standing.contender, look, score, remark, standing.tied, standing is choice, strip)
