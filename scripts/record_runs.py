"""Record the runs that tests/test_race_calibration.py draws its races from: one optimizer, many seeds, real data.

    python -m scripts.record_runs

Some minutes on one core. The recordings need not be made again when an optimizer changes: they stand for how scores of
real runs scatter, not for what an optimizer reaches.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from piste.race import environment
from piste.race.contenders import Contender, make_contenders
from piste.race.inspection import load_data
from piste.race.record import CONFIRM, TUNE, RunKey, RunRecord
from piste.race.task import load_task
from piste.race.training import run

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded"
STEPS = {"char_transformer": 120, "digits": 60}
SEEDS = 40
TRIALS = 16
# The best of the trials below, which are recorded too.
LRS = {"adamw": 4e-3, "sgd_momentum": 0.1}


def record(task_name: str) -> None:
    """All runs on one task, as lines of JSON."""
    task = load_task(task_name).task
    splits = load_data(task)
    lines = []
    for contender in make_contenders(list(LRS), ()):
        trials = [contender.lr_at((2 * place + 1) / (2 * TRIALS)) for place in range(TRIALS)]
        wanted = [(TUNE, 0, lr) for lr in trials]
        wanted += [(CONFIRM, seed, LRS[contender.optimizer]) for seed in range(1, SEEDS + 1)]
        for phase, seed, lr in wanted:
            key = _key(task_name, contender, phase, seed, lr)
            lines.append(_line(run(task, splits, contender, key, lambda step: None)))
    (RECORDED / f"{task_name}.jsonl").write_text("\n".join(lines) + "\n")


def _key(task_name: str, contender: Contender, phase: str, seed: int, lr: float) -> RunKey:
    return RunKey(
        task=task_name,
        task_hash="",
        contender=contender.name,
        optimizer=contender.optimizer,
        schedule=contender.schedule,
        hyperparameters={"lr": lr},
        steps=STEPS[task_name],
        seed=seed,
        phase=phase,
        device="cpu",
        versions=environment.versions(),
    )


def _line(made: RunRecord) -> str:
    valid = [float(f"{value:.6g}") for value in made.curve.valid_metric]
    test = None if made.test_metric is None else float(f"{made.test_metric:.6g}")
    named = {"optimizer": made.key.optimizer, "phase": made.key.phase, "seed": made.key.seed, "lr": made.key.lr}
    return json.dumps({**named, "status": made.status, "step": made.curve.step, "valid": valid, "test": test})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in STEPS:
        record(name)
