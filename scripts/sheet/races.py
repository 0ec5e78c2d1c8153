"""Which races were run for docs/sheet.md, and what of each run is kept beside the page.

Every race is an ordinary command, so that anybody can repeat one alone; runs of different races share their seeds, and
with them initial weights and batch order, so that they may be compared seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from piste.race.record import CONFIRM, TUNE, RunRecord
from piste.race.store import Store
from piste.race.study import stored_result, stored_settings

KEPT = Path(__file__).resolve().parent.parent.parent / "docs" / "sheet"
_HEAD = "races.json"

TASKS = ("digits", "zipf_bigram", "char_transformer", "digits_noise", "digits_mixer", "digits_vae")
_ON_VIT = "adamw,sgd_momentum,sam+adamw,sam+sgd_momentum,adan,ranger,ranger21,lamb,adabelief,amos,muon"
_ON_CARTPOLE = "adamw,sgd_momentum,rmsprop,adan,adabelief,rangeradabelief,ranger,ranger21,amos,lookahead+adamw"
MAIN = "main"


@dataclass(frozen=True)
class Race:
    """One command: ``piste race TASK ...``.

    Args:
        arm: what sets its contenders apart from those of the main race; runs are compared across arms.
        task: a built-in task.
        optimizers: as the option takes them.
        seeds: confirmation runs.
        options: others, as on the command line.
    """

    arm: str
    task: str
    optimizers: str
    seeds: int = 10
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.task if self.arm == MAIN else f"{self.arm}_{self.task}".replace(" ", "_").replace("=", "_")

    def arguments(self, out: Path) -> list[str]:
        """What stands after ``piste race``. No timing passes: times were taken elsewhere, on a quiet machine."""
        fixed = ["--trials", "5", "--seeds", str(self.seeds), "--timing", "0"]
        return [self.task, "--optimizers", self.optimizers, *self.options, *fixed, "--out", str(out / self.folder)]


def _sweep(name: str, tasks: Sequence[str], values: Sequence[str], optimizers: str) -> list[Race]:
    """A race for each value, so that each has its own search for the learning rate."""
    arms = [(f"{name}={value}", task) for task in tasks for value in values]
    return [
        Race(arm, task, optimizers, 20 if task == "cartpole" else 10, ("--sweep", arm.replace(" ", "")))
        for arm, task in arms
    ]


RACES = (
    *(Race(MAIN, task, "cheatsheet,muon,soap") for task in TASKS),
    Race(MAIN, "digits_vit", _ON_VIT),
    Race(MAIN, "cartpole", _ON_CARTPOLE, 20),
    *(Race("one_cycle", task, "ranger", options=("--schedules", "one_cycle")) for task in TASKS),
    *_sweep("eps", ("digits", "char_transformer"), ("1e-4", "0.01", "0.1", "1"), "adamw,ranger"),
    *_sweep("eps", ("digits", "char_transformer", "cartpole"), ("1e-8", "1e-12", "1e-16"), "rangeradabelief"),
    *(Race("madgrad", task, "ranger21_madgrad") for task in ("char_transformer", "digits_vit")),
)


@dataclass(frozen=True)
class Made:
    """What is kept of a run.

    Args:
        score: on the report split for a confirmation, on the validation split for a trial; None if it was lost.
        valid: the validation metric along a confirmation, at ``step``.
    """

    arm: str
    task: str
    optimizer: str
    schedule: str
    phase: str
    seed: int
    settings: dict[str, float]
    status: str
    score: float | None
    steps: int
    evaluations: int
    state_bytes: int
    parameters: int
    step: list[int] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)


def keep(results: Path) -> None:
    """Write down, beside the page, what the races in a folder came to."""
    KEPT.mkdir(exist_ok=True)
    head: dict[str, Any] = {"races": []}
    lines: dict[str, list[str]] = {}
    for race in RACES:
        store = Store(results / race.folder)
        found, settings = stored_result(store), stored_settings(store)
        (task,) = found.results
        head["higher_is_better"] = {**head.get("higher_is_better", {}), task.task: task.higher_is_better}
        head["metric"] = {**head.get("metric", {}), task.task: task.metric_name}
        head["machine"] = found.machine
        head["versions"] = found.records[0].key.versions
        best = {standing.contender: standing.best_hyperparameters for standing in task.standings}
        edges = {standing.optimizer: standing.edge for standing in task.standings if standing.edge}
        shown = {"arm": race.arm, "task": race.task, "trials": settings.trials, "seeds": settings.seeds}
        head["races"].append({**shown, "created": found.created, "edges": edges})
        kept = [
            made
            for made in found.records
            if made.key.phase == TUNE
            or (made.key.phase == CONFIRM and made.key.hyperparameters == best[made.key.contender])
        ]
        lines.setdefault(race.task, []).extend(json.dumps(_short(_made(race.arm, made))) for made in kept)
    (KEPT / _HEAD).write_text(json.dumps(head, indent=1) + "\n")
    for task_name, texts in lines.items():
        (KEPT / f"{task_name}.jsonl").write_text("\n".join(texts) + "\n")


def kept() -> tuple[dict[str, Any], list[Made]]:
    """What was written down: about the races, and the runs."""
    head = json.loads((KEPT / _HEAD).read_text())
    runs = [
        Made(**json.loads(line))
        for task in head["metric"]
        for line in (KEPT / f"{task}.jsonl").read_text().splitlines()
    ]
    return head, runs


def _made(arm: str, record: RunRecord) -> Made:
    key, curve = record.key, record.curve
    confirms = key.phase == CONFIRM
    last = curve.valid_metric[-1] if curve.valid_metric else None
    score = (record.test_metric if confirms else last) if record.finished else None
    return Made(
        *(arm, key.task, key.optimizer, key.schedule, key.phase, key.seed, key.hyperparameters, record.status),
        None if score is None else _digits(score),
        *(key.steps, record.cost.gradient_evaluations, record.cost.state_bytes, record.cost.parameters),
        step=curve.step if confirms else [],
        valid=[_digits(value) for value in curve.valid_metric] if confirms else [],
    )


def _short(made: Made) -> dict[str, Any]:
    """Without what is empty."""
    return {name: value for name, value in asdict(made).items() if value != []}


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
