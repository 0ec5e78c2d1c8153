"""Which runs a race makes, decided from the runs it has: killed anywhere, it goes on where it was.

1. *Tune.* Every contender gets the same number of learning rates, quasi-random around its own prior, all on one seed.
   Where the best of them is the lowest or highest tried, the range is extended, at most twice.
2. *Confirm.* The best learning rate (on the validation split) is trained again on fresh seeds, the same ones for every
   contender, and scored on the report split, which nothing else has used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import qmc  # type: ignore[import-untyped]

from piste.race.contenders import Contender, rounded
from piste.race.inspection import TaskCard
from piste.race.record import CONFIRM, TUNE, RunKey, RunRecord

Records = Mapping[str, RunRecord]

TUNE_SEED = 0
# With two trials one of them is always an edge; extending then would say nothing.
FEWEST_TRIALS_TO_EXTEND = 3
MOST_EXTENSIONS = 2
_SEQUENCE_SEED = 20  # of the scrambling; one sequence for all contenders, so that all look at the same positions


@dataclass(frozen=True)
class Plan:
    """A race, fully decided: given the finished runs, the next ones follow.

    Args:
        cards: the tasks.
        contenders: who races on each of them.
        steps: steps of a run; None leaves it to each task.
        trials: learning rates tried for each contender.
        seeds: confirmation runs for each contender.
        device: such as ``"cpu"``.
        versions: of python, torch and piste.
    """

    cards: tuple[TaskCard, ...]
    contenders: tuple[Contender, ...]
    steps: int | None
    trials: int
    seeds: int
    device: str
    versions: dict[str, str]

    def steps_of(self, card: TaskCard) -> int:
        """Steps of each run of a task."""
        return self.steps or card.steps

    @property
    def smallest_number_of_runs(self) -> int:
        """All trials and confirmations, without extensions."""
        return len(self.cards) * len(self.contenders) * (self.trials + self.seeds)

    def key(self, card: TaskCard, contender: Contender, lr: float, seed: int, phase: str) -> RunKey:
        """The key of one run."""
        return RunKey(
            task=card.name,
            task_hash=card.task_hash,
            contender=contender.name,
            optimizer=contender.optimizer,
            schedule=contender.schedule,
            hyperparameters={"lr": lr},
            steps=self.steps_of(card),
            seed=seed,
            phase=phase,
            device=self.device,
            versions=self.versions,
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
        contenders = tuple(Contender(**contender) for contender in content["contenders"])
        return cls(**{**content, "cards": cards, "contenders": contenders})


@dataclass(frozen=True)
class Tuning:
    """How far the search for one contender's learning rate on one task is.

    Args:
        runs: keys of all trials asked for so far, extensions included.
        missing: those that have not been made.
        best: the record with the best validation score; None while trials are missing or if none finished.
        edge: ``"low"``, ``"high"`` or ``""``: whether the best is at an end of what was tried.
        extensions: trials beyond the equal number.
    """

    runs: list[RunKey]
    missing: list[RunKey]
    best: RunRecord | None
    edge: str
    extensions: int


def tuning(plan: Plan, card: TaskCard, contender: Contender, records: Records) -> Tuning:
    """Where the search for a contender's learning rate stands, from the records alone."""
    lrs = [contender.lr_at(position) for position in _positions(plan.trials)]
    for extensions in range(MOST_EXTENSIONS + 1):
        keys = [plan.key(card, contender, lr, TUNE_SEED, TUNE) for lr in lrs]
        missing = [key for key in keys if key.id not in records]
        best = None if missing else best_trial(card, [records[key.id] for key in keys])
        edge = "" if best is None else _edge(best.key.lr, lrs)
        if not edge or extensions == MOST_EXTENSIONS or plan.trials < FEWEST_TRIALS_TO_EXTEND:
            break
        lrs.append(_beyond(edge, lrs, contender.decades / plan.trials))
    return Tuning(keys, missing, best, edge, extensions)


def confirmations(plan: Plan, card: TaskCard, contender: Contender, lr: float) -> list[RunKey]:
    """The confirmation runs at a learning rate, in seed order. No seed of them was used for tuning."""
    seeds = range(TUNE_SEED + 1, TUNE_SEED + 1 + plan.seeds)
    return [plan.key(card, contender, lr, seed, CONFIRM) for seed in seeds]


def keys_so_far(plan: Plan, records: Records) -> Iterator[tuple[TaskCard, Contender, RunKey]]:
    """Every run the plan asks for, as far as the records decide it."""
    for card in plan.cards:
        for contender in plan.contenders:
            state = tuning(plan, card, contender, records)
            keys = state.runs
            if state.best is not None:
                keys = keys + confirmations(plan, card, contender, state.best.key.lr)
            for key in keys:
                yield card, contender, key


def next_runs(plan: Plan, records: Records) -> list[tuple[TaskCard, Contender, RunKey]]:
    """The runs that can be made now, in the order to make them.

    Contenders take turns, so that what an idle or a busy machine does to the timings falls on all alike; trials come
    before confirmations, of which more become known meanwhile.
    """
    missing: list[tuple[tuple[bool, int], tuple[TaskCard, Contender, RunKey]]] = []
    turns: dict[tuple[str, str, str], int] = {}
    for card, contender, key in keys_so_far(plan, records):
        lane = (card.reference, contender.name, key.phase)
        turns[lane] = turns.get(lane, -1) + 1
        if key.id not in records:
            missing.append(((key.phase == CONFIRM, turns[lane]), (card, contender, key)))
    return [run for _, run in sorted(missing, key=lambda entry: entry[0])]


def best_trial(card: TaskCard, trials: list[RunRecord]) -> RunRecord | None:
    """The finished trial with the best validation metric; the lower validation loss, then the lower lr, break ties."""
    sign = -1.0 if card.higher_is_better else 1.0
    finished = [trial for trial in trials if trial.finished]
    return min(
        finished,
        key=lambda trial: (sign * trial.curve.valid_metric[-1], trial.curve.valid_loss[-1], trial.key.lr),
        default=None,
    )


def _positions(count: int) -> list[float]:
    """Quasi-random positions in [0, 1]; more of them begin with the same ones, so that earlier trials stay useful."""
    sequence = qmc.Halton(d=1, scramble=True, seed=_SEQUENCE_SEED)
    return [float(position) for position in sequence.random(count)[:, 0]]


def _edge(lr: float, lrs: list[float]) -> str:
    if len(lrs) == 1:
        return ""
    return "low" if lr == min(lrs) else "high" if lr == max(lrs) else ""


def _beyond(edge: str, lrs: list[float], decades: float) -> float:
    """One mean spacing beyond the edge."""
    return rounded(min(lrs) / 10**decades if edge == "low" else max(lrs) * 10**decades)
