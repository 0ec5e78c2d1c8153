"""Tasks from what you have for a framework: a LightningModule, or a ``Trainer`` of Hugging Face.

The race does the training itself, the same way for every optimizer: the model, the loss and the batches are the
framework's, its loop, its optimizer and its callbacks are not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from piste.race.data import Collated, Splits
from piste.race.task import Task

__all__ = ["lightning_task", "trainer_task"]

_OWN = ("model", "data", "loss", "metric", "metric_name")


def lightning_task(
    name: str, module: Callable[[], Any], data: Callable[[], Any], *, metric: str | None = None, **settings: Any
) -> Task:
    """A task from a LightningModule and its loaders.

    Args:
        name: of the task.
        module: called without arguments, gives a new module. Its ``training_step`` gives the loss.
        data: called without arguments, gives three ``DataLoader``s (to train, to validate, to report), ``Splits``, or a
            ``LightningDataModule`` with loaders for all three.
        metric: what ``validation_step`` logs and you care about, such as ``"val_acc"``; None: the loss.
        **settings: further arguments of ``Task``; ``batch_size`` is that of the first loader unless given.

    Raises:
        ValueError: the module optimizes by hand, ``data`` gives something else, ``training_step`` gives no loss, or
            ``validation_step`` does not log the metric; some of it when the race looks at the task.

    When not to use: manual optimization, several losses or optimizers, or hooks (``on_train_batch_start``, …) that the
    loss depends on: they are not called, and there is no ``self.trainer``.

    Example:
        >>> from piste.race.adapters import lightning_task
        >>> def task():  # in my_task.py, for: piste race my_task.py:task
        ...     from my_project import Classifier, Data
        ...     return lightning_task("mine", Classifier, Data, metric="val_acc", higher_is_better=True, steps=500)
    """
    _refuse_own(settings)
    splits = cache(lambda: _splits(data()))

    def model() -> nn.Module:
        made = module()
        if not made.automatic_optimization:
            raise ValueError(f"{type(made).__name__} optimizes by hand; legal: a module with automatic optimization")
        return cast(nn.Module, made)

    def loss(made: nn.Module, batch: Any) -> Tensor:
        with _logged(made):
            given = _step(made.training_step, batch)  # type: ignore[arg-type]
        given = given.get("loss") if isinstance(given, dict) else given
        if not isinstance(given, Tensor):
            raise ValueError(f"training_step gives {type(given).__name__}; legal: the loss, or a dict with a 'loss'")
        return given

    def logged(made: nn.Module, batch: Any) -> Tensor | float:
        with _logged(made) as values:
            _step(made.validation_step, batch)  # type: ignore[arg-type]
        if metric not in values:
            raise ValueError(f"validation_step does not log {metric!r}; it logs {', '.join(values) or 'nothing'}")
        return cast("Tensor | float", values[metric])

    scored: dict[str, Any] = {} if metric is None else {"metric": logged, "metric_name": metric}
    return Task(name=name, model=model, data=lambda: splits()[0], loss=loss, **_sized(splits, settings), **scored)


def trainer_task(name: str, trainer: Callable[[], Any], *, report: Any = None, **settings: Any) -> Task:
    """A task from a ``Trainer`` of Hugging Face's transformers, or a subclass with a ``compute_loss`` of its own.

    Args:
        name: of the task.
        trainer: called without arguments, gives a trainer with a new model (or with ``model_init``), a training and an
            evaluation data set. What it does to batches (unused columns, padding) is done here, too.
        report: a data set for the scores; None: every second example of the evaluation data set is held out for them.
        **settings: further arguments of ``Task``, ``metric`` among them; ``batch_size`` is the trainer's unless given.

    Raises:
        ValueError: the trainer has no evaluation data set, or a data set that cannot be read by index.

    When not to use: ``compute_metrics`` is not called, as it takes all predictions at once; and what a trainer does
    round a step (accumulation, label smoothing apart, mixed precision) is the race's to decide.

    Example:
        >>> from piste.race.adapters import trainer_task
        >>> def task():  # in my_task.py, for: piste race my_task.py:task
        ...     from my_project import make_trainer
        ...     return trainer_task("mine", make_trainer, steps=500, domain="nlp")
    """
    _refuse_own({key: value for key, value in settings.items() if not key.startswith("metric")})

    @cache
    def first() -> Any:
        # A trainer seeds torch when it is made; the race has done that already.
        with torch.random.fork_rng(devices=[]):
            return trainer()

    splits = cache(lambda: _of_trainer(first(), report))

    def model() -> nn.Module:
        made = first()
        return cast(nn.Module, trainer().model if made.model_init is None else made.call_model_init())

    def loss(made: nn.Module, batch: Any) -> Tensor:
        return cast(Tensor, first().compute_loss(made, batch))

    return Task(name=name, model=model, data=lambda: splits()[0], loss=loss, **_sized(splits, settings))


def _refuse_own(settings: dict[str, Any]) -> None:
    for name in settings:
        if name in _OWN:
            raise ValueError(f"{name}= is what this adapter makes; legal: the other arguments of piste.race.Task")


def _sized(splits: Callable[[], tuple[Splits, int | None]], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the loader's batch size where they have none."""
    if "batch_size" in settings:
        return settings
    size = splits()[1]
    if size is None:
        raise ValueError("the size of batches is not known; legal: batch_size=, or a DataLoader that has one")
    return {**settings, "batch_size": size}


def _splits(given: Any) -> tuple[Splits, int | None]:
    """Three loaders, a data module or ``Splits``, and the batch size if they say one."""
    if isinstance(given, Splits):
        return given, None
    loaders = _of_module(given) if hasattr(given, "train_dataloader") else given
    if not isinstance(loaders, (tuple, list)) or len(loaders) != 3:
        raise ValueError(
            f"data() gives {type(given).__name__}; legal: three DataLoaders, a LightningDataModule or piste.race.Splits"
        )
    return Splits(*loaders), getattr(loaders[0], "batch_size", None)


def _of_module(module: Any) -> list[Any]:
    module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    return [module.train_dataloader(), module.val_dataloader(), module.test_dataloader()]


def _of_trainer(trainer: Any, report: Any) -> tuple[Splits, int]:
    """What a trainer's loaders read, and the size of their batches."""
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        raise ValueError("the trainer needs one eval_dataset, which chooses learning rates")
    train, evaluation = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    if report is None:
        count = len(evaluation.dataset)
        valid, scored = (
            Collated(Subset(evaluation.dataset, range(first, count, 2)), evaluation.collate_fn) for first in (0, 1)
        )
        splits = Splits(train, valid, scored)
    else:
        splits = Splits(train, evaluation, trainer.get_eval_dataloader(report))
    return splits, trainer.args.train_batch_size


def _step(step: Callable[..., Any], batch: Any) -> Any:
    """Call a step of a LightningModule, which may leave out the number of the batch."""
    return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)


@contextmanager
def _logged(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the module logs meanwhile, by name; without a trainer there is nothing else that it could be told to."""
    values: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        if hasattr(value, "compute"):  # a metric of torchmetrics, which would go on counting
            metric, value = value, value.compute()
            metric.reset()
        values[name] = value

    def log_dict(several: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in several.items():
            log(name, value)

    module.__dict__.update(log=log, log_dict=log_dict)
    try:
        yield values
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
