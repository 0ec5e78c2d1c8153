"""Runs the plans of a step: picks the engine and works the buckets through stage by stage.

Every bucket passes stage 0, opaque functions are called, reductions completed, every bucket passes stage 1, and so on.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from piste.bucket import Bucket, Engine
from piste.device_numbers import give_numbers, restored, stored_before
from piste.engines import cpp_build
from piste.engines.compiled import Compiled
from piste.engines.cpp import Cpp
from piste.engines.foreach import Foreach
from piste.engines.reference import Reference
from piste.engines.triton import Triton
from piste.opaques import call_opaques
from piste.roster import Member, Roster, Sorted, plans_built
from piste.sharding import complete
from piste.symbol import ALL

__all__ = ["ENGINES", "Member", "Roster", "engine_for", "only_looked_at", "plans_built", "run", "take"]

log = logging.getLogger("piste")

ENGINES: dict[str, Engine] = {e.name: e for e in (Reference(), Foreach(), Compiled(), Cpp(), Triton())}


_looker: ContextVar[Callable[[Sequence[Bucket]], None] | None] = ContextVar("looker", default=None)


@contextmanager
def only_looked_at(look: Callable[[Sequence[Bucket]], None]) -> Iterator[None]:
    """Nothing is worked out inside, but shown to ``look``: for questions about steps on tensors without memory.

    All totals are 1 then.
    """
    before = _looker.set(look)
    try:
        yield
    finally:
        _looker.reset(before)


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


def take(
    step: Sorted, engine: str, *, inverse_scale: Tensor | None = None, skip: Tensor | None = None
) -> dict[str, Tensor]:
    """Run a step and count it: with the engine of this name, the rest as for :func:`run`."""
    totals = run(step.buckets, engine_for(engine), inverse_scale=inverse_scale, skip=skip)
    step.finish(skip)
    return totals


def run(
    buckets: Sequence[Bucket],
    engine: Engine,
    *,
    inverse_scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> dict[str, Tensor]:
    """Work the buckets of a step through.

    Args:
        buckets: the weights that step, as :meth:`Roster.sort` gave them.
        engine: see :func:`engine_for`.
        inverse_scale: what gradients are multiplied by as they are read, for rules traced with ``scaled=True``.
        skip: on the device, whether nothing is to change (not 0), for rules traced with ``skippable=True``.

    Returns:
        The totals over all weights that the rules asked for, by name.
    """
    look = _looker.get()
    if look is not None:
        look(buckets)
        return defaultdict(lambda: torch.ones(()))
    _give_tallies(buckets)
    before = [stored_before(bucket) if skip is not None else {} for bucket in buckets]
    for bucket in buckets:
        if inverse_scale is not None:
            _give(bucket, "inverse_scale", inverse_scale)
        if skip is not None:
            _give(bucket, "skip", skip)
        give_numbers(bucket)
        engine.begin(bucket)
    totals: dict[str, Tensor] = {}
    under_way: dict[Bucket, Callable[[], None]] = {}
    for stage in range(max((len(b.plan.stages) for b in buckets), default=0)):
        active = [b for b in buckets if stage < len(b.plan.stages)]
        # whoever has something to send goes first, so that it travels while the others are worked on
        for bucket in sorted(active, key=lambda b: not b.plan.stages[stage].opaques):
            if bucket in under_way:
                under_way.pop(bucket)()
            bucket.partials = {}
            _forget(bucket, stage)
            engine.run(bucket, stage)
            arrive = call_opaques(bucket, bucket.plan.stages[stage].opaques)
            if arrive is not None:
                under_way[bucket] = arrive
        _complete_reductions(active, totals)
    if skip is not None:
        for bucket, copies in zip(buckets, before, strict=True):
            restored(bucket, copies, skip)
    return totals


def _forget(bucket: Bucket, stage: int) -> None:
    """What an earlier stage handed to opaque functions, where this one works it out anew, from states as stored."""
    part = bucket.plan.stages[stage]
    for sym in part.kept:
        if part.loads.get(sym) != "value":
            bucket.values.pop(sym, None)
            bucket.wholes.pop(sym, None)


def _give(bucket: Bucket, name: str, value: Tensor) -> None:
    """A number for all weights, under the symbol of this name."""
    value = value.to(bucket.device, bucket.dtype)
    for stage in bucket.plan.stages:
        for sym in stage.loads:
            if sym.op == name:
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
            # filled on the device: copying one number there would wait for it
            bucket.values[sym] = [torch.full((), sums[sym.attr], device=bucket.device, dtype=bucket.dtype)]


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
        # in the order of size, so that the order of buckets plays no part
        totals[name] = torch.stack([x.to(parts[0].device, dtype) for x in parts]).sort().values.sum()
    for bucket in buckets:
        for sym in bucket.partials:
            if sym.kind == ALL:
                bucket.values[sym] = [totals[sym.attr].to(bucket.device, bucket.dtype)]
