"""The verdict of a task in words, and what must be said beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from piste.race.power import unresolved
from piste.race.result import Standing
from piste.race.search import redraw
from piste.race.statistics import LEVEL, detectable
from piste.race.words import listing, number, percent, size

# Step times closer than this are the same; then the smaller optimizer state is the cheaper one.
_SAME_TIME = 0.05
# Of each contender, the validation scores of its trials in the order of the search, without extensions.
Searches = Mapping[str, Sequence[float]]
# Contenders that a verdict names; the others are counted, and stand in the table.
NAMED = 3


def recommended(standings: Sequence[Standing]) -> Standing | None:
    """The cheapest of the leader's group: least time a step, and of equally fast ones the least state.

    From a single seed, which cannot tell a tie, it is the one that scored best.
    """
    if standings and len(standings[0].scores) == 1:
        return standings[0]
    group = [standing for standing in standings if standing.tied]
    if not group:
        return None
    times = [standing.cost.mean_step_seconds for standing in group if not math.isnan(standing.cost.mean_step_seconds)]
    limit = min(times, default=math.inf) * (1 + _SAME_TIME)
    fast = [standing for standing in group if standing.cost.mean_step_seconds <= limit] or group
    return min(fast, key=lambda standing: standing.cost.state_bytes)  # of equal ones the first, which scored best


def verdict(task: str, metric: str, higher_is_better: bool, standings: Sequence[Standing]) -> str:
    """One or two sentences: who wins, or that no difference was found and what is the cheapest.

    Args:
        task, metric, higher_is_better: as in the task's result.
        standings: leader first, then its group, then the others.
    """
    leader = standings[0] if standings and standings[0].scores else None
    if leader is None:
        yet = " yet" if any(standing.is_open for standing in standings) else ""
        return f"No verdict on {task}{yet}: no contender has been confirmed on every seed."
    best = recommended(standings)
    at = f"{metric} {_number(leader.mean)}"
    if len(leader.scores) < 2:
        return (
            f"{leader.contender} scored best on {task} ({at}), but one seed cannot tell a difference from chance; "
            "race with --seeds 5 for a verdict."
        )
    others = [standing for standing in standings if standing.tied and standing is not leader]
    if len(standings) == 1:
        return f"{leader.contender} reached {at} [{_interval(leader)}] on {task}; it raced alone."
    if not others:
        return _win(task, higher_is_better, leader, standings[1], at)
    assert best is not None
    group = [standing.contender for standing in standings if standing.tied]
    between = f"the {len(group)} best" if len(group) > NAMED else "them"
    return (
        f"No difference found on {task} between {listing(group, NAMED)} "
        f"({at} [{_interval(leader)}] for the best mean). "
        f"Take {best.contender}, the cheapest of {between}: {_cost_words(best)}.{_behind(standings)}"
        f"{_unresolved(standings)}"
    )


def _win(task: str, higher_is_better: bool, leader: Standing, second: Standing, at: str) -> str:
    text = f"{leader.contender} wins on {task}: {at} [{_interval(leader)}] at lr {_lr(leader)}"
    if not second.scores:
        return f"{text}; no other contender finished."
    if second.failures and second.difference_low <= 0 <= second.difference_high:
        return f"{text}; the next, {second.contender}, lost runs. It costs {_cost_words(leader)}."
    ahead = "higher" if higher_is_better else "lower"
    low, high = sorted((abs(second.difference_low), abs(second.difference_high)))
    return (
        f"{text}, {_number(abs(second.difference))} [{_number(low)}, {_number(high)}] {ahead} than the next, "
        f"{second.contender}. It costs {_cost_words(leader)}."
    )


def caveats(standings: Sequence[Standing], searches: Searches, higher_is_better: bool) -> list[str]:
    """What a reader of the verdict must know: what went unseen, what hangs on a draw, what it costs.

    Args:
        standings: leader first.
        searches: of each contender.
        higher_is_better: direction of the score.
    """
    best = recommended(standings)
    if best is None or len(best.scores) < 2:
        return []
    found = [_unseen(standings), _fragile(standings, searches, higher_is_better), _edge(best), *_price(best, standings)]
    return [caveat for caveat in found if caveat]


def _unseen(standings: Sequence[Standing]) -> str:
    """How large a difference a tie may hide."""
    leader, *others = standings
    tied = [standing for standing in others if standing.tied and standing.scores]
    if not tied:
        return ""
    scored = sum(bool(standing.scores) for standing in standings)
    pairs = scored * (scored - 1) // 2
    least = max(detectable(np.subtract(standing.scores, leader.scores), pairs) for standing in tied)
    if not least:
        return ""
    means = [standing.mean for standing in standings if standing.scores]
    span = max(means) - min(means)
    if least > span:
        return (
            f"No difference found is not equality: with {len(leader.scores)} seeds not even the largest difference "
            f"seen here, {number(span, 2)}, can be told from chance."
        )
    return (
        f"No difference found is not equality: these {len(leader.scores)} seeds find a true difference of "
        f"{number(least, 2)} in four races of five, and may miss a smaller one."
    )


def _fragile(standings: Sequence[Standing], searches: Searches, higher_is_better: bool) -> str:
    """Whether a lead would survive other trials and other seeds."""
    leader, *others = standings
    second = next((standing for standing in others if standing.scores), None)
    if second is None or second.tied:
        return ""
    names = (leader.contender, second.contender)
    trials = (searches[names[0]], searches[names[1]])
    if len(trials[0]) != len(trials[1]) or len(trials[0]) < 2:
        return ""
    found = redraw(trials, (leader.scores, second.scores), higher_is_better)
    if found.ahead >= LEVEL:
        return ""
    return (
        f"The lead hangs on the draw of learning rates: with trials and seeds drawn anew, {leader.contender} comes out "
        f"ahead of {second.contender} in {percent(found.ahead)} of studies."
    )


def _edge(best: Standing) -> str:
    if not best.edge:
        return ""
    side = {"low": "lowest", "high": "highest"}[best.edge]
    return f"The best lr of {best.contender} is the {side} that was tried; a better one may lie beyond."


def _price(best: Standing, standings: Sequence[Standing]) -> list[str]:
    """What the contender to take costs more than the next one."""
    other = next((standing for standing in standings if standing is not best and standing.scores), None)
    if other is None:
        return []
    found = []
    passes, others = best.cost.gradient_evaluations, other.cost.gradient_evaluations
    if others and passes > others:
        found.append(
            f"{best.contender} makes {number(passes / others, 2)} times the gradient evaluations of {other.contender} "
            "in equal steps."
        )
    slower = (
        best.cost.mean_step_seconds / other.cost.mean_step_seconds - 1 if other.cost.mean_step_seconds else math.nan
    )
    if slower > _SAME_TIME:
        found.append(f"A step of {best.contender} takes {percent(slower)} longer than one of {other.contender}.")
    return found


def _unresolved(standings: Sequence[Standing]) -> str:
    words = unresolved(standings)
    return f" {words}" if words else ""


def _behind(standings: Sequence[Standing]) -> str:
    names = [standing.contender for standing in standings if not standing.tied and standing.scores]
    lost = [standing.contender for standing in standings if not standing.scores]
    behind = f" Behind them: {listing(names, NAMED)}." if names else ""
    return behind + (f" Without a result: {listing(lost, NAMED)}." if lost else "")


def _cost_words(standing: Standing) -> str:
    cost = standing.cost
    return f"{1000 * cost.mean_step_seconds:.3g} ms a step, {size(cost.state_bytes)} of optimizer state"


def _interval(standing: Standing) -> str:
    return f"{_number(standing.low)}, {_number(standing.high)}"


def _lr(standing: Standing) -> str:
    return f"{standing.best_hyperparameters['lr']:g}"


def _number(value: float) -> str:
    return f"{value:.4g}"
