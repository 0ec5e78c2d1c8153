"""Runs the plans of a step: picks the engine and works the buckets through stage by stage.

Every bucket passes stage 0, reductions are completed, opaque functions called, every bucket passes stage 1, and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from piste.bucket import Bucket, Engine
from piste.engines import cpp_build
from piste.engines.compiled import Compiled
from piste.engines.cpp import Cpp
from piste.engines.foreach import Foreach
from piste.engines.reference import Reference
from piste.engines.triton import Triton
from piste.roster import Member, Roster, plans_built
from piste.sharding import complete, gathered, part_of
from piste.symbol import ALL, FULL, HOST, Sym, compile_host

__all__ = ["ENGINES", "Member", "Roster", "engine_for", "plans_built", "run"]

log = logging.getLogger("piste")

ENGINES: dict[str, Engine] = {e.name: e for e in (Reference(), Foreach(), Compiled(), Cpp(), Triton())}


def engine_for(name: str) -> Engine:
    """The engine of this name; ``"auto"`` is the fastest that works here."""
    return ENGINES[_fastest() if name == "auto" else name]


@cache
def _fastest() -> str:
    """Generated C++ where there is a compiler; it hands weights on other devices than CPUs to foreach."""
    try:
        compiler = cpp_build.toolchain().command[0]
    except cpp_build.BuildError as error:
        log.info("engine='auto' takes 'foreach', because 'cpp' does not work here: %s", error)
        return "foreach"
    log.info("engine='auto' takes 'cpp' for weights on the CPU (compiler %s), 'foreach' for others", compiler)
    return "cpp"


def run(
    buckets: Sequence[Bucket],
    engine: Engine,
    *,
    inverse_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Take one step.

    Args:
        buckets: the weights that step, as :meth:`Roster.sort` gave them.
        engine: see :func:`engine_for`.
        inverse_scale: what gradients are multiplied by as they are read, for rules traced with ``scaled=True``.

    Returns:
        The totals over all weights that the rules asked for, by name.
    """
    _give_tallies(buckets)
    for bucket in buckets:
        if inverse_scale is not None:
            _give_scale(bucket, inverse_scale)
        engine.begin(bucket)
    totals: dict[str, Tensor] = {}
    for stage in range(max((len(b.plan.stages) for b in buckets), default=0)):
        active = [b for b in buckets if stage < len(b.plan.stages)]
        for bucket in active:
            bucket.partials = {}
            _forget(bucket, stage)
            engine.run(bucket, stage)
        _complete_reductions(active, totals)
        for bucket in active:
            for sym in bucket.plan.stages[stage].opaques:
                bucket.values[sym] = _call_opaque(bucket, sym)
    return totals


def _forget(bucket: Bucket, stage: int) -> None:
    """What an earlier stage handed to opaque functions, where this one works it out anew, from states as stored."""
    part = bucket.plan.stages[stage]
    for sym in part.kept:
        if part.loads.get(sym) != "value":
            bucket.values.pop(sym, None)


def _give_scale(bucket: Bucket, inverse_scale: Tensor) -> None:
    value = inverse_scale.to(bucket.device, bucket.dtype)
    for stage in bucket.plan.stages:
        for sym in stage.loads:
            if sym.op == "inverse_scale":
                bucket.values[sym] = [value]


def _give_tallies(buckets: Sequence[Bucket]) -> None:
    """Add up host numbers of all weights, by name."""
    sums: dict[str, float] = {}
    for bucket in buckets:
        for sym, host in bucket.plan.tallies:
            numbers = [host(row)[0] for row in bucket.rows]
            sums[sym.attr] = sums.get(sym.attr, 0.0) + sum(numbers[i] for i in bucket.row_of)
    for bucket in buckets:
        for sym, _ in bucket.plan.tallies:
            bucket.values[sym] = [torch.tensor(sums[sym.attr], device=bucket.device, dtype=bucket.dtype)]


def _complete_reductions(buckets: list[Bucket], totals: dict[str, Tensor]) -> None:
    """Turn partial results into values: over processes that share weights, and for totals over buckets."""
    shares: dict[str, list[Tensor]] = {}
    for bucket in buckets:
        for sym, partial in bucket.partials.items():
            if bucket.seats.spread is not None:
                of = sym.args[0].kind
                partial = complete(
                    partial,
                    "peak" if sym.op == "peak" else "sum",
                    bucket.seats.spread,
                    kept=sym.kind.keep,
                    over=of.keep if of.level == 2 else None,
                )
            if sym.kind == ALL:
                shares.setdefault(sym.attr, []).extend(partial)
            else:
                bucket.values[sym] = partial
    for name, parts in shares.items():
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in parts) else torch.float32
        totals[name] = torch.stack([x.to(parts[0].device, dtype) for x in parts]).sum()
    for bucket in buckets:
        for sym in bucket.partials:
            if sym.kind == ALL:
                bucket.values[sym] = [totals[sym.attr].to(bucket.device, bucket.dtype)]


#: the most numbers of one argument that an opaque function gets in a stack; larger weights come one by one. On CPUs a
#: stack of large matrices is no faster than one after the other, and stacking copies them
_MOST_STACKED, _MOST_STACKED_ON_CPU = 1 << 26, 1 << 18


def _call_opaque(bucket: Bucket, sym: Sym) -> list[Tensor]:
    """Call an opaque function on all weights of a bucket, those of equal shapes (and host numbers) at once.

    It sees whole weights: what is spread over processes is gathered first, and each process keeps its part of the
    result.
    """
    function, batched = sym.attr
    host = compile_host([a for a in sym.args if a.kind == HOST])
    numbers = [host(row) for row in bucket.rows]
    taken = [_whole(bucket, a) for a in sym.args if a.kind != HOST]
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(bucket.row_of):
        key = i if not batched else (numbers[row], *(values[i].shape for values in taken))
        alike.setdefault(key, []).append(i)
    results: list[Tensor] = [torch.empty(0)] * len(bucket)
    most = _MOST_STACKED_ON_CPU if bucket.device.type == "cpu" else _MOST_STACKED
    for members in (run for same in alike.values() for run in _runs(same, taken, most)):
        given = iter(numbers[bucket.row_of[members[0]]])
        tensors = (_stacked([v[i] for i in members]) if batched else v[members[0]] for v in taken)
        out = function(*(next(given) if a.kind == HOST else next(tensors) for a in sym.args))
        for i, result in zip(members, out if batched else [out], strict=True):
            results[i] = result
    spread = bucket.seats.spread
    return [part_of(x, spread) for x in results] if spread is not None and sym.kind == FULL else results


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _whole(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    """Whole values of all weights of a bucket."""
    values: Sequence[Tensor] = bucket.values[sym]
    spread = bucket.seats.spread
    if spread is None or sym.kind != FULL:
        return values
    return [gathered(x, spread, shape) for x, shape in zip(values, bucket.seats.shapes, strict=True)]


def _runs(members: list[int], taken: Sequence[Sequence[Tensor]], most: int) -> Iterator[list[int]]:
    """Weights of equal shapes in runs that bound the size of a stack."""
    largest = max((values[members[0]].numel() for values in taken), default=0)
    count = max(1, most // max(1, largest))
    for start in range(0, len(members), count):
        yield members[start : start + count]
