"""A finished race handed on to TensorBoard, MLflow or Weights & Biases, which receive and are never read from."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from piste.race.record import RunRecord
from piste.race.result import StudyResult
from piste.race.words import single_line

from .files import ExportError

_SERIES: Final = ("train_loss", "valid_loss", "valid_metric", "lr", "gradient_norm")


def send(result: StudyResult, address: str) -> str:
    """Hand all runs of a race on.

    Args:
        result: the study.
        address: ``"tensorboard:FOLDER"``, ``"mlflow:URI"`` or ``"wandb:PROJECT"``.

    Returns:
        Where they went, in words.

    Raises:
        ExportError: the address names no sink, or its package is missing.
    """
    name, _, place = address.partition(":")
    if name not in SINKS or not place:
        legal = ", ".join(f"{sink}:{where}" for sink, (where, _) in SINKS.items())
        raise ExportError(f"{address!r} is not legal; legal: {legal}")
    try:
        SINKS[name][1](result, place)
    except ImportError as error:
        raise ExportError(f"{name} needs a package that is not installed: pip install {name}") from error
    return f"{len(result.records)} runs to {name} ({place})"


def _tensorboard(result: StudyResult, place: str) -> None:
    writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for run in result.records:
        writer = writer_class(str(Path(place) / _label(run, "/")))
        for step, values in _points(run):
            for series, value in values.items():
                writer.add_scalar(series, value, step)
        writer.add_hparams(_settings(run), _outcome(run), run_name=".")
        writer.close()


def _mlflow(result: StudyResult, place: str) -> None:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(place)
    mlflow.set_experiment(single_line(result.title) or "piste race")
    for run in result.records:
        with mlflow.start_run(run_name=_label(run, " ")):
            mlflow.set_tags({"piste.id": run.id, "status": run.status, "message": run.message})
            mlflow.log_params(_settings(run))
            for step, values in _points(run):
                mlflow.log_metrics(values, step=step)
            mlflow.log_metrics(_outcome(run))


def _wandb(result: StudyResult, place: str) -> None:
    wandb = importlib.import_module("wandb")
    for run in result.records:
        settings = {**_settings(run), "status": run.status, "message": run.message}
        # the service is asked only where the user has set it up
        mode = os.environ.get("WANDB_MODE", "offline")
        with wandb.init(
            project=place, name=_label(run, " "), group=run.key.contender, config=settings, mode=mode, reinit=True
        ) as sent:
            for step, values in _points(run):
                sent.log(values, step=step)
            sent.summary.update(_outcome(run))


def _points(run: RunRecord) -> Iterator[tuple[int, dict[str, float]]]:
    """The finite numbers of each evaluation."""
    for place, step in enumerate(run.curve.step):
        series = {name: getattr(run.curve, name, []) for name in _SERIES}
        values = {name: each[place] for name, each in series.items() if place < len(each)}
        yield step, {name: value for name, value in values.items() if math.isfinite(value)}


def _settings(run: RunRecord) -> dict[str, Any]:
    key = run.key
    return {
        **key.hyperparameters,
        **{
            name: getattr(key, name)
            for name in ("task", "contender", "optimizer", "schedule", "phase", "seed", "steps")
        },
    }


def _outcome(run: RunRecord) -> dict[str, float]:
    """Final numbers; those that are not known are left out."""
    found = {"test_loss": run.test_loss, "test_metric": run.test_metric, "step_seconds": run.cost.step_seconds}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _label(run: RunRecord, separator: str) -> str:
    """Task, contender, setting and seed; of names only what a path may hold."""
    parts = (run.key.task, run.key.contender, f"{run.key.phase}-lr{run.key.lr:g}-seed{run.key.seed}-{run.id[:6]}")
    return separator.join("".join(c if c.isalnum() or c in "+-_." else "_" for c in part).strip(".") for part in parts)


SINKS: Final[dict[str, tuple[str, Callable[[StudyResult, str], None]]]] = {
    "tensorboard": ("FOLDER", _tensorboard),
    "mlflow": ("URI", _mlflow),
    "wandb": ("PROJECT", _wandb),
}
