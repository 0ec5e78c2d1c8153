"""The cpp engine: each stage of a plan as generated C++, run over all weights of a bucket in one call.

The text comes from :mod:`piste.engines.cpp_source` (``source(plan)`` shows it) and is compiled once per machine
(:mod:`piste.engines.cpp_build`). A call gets a table of addresses and numbers, which is filled anew in every step from
lists, since gradients move. It runs without Python's lock, in the threads that torch was given.

Where no compiler works, on other devices than CPUs, for tensors that wrap others and for number formats that kernels do
not know, the foreach engine does the work. In a forked child the step runs in one thread, as the others did not come
along.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any

import torch

from piste.bucket import Bucket
from piste.codecs import Codec
from piste.engines import cpp_build
from piste.engines.cpp_host import hyper_names
from piste.engines.cpp_source import write
from piste.engines.cpp_statements import TYPES
from piste.engines.kernel import Pass
from piste.engines.native import Built, Native, Step, native_passes, plain_homes
from piste.engines.tables import Table, column
from piste.plan import Plan

__all__ = ["Cpp", "source"]

_LOG = logging.getLogger("piste")
_MOST_AXES = 8  # MAX_RANK of cpp_runtime.h

#: the process in which OpenMP's threads live: in a forked child they are gone, and waiting for them would be for ever
_PROCESS = os.getpid()

Kernel = Callable[[int, int, int, int, bytes, bytes], None]


def _kernel(library: ctypes.CDLL, name: str) -> Kernel:
    function = getattr(library, name)
    function.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = None
    kernel: Kernel = function
    return kernel


def source(plan: Plan) -> str:
    """The generated text of a plan for float32, for reading."""
    return write(plan, native_passes(plan), torch.float32, plain_homes(plan), {})


class Cpp(Native):
    """See the head of this module."""

    name = "cpp"
    most_axes = _MOST_AXES

    def __init__(self) -> None:
        super().__init__()
        self.broken = ""

    def takes(self, bucket: Bucket, homes: Mapping[str, torch.dtype]) -> bool:
        return not self.broken and bucket.device.type == "cpu" and TYPES.keys() >= set(homes.values())

    def build(
        self,
        plan: Plan,
        native: Mapping[str, Pass],
        real: torch.dtype,
        homes: Mapping[str, torch.dtype],
        codecs: Mapping[str, Codec],
    ) -> Built | None:
        text = write(plan, native, real, homes, codecs)
        if not native:
            return Built(text, {}, hyper_names(plan))
        try:
            library = cpp_build.library(text, "an optimizer's step")
        except cpp_build.BuildError as error:
            self.broken = str(error)
            _LOG.warning("the foreach engine takes over from the cpp engine: %s", error)
            return None
        return Built(text, {name: _kernel(library, name) for name in native}, hyper_names(plan))

    def launch(self, bucket: Bucket, table: Table, inputs: Any, step: Step) -> None:
        columns = [*table.space(step.work.space, bucket.homes["p"]), *bucket.seats.groups, *_steps(bucket)]
        for argument in step.columns:
            columns += column(bucket, table, argument)
        columns += table.geometry
        # a group that is not in this bucket may have a flag where this plan has a number
        hyper = [group.get(name, nan) for group in bucket.hp for name in inputs]
        threads = torch.get_num_threads() if os.getpid() == _PROCESS else 1
        step.kernel(len(bucket), threads, len(inputs), table.axes, _packed("q", columns), _packed("d", hyper))


def _steps(bucket: Bucket) -> Sequence[int]:
    """Step numbers; from a tensor where thresholds of rounding follow from them, for no graph records a CPU."""
    return bucket.steps if bucket.clock is None or not bucket.seats.codecs else bucket.clock.tolist()


def _packed(letter: str, numbers: Sequence[float]) -> bytes:
    """Numbers as C has them, side by side: the fastest way there that the standard library knows."""
    return struct.pack(f"{len(numbers)}{letter}", *numbers)
