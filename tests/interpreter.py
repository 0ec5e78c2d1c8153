"""Makes Triton's interpreter two to three times as fast, for tests that run thousands of kernels in it.

It exchanges the functions of ``triton.language`` at every call of a function inside a kernel, asks again and again
which of NumPy's types belongs to which of its own, and wraps up the sizes of every value anew. Here that happens once
in a process. It also looks for overflow in every sum of integers, as a GPU does only when it is asked to debug.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from piste.engines import triton as engine

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which nothing above does

#: numpy's words for what kernels do on purpose, on lanes whose result nobody takes
ON_IDLE_LANES = "(divide by zero|invalid value|overflow) encountered"
#: what a file of tests that run kernels in the interpreter puts on all of them
MARKS = [
    pytest.mark.skipif(not engine.works_on(torch.device("cpu")), reason="Triton is for Linux, or not interpreted"),
    pytest.mark.filterwarnings(f"ignore:{ON_IDLE_LANES}:RuntimeWarning"),
]


class _Exchanged:
    """What takes the functions back after a kernel; nobody here needs the others."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """Does nothing where kernels are not interpreted, or where the interpreter has other functions than these."""
    if not engine.works_on(torch.device("cpu")):
        return
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "InterpreterOptions")):
        return
    exchange, find = interpreter._patch_lang, interpreter._get_np_dtype
    language = interpreter.tl
    done: set[frozenset[int]] = set()
    known: dict[Any, Any] = {}

    def exchange_once(function: Any) -> _Exchanged:
        modules = frozenset(id(m) for m in function.__globals__.values() if m is language or m is language.core)
        if modules not in done:
            done.add(modules)
            exchange(function)
        return _Exchanged()

    def find_once(kind: Any) -> Any:
        one = kind.element_ty if type(kind) is language.block_type else kind
        key = one.name if type(one) is language.dtype else type(one)
        if key not in known:
            known[key] = find(kind)
        return known[key]

    shapes: dict[Any, Any] = {}

    def remember_shape(self: Any, handle: Any, kind: Any) -> None:
        if kind.name not in shapes:
            make(self, handle, kind)
            shapes[kind.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[kind.name]

    make, language.core.tensor.__init__ = language.core.tensor.__init__, remember_shape
    interpreter._patch_lang, interpreter._get_np_dtype = exchange_once, find_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


quicken()
