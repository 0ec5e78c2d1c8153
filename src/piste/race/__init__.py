"""Race optimizers on your own problem: ``piste race my_task.py``.

A task file needs two names from here, ``Task`` and ``Splits``. ``piste.race.loaders`` reads data that are on the disk,
``piste.race.adapters`` makes tasks of a LightningModule or a ``Trainer``.
"""

from __future__ import annotations

from piste.race.data import Splits
from piste.race.task import Task, TaskError, load_task

__all__ = ["Splits", "Task", "TaskError", "load_task"]
