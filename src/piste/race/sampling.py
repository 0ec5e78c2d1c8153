"""Where in its space a contender's trials stand: quasi-random, or chosen by Optuna's TPE from the results so far.

Quasi-random points depend on nothing that is measured: what they are scored by can be changed afterwards, trials made
side by side are those made one by one, and a best at the edge means something (Bousquet et al. 2017, arXiv 1706.03200).
TPE can find a better setting in many dimensions, and gives all of that up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from scipy.stats import qmc  # type: ignore[import-untyped]

from piste.race.contenders import Contender
from piste.race.space import rounded

HALTON = "halton"
TPE = "tpe"
SAMPLERS = (HALTON, TPE)

Point = dict[str, float]

_SEQUENCE_SEED = 20  # of the scrambling; one sequence for all contenders, so that all look at the same positions
_LEAST_RANDOM = 3  # trials before TPE has anything to go by


class SamplerError(ValueError):
    """The sampler cannot be used here."""


def points(contender: Contender, count: int) -> list[Point]:
    """So many settings: the preset as it is at the centre of its range, then quasi-random ones, for each swept value.

    More of them begin with the same ones, so that earlier trials stay useful.
    """
    cells = contender.cells
    needed = math.ceil(count / len(cells))
    free: list[Point] = [{"lr": rounded(contender.lr_center)}]
    for first, *rest in _positions(1 + len(contender.sampled), max(0, needed - 1)):
        chosen = zip(contender.sampled, rest, strict=True)
        free.append(
            {"lr": contender.lr_at(first), **{dimension.name: dimension.at(place) for dimension, place in chosen}}
        )
    fixed = dict(contender.settings)
    return [{**fixed, **point, **cell} for point in free[:needed] for cell in cells][:count]


@lru_cache(maxsize=64)
def _positions(dimensions: int, count: int) -> tuple[tuple[float, ...], ...]:
    """The first points of the sequence. They are asked for again after every run, and scrambling takes its time."""
    sequence = qmc.Halton(d=dimensions, scramble=True, seed=_SEQUENCE_SEED)
    return tuple(tuple(map(float, position)) for position in sequence.random(count))


def adaptive_points(contender: Contender, count: int, loss: Callable[[Point], float | None]) -> tuple[list[Point], int]:
    """So many settings, of which those after the first half follow from how the ones before went.

    Args:
        contender: whose.
        count: how many.
        loss: how a trial ended, lower is better, inf if it was lost, None if it has not been made.

    Returns:
        The settings known so far, and the number of those that are not.

    Raises:
        SamplerError: Optuna is not installed.
    """
    found = points(contender, min(count, max(_LEAST_RANDOM, len(contender.cells), count // 2)))
    while len(found) < count:
        losses = [loss(point) for point in found]
        if any(value is None for value in losses):
            break
        past = tuple((tuple(point.items()), float(value or 0.0)) for point, value in zip(found, losses, strict=True))
        found.append(dict(_suggested(contender, past)))
    return found, count - len(found)


@lru_cache(maxsize=4096)
def _suggested(
    contender: Contender, past: tuple[tuple[tuple[tuple[str, float], ...], float], ...]
) -> tuple[tuple[str, float], ...]:
    """What TPE asks for after these trials; the same for the same trials."""
    optuna = optuna_or_refusal()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    swept = [dimension for dimension in contender.space if dimension.values]
    lr = contender.lr_range
    ranged = (lr, *contender.sampled)
    kinds = {
        **{dimension.name: optuna.distributions.FloatDistribution(0.0, 1.0) for dimension in ranged},
        **{each.name: optuna.distributions.CategoricalDistribution(each.values) for each in swept},
    }
    worst = max((value for _, value in past if math.isfinite(value)), default=0.0)
    sampler = optuna.samplers.TPESampler(seed=_SEQUENCE_SEED + len(past), n_startup_trials=1, multivariate=False)
    study = optuna.create_study(sampler=sampler)
    for settings, value in past:
        point = dict(settings)
        places = {each.name: each.position(contender.value(each.name, point)) for each in ranged}
        choices = {each.name: contender.value(each.name, point) for each in swept}
        # A lost trial is as bad as the worst: left out, it would be tried again and again.
        score = value if math.isfinite(value) else worst
        study.add_trial(optuna.create_trial(params=places | choices, distributions=kinds, value=score))
    asked = study.ask(kinds).params
    chosen = {each.name: contender.lr_at(asked["lr"]) if each is lr else each.at(asked[each.name]) for each in ranged}
    chosen |= {each.name: float(asked[each.name]) for each in swept}
    return tuple({**dict(contender.settings), **chosen}.items())


def optuna_or_refusal() -> Any:
    """Optuna, imported only when asked for.

    Raises:
        SamplerError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise SamplerError("--sampler tpe needs optuna, which comes with: pip install 'piste[tpe]'") from error
    return optuna
