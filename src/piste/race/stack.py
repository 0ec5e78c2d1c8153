"""Models of one shape as one: their weights stacked, a function of model and batch called once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from piste.race.task import Task

_KEPT_BYTES = 31 << 20

Function = Callable[[nn.Module, Any], Tensor | float]
Place = tuple[dict[str, Any], str]  # a module's weights or buffers, and the name of one


class Stack:
    """Models of one shape whose weights and buffers lie one above the other, as slices of common tensors.

    Args:
        task: whose models they are.
        models: they stay as they are, but for where their numbers lie.
    """

    def __init__(self, task: Task, models: Sequence[nn.Module]) -> None:
        _keep_freed_memory()
        self.task = task
        self.shell = models[0]  # what is called, with all models' numbers in the place of its own
        weights = [dict(model.named_parameters()) for model in models]
        self.weights = {name: _stacked([each[name] for each in weights]) for name in weights[0]}
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: _stacked([each[name] for each in buffers]) for name in buffers[0]}
        self.places = [_places(self.shell, tensor) for tensor in (*weights[0].values(), *buffers[0].values())]
        self.generator = _generator_of(next(iter(self.weights.values())).device)
        self.leaves = [tensor for tensor in self.weights.values() if tensor.requires_grad]
        self.trained = [[weight for weight in each.values() if weight.requires_grad] for each in weights]
        self.addresses = self._addresses()
        self.draws: bool | None = None  # whether the loss draws random numbers, once that is known

    def gradients(self, batch: Any) -> tuple[Sequence[Tensor], list[Sequence[Tensor] | None]]:
        """The losses of all models, and for each trained weight the gradients of all, None where it has none.

        Raises:
            RuntimeError: the loss draws random numbers, and did not when it was called first.
        """
        before = self._generator()
        if self.draws is None:
            self._find_out_whether_it_draws(batch)
        losses = self._all(self.task.loss, batch, transposed=not self.draws)
        if not self.draws and not torch.equal(before, self._generator()):
            raise RuntimeError("the loss began to draw random numbers when it had been called without for some time")
        gradients = torch.autograd.grad(losses.sum(), self.leaves, allow_unused=True)
        return losses.detach().unbind(), [None if each is None else each.contiguous().unbind() for each in gradients]

    @torch.no_grad()
    def scores(self, batch: Any) -> list[tuple[float, float]]:
        """Loss and metric of all models on a batch, in evaluation mode."""
        was_training = self.shell.training
        self.shell.eval()
        losses = self._all(self.task.loss, batch)
        metrics = losses if self.task.metric is None else self._all(self.task.metric, batch)
        self.shell.train(was_training)
        return list(zip(losses.tolist(), metrics.tolist(), strict=True))

    def check(self) -> None:
        """See that weights still lie in the stack.

        Raises:
            RuntimeError: an optimizer has put one elsewhere.
        """
        if self._addresses() != self.addresses:
            raise RuntimeError("an optimizer moved weights: they are no longer slices of the stack")

    def _all(self, function: Function, batch: Any, *, transposed: bool = False) -> Tensor:
        """A function of model and batch, of all models: one number each.

        Args:
            function: of one model.
            batch: for all of them.
            transposed: work out linear layers as :class:`_Linear` does.
        """
        mode = _Linear if transposed else nullcontext

        def of_one(*tensors: Tensor) -> Tensor:
            with _in_place_of(self.places, tensors), mode():
                value: Tensor = function(self.shell, batch)  # type: ignore[assignment]
            return value.reshape(())

        results: Tensor = vmap(of_one, randomness="same")(*self.weights.values(), *self.buffers.values())
        return results

    @torch.no_grad()
    def _find_out_whether_it_draws(self, batch: Any) -> None:
        """Call the loss once and leave everything as it was."""
        before, kept = self._generator(), self.buffers
        self.buffers = {name: buffer.clone() for name, buffer in kept.items()}
        try:
            self._all(self.task.loss, batch)
        finally:
            self.buffers = kept
        self.draws = not torch.equal(before, self._generator())
        if self.draws:
            self.generator.set_state(before)

    def _generator(self) -> Tensor:
        return self.generator.get_state()

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weights in self.trained for weight in weights]


class _Linear(TorchFunctionMode):
    """Linear layers as ``(W X^T)^T``: the gradient of ``W`` then comes out as ``W`` lies, and is not copied.

    Written as ``X W^T``, which is what ``vmap`` makes of them, it comes out transposed. The numbers are the same, but
    outputs lie transposed in memory, and what draws random numbers for them would hand them out in another order than
    for a model alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_linear if func is functional.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2:
        return functional.linear(input, weight, bias)
    product = torch.matmul(weight, input.mT).mT
    return product if bias is None else product + bias


@contextmanager
def _in_place_of(places: Sequence[Sequence[Place]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """With these tensors where a module has its own. ``functional_call`` does the same in ten times the time."""
    kept = [of[0][0][of[0][1]] for of in places]
    try:
        _put(places, tensors)
        yield
    finally:
        _put(places, kept)


def _put(places: Sequence[Sequence[Place]], tensors: Sequence[Tensor | None]) -> None:
    for of, tensor in zip(places, tensors, strict=True):
        for holder, name in of:
            holder[name] = tensor


def _places(module: nn.Module, tensor: Tensor) -> list[Place]:
    """Where a module has this tensor: in several places, where layers share it."""
    holders = [holder for each in module.modules() for holder in (each._parameters, each._buffers)]
    return [(holder, name) for holder in holders for name, found in holder.items() if found is tensor]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all, in which they have their places from now on."""
    whole = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, place in zip(tensors, whole.unbind(), strict=True):
        tensor.data = place
    return whole.requires_grad_(tensors[0].requires_grad)


def _generator_of(device: torch.device) -> torch.Generator:
    """What a task's random numbers come from there."""
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what is freed: stacked gradients come and go in every step.

    glibc gives large pieces back to the system and gets them anew page by page, a third of the time of a step. Large
    is what is larger than any such piece that was freed before, up to 32 MiB (mallopt(3), ``M_MMAP_THRESHOLD``).
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
