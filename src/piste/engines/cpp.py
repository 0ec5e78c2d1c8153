"""The cpp engine: each stage of a plan as generated C++, run over all weights of a bucket in one call.

The text comes from :mod:`piste.engines.cpp_source` (``source(plan)`` shows it) and is compiled once per machine
(:mod:`piste.engines.cpp_build`). A call gets a table of addresses and numbers, which is filled anew in every step from
lists, since gradients move. It runs without Python's lock, in the threads that torch was given.

Kernels walk all tensors of a weight in the order of the weight's memory. A tensor that lies otherwise is worked on as a
copy for the length of the step. Where no compiler works, on other devices than CPUs, for tensors that wrap others and
for number formats that kernels do not know, the foreach engine does the work. In a forked child the step runs in one
thread, as the others did not come along.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import nan, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.bucket import Bucket, beside
from piste.codecs import Codec, row_length
from piste.engines import cpp_build, reference
from piste.engines.cpp_source import TYPES, all_columns, hyper_names, write
from piste.engines.foreach import Foreach
from piste.engines.kernel import Column, Pass, is_native, passes
from piste.plan import Plan, Stage
from piste.storage import shape_of
from piste.symbol import ALL, FULL, MATRIX, Kind, Sym

__all__ = ["Cpp", "source"]

_LOG = logging.getLogger("piste")
_MOST_AXES = 8  # MAX_RANK of cpp_runtime.h

#: the process in which OpenMP's threads live: in a forked child they are gone, and waiting for them would be for ever
_PROCESS = os.getpid()

Kernel = Callable[[int, int, int, int, bytes, bytes], None]


class _Step(NamedTuple):
    """One pass of a stage; without a kernel it is torch's."""

    work: Pass
    kernel: Kernel | None
    columns: list[Column]


class _Lowered:
    """A plan as kernels, for one choice of number formats."""

    def __init__(
        self, plan: Plan, real: torch.dtype, homes: dict[str, torch.dtype], codecs: Mapping[str, Codec]
    ) -> None:
        stages = [passes(stage) for stage in plan.stages]
        named = {f"stage{i}_pass{j}": one for i, all_ in enumerate(stages) for j, one in enumerate(all_)}
        native = {name: one for name, one in named.items() if is_native(one)}
        self.source = write(plan, native, real, homes, codecs)
        self.hyper = hyper_names(plan)
        self.kinds = _kinds(plan)
        self.by_axes = plan.graph.by_shape or any(one.axes for one in native.values())
        self.in_torch = len(native) < len(named)
        library = cpp_build.library(self.source, "an optimizer's step") if native else None
        self.stages = [
            [
                _Step(one, _kernel(library, f"stage{i}_pass{j}") if is_native(one) else None, all_columns(one, codecs))
                for j, one in enumerate(all_)
            ]
            for i, all_ in enumerate(stages)
        ]


def _kernel(library: ctypes.CDLL | None, name: str) -> Kernel:
    function = getattr(library, name)
    function.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = None
    kernel: Kernel = function
    return kernel


def _lower(plan: Plan, real: torch.dtype, homes: dict[str, torch.dtype], codecs: Mapping[str, Codec]) -> _Lowered:
    key = ("cpp", real, tuple(sorted(homes.items())), tuple(sorted((h, c.name) for h, c in codecs.items())))
    if key not in plan.lowered:
        plan.lowered[key] = _Lowered(plan, real, homes, codecs)
    lowered: _Lowered = plan.lowered[key]
    return lowered


def _kinds(plan: Plan) -> dict[str, Kind]:
    """What the tensors in each home are."""
    found: dict[str, Kind] = {"g": FULL, "p": FULL}
    for stage in plan.stages:
        found |= {home: sym.kind for sym, home in stage.loads.items() if home != "value"}
        found |= {home: sym.kind for home, sym in stage.writes.items()}
    return found


def source(plan: Plan) -> str:
    """The generated text of a plan for float32, for reading."""
    homes = dict.fromkeys(["g", "p", *(f"state.{name}" for name in plan.graph.ordered_states)], torch.float32)
    named = {f"stage{i}_pass{j}": one for i, stage in enumerate(plan.stages) for j, one in enumerate(passes(stage))}
    return write(plan, {name: one for name, one in named.items() if is_native(one)}, torch.float32, homes, {})


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a bucket as addresses


class Stacked(Sequence[Tensor]):
    """One small result per weight, in a single buffer; a tensor is made for each only when somebody looks."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes = shapes
        self.ends = list(accumulate(map(prod, shapes)))
        self.buffer = torch.empty(self.ends[-1], dtype=dtype)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        end = self.ends[i]
        return self.buffer[end - prod(self.shapes[i]) : end].view(self.shapes[i])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def addresses(self) -> list[int]:
        start, size = self.buffer.data_ptr(), self.buffer.element_size()
        return [start + size * end for end in (0, *self.ends[:-1])]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    if isinstance(tensors, Stacked):
        return tensors.addresses()
    found = list(map(Tensor.data_ptr, tensors))
    if 0 in found and any(not at and x.numel() for at, x in zip(found, tensors, strict=True)):
        kind = type(tensors[found.index(0)]).__name__
        raise RuntimeError(f"a {kind} without memory of its own stands beside weights that have theirs")
    return found


def _is_dense(p: Tensor) -> bool:
    """Do the elements fill their stretch of memory, each place once?"""
    if p.is_contiguous():
        return True
    size = 1
    for stride, extent in sorted(zip(p.stride(), p.shape, strict=True)):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return True


def _alike(p: Tensor, other: Tensor) -> bool:
    """Do two tensors of one shape lie in memory in the same order?"""
    same = zip(p.shape, p.stride(), other.stride(), strict=True)
    return p.shape == other.shape and all(extent == 1 or a == b for extent, a, b in same)


def _row(p: Tensor, codecs: Mapping[str, Codec]) -> int:
    """How many numbers codes have to a row; all of them where a row is whole blocks, for then none begins anew."""
    length = row_length(p.shape)
    return p.numel() if length % max(1, *(codec.block for codec in codecs.values())) == 0 else length


class _Table:
    """What stays of a bucket from step to step, as long as its tensors are the same."""

    def __init__(self, bucket: Bucket, lowered: _Lowered) -> None:
        # codes are the library's own, and lie in the order of rows: then weights have to, as well
        self.by_rows = bool(bucket.seats.codecs)
        self.states = bucket.seats.encoded - {"p"}
        homes = {home: tensors for home, tensors in bucket.homes.items() if home not in self.states}
        self.lowered = lowered
        self.kinds = lowered.kinds
        self.full = [home for home, kind in self.kinds.items() if kind == FULL and home in homes and home != "g"]
        self.sizes = list(map(Tensor.numel, homes["p"]))
        self.rows = [_row(p, bucket.seats.codecs) for p in homes["p"]] if self.by_rows else []
        for home in self.full:
            if list(map(Tensor.numel, homes[home])) != self.sizes:
                raise RuntimeError(f"a weight and its {home} differ in size; was the weight replaced by another?")
        self.axes = max(p.ndim for p in homes["p"]) if lowered.by_axes else 0
        self.shapes = bucket.seats.shapes
        self.contiguous = all(all(map(Tensor.is_contiguous, homes[home])) for home in homes if home != "g")
        self.strides = [] if self.contiguous else [p.stride() for p in homes["p"]]
        self.regular = self.contiguous or all(
            self._fits(home, homes["p"][i], homes[home][i])
            for home in homes if self._is_walked(home) and home != "g" for i in range(len(bucket))
        )  # fmt: skip
        self.spaces: dict[Kind, list[int]] = {}
        self.geometry = self._geometry(homes["p"])

    def _is_walked(self, home: str) -> bool:
        """Does a kernel see it? Matrices are torch's, and what the plan leaves alone is nobody's."""
        return self.kinds.get(home, MATRIX) != MATRIX

    def _fits(self, home: str, p: Tensor, tensor: Tensor) -> bool:
        if home == "p":
            return self._lies_well(p)
        return _alike(p, tensor) if self.kinds[home] == FULL else tensor.is_contiguous()

    def _geometry(self, weights: Sequence[Tensor]) -> list[int]:
        """Shapes here, then strides, then whole shapes, an axis after the other; missing axes have size one."""
        columns: list[int] = []
        here, strides = [p.shape for p in weights], [self._order(p).stride() for p in weights]
        for table in (here, strides, self.shapes) if self.axes else ():
            rows = [(*row, *[1] * (self.axes - len(row))) for row in table]
            for column in zip(*rows, strict=True):
                columns.extend(column)
        return columns

    def _order(self, p: Tensor) -> Tensor:
        """The weight, or what stands in for it."""
        return p if self._lies_well(p) else torch.empty(p.shape, device="meta")

    def _lies_well(self, p: Tensor) -> bool:
        return p.is_contiguous() if self.by_rows else _is_dense(p)

    def space(self, kind: Kind, weights: Sequence[Tensor]) -> list[int]:
        """How many elements each weight has in an index space."""
        if kind not in self.spaces:
            sizes = self.sizes if kind == FULL else [prod(shape_of(kind, p) or ()) for p in weights]
            self.spaces[kind] = sizes
        return self.spaces[kind]

    def settle(self, bucket: Bucket) -> None:
        """Put copies in the place of tensors that do not lie in memory as their weight does."""
        gradients = bucket.homes["g"]
        if list(map(Tensor.numel, gradients)) != self.sizes:
            raise RuntimeError("a weight and its gradient differ in size; was the weight replaced after backward()?")
        if self.contiguous:
            usual = all(map(Tensor.is_contiguous, gradients))
        else:
            usual = self.regular and list(map(Tensor.stride, gradients)) == self.strides
        if not usual:
            bucket.homes = {home: list(tensors) for home, tensors in bucket.homes.items()}
            for i in range(len(bucket)):
                self._stand_in(bucket.homes, i)

    def _stand_in(self, homes: dict[str, list[Tensor]], i: int) -> None:
        if not self._lies_well(homes["p"][i]):
            homes["p"][i] = homes["p"][i].contiguous()
        p = homes["p"][i]
        for home, tensors in homes.items():
            if home in self.states or not self._is_walked(home):
                continue
            if self.kinds[home] != FULL:
                tensors[i] = tensors[i].contiguous()
            elif not _alike(p, tensors[i]):
                tensors[i] = _ordered(tensors[i], p)


def _ordered(tensor: Tensor, p: Tensor) -> Tensor:
    """A copy that lies in memory as ``p`` does."""
    return torch.empty_strided(p.shape, p.stride(), dtype=tensor.dtype).copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------


class Cpp:
    """See the head of this module."""

    name = "cpp"

    def __init__(self) -> None:
        self.instead = Foreach()
        self.broken = ""

    def begin(self, bucket: Bucket) -> None:
        if "cpp" not in bucket.seats.kept:
            bucket.seats.kept["cpp"] = self._table(bucket)
        table: _Table | None = bucket.seats.kept["cpp"]
        if table is None:
            self.instead.begin(bucket)
            return
        table.settle(bucket)
        if table.lowered.in_torch:
            bucket.set_columns(reference.inputs(bucket.plan)[1])

    def _table(self, bucket: Bucket) -> _Table | None:
        codecs, encoded = bucket.seats.codecs, bucket.seats.encoded
        homes = {home: tensors[0].dtype for home, tensors in bucket.homes.items() if home not in encoded}
        hidden = any(not at and p.numel() for at, p in zip(bucket.seats.addresses, bucket.homes["p"], strict=True))
        if self.broken or hidden or bucket.device.type != "cpu" or not TYPES.keys() >= set(homes.values()):
            return None
        try:
            lowered = _lower(bucket.plan, bucket.dtype, homes, codecs)
        except cpp_build.BuildError as error:
            self.broken = str(error)
            _LOG.warning("the foreach engine takes over from the cpp engine: %s", error)
            return None
        table = _Table(bucket, lowered)
        return table if table.axes <= _MOST_AXES else None

    def run(self, bucket: Bucket, stage: int) -> None:
        table: _Table | None = bucket.seats.kept["cpp"]
        if table is None:
            self.instead.run(bucket, stage)
            return
        for work, kernel, arguments in table.lowered.stages[stage]:
            if kernel is None:
                keeps = list(work.kept)
                reference.walk(bucket, Stage(work.loads, work.compute, work.writes, work.partials, keeps))
            else:
                _launch(bucket, table, work.space, arguments, kernel)
            _copy_back(bucket, work)


def _launch(bucket: Bucket, table: _Table, space: Kind, arguments: Sequence[Column], kernel: Kernel) -> None:
    columns = [*table.space(space, bucket.homes["p"]), *bucket.seats.groups, *bucket.steps]
    for column in arguments:
        columns += _column(bucket, table, column)
    columns += table.geometry
    # a group that is not in this bucket may have a flag where this plan has a number
    hyper = [group.get(name, nan) for group in bucket.hp for name in table.lowered.hyper]
    threads = torch.get_num_threads() if os.getpid() == _PROCESS else 1
    kernel(len(bucket), threads, len(table.lowered.hyper), table.axes, _packed("q", columns), _packed("d", hyper))


def _packed(letter: str, numbers: Sequence[float]) -> bytes:
    """Numbers as C has them, side by side: the fastest way there that the standard library knows."""
    return struct.pack(f"{len(numbers)}{letter}", *numbers)


def _column(bucket: Bucket, table: _Table, column: Column) -> list[int]:
    """The addresses of one argument; buffers for results are made here."""
    source, key = column
    if source == "phase":
        return bucket.seats.phases
    if source == "row":
        return table.rows
    if source == "rest":
        return _addresses(bucket.homes[beside(str(key))])
    if isinstance(key, str):
        tensors = bucket.homes[key]
        return bucket.seats.addresses if tensors is bucket.seats.homes["p"] else _addresses(tensors)
    if source == "value":
        values = bucket.values[key] = _usable(bucket, key)
        return _addresses(values) if key.kind != ALL else _addresses(values) * len(bucket)
    results = _buffers(bucket, key)
    (bucket.values if source == "kept" else bucket.partials)[key] = results
    return _addresses(results) if key.kind != ALL else _addresses(results) * len(bucket)


def _buffers(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    weights = bucket.homes["p"]
    if sym.kind == ALL:
        return [torch.empty((), dtype=bucket.dtype)]
    if sym.kind == FULL:
        return [torch.empty_strided(p.shape, p.stride(), dtype=bucket.dtype) for p in weights]
    return Stacked([shape_of(sym.kind, p) or () for p in weights], bucket.dtype)


def _usable(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    """Finished values in the precision of the arithmetic, lying as kernels expect."""
    values: Sequence[Tensor] = bucket.values[sym]
    if isinstance(values, Stacked):
        return values
    right = [x if x.dtype == bucket.dtype else x.to(bucket.dtype) for x in values]
    if sym.kind != FULL:
        return [x.contiguous() for x in right]
    return [x if _alike(p, x) else _ordered(x, p) for p, x in zip(bucket.homes["p"], right, strict=True)]


def _copy_back(bucket: Bucket, work: Pass) -> None:
    """Bring what was written to a copy to where it belongs."""
    for home in work.writes:
        if bucket.homes[home] is not bucket.seats.homes[home]:
            for copy, tensor in zip(bucket.homes[home], bucket.seats.homes[home], strict=True):
                if copy is not tensor:
                    tensor.copy_(copy)
