"""piste inside Lightning: any optimizer by its name, two-pass optimizers in automatic optimization, averages.

>>> import lightning, torch
>>> from piste.integrations.lightning import PisteModule, configure
>>> class Net(PisteModule):  # instead of LightningModule
...     def __init__(self):
...         super().__init__()
...         self.layer = torch.nn.Linear(4, 1)
...     def training_step(self, batch, batch_idx):
...         return self.layer(batch).square().mean()
...     def configure_optimizers(self):
...         return configure(self, "sam+ranger", lr=1e-3)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import piste
from piste.integrations.framework import framework
from piste.integrations.wrapped import from_outside_in, two_pass_of

with framework("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from torchmetrics import Metric

__all__ = ["ModelEMACallback", "PisteModule", "configure"]

_TRAINING = "piste.training_weights"  # in a checkpoint
_ENDLESS = ("constant", "untuned_warmup")  # schedules that need no length


def configure(
    module: LightningModule,
    name: str,
    *,
    schedule: str | None = None,
    total_steps: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: an optimizer by its name, and the schedule that goes with it, in steps.

    Args:
        module: the module, attached to its trainer, as it is in ``configure_optimizers``.
        name: as for :func:`piste.create`, such as ``"ranger21"`` or ``"sam+adamw"``.
        schedule: the name of a function in ``piste.schedules``; None for the preset's companion.
        total_steps: optimizer steps of the whole run; None for what the trainer estimates from its limits, its data and
            its accumulation.
        **overrides: as for :func:`piste.create`.

    Returns:
        A dictionary with the optimizer, and its schedule with ``interval="step"``.

    Raises:
        TypeError: the optimizer needs more than Lightning gives it, and ``module`` is no :class:`PisteModule`.
        ValueError: as :func:`piste.create_with_schedule`; or the trainer has neither ``max_steps`` nor ``max_epochs``
            with data of known length, and ``schedule`` is neither "constant" nor "untuned_warmup".

    Not for several optimizers in manual optimization: call :func:`piste.create` for each.

    >>> import lightning, torch
    >>> from piste.integrations.lightning import configure
    >>> class Net(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return configure(self, "ranger21", lr=1e-3)
    """
    steps = module.trainer.estimated_stepping_batches if total_steps is None else total_steps
    if total_steps is not None or 1 <= steps < float("inf"):
        optimizer, curve = piste.create_with_schedule(
            name, module, total_steps or int(steps), schedule=schedule, **overrides
        )
    elif schedule in _ENDLESS:
        optimizer = piste.create(name, module, **overrides)
        curve = piste.schedules.named(schedule)(optimizer)
    else:
        raise ValueError(
            f"configure({name!r}) got schedule={schedule!r} for a trainer that cannot tell how many steps there will "
            f"be; legal: total_steps=, max_steps= or max_epochs= of the Trainer, or one of {', '.join(_ENDLESS)}"
        )
    needs = _modes(optimizer) is not None or (module.automatic_optimization and two_pass_of(optimizer) is not None)
    if needs and not isinstance(module, PisteModule):
        raise TypeError(
            f"{type(module).__name__} got {name!r}, which needs hooks of its own; legal: class "
            f"{type(module).__name__}(piste.integrations.lightning.PisteModule) instead of LightningModule"
        )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": curve, "interval": "step"}}


class PisteModule(LightningModule):
    """A LightningModule whose optimizer may make two passes, or evaluate other weights than it trains.

    Derive from it instead of ``LightningModule``, or name it before another base class. With other optimizers it does
    nothing.

    **Two passes** (``piste.SAM``, ``GSAM``, ``LookSAM``, and ``ESAM`` with ``gamma=1``) in automatic optimization: the
    weights climb once, with the gradient of all micro-batches of ``accumulate_grad_batches``, which are then replayed
    through ``training_step`` at the perturbed weights; what both gradients make is clipped and stepped with. A gradient
    scaler unscales once and skips the whole step if either pass overflows. What is logged, returned, counted by metrics
    and by BatchNorm's running statistics is of the first pass. Micro-batches are kept on the device for it.

    **Schedule-free optimizers**, and whatever has ``train()`` and ``eval()``: validation, and the module after ``fit``,
    have the weights that are meant to be evaluated. So has the ``state_dict`` of a checkpoint, and the weights in
    training beside it, from which a run goes on bit by bit. Neither changes the run; one more copy of the weights
    meanwhile. BatchNorm's statistics are those of training: see :func:`piste.recalibrate`.

    Attributes:
        perturbation: under DDP, ``"local"``: each process climbs with its own gradient; or ``"averaged"``: all alike.
        second_pass: is ``training_step`` called at perturbed weights? For side effects of yours, such as a call of the
            logger itself.

    Raises:
        RuntimeError: in the first step, before weights move: another strategy than one device or DDP,
            ``dataloader_iter``; ``configure_callbacks`` or ``on_train_batch_start`` overridden without ``super()``.
        ValueError: likewise: a two-pass optimizer inside of another wrapper, ESAM with ``gamma < 1``, an unknown
            ``perturbation``; ``save_weights_only=True`` beside a schedule-free optimizer.

    Not needed in manual optimization, where ``self.optimizers().step(closure)`` makes both passes, if the closure goes
    through all micro-batches.

    >>> import torch
    >>> from piste.integrations.lightning import PisteModule, configure
    >>> class Net(PisteModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return configure(self, "gsam+sgd_momentum", lr=0.1, rho=0.05)
    """

    perturbation: str = "local"
    second_pass: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modes = _Modes()
        self._batches: list[tuple[Any, ...]] = []  # arguments of training_step, of which the next step is made

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook: a callback of this class's own. Add yours to what ``super()`` returns."""
        return [*super().configure_callbacks(), self._modes]  # type: ignore[misc]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Lightning's hook: micro-batches are kept for a second pass."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # where Lightning clears gradients
            self._batches = []
        if self.automatic_optimization and any(isinstance(each, piste.SAM) for each in self.trainer.optimizers):
            numbered = is_param_in_hook_signature(self.training_step, "batch_idx", min_args=2)
            same = copy.copy(batch)  # a training_step may take labels out
            self._batches.append((same, batch_idx) if numbered else (same,))
        return super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Lightning's hook: both passes, for optimizers that have two."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not self._modes.attached:
            raise RuntimeError(f"{type(self).__name__}.configure_callbacks() leaves out what super() returns; add it")
        two_pass = two_pass_of(inner)
        if two_pass is None or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        self._check(two_pass, inner)
        loss, ready = self._both_passes(two_pass, optimizer_closure)
        if ready or _scaler(self.trainer) is not None:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        two_pass.finish()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As in Lightning, but what a second pass would log is dropped: its loss is not that of the weights."""
        if not self.second_pass:
            super().log(*args, **kwargs)

    def _both_passes(self, optimizer: piste.SAM, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The last micro-batch of the first pass, and the second; ``p.grad`` becomes what the optimizer steps with.

        Returns:
            The loss of that micro-batch at the weights themselves; and False if the step is to be skipped.
        """
        batches, self._batches = self._batches, []
        strategy = self.trainer.strategy
        apart = self.perturbation == "local" and optimizer.combines  # gradients are averaged after they were combined
        two = optimizer.needs_two_passes
        if optimizer.model is None:
            optimizer.model = self  # whose running statistics move in the first pass only
        try:
            with _unsynchronized(self.trainer, apart or (two and self.perturbation == "local")):
                loss = closure()
            if not any(p.grad is not None for p in _weights(optimizer)):
                return loss, False  # training_step returned None: nothing in these batches counts
            if two:
                climbed = optimizer.first_step()
                if strategy.reduce_boolean_decision(climbed):
                    self._second_pass(optimizer, batches, apart)
                elif climbed:
                    optimizer.give_up()
            ready = optimizer.descend()
        except BaseException:
            optimizer.restore()
            raise
        if ready and apart:
            for p in _weights(optimizer):
                p.grad = strategy.reduce(torch.zeros_like(p) if p.grad is None else p.grad, reduce_op="mean")
        elif not ready:
            for p in _weights(optimizer)[:1]:  # where a scaler finds it
                p.grad = torch.full_like(p, torch.inf)
        return loss, ready

    def _second_pass(self, optimizer: piste.SAM, batches: list[tuple[Any, ...]], apart: bool) -> None:
        """Gradients of the micro-batches at the perturbed weights, made by the trainer's own means."""
        trainer = self.trainer
        with self._in_second_pass(), torch.enable_grad():
            for i, arguments in enumerate(batches):
                with _unsynchronized(trainer, apart or i < len(batches) - 1):
                    output = trainer.strategy.training_step(*arguments)
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if loss is not None:
                        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)

    @contextmanager
    def _in_second_pass(self) -> Iterator[None]:
        """Metrics go on with copies of their states, and get theirs back."""
        metrics = [vars(module) for module in self.modules() if isinstance(module, Metric)]
        before = [dict(states) for states in metrics]
        for states in metrics:
            states.update({key: _copied(value) for key, value in states.items()})
        self.second_pass = True
        try:
            yield
        finally:
            self.second_pass = False
            for states, own in zip(metrics, before, strict=True):
                states.update(own)

    def _check(self, two_pass: piste.SAM, optimizer: torch.optim.Optimizer) -> None:
        """Refuse, before anything is changed, what two passes cannot be made of."""
        name, strategy = type(two_pass).__name__, self.trainer.strategy
        if self.perturbation not in ("local", "averaged"):
            raise ValueError(
                f"{type(self).__name__} has perturbation={self.perturbation!r}; legal: 'local', 'averaged'"
            )
        if two_pass is not optimizer:
            raise ValueError(f"{name} is inside of {type(optimizer).__name__}; legal in Lightning: {name} outermost")
        if two_pass.selects:
            raise ValueError(
                f"{name} ranks samples, and training_step tells one loss for all of them; legal in Lightning: gamma=1"
            )
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise RuntimeError(
                f"{name} cannot make two passes under {type(strategy).__name__}; legal: one device, or strategy='ddp'"
            )
        if is_param_in_hook_signature(self.training_step, "dataloader_iter", explicit=True):
            raise RuntimeError(
                f"{name} needs every batch twice, and training_step(dataloader_iter) takes them itself; legal: "
                "training_step(batch, batch_idx)"
            )
        if not self._batches:
            raise RuntimeError(f"{type(self).__name__}.on_train_batch_start() does not call super(), and has to")


class _OtherWeights(Callback):
    """Other weights are evaluated than are trained, and both are saved. Those in training come back bit by bit."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] | None = None  # what is in training, while the others are in its place

    def tensors(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        """All that is changed."""
        raise NotImplementedError

    def put(self, trainer: Trainer, module: LightningModule) -> None:
        """Change it to what is evaluated."""
        raise NotImplementedError

    def take_back(self, trainer: Trainer) -> None:
        """Be told that all is as it was in training."""

    def applies(self, trainer: Trainer) -> bool:
        """Is there anything to change?"""
        return True

    @torch.no_grad()
    def enter(self, trainer: Trainer, module: LightningModule) -> None:
        if self._kept is None and self.applies(trainer):
            self._kept = [(x, x.detach().clone()) for x in self.tensors(trainer, module)]
            self.put(trainer, module)

    @torch.no_grad()
    def leave(self, trainer: Trainer) -> None:
        if self._kept is not None:
            self.take_back(trainer)
            for tensor, before in self._kept:
                tensor.copy_(before)
            self._kept = None

    def check(self, trainer: Trainer) -> None:
        """Refuse checkpoints that Lightning saves without asking callbacks."""
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise ValueError(
                "ModelCheckpoint has save_weights_only=True, and would save the weights in training instead of those "
                "that are validated; legal here: save_weights_only=False"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._kept = None  # a new run starts with the weights that the last one ended with

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.applies(trainer):
            return
        inside = self._kept is not None
        if inside:  # the optimizer's part of the checkpoint has to be of the weights in training
            self.leave(trainer)
            states = [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
            checkpoint["optimizer_states"] = copy.deepcopy(states)
        checkpoint[_TRAINING] = copy.deepcopy(trainer.strategy.lightning_module_state_dict())
        self.enter(trainer, pl_module)
        checkpoint["state_dict"] = copy.deepcopy(trainer.strategy.lightning_module_state_dict())
        if not inside:
            self.leave(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._kept = None
        if trainer.state.fn == "fit" and _TRAINING in checkpoint:
            trainer.strategy.load_model_state_dict(
                {"state_dict": checkpoint[_TRAINING]}, strict=pl_module.strict_loading
            )


class _Modes(_OtherWeights):
    """Calls ``train()`` and ``eval()`` of optimizers that have them."""

    def __init__(self) -> None:
        super().__init__()
        self.attached = False  # to a trainer that fits

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.attached = self.attached or stage == "fit"

    def applies(self, trainer: Trainer) -> bool:
        return any(_modes(optimizer) is not None for optimizer in trainer.optimizers)

    def tensors(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        found: list[Tensor] = []
        for optimizer in filter(None, map(_modes, trainer.optimizers)):
            for p in _weights(optimizer):
                states = optimizer.state.get(p, {})
                found += [
                    p,
                    *(x for key, x in states.items() if str(key).startswith("p.")),
                ]  # rests of a bfloat16 weight
        return found

    def put(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in filter(None, map(_modes, trainer.optimizers)):
            optimizer.eval()

    def take_back(self, trainer: Trainer) -> None:
        for optimizer in filter(None, map(_modes, trainer.optimizers)):
            optimizer.train()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.applies(trainer):
            self.check(trainer)
            self.take_back(trainer)  # some begin in evaluation


class ModelEMACallback(_OtherWeights):
    """Keeps a :class:`piste.ModelEMA` of the module, which is validated, saved, and in the module after ``fit``.

    It is updated once for each optimizer step, whatever the accumulation, with the weights after the whole step of a
    two-pass optimizer; steps that a gradient scaler skips count too. Checkpoints have the averages as ``state_dict``,
    which ``load_from_checkpoint`` and ``trainer.test(ckpt_path=...)`` take; ``fit(ckpt_path=...)`` goes on with the
    weights in training, bit by bit.

    **When not**: with schedule-free optimizers, which average by themselves.

    Args:
        decay: as of :class:`piste.ModelEMA`.
        warmup: likewise.
        buffers: likewise.

    Attributes:
        ema: the average, from the beginning of ``fit`` on; None before.

    Raises:
        ValueError: in ``fit``, a value is out of range, the optimizer averages by itself, or a ``ModelCheckpoint`` has
            ``save_weights_only=True``.

    >>> import lightning
    >>> from piste.integrations.lightning import ModelEMACallback
    >>> trainer = lightning.Trainer(callbacks=[ModelEMACallback(decay=0.995)], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, buffers: str = "copy") -> None:
        super().__init__()
        self.decay, self.warmup, self.buffers = decay, warmup, buffers
        self.ema: piste.ModelEMA | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.ema = piste.ModelEMA(pl_module, self.decay, self.warmup, self.buffers)  # type: ignore[arg-type]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)
        for optimizer in filter(None, map(_modes, trainer.optimizers)):
            raise ValueError(
                f"ModelEMACallback beside {type(optimizer).__name__}, which averages by itself; legal: one"
            )
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ema is not None and trainer.global_step > self._step:
            self.ema.update(trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)
            self._step = trainer.global_step

    def applies(self, trainer: Trainer) -> bool:
        return self.ema is not None and self.ema.updates > 0

    def tensors(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    def put(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ema is not None:
            self.ema.copy_to(module)

    def state_dict(self) -> dict[str, Any]:
        """The average's."""
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        if self.ema is not None:
            self.ema.load_state_dict(state_dict)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _unsynchronized(trainer: Trainer, quiet: bool) -> AbstractContextManager[None]:
    """Where ``quiet``, processes keep their gradients for themselves."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if quiet and isinstance(strategy, DDPStrategy) else nullcontext()


def _copied(value: Any) -> Any:
    """What a metric may change in place, once more."""
    return value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def _modes(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer inside of all wrappers, which pass such calls on, if it evaluates other weights than it trains."""
    *_, innermost = from_outside_in(optimizer)
    return innermost if all(callable(getattr(innermost, name, None)) for name in ("train", "eval")) else None
