"""The tensors of a bucket as addresses, for engines that generate kernels.

Kernels walk all tensors of a weight in the order of the weight's memory. A tensor that lies otherwise is worked on as a
copy for the length of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from piste.bucket import Bucket, beside
from piste.codecs import Codec, row_length
from piste.engines.kernel import Column, Pass
from piste.plan import Plan
from piste.storage import shape_of
from piste.symbol import ALL, FULL, MATRIX, Kind, Sym

__all__ = ["Stacked", "Table", "column", "copy_back", "kinds_of"]


def kinds_of(plan: Plan) -> dict[str, Kind]:
    """What the tensors in each home are."""
    found: dict[str, Kind] = {"g": FULL, "p": FULL}
    for stage in plan.stages:
        found |= {home: sym.kind for sym, home in stage.loads.items() if home != "value"}
        found |= {home: sym.kind for home, sym in stage.writes.items()}
    return found


class Stacked(Sequence[Tensor]):
    """One small result per weight, in a single buffer; a tensor is made for each only when somebody looks."""

    def __init__(self, shapes: list[tuple[int, ...]], like: Bucket) -> None:
        self.shapes = shapes
        self.ends = list(accumulate(map(prod, shapes)))
        self.buffer = torch.empty(self.ends[-1], dtype=like.dtype, device=like.device)

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


class Table:
    """What stays of a bucket from step to step, as long as its tensors are the same."""

    def __init__(self, bucket: Bucket, kinds: Mapping[str, Kind], *, by_axes: bool) -> None:
        # codes are the library's own, and lie in the order of rows: then weights have to, as well
        self.by_rows = bool(bucket.seats.codecs)
        self.states = bucket.seats.encoded - {"p"}
        homes = {home: tensors for home, tensors in bucket.homes.items() if home not in self.states}
        self.kinds = kinds
        self.full = [home for home, kind in self.kinds.items() if kind == FULL and home in homes and home != "g"]
        self.sizes = list(map(Tensor.numel, homes["p"]))
        self.rows = [_row(p, bucket.seats.codecs) for p in homes["p"]] if self.by_rows else []
        for home in self.full:
            if list(map(Tensor.numel, homes[home])) != self.sizes:
                raise RuntimeError(f"a weight and its {home} differ in size; was the weight replaced by another?")
        self.axes = max(p.ndim for p in homes["p"]) if by_axes else 0
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
    return torch.empty_strided(p.shape, p.stride(), dtype=tensor.dtype, device=p.device).copy_(tensor)


def column(bucket: Bucket, table: Table, argument: Column) -> list[int]:
    """The addresses of one argument; buffers for results are made here."""
    source, key = argument
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
    if source == "kept":
        results = bucket.values[key] = _buffers(bucket, key)
    else:
        results = bucket.partials[key] = _lasting_buffers(bucket, key)
    return _addresses(results) if key.kind != ALL else _addresses(results) * len(bucket)


def _buffers(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    weights = bucket.homes["p"]
    if sym.kind == ALL:
        return [torch.empty((), dtype=bucket.dtype, device=bucket.device)]
    if sym.kind == FULL:
        return [torch.empty_strided(p.shape, p.stride(), dtype=bucket.dtype, device=p.device) for p in weights]
    return Stacked([shape_of(sym.kind, p) or () for p in weights], bucket)


def _lasting_buffers(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    """Buffers for partial results, which nobody reads after the step: small ones serve in every step."""
    if sym.kind == FULL:
        return _buffers(bucket, sym)
    kept = bucket.seats.kept
    if ("partial", sym) not in kept:
        kept["partial", sym] = _buffers(bucket, sym)
    found: Sequence[Tensor] = kept["partial", sym]
    return found


def _usable(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    """Finished values in the precision of the arithmetic, lying as kernels expect."""
    values: Sequence[Tensor] = bucket.values[sym]
    if isinstance(values, Stacked):
        return values
    right = [x if x.dtype == bucket.dtype else x.to(bucket.dtype) for x in values]
    if sym.kind != FULL:
        return [x.contiguous() for x in right]
    return [x if _alike(p, x) else _ordered(x, p) for p, x in zip(bucket.homes["p"], right, strict=True)]


def copy_back(bucket: Bucket, work: Pass) -> None:
    """Bring what was written to a copy to where it belongs."""
    for home in work.writes:
        if bucket.homes[home] is not bucket.seats.homes[home]:
            for copy, tensor in zip(bucket.homes[home], bucket.seats.homes[home], strict=True):
                if copy is not tensor:
                    tensor.copy_(copy)
