"""The foreach engine: a plan as a few ``torch._foreach_*`` calls over lists of tensors.

Each stage is written out once per plan as a small function (:mod:`piste.engines.foreach_source`; ``source(plan)`` shows
it), which is called for one chunk of the weights after the other. So temporaries exist for one chunk at a time. On a
CPU a chunk is small enough to stay in the cache from the first operation to the last, which is worth more than the
calls it costs; for the same reason a weight that is larger than a chunk is taken piece by piece where the stage treats
its elements alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.engines.edges import at_edges
from piste.engines.foreach_math import HELPERS, Tensors
from piste.engines.foreach_registers import Columns
from piste.engines.foreach_source import Writer
from piste.plan import Plan, Stage
from piste.symbol import ALL, MATRIX, Sym, compile_host

__all__ = ["Foreach", "source"]

#: elements of a chunk: on a CPU few enough for the temporaries to stay in cache, elsewhere enough to fill the device
#: with every launch
_CHUNK_CPU, _CHUNK_DEVICE = 1 << 19, 1 << 26


#: how partial results of a reduction are put together
_TOGETHER: dict[str, Callable[..., Tensors]] = {
    "sum": torch._foreach_add,
    "total": torch._foreach_add,
    "peak": torch._foreach_maximum,
}


class _Stage(NamedTuple):
    function: Callable[..., tuple[list[Tensors], list[Tensors]]]
    homes: list[str]
    inputs: list[Sym]
    divisible: bool
    source: str


class _Lowered:
    """A plan as generated functions, for one choice of homes that need a cast."""

    def __init__(self, plan: Plan, cast: frozenset[str]) -> None:
        columns = Columns()
        self.stages = []
        for stage in plan.stages:
            writer = Writer(stage, columns, cast)
            text = writer.write()
            space: dict[str, Any] = dict(HELPERS)
            exec(compile(text, "<piste foreach stage>", "exec"), space)
            self.stages.append(_Stage(space["stage"], writer.homes, list(writer.inputs), _divisible(stage), text))
        self.host = compile_host(columns.roots)


def _divisible(stage: Stage) -> bool:
    """Does the stage treat all elements of a weight alike?"""
    values = [*stage.loads, *stage.compute, *stage.partials]
    return not stage.kept and not any(sym.kind.keep or sym.kind == MATRIX for sym in values)


def _lower(bucket: Bucket) -> _Lowered:
    encoded = bucket.seats.encoded
    stored = {home: tensors for home, tensors in bucket.homes.items() if home not in encoded}
    cast = frozenset(home for home, tensors in stored.items() if tensors[0].dtype != bucket.dtype)
    return _lowered(bucket.plan, cast)


def _lowered(plan: Plan, cast: frozenset[str]) -> _Lowered:
    key = ("foreach", cast)
    if key not in plan.lowered:
        plan.lowered[key] = _Lowered(plan, cast)
    lowered: _Lowered = plan.lowered[key]
    return lowered


def source(plan: Plan) -> str:
    """The generated functions of a plan, for reading."""
    return "\n\n".join(stage.source for stage in _lowered(plan, frozenset()).stages)


def _chunks(bucket: Bucket, limit: int) -> Iterator[slice]:
    """Runs of weights with no more than ``limit`` elements; a weight larger than that has a run of its own."""
    start, held = 0, 0
    for i, tensor in enumerate(bucket.homes["p"]):
        size = tensor.numel()
        if held and held + size > limit:
            yield slice(start, i)
            start, held = i, 0
        held += size
    yield slice(start, len(bucket))


def _pieces(homes: list[list[Tensor]], limit: int) -> Iterator[list[list[Tensor]]]:
    """A chunk as it is, or, where it is one large weight, as runs of its elements."""
    one = [tensors[0] for tensors in homes]
    whole = len(homes[0]) > 1 or one[0].numel() <= limit
    if whole or any(t.numel() != one[0].numel() or not t.is_contiguous() for t in one):
        yield homes
    else:
        for run in zip(*(torch.split(t.view(-1), limit) for t in one), strict=True):
            yield [[t] for t in run]


class Foreach:
    """See the head of this module."""

    name = "foreach"

    def begin(self, bucket: Bucket) -> None:
        bucket.set_columns(_lower(bucket).host)

    @at_edges
    def run(self, bucket: Bucket, stage: int) -> None:
        lowered, part = _lower(bucket).stages[stage], bucket.plan.stages[stage]
        if not part.results:
            return
        limit = _CHUNK_CPU if bucket.device.type == "cpu" else _CHUNK_DEVICE
        for chunk in _chunks(bucket, limit):
            columns = [c[chunk] if isinstance(c, list) else c for c in bucket.columns]
            homes = [bucket.homes[h][chunk] for h in lowered.homes]
            values = [bucket.values[s] if s.kind == ALL else bucket.values[s][chunk] for s in lowered.inputs]
            shares: list[Tensors] = []
            split = lowered.divisible and homes and bucket.device.type == "cpu"
            for piece in _pieces(homes, limit) if split else [homes]:
                count = len(bucket.row_of[chunk])
                partials, keeps = lowered.function(count, columns, bucket.dtype, *piece, *values)
                shares = _combined(part.partials, shares, partials)
                for sym, results in zip(part.kept, keeps, strict=True):
                    bucket.values.setdefault(sym, []).extend(results)
            for sym, results in zip(part.partials, shares, strict=True):
                if sym.op == "total" and sym in bucket.partials:
                    results = _TOGETHER["total"](bucket.partials.pop(sym), results)
                bucket.partials.setdefault(sym, []).extend(results)


def _combined(reductions: list[Sym], so_far: list[Tensors], more: list[Tensors]) -> list[Tensors]:
    """Partial results of one weight's pieces, put together."""
    if not so_far:
        return more
    return [_TOGETHER[r.op](a, b) for r, a, b in zip(reductions, so_far, more, strict=True)]
