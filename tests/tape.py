"""A CUDA graph for CPUs: what one step does is put on a tape, and done again without Python's part in it.

Every operation of torch that a step calls is noted with the very arguments it had, and so are launches of generated
kernels. Played again, each operation takes the same tensors and the same Python numbers, and leaves its results in the
same tensors as before. What Python would work out anew from step to step stands still: a step that plays right again
has none of it. As on a GPU, a tape refuses whatever would wait for the device, and numbers that come from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piste.engines import cpp, triton

#: what waits for the device, and how a number comes from the host
_REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "equal")
_FROM_HOST = ("lift_fresh", "lift_fresh_copy")


class Tape(TorchDispatchMode):
    """Records inside ``with``; see the head of this module.

    Args:
        uploads: are numbers from the host let through? They stand still when the tape is played.
    """

    def __init__(self, *, uploads: bool = False) -> None:
        super().__init__()
        self.refused = _REFUSED if uploads else (*_REFUSED, *_FROM_HOST)
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in self.refused:
            raise RuntimeError(f"aten::{name} cannot be recorded")
        out = func(*args, **kwargs)
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [x for x in tree_leaves(out) if isinstance(x, Tensor) and _memory(x) not in given]
        if fresh:
            self.calls.append(lambda: _fill(fresh, func(*args, **kwargs)))
        elif not func.is_view:
            self.calls.append(lambda: func(*args, **kwargs))
        return out

    def launched(self, kernel: Callable[..., Any]) -> Callable[..., None]:
        """A kernel whose launches are noted."""

        def launch(*args: Any, **kwargs: Any) -> None:
            def again() -> None:
                kernel(*args, **kwargs)

            with torch.utils._python_dispatch._disable_current_modes():
                again()
            self.calls.append(again)

        return launch

    @torch.no_grad()
    def play(self) -> None:
        for call in self.calls:
            call()


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _fill(fresh: list[Tensor], out: Any) -> None:
    inside = {_memory(x) for x in fresh}
    new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and _memory(x) not in inside]
    for old, value in zip(fresh, new, strict=True):
        old.copy_(value)


class Steps:
    """Takes the steps of an optimizer: one of them onto a tape, and those that follow from it.

    Args:
        optimizer: whose steps.
        patch: of the test.
        record: which step is recorded, counted from 0; None for none.
        how: see :class:`Tape`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, patch: pytest.MonkeyPatch, record: int | None, **how: bool
    ) -> None:
        self.optimizer, self.patch, self.record, self.how = optimizer, patch, record, how
        self.taken = 0
        self.tape: Tape | None = None

    def __call__(self) -> None:
        if self.tape is not None:
            self.tape.play()
        elif self.taken == self.record:
            with taped(self.patch, **self.how) as self.tape:
                self.optimizer.step()
        else:
            self.optimizer.step()
        self.taken += 1


class _Launcher:
    """A Triton kernel whose launches are noted."""

    def __init__(self, kernel: Any, tape: Tape) -> None:
        self.kernel, self.tape = kernel, tape

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.tape.launched(self.kernel[grid])


@contextmanager
def taped(patch: pytest.MonkeyPatch, *, uploads: bool = False) -> Iterator[Tape]:
    """A tape that generated kernels are noted on, too."""
    tape = Tape(uploads=uploads)
    native = cpp.Cpp.launch
    launch = triton.Triton.launch

    def noted_native(self: Any, bucket: Any, table: Any, inputs: Any, step: Any) -> None:
        native(self, bucket, table, inputs, step._replace(kernel=tape.launched(step.kernel)))

    def noted(self: Any, bucket: Any, table: Any, inputs: Any, step: Any) -> None:
        kernels = step.kernel
        main = None if kernels.main is None else _Launcher(kernels.main, tape)
        reductions = [(reduction, _Launcher(kernel, tape)) for reduction, kernel in kernels.reductions]
        launch(self, bucket, table, inputs, step._replace(kernel=type(kernels)(main, reductions)))

    with patch.context() as patched, tape:
        patched.setattr(cpp.Cpp, "launch", noted_native)
        patched.setattr(triton.Triton, "launch", noted)
        if triton._math() is not None:
            patched.setattr(triton._math(), "finish", _Launcher(triton._math().finish, tape))
        yield tape
