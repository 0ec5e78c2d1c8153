"""Which runs a race makes, decided from the runs it has: killed anywhere, it goes on where it was.

1. *Tune.* Every contender gets the same number of trials: first its preset as it is, then quasi-random points around
   its own prior (or, asked for, points that TPE chooses by the results so far), all on one seed. Where the best is at
   an end of what was tried, the range is extended, at most twice. With ``screens``, all trials run on a schedule of
   half the length first, to its end, and the better half goes on.
2. *Confirm.* The best setting (on the validation split) is trained again on fresh seeds, the same ones for every
   contender, and scored on the report split, which nothing else has used.
3. *Time.* Contenders take turns at short runs, one at a time, with nothing beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from piste.race import sampling
from piste.race.contenders import Contender
from piste.race.inspection import TaskCard
from piste.race.record import CONFIRM, SCREEN, TIME, TUNE, RunKey, RunRecord

Records = Mapping[str, RunRecord]
Settings = dict[str, float]

TUNE_SEED = 0
# With two trials one of them is always an edge; extending then would say nothing.
FEWEST_TRIALS_TO_EXTEND = 3
MOST_EXTENSIONS = 2
# An extension goes one mean spacing beyond the edge, but not less than this: twenty trials are dense.
LEAST_EXTENSION = 0.25  # decades
TIMED_STEPS = 60
_ORDER = (SCREEN, TUNE, CONFIRM, TIME)


@dataclass(frozen=True)
class Plan:
    """A race, fully decided: given the finished runs, the next ones follow.

    Args:
        cards: the tasks.
        contenders: who races on each of them.
        steps: steps of a run; None leaves it to each task.
        trials: settings tried for each contender, times the number of combinations of swept values.
        seeds: confirmation runs for each contender.
        device: such as ``"cpu"``.
        versions: of python, torch and piste.
        sampler: ``"halton"`` or ``"tpe"``.
        screens: how often trials are halved on shorter schedules before they run at full length.
        timing: rounds of timing passes; 0 for none.
        machine: fingerprint of where timing passes run.
        target: the validation score whose first passing is timed; None for that of the tuned baselines.
        remarks: what has to be said about how this plan came about.
    """

    cards: tuple[TaskCard, ...]
    contenders: tuple[Contender, ...]
    steps: int | None
    trials: int
    seeds: int
    device: str
    versions: dict[str, str]
    sampler: str = sampling.HALTON
    screens: int = 0
    timing: int = 0
    machine: str = ""
    target: float | None = None
    remarks: tuple[str, ...] = ()

    def steps_of(self, card: TaskCard) -> int:
        """Steps of each run of a task."""
        return self.steps or card.steps

    @property
    def trials_each(self) -> int:
        """Trials of every contender: as many learning rates for each swept value of the one that has most of them."""
        return self.trials * max(len(contender.cells) for contender in self.contenders)

    @property
    def smallest_number_of_runs(self) -> int:
        """All trials and confirmations, without extensions and timing passes."""
        return len(self.cards) * len(self.contenders) * (self.trials_each + self.seeds)

    def key(
        self,
        card: TaskCard,
        contender: Contender,
        hyperparameters: Mapping[str, float],
        seed: int,
        phase: str,
        steps: int | None = None,
    ) -> RunKey:
        """The key of one run."""
        return RunKey(
            task=card.name,
            task_hash=card.task_hash,
            contender=contender.name,
            optimizer=contender.optimizer,
            schedule=contender.schedule,
            hyperparameters=dict(hyperparameters),
            steps=self.steps_of(card) if steps is None else steps,
            seed=seed,
            phase=phase,
            device=self.device,
            versions=self.versions,
            # A timing pass of another machine is another run: wall times are never compared across machines.
            machine=self.machine if phase == TIME else "",
            # What is confirmed and timed is trained alone.
            packed=card.packs and phase in (SCREEN, TUNE),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Back from plain data.

        Raises:
            KeyError, TypeError: it is not that of a plan.
        """
        cards = tuple(TaskCard(**{**card, "examples": tuple(card["examples"])}) for card in content["cards"])
        contenders = tuple(Contender.from_json(contender) for contender in content["contenders"])
        remarks = tuple(content.get("remarks", ()))
        return cls(**{**content, "cards": cards, "contenders": contenders, "remarks": remarks})


@dataclass(frozen=True)
class Tuning:
    """How far the search for one contender's setting on one task is.

    Args:
        runs: keys of all trials asked for so far, screening and extensions included.
        missing: those that have not been made.
        best: the record with the best validation score; None while trials are missing or if none finished.
        edge: ``"low"``, ``"high"`` or ``""``: whether the best learning rate is at an end of what was tried.
        extensions: trials beyond the equal number.
        edges: the same as ``edge`` for each dimension whose best is at an end.
        unknown: trials that will be asked for once the missing ones are there.
    """

    runs: list[RunKey]
    missing: list[RunKey]
    best: RunRecord | None
    edge: str
    extensions: int
    edges: dict[str, str] = field(default_factory=dict)
    unknown: int = 0


def tuning(plan: Plan, card: TaskCard, contender: Contender, records: Records) -> Tuning:
    """Where the search for a contender's setting stands, from the records alone."""
    runs: list[RunKey] = []
    points, unknown = _points(plan, card, contender, records)
    for stage in range(plan.screens, 0, -1):
        # A whole run on a schedule of its own, and never the beginning of a longer one: ranks flip while rates fall.
        keys = [plan.key(card, contender, p, TUNE_SEED, SCREEN, _halved(plan, card, stage)) for p in points]
        runs += keys
        missing = [key for key in keys if key.id not in records]
        if missing:
            return Tuning(runs, missing, None, "", 0, unknown=sum(_survivors(len(points), stage)))
        points = _better_half(card, keys, records)
    added = 0
    for round_ in range(MOST_EXTENSIONS + 1):
        keys = [plan.key(card, contender, point, TUNE_SEED, TUNE) for point in points]
        missing = [key for key in keys if key.id not in records]
        best = None if missing or unknown else best_trial(card, [records[key.id] for key in keys])
        edges = {} if best is None else _edges(contender, best.key, [*runs, *keys])
        further = [] if best is None else _extensions(plan, contender, best.key, edges, [*runs, *keys])
        if not further or round_ == MOST_EXTENSIONS or plan.trials < FEWEST_TRIALS_TO_EXTEND:
            break
        points, added = points + further, added + len(further)
    return Tuning([*runs, *keys], missing, best, edges.get("lr", ""), added, edges, unknown)


def confirmations(plan: Plan, card: TaskCard, contender: Contender, best: Mapping[str, float] | float) -> list[RunKey]:
    """The confirmation runs of a setting (or of a learning rate alone), in seed order. No seed tuned anything."""
    seeds = range(TUNE_SEED + 1, TUNE_SEED + 1 + plan.seeds)
    chosen = best if isinstance(best, Mapping) else {"lr": best}
    return [plan.key(card, contender, chosen, seed, CONFIRM) for seed in seeds]


def timings(plan: Plan, card: TaskCard, contender: Contender, best: Mapping[str, float]) -> list[RunKey]:
    """The timing passes of a setting, a round each."""
    steps = min(TIMED_STEPS, plan.steps_of(card) or TIMED_STEPS)  # a script is ended after so many
    return [plan.key(card, contender, best, round_, TIME, steps) for round_ in range(plan.timing)]


Asked = tuple[TaskCard, Contender, RunKey]


@dataclass(frozen=True)
class Lane:
    """The runs of one contender on one task that the plan asks for, as far as the records decide them.

    Args:
        card, contender: which.
        search: how far it is.
        confirmations, timings: of the setting that was found; none before.
        missing: those of search and confirmation that have not been made, each behind what decides its turn.
    """

    card: TaskCard
    contender: Contender
    search: Tuning
    confirmations: list[RunKey]
    timings: list[RunKey]
    missing: list[tuple[tuple[int, int], Asked]]


def lane(plan: Plan, card: TaskCard, contender: Contender, records: Records) -> Lane:
    """Where one contender stands on one task; no record of another one or of another task changes it."""
    search = tuning(plan, card, contender, records)
    confirmed: list[RunKey] = []
    passes: list[RunKey] = []
    if search.best is not None:
        confirmed = confirmations(plan, card, contender, search.best.key.hyperparameters)
        passes = timings(plan, card, contender, search.best.key.hyperparameters)
    missing = [turn for turn in _turns(card, contender, search.runs + confirmed) if turn[1][2].id not in records]
    return Lane(card, contender, search, confirmed, passes, missing)


def lanes(plan: Plan, records: Records) -> list[Lane]:
    """Every contender on every task."""
    return [lane(plan, card, contender, records) for card in plan.cards for contender in plan.contenders]


def keys_so_far(plan: Plan, records: Records) -> Iterator[Asked]:
    """Every run the plan asks for, as far as the records decide it."""
    return asked_of(lanes(plan, records))


def asked_of(known: Iterable[Lane]) -> Iterator[Asked]:
    """The same from what is known of all contenders on all tasks."""
    for each_card in _by_card(known):
        for each in each_card:
            for key in each.search.runs + each.confirmations:
                yield each.card, each.contender, key
        for _, asked in _passes(each_card):
            yield asked


def next_runs(plan: Plan, records: Records) -> list[Asked]:
    """The runs that can be made now, in the order to make them."""
    return next_of(lanes(plan, records), records)


def next_of(known: Iterable[Lane], records: Records) -> list[Asked]:
    """The runs that can be made now, in the order to make them.

    Contenders take turns, so that what an idle or a busy machine does to the timings falls on all alike; trials come
    before confirmations, of which more become known meanwhile, and timing passes last.
    """
    missing: list[tuple[tuple[int, int], Asked]] = []
    for each_card in _by_card(known):
        missing += (turn for each in each_card for turn in each.missing)
        missing += (turn for turn in _passes(each_card) if turn[1][2].id not in records)
    return [asked for _, asked in sorted(missing, key=lambda turn: turn[0])]


def _by_card(known: Iterable[Lane]) -> list[list[Lane]]:
    return [list(group) for _, group in groupby(known, key=lambda each: each.card.reference)]


def _passes(known: list[Lane]) -> list[tuple[tuple[int, int], Asked]]:
    """Timing passes of one task: turns can only be taken once everyone is there, and nothing else is to be run."""
    if any(each.missing for each in known):
        return []
    return [turn for each in known for turn in _turns(each.card, each.contender, each.timings)]


def _turns(card: TaskCard, contender: Contender, keys: Iterable[RunKey]) -> Iterator[tuple[tuple[int, int], Asked]]:
    """Each run behind its phase and its place in that."""
    place: Counter[str] = Counter()
    for key in keys:
        yield (_ORDER.index(key.phase), place[key.phase]), (card, contender, key)
        place[key.phase] += 1


def best_trial(card: TaskCard, trials: list[RunRecord]) -> RunRecord | None:
    """The finished trial with the best validation metric; the lower validation loss, then the lower lr, break ties."""
    return min((trial for trial in trials if trial.finished), key=lambda trial: _rank(card, trial), default=None)


def _points(plan: Plan, card: TaskCard, contender: Contender, records: Records) -> tuple[list[Settings], int]:
    """The settings of the equal number of trials, and how many of them are not known yet."""
    if plan.sampler == sampling.HALTON:
        return sampling.points(contender, plan.trials_each), 0

    def loss(settings: Settings) -> float | None:
        """What a trial came to, lower is better; None if it has not been made."""
        record = records.get(plan.key(card, contender, settings, TUNE_SEED, TUNE).id)
        if record is None:
            return None
        return (-1 if card.higher_is_better else 1) * record.curve.valid_metric[-1] if record.finished else math.inf

    return sampling.adaptive_points(contender, plan.trials_each, loss)


def _halved(plan: Plan, card: TaskCard, stage: int) -> int:
    return max(1, plan.steps_of(card) >> stage)


def _survivors(count: int, stages: int) -> list[int]:
    """How many trials are left after each halving."""
    left = [count]
    for _ in range(stages):
        left.append(math.ceil(left[-1] / 2))
    return left[1:]


def _better_half(card: TaskCard, keys: list[RunKey], records: Records) -> list[Settings]:
    finished = [records[key.id] for key in keys if records[key.id].finished]
    ranked = sorted(finished, key=lambda trial: _rank(card, trial))
    return [trial.key.hyperparameters for trial in ranked[: math.ceil(len(keys) / 2)]]


def _rank(card: TaskCard, trial: RunRecord) -> tuple[float, float, float]:
    sign = -1.0 if card.higher_is_better else 1.0
    return sign * trial.curve.valid_metric[-1], trial.curve.valid_loss[-1], trial.key.lr


def _edges(contender: Contender, best: RunKey, tried: list[RunKey]) -> dict[str, str]:
    """Of each dimension whose best value is the lowest or highest tried, which of the two."""
    found = {}
    for name in ("lr", *(dimension.name for dimension in contender.space)):
        values = {contender.value(name, key.hyperparameters) for key in tried}
        own = contender.value(name, best.hyperparameters)
        if len(values) > 1 and own in (min(values), max(values)):
            found[name] = "low" if own == min(values) else "high"
    return found


def _extensions(
    plan: Plan, contender: Contender, best: RunKey, edges: Mapping[str, str], tried: list[RunKey]
) -> list[Settings]:
    """The best setting with one dimension moved beyond its edge, for each that can be; swept lists stay."""
    lr = contender.lr_range
    known = [key.hyperparameters for key in tried]
    found = []
    for dimension in (lr, *contender.sampled):
        if dimension.name not in edges:
            continue
        own = contender.value(dimension.name, best.hyperparameters)
        decades = contender.decades if dimension is lr else dimension.decades
        value = dimension.beyond(edges[dimension.name], own, max(decades / plan.trials, LEAST_EXTENSION))
        if value is not None and {**best.hyperparameters, dimension.name: value} not in known:
            found.append({**best.hyperparameters, dimension.name: value})
    return found
