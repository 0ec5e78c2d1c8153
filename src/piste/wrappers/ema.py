"""An exponential moving average of a model's weights, beside whatever optimizer trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from piste.checkpoint import check_tensor
from piste.checks import check_choice, check_hyperparameters, near
from piste.execution import ENGINES
from piste.parts.averaging import moving_average
from piste.roster import real
from piste.storage import anchor, compute_dtype
from piste.wrappers.arithmetic import Arithmetic, formats_of

__all__ = ["ModelEMA"]


class ModelEMA:
    r"""Keeps an exponential moving average of a model's weights, to evaluate and to export.

    .. math::
        \bar p_1 = p_1, \qquad \bar p_{t+1} = d_t\,\bar p_t + (1 - d_t)\,p_{t+1}, \qquad
        d_t = \min\!\left(d, \frac{1 + t}{10 + t}\right)

    where :math:`t` counts the updates already made; without ``warmup`` :math:`d_t = d`. The first update copies the
    weights, so nothing of an initialisation remains that nobody trained.

    **When to use**: nearly always, at a few per mille of a step's time: averages of the last thousands of steps usually
    generalise better than the last weights, above all at a constant or high learning rate. **When not**: with
    schedule-free optimizers, which average by themselves; when a copy of all weights does not fit.

    Averages are float32, also of bfloat16 weights (a bfloat16 average with a decay of 0.999 would stand still), and
    float64 for float64 weights. Tied weights are kept once. The optimizer does not matter: call :meth:`update` after
    its step, and where a wrapper such as Lookahead moves weights, after the wrapper's step.

    State: 4 bytes per parameter; while averages are swapped in, the weights once more.

    Args:
        model: the model. Its weights are looked up at every update, so they may be replaced, unfrozen, added or taken
            away.
        decay: :math:`d`, in [0, 1); it averages over about ``1 / (1 - decay)`` updates.
        warmup: begin with a smaller decay, so that the first updates do not weigh for the whole horizon.
        buffers: ``"copy"`` keeps the buffers (BatchNorm's running statistics) as they were at the last update;
            ``"average"`` averages those of floating point as weights. See :func:`piste.recalibrate` for statistics that
            belong to the averaged weights.
        engine: as in :class:`piste.options.EngineOptions`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a value is out of range.

    Example:
        >>> import torch, piste
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = piste.AdamW(model.parameters())
        >>> ema = piste.ModelEMA(model, decay=0.99)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).sum().backward()
        ...     optimizer.step()
        ...     ema.update()
        >>> with ema.average():
        ...     prediction = model(torch.ones(1, 3))

    Sources: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging" (1992); the warm-up is that of
    ``num_updates`` in TensorFlow's ``tf.train.ExponentialMovingAverage``; without it, parity with
    ``torch.optim.swa_utils.AveragedModel(multi_avg_fn=get_ema_multi_avg_fn(decay))``.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        warmup: bool = True,
        buffers: Literal["copy", "average"] = "copy",
        engine: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ModelEMA got model={type(model).__name__}; legal: an nn.Module")
        given = {"decay": decay, "warmup": warmup}
        check_hyperparameters("ModelEMA", given, given)
        check_choice("buffers", buffers, ("copy", "average"))
        check_choice("engine", engine, ("auto", *ENGINES))
        self.model, self.decay, self.warmup, self.buffers, self.engine = model, decay, warmup, buffers, engine
        #: updates made so far
        self.updates = 0
        self._averages: dict[str, dict[str, Any]] = {}
        self._copies: dict[str, Tensor] = {}
        self._swapped = False
        self._arithmetic = Arithmetic(moving_average)

    def decay_now(self) -> float:
        """The decay of the next update."""
        t = self.updates
        return min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay

    def _sorted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's tensors that are averaged and those that are copied, by name."""
        averaged: dict[str, Tensor] = dict(self.model.named_parameters())
        copied: dict[str, Tensor] = {}
        for name, tensor in self.model.named_buffers():
            numbers = tensor.is_floating_point() or tensor.is_complex()
            (averaged if self.buffers == "average" and numbers else copied)[name] = tensor
        return averaged, copied

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take the model's present weights into the average.

        Args:
            optimizer: the one that trains them. Needed only where it stores bfloat16 weights with
                ``weights="kahan"`` or ``"remainder"``: then the average is of what these stand for.

        Raises:
            RuntimeError: the averages are swapped in.
        """
        if self._swapped:
            raise RuntimeError("update() inside average(): the model's weights are the averages now")
        averaged, copied = self._sorted()
        self._averages = {name: self._averages.get(name, {"step": 0}) for name in averaged}
        self._copies = {name: copy for name, copy in self._copies.items() if name in copied}
        for name, tensor in averaged.items():
            own = self._averages[name]
            if "average" in own:  # the model may have moved, or changed its precision
                own["average"] = own["average"].to(tensor.device, compute_dtype(real(tensor.detach()).dtype))
        live = {name: tensor for name, tensor in averaged.items() if tensor.numel()}
        states = [self._averages[name] for name in live]
        weights = [tensor.detach() if tensor.grad_fn is not None else tensor for tensor in live.values()]
        formats = None if optimizer is None else formats_of(optimizer, weights, states)
        self._arithmetic.run(weights, states, [0] * len(weights), [{"decay": self.decay_now()}], self.engine, formats)
        for name, tensor in copied.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.device != tensor.device or copy.dtype != tensor.dtype:
                self._copies[name] = tensor.detach().clone()
            else:
                copy.copy_(tensor)
        self.updates += 1

    @contextmanager
    def average(self) -> Iterator[nn.Module]:
        """Put the averages into the model for the length of a ``with`` block; afterwards all is as it was, bit by bit.

        Yields:
            The model. Before the first update it is unchanged.

        Raises:
            RuntimeError: they are in it already.
        """
        if self._swapped:
            raise RuntimeError("average() inside average(): the averages are in the model already")
        averaged, copied = self._sorted()
        saved = [(tensor, tensor.detach().clone()) for tensor in (*averaged.values(), *copied.values())]
        self._swapped = True
        try:
            self._put(averaged, copied)
            yield self.model
        finally:
            self._swapped = False
            with torch.no_grad():
                for tensor, before in saved:
                    _write(tensor, before)

    def tensors(self) -> dict[str, Tensor]:
        """The averages and the buffers that belong to them by name, in the model's own precision.

        For ``torch.func.functional_call(model, ema.tensors(), inputs)``, which leaves the model alone. Not copies,
        where no precision is changed: do not write to them.
        """
        averaged, copied = self._sorted()
        kinds = {name: tensor.dtype for name, tensor in {**averaged, **copied}.items()}
        return {
            name: (torch.view_as_complex(value) if kinds[name].is_complex else value).to(kinds[name])
            for name, value in self._values().items()
            if name in kinds
        }

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages, and the buffers that belong to them, into another model with the same names.

        Args:
            model: the receiver, for instance ``copy.deepcopy(ema.model)``.

        Raises:
            ValueError: it lacks a tensor of this name and shape. Nothing has been changed then.
        """
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        expected = {name: real(tensors[name]).shape for name in tensors}
        for name, value in self._values().items():
            shape = expected.get(name) if name in self._averages else (tensors[name].shape if name in tensors else None)
            if shape != value.shape:
                raise ValueError(f"the model has no tensor {name!r} of shape {tuple(value.shape)}{near(name, tensors)}")
        self._put(tensors, tensors)

    @torch.no_grad()
    def _put(self, averaged: Mapping[str, Tensor], copied: Mapping[str, Tensor]) -> None:
        for name, own in self._averages.items():
            if name in averaged and "average" in own:
                _write(real(averaged[name]), own["average"])
        for name, value in self._copies.items():
            if name in copied:
                _write(copied[name], value)

    def _values(self) -> dict[str, Tensor]:
        return {name: own["average"] for name, own in self._averages.items() if "average" in own} | self._copies

    def state_dict(self) -> dict[str, Any]:
        """Averages and buffers by name, and the number of updates; ``torch.load(weights_only=True)`` reads it."""
        steps = {name: own["step"] for name, own in self._averages.items() if "average" in own}
        averages = {name: self._averages[name]["average"] for name in steps}
        return {"updates": self.updates, "steps": steps, "averages": averages, "buffers": dict(self._copies)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, for a model with the same names; tensors move to the model's device.

        Raises:
            ValueError: something does not fit. Nothing has been changed then.
        """
        missing = [key for key in ("updates", "steps", "averages", "buffers") if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict has no {missing[0]!r}; it is not what ModelEMA.state_dict() returns")
        averaged, copied = self._sorted()
        averages: dict[str, dict[str, Any]] = {}
        for name, value in state_dict["averages"].items():
            weight = _named(averaged, name, "average")
            if name not in state_dict["steps"]:
                raise ValueError(f"state_dict has no number of steps of the average {name!r}")
            averages[name] = {
                "step": int(state_dict["steps"][name]),
                "average": check_tensor(value, "average", repr(name), anchor, real(weight.detach())),
            }
        copies: dict[str, Tensor] = {}
        for name, value in state_dict["buffers"].items():
            buffer = _named(copied, name, "copied buffer")
            copies[name] = check_tensor(value, "buffer", repr(name), anchor, buffer)
        if averages:
            for name in (name for name, tensor in averaged.items() if tensor.numel() and name not in averages):
                raise ValueError(f"state_dict lacks the average of {name!r}{near(name, averages)}")
        self._averages, self._copies, self.updates = averages, copies, int(state_dict["updates"])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_arithmetic"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arithmetic = Arithmetic(moving_average)

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"ModelEMA({kind}, decay={self.decay}, warmup={self.warmup}, buffers={self.buffers!r})"


def _write(tensor: Tensor, value: Tensor) -> None:
    """Copy, also into a buffer that repeats its elements (``expand``), which torch refuses to write to."""
    for axis in range(tensor.ndim):
        if tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
            tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)


def _named(tensors: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"state_dict has {name!r}, which is no {what} of this model{near(name, tensors)}")
    return tensors[name]
