"""The triton engine: each stage of a plan as generated Triton kernels, one launch a pass for all weights of a bucket.

The text comes from :mod:`piste.engines.triton_source` (``source(plan)`` shows it). A kernel finds the tensors through a
table of addresses; it is sent to the device only when it differs from the one that is there. Host numbers are sent in
every step, and nothing that changes with the step is compiled in.

It takes weights on a GPU, and on the CPU where Triton interprets kernels (``TRITON_INTERPRET=1``, for tests). Where
Triton is not installed, for other weights and for number formats that kernels do not know, foreach does the work.
"""

from __future__ import annotations

import linecache
import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.codecs import Codec, phase_at
from piste.engines.kernel import Pass, host_numbers, is_small, single, spread
from piste.engines.native import Built, Native, Step, native_passes, plain_homes
from piste.engines.tables import Stacked, Table, column
from piste.engines.triton_codecs import unit
from piste.engines.triton_source import RESULTS, TILE, write
from piste.engines.triton_values import TYPES
from piste.plan import Plan
from piste.symbol import ALL, FULL, Kind, Sym, compile_host

__all__ = ["Triton", "source", "works_on"]

_LOG = logging.getLogger("piste")


@cache
def _math() -> Any:
    """The module of helper functions, or None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from piste.engines import triton_math

    return triton_math


def works_on(device: torch.device) -> bool:
    """Can kernels run on this device?"""
    if device.type == "cuda":
        return _math() is not None
    return device.type == "cpu" and _math() is not None and bool(_math().INTERPRETED)


@cache
def _explain(device: str) -> None:
    """Once for each kind of device."""
    missing = "Triton is not installed" if _math() is None else f"its kernels do not run on {device!r}"
    _LOG.warning("the foreach engine takes over from the triton engine: %s", missing)


def source(plan: Plan) -> str:
    """The generated text of a plan for float32, for reading."""
    return write(plan, native_passes(plan), torch.float32, plain_homes(plan), {})


def _loaded(text: str) -> dict[str, Any]:
    """The functions of a source. Triton reads the text of a function again, as Python tells it from the line cache."""
    file = f"<piste kernels {hash(text):x}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    space: dict[str, Any] = {name: getattr(_math(), name) for name in _math().__all__}
    space |= {"__name__": "piste_kernels", "triton": _math().triton, "tl": _math().tl}
    exec(compile(text, file, "exec"), space)
    return space


class _Kernel(NamedTuple):
    """The kernels of a pass."""

    main: Any
    reductions: list[tuple[Sym, Any]]


def _kernel(space: Mapping[str, Any], name: str, one: Pass) -> _Kernel:
    has_main = one.writes or one.kept or len(spread(one)) < len(one.partials)
    reductions = [(reduction, space[f"{name}_{i}"]) for i, reduction in enumerate(spread(one))]
    return _Kernel(space[name] if has_main else None, reductions)


class _Inputs(NamedTuple):
    """How host numbers are worked out, and what is cut into pieces of this length."""

    host: Any
    unit: int


class Triton(Native):
    """See the head of this module."""

    name = "triton"

    def takes(self, bucket: Bucket, homes: Mapping[str, torch.dtype]) -> bool:
        if not works_on(bucket.device):
            _explain(bucket.device.type)
        return works_on(bucket.device) and TYPES.keys() >= set(homes.values())

    def build(
        self,
        plan: Plan,
        native: Mapping[str, Pass],
        real: torch.dtype,
        homes: Mapping[str, torch.dtype],
        codecs: Mapping[str, Codec],
    ) -> Built | None:
        text = write(plan, native, real, homes, codecs)
        space = _loaded(text)
        kernels = {name: _kernel(space, name, one) for name, one in native.items()}
        numbers, _ = host_numbers(plan, native.values())
        return Built(text, kernels, _Inputs(compile_host(numbers), unit(codecs) or TILE))

    def begin(self, bucket: Bucket) -> None:
        super().begin(bucket)
        held = bucket.seats.kept[self.name]
        if held is not None:
            inputs: _Inputs = held.kernels.inputs
            numbers = [number for row in bucket.rows for number in inputs.host(row)]
            host = torch.tensor(numbers or [0.0], dtype=bucket.dtype)
            bucket.seats.kept["triton.numbers"] = host.to(bucket.device, non_blocking=True)

    def launch(self, bucket: Bucket, table: Table, inputs: Any, step: Step) -> None:
        space, kernels = step.work.space, step.kernel
        sizes = table.space(space, bucket.homes["p"])
        places: list[int] = []
        others: list[int] = []
        for argument in step.columns:
            if argument.source == "phase":
                others += map(phase_at, bucket.steps, bucket.seats.phases)
            elif argument.source == "row":
                others += table.rows
            else:
                places += column(bucket, table, argument)
        axes = table.axes
        geometry = _once(bucket, ("geometry", space), lambda: _geometry(bucket, table, space))
        given = _sent(bucket, (id(step.work), "table"), [*sizes, *bucket.row_of, *places, *others, *geometry])
        aligned = not any(at % 16 for at in places)
        numbers = bucket.seats.kept["triton.numbers"]
        for reduction, kernel in kernels.reductions:
            tiles = _result_tiles(bucket, table, space, reduction.kind)
            if tiles.amount:
                _run(kernel, tiles, given, len(bucket), axes, numbers, given, aligned)
        if kernels.main is not None:
            _main(bucket, step, _main_tiles(bucket, table, step, inputs), axes, given, numbers, aligned)


class _Tiles(NamedTuple):
    """The tiles of all weights: how many, which weight and which of its tiles each is, and each weight's first."""

    amount: int
    map: Tensor
    first: Tensor


def _run(
    kernel: Any, tiles: _Tiles, given: Tensor, n: int, axes: int, numbers: Tensor, parts: Tensor, aligned: bool
) -> None:
    # products and sums are rounded one by one, as on every engine
    own = {"enable_fp_fusion": False}
    kernel[(tiles.amount,)](given, n, axes, numbers, tiles.map, tiles.amount, parts, aligned, **own)


_Kept = TypeVar("_Kept")


def _once(bucket: Bucket, key: Any, make: Callable[[], _Kept]) -> _Kept:
    """What stays from step to step, made in the first one."""
    kept = bucket.seats.kept
    if ("triton", key) not in kept:
        kept["triton", key] = make()
    found: _Kept = kept["triton", key]
    return found


def _main_tiles(bucket: Bucket, table: Table, step: Step, inputs: _Inputs) -> _Tiles:
    """The tiles of a pass; over codes, of rows cut into pieces."""
    by_rows = any(c.source == "row" for c in step.columns)

    def tiles() -> _Tiles:
        sizes = table.space(step.work.space, bucket.homes["p"])
        if by_rows:
            pieces = [n // row * -(-row // inputs.unit) if n else 0 for n, row in zip(sizes, table.rows, strict=True)]
            sizes = [n * inputs.unit for n in pieces]
        return _tiles([-(-n // TILE) for n in sizes], bucket.device)

    return _once(bucket, ("tiles", step.work.space, by_rows), tiles)


def _result_tiles(bucket: Bucket, table: Table, space: Kind, kind: Kind) -> _Tiles:
    """The results of this kind, some at a time; a weight without elements has none to be worked out."""

    def tiles() -> _Tiles:
        sizes, results = (table.space(one, bucket.homes["p"]) for one in (space, kind))
        return _tiles([-(-n // RESULTS) if size else 0 for n, size in zip(results, sizes, strict=True)], bucket.device)

    return _once(bucket, ("results", space, kind), tiles)


def _tiles(counts: Sequence[int], device: torch.device) -> _Tiles:
    first = torch.tensor([0, *accumulate(counts)])
    weight = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    number = torch.arange(len(weight)) - first[weight]
    return _Tiles(len(weight), torch.cat((weight, number)).to(device), first.to(device))


def _main(bucket: Bucket, step: Step, tiles: _Tiles, axes: int, given: Tensor, numbers: Tensor, aligned: bool) -> None:
    reductions = single(step.work)
    parts = torch.empty(max(1, tiles.amount * len(reductions)), dtype=torch.float64, device=bucket.device)
    if tiles.amount:
        _run(step.kernel.main, tiles, given, len(bucket), axes, numbers, parts, aligned)
    for place, reduction in enumerate(reductions):
        results = bucket.partials[reduction]
        if reduction.kind == ALL:
            out = torch.empty(len(bucket), dtype=torch.float64, device=bucket.device)
        else:
            out = results.buffer if isinstance(results, Stacked) else results[0]
        peak = reduction.op == "peak"
        _math().finish[(len(bucket),)](parts, tiles.first, out, place, len(reductions), PEAK=peak, WIDTH=TILE)
        if reduction.kind == ALL:
            results[0].copy_(out.sum())


def _geometry(bucket: Bucket, table: Table, space: Kind) -> list[int]:
    """The size of every axis of all weights, and then its stride, in this space."""
    axes = table.axes
    if not axes or is_small(space):
        return [1] * (2 * axes * len(bucket))
    if space == FULL:
        shapes, strides = (table.geometry[k * axes * len(bucket) : (k + 1) * axes * len(bucket)] for k in (0, 1))
        return [*shapes, *(1 if size == 1 else step for size, step in zip(shapes, strides, strict=True))]
    sizes = [[p.shape[a] if a in space.keep and a < p.ndim else 1 for a in range(axes)] for p in bucket.homes["p"]]
    steps = [[prod(shape[a + 1 :]) for a in range(axes)] for shape in sizes]
    return [number for rows in (sizes, steps) for a in zip(*rows, strict=True) for number in a]


def _sent(bucket: Bucket, key: Any, numbers: Sequence[int]) -> Tensor:
    """The numbers on the device. They are sent when they differ from what is there."""
    packed = struct.pack(f"{len(numbers)}q", *numbers)
    known = bucket.seats.kept.get(key)
    if known is None or known[0] != packed:
        host = torch.frombuffer(bytearray(packed), dtype=torch.int64)
        known = bucket.seats.kept[key] = packed, host.to(bucket.device, non_blocking=True)
    tensor: Tensor = known[1]
    return tensor
