"""piste in transformers: any optimizer and its schedule for a stock ``Trainer``, and a ``Trainer`` with two passes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import piste
from piste.integrations.framework import framework
from piste.integrations.wrapped import two_pass_of

with framework("transformers"):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from piste.integrations.accelerate import check_processes

__all__ = ["SharpnessTrainer", "trainer_kwargs"]

logger = logging.getLogger("piste")

#: our names of what both sides have
_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
#: arguments of training that name a schedule, and those that a Trainer ignores where it is handed an optimizer
_OF_SCHEDULES = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_OF_ITS_OPTIMIZERS = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")


def trainer_kwargs(
    name: str | piste.Preset,
    model: nn.Module,
    args: TrainingArguments,
    *,
    schedule: str | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """What a stock ``Trainer`` is to be given, beside model and arguments, to train with an optimizer of piste.

    ``learning_rate`` and ``weight_decay`` of ``args`` are used where they differ from their defaults (5e-5 and 0). An
    untouched default is not: the preset's own counts. So does the preset's companion schedule, unless
    ``lr_scheduler_type``, ``lr_scheduler_kwargs`` or ``warmup_steps`` say otherwise; the trainer's own schedule is used
    then. What was chosen is logged by the logger "piste". Optimizers with a schedule of their own (Ranger21) get a
    constant one from outside, and learn from the trainer how many steps there will be.

    Args:
        name: of the optimizer, as for :func:`piste.create`.
        model: the model that the trainer gets.
        args: the arguments that the trainer gets.
        schedule: the name of a function in ``piste.schedules``; None as above.
        callbacks: other callbacks for the trainer; one of piste's joins them.
        **overrides: as for :func:`piste.create`; they count more than ``args``. ``lr=5e-5`` asks for just that.

    Returns:
        ``optimizers=`` and ``callbacks=`` of ``Trainer``.

    Raises:
        TypeError: ``model`` is no module, or ``args`` no ``TrainingArguments``.
        ValueError: as :func:`piste.create`.

    Not for a ``Trainer`` with ``model_init=`` or FSDP, which take no optimizer: make the model before, or override
    ``create_optimizer``. Two-pass optimizers (``"sam+adamw"``) need :class:`SharpnessTrainer`.

    >>> import torch
    >>> from transformers import TrainingArguments
    >>> from piste.integrations.transformers import trainer_kwargs
    >>> args = TrainingArguments("out", max_steps=100, learning_rate=2e-3, use_cpu=True, report_to="none")
    >>> optimizer, schedule = trainer_kwargs("ranger21", torch.nn.Linear(4, 2), args)["optimizers"]
    >>> optimizer.param_groups[0]["lr"]
    0.002

    Sources: each preset names its own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"trainer_kwargs got model={type(model).__name__}; legal: an nn.Module, made before the trainer"
        )
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"trainer_kwargs got args={type(args).__name__}; legal: the TrainingArguments of the trainer")
    if schedule is not None:
        piste.schedules.named(schedule)  # refuses unknown names now rather than when training begins
    title = name if isinstance(name, str) else name.name
    touched = _touched(args)
    said = {ours: touched[theirs] for ours, theirs in _SETTINGS.items() if theirs in touched}
    optimizer = piste.create(name, model, **(said | overrides))
    first = optimizer.param_groups[0]
    for ours, theirs in _SETTINGS.items():
        where = "an override" if ours in overrides else f"TrainingArguments.{theirs}" if ours in said else "the preset"
        logger.info("trainer_kwargs(%r): %s=%s, from %s", title, ours, first.get(ours), where)
    for argument in set(_OF_ITS_OPTIMIZERS) & touched.keys():
        logger.warning(
            "trainer_kwargs(%r): TrainingArguments.%s says nothing to an optimizer of piste", title, argument
        )
    if schedule is None and touched.keys() & set(_OF_SCHEDULES):
        logger.info("trainer_kwargs(%r): the schedule is the trainer's, %s", title, args.lr_scheduler_type)
        return {"optimizers": (optimizer, None), "callbacks": list(callbacks)}
    later = _Later(name, schedule)
    return {"optimizers": (optimizer, later), "callbacks": [*callbacks, later]}


def _touched(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from the defaults of their class."""
    return {f.name: getattr(args, f.name) for f in fields(args) if f.init and getattr(args, f.name) != f.default}


class _Later(TrainerCallback):
    """A schedule for a trainer that says only when training begins how long it will be.

    It stands in the schedule's place, which the trainer fills before it knows, and is told as a callback.
    """

    def __init__(self, name: str | piste.Preset, schedule: str | None) -> None:
        self.name, self.chosen = name, schedule
        self.made: LRScheduler | None = None
        self.saved: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.made = piste.schedule_for(self.name, kwargs["optimizer"], state.max_steps, schedule=self.chosen)
        if self.saved is not None:
            self.made.load_state_dict(self.saved)
            self.saved = None

    @property
    def schedule(self) -> LRScheduler:
        if self.made is None:
            raise RuntimeError(
                "the schedule of trainer_kwargs was never told how long training is: give Trainer its callbacks= too"
            )
        return self.made

    def step(self) -> None:
        self.schedule.step()

    def get_last_lr(self) -> list[Any]:
        return self.schedule.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict  # a checkpoint is loaded before training begins


class SharpnessTrainer(Trainer):
    """A ``Trainer`` whose steps have two passes where its optimizer wants them: SAM, GSAM, LookSAM and the like.

    With any other optimizer it is a plain ``Trainer``. As a mix-in it goes before a trainer of your own:
    ``class Mine(SharpnessTrainer, Seq2SeqTrainer)``.

    The weights climb once for each step, with the gradient of all its micro-batches, which are then computed again
    where the weights are: the same as one large batch. ``max_grad_norm`` clips what the optimizer steps with. BatchNorm
    statistics move in the first pass only, and the loss that is logged is that of the first pass. Dropout draws anew in
    the second. Where several processes train, all climb with the averaged gradient.

    Args:
        *args, **kwargs: those of ``Trainer``.

    Raises:
        ValueError: at the start of training: ESAM with ``gamma`` below 1, which needs the loss of every sample; sharded
            models, DeepSpeed and XLA, which were not tried.

    Not for SAF and MESA, which have one pass: add their ``trajectory_loss`` in ``compute_loss_func=``.

    >>> import torch
    >>> from transformers import TrainingArguments
    >>> from piste.integrations.transformers import SharpnessTrainer, trainer_kwargs
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 1)
    ...     def forward(self, x):
    ...         return {"loss": self.layer(x).square().mean()}
    >>> model, data = Net(), [{"x": [1.0, 2.0, 3.0]}] * 8
    >>> args = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    >>> trainer = SharpnessTrainer(model, args, train_dataset=data, **trainer_kwargs("sam+adamw", model, args, rho=0.1))

    Sources: :class:`piste.SAM` and its descendants name theirs.
    """

    _sharpness: piste.SAM | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        self._sharpness, self._batches = two_pass_of(optimizer), list[Any]()
        if self._sharpness is not None:
            _check(self._sharpness)
            check_processes("SharpnessTrainer", self.accelerator)
            if self._sharpness.model is None:
                self._sharpness.model = self.model
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._sharpness is not None:
            self._batches.append(inputs)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._sharpness is not None and self.accelerator.sync_gradients:
            batches, self._batches = self._batches, []
            if self._climb(self._sharpness, model, batches, num_items_in_batch):
                self._sharpness.descend()
        return loss

    def _climb(self, sharpness: piste.SAM, model: nn.Module, batches: list[Any], num_items_in_batch: Any) -> bool:
        """The second pass, if this step has one; False if the step is to be skipped."""
        if not sharpness.needs_two_passes:
            return True
        if not sharpness.first_step():
            # a scaler finds what is not finite for itself; without one, the optimizer's step() skips
            return self.accelerator.scaler is not None
        try:
            for i, inputs in enumerate(batches):
                last = i == len(batches) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            sharpness.restore()
            raise
        return True


def _check(sharpness: piste.SAM) -> None:
    if sharpness.selects:
        raise ValueError(
            "SharpnessTrainer got ESAM with gamma < 1, which needs the loss of every sample, and a Trainer has one for "
            "a batch; legal: gamma=1, or piste.integrations.accelerate.sharpness_step in a loop of your own"
        )
