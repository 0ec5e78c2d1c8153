"""What a race needs to know about a problem: the ``Task``, and how it is found by name or in a file."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from piste.race.data import Splits
from piste.race.words import single_line

# The built-in tasks and the modules they stand in; a module is imported only when its task is asked for.
BUILT_IN = {
    name: f"piste.race.tasks.{module}"
    for module, names in (
        ("char_transformer", ("char_transformer",)),
        ("digits", ("digits", "digits_mlp", "digits_mixer", "digits_noise", "digits_vit")),
        ("digits_vae", ("digits_vae",)),
        ("mnist1d", ("mnist1d", "mnist1d_mlp")),
        ("logistic", ("logistic_breast_cancer", "logistic_digits", "logistic_wine")),
        ("zipf_bigram", ("zipf_bigram",)),
        ("quadratics", ("quadratic_axis", "quadratic_noisy", "quadratic_rotated")),
        ("linear_networks", ("linear_autoencoder", "matrix_factorisation")),
        ("cartpole", ("cartpole",)),
    )
    for name in names
}


DOMAINS = ("", "vision", "nlp", "rl")


class TaskError(ValueError):
    """A task cannot be loaded or used; the message says which and why."""


@dataclass(frozen=True)
class Task:
    """A problem to race optimizers on.

    Args:
        name: short; letters, digits, ``_``, ``-`` and ``.``, a letter or digit first; names the results.
        model: called without arguments, gives a new ``nn.Module`` with fresh random weights. The race seeds torch
            before each call, so that every contender starts from the same weights.
        data: called without arguments once a worker process, gives the ``Splits``.
        loss: ``loss(model, batch)`` runs the model and gives the scalar training loss, averaged over the batch.
        metric: ``metric(model, batch)`` gives the number you care about (a scalar tensor or a float, averaged over
            the batch). It chooses the learning rates and makes the scores. None: the loss.
        metric_name: what to call it in tables.
        higher_is_better: direction of the metric.
        steps: optimizer steps of one run, unless ``--steps`` says otherwise.
        batch_size: examples of a training batch.
        description: one line.
        domain: ``"vision"``, ``"nlp"``, ``"rl"`` or ``""``: the field of application, for presets that have settings
            by field (AdaBelief's eps).
        settings: arguments of ``piste.create`` that every optimizer is made with here, those aside that it does not
            have: ``{"weight_decay": 0.0}`` where decay would move the minimum, ``{"heads": ["out"]}`` for Muon.
        version: change it whenever results can no longer be compared though this file stayed the same (a data file
            that changed, say). It is part of what identifies a run.

    Raises:
        ValueError: an argument is not what is described above.

    When not to use: data that cannot be read by index, or a loss that needs more than one model.

    Example:
        >>> import torch
        >>> from piste.race import Splits, Task
        >>> def data():
        ...     x = torch.linspace(-3, 3, 300)[:, None]
        ...     y = x.sin()
        ...     return Splits(train=(x[0::3], y[0::3]), valid=(x[1::3], y[1::3]), report=(x[2::3], y[2::3]))
        >>> def loss(model, batch):
        ...     x, y = batch
        ...     return (model(x) - y).square().mean()
        >>> task = Task(name="sine", model=lambda: torch.nn.Linear(1, 1), data=data, loss=loss, steps=100)
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Splits]
    loss: Callable[[nn.Module, Any], Tensor]
    metric: Callable[[nn.Module, Any], Tensor | float] | None = None
    metric_name: str = "loss"
    higher_is_better: bool = False
    steps: int = 250
    batch_size: int = 32
    description: str = ""
    domain: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[^\W_][\w.-]*", self.name):
            raise ValueError(
                f"name must be letters, digits, '_', '-' or '.', a letter or digit first, not {self.name!r}"
            )
        for argument in ("model", "data", "loss"):
            if not callable(getattr(self, argument)):
                raise ValueError(f"{argument} must be a function, not {getattr(self, argument)!r}")
        if isinstance(self.model, nn.Module):
            raise ValueError("model must be a function that makes a new model, not a model: write model=lambda: …")
        if self.metric is not None and not callable(self.metric):
            raise ValueError(f"metric must be a function or None, not {self.metric!r}")
        if self.metric is None and (self.metric_name != "loss" or self.higher_is_better):
            raise ValueError("metric_name and higher_is_better belong to a metric, but metric is None")
        if self.domain not in DOMAINS:
            raise ValueError(f"domain must be one of {', '.join(map(repr, DOMAINS))}, not {self.domain!r}")
        for argument in ("steps", "batch_size"):
            value = getattr(self, argument)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument} must be a whole number >= 1, not {value!r}")
        for argument in ("metric_name", "description", "version"):
            if not isinstance(getattr(self, argument), str):
                raise ValueError(f"{argument} must be text, not {getattr(self, argument)!r}")
        if not isinstance(self.settings, Mapping) or not all(isinstance(name, str) for name in self.settings):
            raise ValueError(f"settings must be a dict of arguments by name, not {self.settings!r}")
        if "lr" in self.settings:
            raise ValueError("settings must not hold lr: the race looks for it")
        if not isinstance(self.higher_is_better, bool):
            raise ValueError(f"higher_is_better must be True or False, not {self.higher_is_better!r}")


@dataclass(frozen=True)
class LoadedTask:
    """A task and the hash of the source it came from."""

    task: Task
    source_hash: str


def load_task(reference: str) -> LoadedTask:
    """Find a task by the name of a built-in one, or as ``FILE.py`` or ``FILE.py:name``.

    Args:
        reference: ``name`` may be a ``Task`` or a function without arguments that returns one; it may be left out
            where the file holds a single ``Task``.

    Raises:
        TaskError: there is no such task or file, the file raises, or it does not give a ``Task``.
    """
    if reference in BUILT_IN:
        module = importlib.import_module(BUILT_IN[reference])
        return _checked(module, reference, f"the built-in task {reference}")
    path, name = split_reference(reference)
    if not name:
        _refuse_script(path)
    module = import_file(path)
    where = str(path)
    return _checked(module, name or _only_task(module, where), where)


def split_reference(reference: str) -> tuple[Path, str]:
    """Cut ``FILE.py:name`` in two and see that the file is there.

    Raises:
        TaskError: it is neither a file nor the name of a built-in task.
    """
    match = re.fullmatch(r"(.*\.py)(?::(.*))?", reference, flags=re.DOTALL)
    if match is None:
        close = difflib.get_close_matches(reference, BUILT_IN, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise TaskError(
            f"no task {reference!r}: give a Python file (my_task.py or my_task.py:name) "
            f"or one of the built-in tasks {', '.join(BUILT_IN)}{hint}"
        )
    path = Path(match[1])
    if not path.exists():
        raise TaskError(f"there is no file {path} (piste race --new {path} writes one to start from)")
    if not path.is_file():
        raise TaskError(f"{path} is not a file")
    return path, match[2] or ""


def import_file(path: Path) -> ModuleType:
    """Run a task file; what stands beside it can be imported.

    Raises:
        TaskError: it raises.
    """
    spec = importlib.util.spec_from_file_location(f"piste_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path}{_line_of(error, path)} raises {_in_one_line(error)}") from error
    return module


def _refuse_script(path: Path) -> None:
    """A training script would train from its first line to its last, only to turn out to hold no task."""
    source = path.read_bytes()
    if b"race_optimizer" in source and b"Task(" not in source:
        raise TaskError(
            f"{path} is a training script and no task, and is not run to look for one; piste race --script {path} "
            "races it, and piste.advise(model, optimizer) in the script gives advice"
        )
    if b"task" not in source.lower():
        raise TaskError(
            f"{path} holds no piste.race.Task (piste race --new FILE writes one to start from), and is not run to look "
            "for one; in a training script, piste.race_optimizer lets it race, and piste.advise gives advice"
        )


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {single_line(str(error))}"


def _line_of(error: BaseException, path: Path) -> str:
    """Where in the task file an error started, as ``:line``."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}" if error.lineno else ""
    lines = [frame.tb_lineno for frame in _frames(error) if Path(frame.tb_frame.f_code.co_filename).name == path.name]
    return f":{lines[-1]}" if lines else ""


def _frames(error: BaseException) -> list[Any]:
    frames, frame = [], error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    return frames


def _only_task(module: ModuleType, where: str) -> str:
    found = {name: value for name, value in vars(module).items() if isinstance(value, Task)}
    if not found:
        raise TaskError(
            f"{where} holds no piste.race.Task; give it one, as in task = Task(name=…, model=…, data=…, loss=…)"
        )
    if len({id(value) for value in found.values()}) > 1:
        raise TaskError(f"{where} holds several tasks; name one: {', '.join(f'{where}:{name}' for name in found)}")
    return next(iter(found))


def _checked(module: ModuleType, name: str, where: str) -> LoadedTask:
    value = getattr(module, name, None)
    if value is None:
        names = [key for key, item in vars(module).items() if isinstance(item, Task)]
        raise TaskError(f"{where} has no {name!r}; its tasks are: {', '.join(names) or 'none'}")
    if not isinstance(value, Task) and inspect.isfunction(value):
        try:
            value = value()
        except (Exception, SystemExit) as error:
            raise TaskError(f"{where}: {name}() raises {_in_one_line(error)}") from error
        name = f"{name}()"
    if not isinstance(value, Task):
        raise TaskError(f"{where}: {name} must be a piste.race.Task, not {type(value).__name__}")
    source = Path(str(module.__file__)).read_bytes()
    return LoadedTask(task=value, source_hash=hashlib.sha256(source).hexdigest())
