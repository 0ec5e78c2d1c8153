"""``--budget 10m``: the race that fits into a wall time on this machine, and what was given up for it, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from piste.race.attempt import EVALUATIONS
from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.protocol import FEWEST_TRIALS_TO_EXTEND, TIMED_STEPS, Plan
from piste.race.record import RunRecord
from piste.race.words import count, duration

# What is planned has to fit with some room: runs side by side slow each other down, now more, now less.
ROOM = 1.15
FEWEST_SEEDS = 3
SHORTEST = 4  # a run keeps at least this part of its steps, one over it
_PACKED = "; trials are counted as if made one by one, and packs of them may be done before"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class BudgetError(ValueError):
    """Not even the smallest race fits."""


@dataclass(frozen=True)
class Pace:
    """How fast a contender trains on a task here.

    Args:
        first_seconds: of its first step, what is compiled for it included; of a whole run where a script makes it.
        step_seconds: of a later one.
        pass_seconds: of a timing pass, where these do not say it: of a script, whose start they do not know.
    """

    first_seconds: float
    step_seconds: float
    pass_seconds: float | None = None

    def of_a_pass(self, steps: int) -> float:
        """Seconds of a timing pass of so many steps."""
        return self.first_seconds + steps * self.step_seconds if self.pass_seconds is None else self.pass_seconds


def pace_of_script(run: RunRecord, seconds: float) -> Pace:
    """What a first run of a script says of others.

    Args:
        run: the first.
        seconds: all that it took.
    """
    # A pass begins as the run did and ends after so many steps; evaluations later on are counted, too, for nobody
    # knows them: rather too much than too little.
    later = max(0, run.cost.steps - TIMED_STEPS)
    spared = 0.0 if math.isnan(run.cost.step_seconds) else later * run.cost.step_seconds
    return Pace(seconds, 0.0, max(0.0, seconds - spared))


Paces = Mapping[tuple[str, str], Pace]
ContendersFor = Callable[[int], tuple[Contender, ...]]


def parse_budget(text: str) -> float:
    """``90s``, ``10m``, ``1.5h`` or ``1h30m`` in seconds.

    Raises:
        ValueError: it is none of these, or nothing.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not legal; legal: a time such as 90s, 10m, 1.5h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time at all; legal: such as 90s, 10m, 1.5h or 1h30m")
    return seconds


def expected_seconds(plan: Plan, paces: Paces, workers: int, made: int = 0) -> float:
    """How long all runs of a race take that are known to come, with one extension for each contender.

    Args:
        plan: the race.
        paces: of every contender on every task.
        workers: processes side by side.
        made: trials of every contender that are there already.
    """
    total = longest = alone = 0.0
    for card in plan.cards:
        for contender in plan.contenders:
            pace = paces[card.reference, contender.name]
            whole = _run_seconds(card, pace, plan.steps_of(card))
            trials = max(0, plan.trials_each - made) * whole
            left = plan.trials_each
            if plan.screens:
                trials = 0.0
                for stage in range(plan.screens, 0, -1):
                    trials += left * _run_seconds(card, pace, max(1, plan.steps_of(card) >> stage))
                    left = math.ceil(left / 2)
                trials += left * whole
            extension = whole if plan.trials >= FEWEST_TRIALS_TO_EXTEND else 0.0
            total += trials + extension + plan.seeds * whole
            longest = max(longest, whole)
            alone += plan.timing * pace.of_a_pass(min(TIMED_STEPS, plan.steps_of(card)))
    return ROOM * (max(total / workers, longest) + alone)


def fitted(
    plan: Plan,
    seconds: float,
    left: float,
    paces: Paces,
    workers: int,
    contenders_for: ContendersFor,
    made: int = 0,
) -> Plan:
    """The race that is nearest to the one asked for and fits, with a remark that says what was given up.

    Trials are given up first, then seeds, then the length of runs, because a shorter schedule answers another question.
    How long a script's run is, is not the race's to say.

    Args:
        plan: as asked for.
        seconds: the budget, for the remark.
        left: what is left of it.
        paces: of every contender on every task.
        workers: processes side by side.
        contenders_for: who races with so many trials, which decide what is searched.
        made: trials of every contender that are there already.

    Raises:
        BudgetError: not even the smallest fits.
    """
    for smaller in _smaller(plan, contenders_for):
        needed = expected_seconds(smaller, paces, workers, made)
        if needed <= left:
            takes = f"The plan takes about {duration(needed)}{_PACKED if any(c.packs for c in plan.cards) else ''}."
            remark = f"Budget {duration(seconds)}: {_given_up(plan, smaller)} {takes}"
            return replace(smaller, remarks=(*plan.remarks, remark))
    rest = f"{duration(left)} of it are" if left > 0 else "nothing of it is"
    raise BudgetError(
        f"the budget of {duration(seconds)} is too short: {rest} left after looking at the tasks, "
        f"and the smallest race of {count(len(plan.contenders), 'contender')} takes about {duration(needed)} here; "
        "name fewer optimizers or tasks, or allow more time"
    )


def _smaller(plan: Plan, contenders_for: ContendersFor) -> Iterator[Plan]:
    """Races from the one asked for to the smallest, in the order in which they are preferred."""
    fewest_trials = min(plan.trials, FEWEST_TRIALS_TO_EXTEND)
    fewest_seeds = min(plan.seeds, FEWEST_SEEDS)
    part = 1
    shortest = SHORTEST if all(plan.steps_of(card) for card in plan.cards) else 1
    while part <= shortest:
        shorter = plan if part == 1 else _shortened(plan, part)
        for trials in range(plan.trials, fewest_trials - 1, -1):
            yield replace(shorter, trials=trials, contenders=contenders_for(trials))
        for seeds in range(plan.seeds - 1, fewest_seeds - 1, -1):
            yield replace(shorter, trials=fewest_trials, seeds=seeds, contenders=contenders_for(fewest_trials))
        part *= 2


def _shortened(plan: Plan, part: int) -> Plan:
    cards = tuple(replace(card, steps=max(1, plan.steps_of(card) // part)) for card in plan.cards)
    return replace(plan, cards=cards, steps=None)


def _given_up(plan: Plan, smaller: Plan) -> str:
    parts = []
    if smaller.trials < plan.trials:
        parts.append(f"{plan.trials - smaller.trials} of {plan.trials} trials each")
    if smaller.seeds < plan.seeds:
        parts.append(f"{plan.seeds - smaller.seeds} of {plan.seeds} seeds each")
    shorter = [
        f"{card.name} {smaller.steps_of(small)} of {plan.steps_of(card)} steps a run"
        for card, small in zip(plan.cards, smaller.cards, strict=True)
        if smaller.steps_of(small) < plan.steps_of(card)
    ]
    if shorter:
        parts.append(f"the length of runs ({', '.join(shorter)})")
    return f"given up for it: {', '.join(parts)}." if parts else "nothing had to be given up for it."


def _run_seconds(card: TaskCard, pace: Pace, steps: int) -> float:
    return pace.first_seconds + steps * pace.step_seconds + (EVALUATIONS + 2) * card.evaluation_seconds
