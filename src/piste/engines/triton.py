"""The triton engine: each stage of a plan as generated Triton kernels, one launch a pass for all weights of a bucket.

The text comes from :mod:`piste.engines.triton_source` (``source(plan)`` shows it). A kernel finds the tensors through a
table of addresses, which is sent to the device only when it differs from the one that is there, as host numbers are
(:mod:`piste.engines.triton_upload`). Nothing that changes with the step is compiled in, and nothing waits for the
device.

On a side stream torch is told of the gradients that kernels read, so that their memory is not given away before.

It takes weights on a GPU, and on the CPU where Triton interprets kernels (``TRITON_INTERPRET=1``, for tests). Where
Triton is not installed, for other weights and for number formats that kernels do not know, foreach does the work.
"""

from __future__ import annotations

import linecache
import logging
import struct
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.codecs import Codec, phase_at
from piste.device_numbers import recording
from piste.engines.kernel import Column, Pass, coded, host_numbers, single, spread
from piste.engines.native import Built, Native, Step, native_passes, plain_homes
from piste.engines.pass_text import PHASE
from piste.engines.tables import Stacked, Table, column
from piste.engines.triton_codecs import unit
from piste.engines.triton_source import TILE, write
from piste.engines.triton_tiles import Tiles, axes_of, result_tiles, weight_tiles
from piste.engines.triton_upload import Upload, current_stream
from piste.engines.triton_values import TYPES, Values
from piste.plan import Plan
from piste.symbol import ALL, Sym, compile_host

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
        return Built(text, kernels, compile_host(numbers))

    def begin(self, bucket: Bucket) -> None:
        super().begin(bucket)
        held = bucket.seats.kept[self.name]
        if held is not None:
            if bucket.clock is None or not recording():  # maps of tiles are made by the steps before a recording
                bucket.seats.kept["triton.stream"] = current_stream(bucket.device)
            _hold_gradients(bucket)
            numbers = [number for row in bucket.rows for number in held.kernels.inputs(row)]
            whole = partial(torch.tensor, numbers or [0.0], dtype=bucket.dtype, device="cpu")
            bucket.seats.kept["triton.numbers"] = _sent(bucket, "numbers", numbers, whole)
            bucket.seats.kept["triton.thresholds"] = _thresholds(bucket)

    def launch(self, bucket: Bucket, table: Table, inputs: Any, step: Step) -> None:
        one, kernels = step.work, step.kernel
        given, aligned = _table(bucket, table, step)
        numbers = bucket.seats.kept["triton.numbers"]
        for reduction, kernel in kernels.reductions:
            tiles = _tiles(
                bucket, ("results", one.space, reduction.kind), result_tiles, table, one.space, reduction.kind
            )
            if tiles.amount:
                _run(kernel, tiles, given, len(bucket), table.axes, numbers, given, aligned)
        if kernels.main is not None:
            piece = (unit(coded(one, bucket.seats.codecs)) or TILE) if _by_rows(step) else 0
            tiles = _tiles(bucket, ("tiles", one.space, piece), weight_tiles, table, one.space, piece)
            _main(bucket, step, tiles, table.axes, given, numbers, aligned)


_Kept = TypeVar("_Kept")


def _once(bucket: Bucket, key: Any, make: Callable[[], _Kept]) -> _Kept:
    """What stays from step to step, made in the first one."""
    kept = bucket.seats.kept
    if ("triton", key) not in kept:
        kept["triton", key] = make()
    found: _Kept = kept["triton", key]
    return found


def _sent(bucket: Bucket, key: Any, known: Any, numbers: Callable[[], Tensor]) -> Tensor:
    """Numbers on the device; see :meth:`Upload.send`."""
    upload = _once(bucket, key, lambda: Upload(bucket.device, recordable=bucket.clock is not None))
    return upload.send(known, numbers, bucket.seats.kept["triton.stream"])


def _thresholds(bucket: Bucket) -> Tensor | None:
    """Where the thresholds of rounding stand, by weight, if the device counts the steps and something is in codes."""
    if bucket.clock is None or not bucket.seats.codecs:
        return None
    phases = _once(bucket, "phases", lambda: torch.tensor(bucket.seats.phases, device=bucket.device))
    return phase_at(bucket.clock, phases)


def _tiles(bucket: Bucket, key: Any, make: Callable[..., Tiles], *given: Any) -> Tiles:
    """A map of tiles. It is freed to the stream on which it was made, so every stream has its own."""
    return _once(bucket, (*key, bucket.seats.kept["triton.stream"]), lambda: make(bucket, *given))


def _hold_gradients(bucket: Bucket) -> None:
    """Whoever lets go of a gradient lets go of its memory on the stream of backward(), which need not wait for ours."""
    if bucket.device.type == "cuda":
        stream = torch.cuda.current_stream(bucket.device)
        if stream != torch.cuda.default_stream(bucket.device) and not torch.cuda.is_current_stream_capturing():
            for gradient in bucket.homes["g"]:
                gradient.record_stream(stream)


def _by_rows(step: Step) -> bool:
    return any(c.source == "row" for c in step.columns)


def _table(bucket: Bucket, table: Table, step: Step) -> tuple[Tensor, bool]:
    """The table of a pass on the device, and whether all tensors that are walked begin where wide loads can."""
    space = step.work.space
    changing = list(bucket.row_of)
    aligned = True
    for argument in step.columns:
        if argument.source == "phase":
            changing += map(phase_at, bucket.steps, bucket.seats.phases)
        elif argument.source == "row":
            changing += table.rows
        else:
            _stay(bucket, argument)
            places = column(bucket, table, argument)
            aligned = aligned and (step.work.kind_of(argument) != space or not any(at % 16 for at in places))
            changing += places

    def numbers() -> Tensor:
        axes = _once(bucket, ("axes", space), lambda: axes_of(bucket, table, space))
        whole = [*table.space(space, bucket.homes["p"]), *changing, *axes]
        return torch.frombuffer(bytearray(struct.pack(f"{len(whole)}q", *whole)), dtype=torch.int64)

    given = _sent(bucket, ("table", id(step.work)), changing, numbers)
    thresholds = bucket.seats.kept["triton.thresholds"]
    if thresholds is not None and PHASE in step.columns:
        place = Values.fixed_columns + step.columns.index(PHASE)
        given[place * len(bucket) : (place + 1) * len(bucket)].copy_(thresholds)
    return given, aligned


def _stay(bucket: Bucket, argument: Column) -> None:
    """Bring a number over all weights, which others work out anew in each step, to where the table has it."""
    sym = argument.key
    if argument.source == "value" and isinstance(sym, Sym) and sym.kind == ALL:
        (value,) = bucket.values[sym]
        here = _once(bucket, ("value", sym), lambda: torch.empty((), dtype=bucket.dtype, device=bucket.device))
        if value is not here:
            bucket.values[sym] = [here.copy_(value)]


def _run(
    kernel: Any, tiles: Tiles, given: Tensor, n: int, axes: int, numbers: Tensor, parts: Tensor, aligned: bool
) -> None:
    # products and sums are rounded one by one, as on every engine
    own = {"enable_fp_fusion": False}
    kernel[(tiles.amount,)](given, n, axes, numbers, tiles.map, tiles.amount, parts, aligned, **own)


def _main(bucket: Bucket, step: Step, tiles: Tiles, axes: int, given: Tensor, numbers: Tensor, aligned: bool) -> None:
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
