"""How many seeds it would take: the rule of sample sizes, for what a race could not tell apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from piste.race.result import Standing
from piste.race.words import number

# Quantiles of the normal distribution for a 95 % interval and for finding a true difference in four races of five.
Z = 1.960 + 0.842


def seeds_needed(deviation: float, difference: float, z: float = Z) -> int:
    """Seeds that each of two contenders needs before a difference of their means shows: n = 2 (z sd / delta)^2.

    Args:
        deviation: standard deviation of a score over seeds.
        difference: what is to be resolved, not 0.
        z: sum of the quantiles of level and power.

    >>> from piste.race.power import seeds_needed
    >>> seeds_needed(0.01, 0.01), seeds_needed(0.01, 0.001)
    (16, 1571)
    """
    return max(2, math.ceil(2 * (z * deviation / difference) ** 2))


def unresolved(standings: Sequence[Standing]) -> str:
    """What it takes to tell the leader from the nearest of its group, in a sentence; empty where nothing can be said.

    Contenders are compared seed by seed, so the deviation is that of the differences over the root of two: what is
    common to a seed has left it.

    Args:
        standings: of one task, leader first.
    """
    if not standings:
        return ""
    leader, *others = standings
    tied = [standing for standing in others if standing.tied and len(standing.scores) == len(leader.scores) > 1]
    nearest = min(tied, key=lambda standing: abs(standing.difference), default=None)
    if nearest is None or nearest.difference == 0:
        return ""
    differences = [own - best for own, best in zip(nearest.scores, leader.scores, strict=True)]
    needed = seeds_needed(statistics.stdev(differences) / math.sqrt(2), nearest.difference)
    if needed <= len(differences):
        return ""
    return (
        f"To tell {leader.contender} from {nearest.contender} needs about {needed:,} seeds, if their difference is the "
        f"{number(abs(nearest.difference), 2)} seen here."
    )
