"""Calls the opaque functions of a stage on the weights of a bucket, those of equal shapes (and host numbers) at once.

They see whole weights, or parts that are like weights of their own. Where a bucket has a team, who owns a weight or a
part calls them, and all get what they need of the results in one collective, which may still be under way when this
returns. Else every process calls them for all weights, on weights gathered first where they are spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.costs import is_light
from piste.exchange import Exchange
from piste.sharding import gathered, part_of
from piste.symbol import FULL, HOST, MATRIX, Sym

__all__ = ["call_opaques"]

#: the most numbers of one argument that a function gets in a stack; larger weights come one by one. On CPUs a stack of
#: large matrices is no faster than one after the other, and stacking copies them
_MOST_STACKED, _MOST_STACKED_ON_CPU = 1 << 26, 1 << 18


def call_opaques(bucket: Bucket, opaques: Sequence[Sym]) -> Callable[[], None] | None:
    """Call these functions; results are in ``bucket.values`` afterwards.

    Returns:
        None, or what has to be called before results are used.
    """
    if not opaques:
        return None
    if bucket.seats.team is not None:
        return _call_shared(bucket, opaques)
    spread = bucket.seats.spread
    for sym in opaques:
        taken = {a: _whole(bucket, a) for a in sym.args if a.kind != HOST}
        results = _call(bucket, sym, taken, _numbers(bucket, sym))
        cut = spread is not None and sym.kind == FULL
        bucket.values[sym] = [part_of(x, spread) for x in results] if cut and spread is not None else results
    return None


def _whole(bucket: Bucket, sym: Sym) -> Sequence[Tensor]:
    """Whole values of all weights of a bucket."""
    values: Sequence[Tensor] = bucket.values[sym]
    spread = bucket.seats.spread
    if spread is None or sym.kind != FULL:
        return values
    return [gathered(x, spread, shape) for x, shape in zip(values, bucket.seats.shapes, strict=True)]


def _numbers(bucket: Bucket, sym: Sym) -> list[tuple[float, ...]]:
    """The host numbers of a call, by weight."""
    table = list(map(bucket.plan.numbers_of[sym], bucket.rows))
    return [table[row] for row in bucket.row_of]


def _call(
    bucket: Bucket, sym: Sym, taken: Mapping[Sym, Sequence[Tensor]], numbers: Sequence[tuple[float, ...]]
) -> list[Tensor]:
    """Call one function for some weights, or parts of them.

    Args:
        bucket: of the weights.
        sym: the call.
        taken: its tensor arguments, one for each of them.
        numbers: its host numbers, likewise.
    """
    function, batched = sym.attr
    columns = [taken[a] for a in sym.args if a.kind != HOST]
    alike: dict[Any, list[int]] = {}
    for i, own in enumerate(numbers):
        key = i if not batched else (own, *(values[i].shape for values in columns))
        alike.setdefault(key, []).append(i)
    results: list[Tensor] = [torch.empty(0)] * len(numbers)
    most = _MOST_STACKED_ON_CPU if bucket.device.type == "cpu" else _MOST_STACKED
    for run in (run for same in alike.values() for run in _runs(same, columns, most)):
        given = iter(numbers[run[0]])
        tensors = (_stacked([v[i] for i in run]) if batched else v[run[0]] for v in columns)
        out = function(*(next(given) if a.kind == HOST else next(tensors) for a in sym.args))
        for i, result in zip(run, out if batched else [out], strict=True):
            results[i] = result
    return results


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _runs(members: list[int], taken: Sequence[Sequence[Tensor]], most: int) -> Iterator[list[int]]:
    """Weights of equal shapes in runs that bound the size of a stack."""
    largest = max((values[members[0]].numel() for values in taken), default=0)
    count = max(1, most // max(1, largest))
    for start in range(0, len(members), count):
        yield members[start : start + count]


# ---------------------------------------------------------------------------------------------------------------------
# Work that a team shares


def _call_shared(bucket: Bucket, opaques: Sequence[Sym]) -> Callable[[], None] | None:
    exchange = _exchange(bucket)
    owned: list[Sym] = []
    for sym in opaques:
        if _is_everybodys(bucket, sym):
            taken = {a: bucket.values[a] for a in sym.args if a.kind != HOST}
            bucket.values[sym] = _call(bucket, sym, taken, _numbers(bucket, sym))
        else:
            owned.append(sym)
    _bring(bucket, exchange, owned)
    leaving: dict[Sym, list[Tensor]] = {}
    for sym in owned:
        taken = {a: _of_mine(bucket, exchange, a) for a in sym.args if a.kind != HOST}
        results = _call(bucket, sym, taken, _numbers_of_mine(bucket, exchange, sym))
        if sym.kind == MATRIX:
            here = dict(zip((exchange.stakes[i].weight for i in exchange.mine), results, strict=True))
            nothing = torch.empty(0, dtype=bucket.dtype, device=bucket.device)
            bucket.values[sym] = [here.get(i, nothing) for i in range(len(bucket))]
        else:
            bucket.wholes[sym] = results
            if _is_read(bucket, sym):
                leaving[sym] = [x.to(bucket.dtype) for x in results]
    if not leaving:
        return None
    like = torch.empty(0, dtype=bucket.dtype, device=bucket.device)
    pending = exchange.from_owners(list(leaving.values()), like)

    def arrive() -> None:
        for sym, values in zip(leaving, pending.wait(), strict=True):
            bucket.values[sym] = values

    return arrive


def _exchange(bucket: Bucket) -> Exchange:
    """What goes between the processes of a bucket's team, worked out once."""
    seats = bucket.seats
    if "exchange" not in seats.kept:
        assert seats.team is not None
        seats.kept["exchange"] = Exchange(seats.team, seats.spread, seats.shapes, seats.stakes)
    found: Exchange = seats.kept["exchange"]
    return found


def _is_everybodys(bucket: Bucket, sym: Sym) -> bool:
    """Has every process what the function needs, and is the work less than that of sending the result?"""
    if _exchange(bucket).spread is not None or sym.kind == MATRIX or any(a.kind == MATRIX for a in sym.args):
        return False
    if any(a in bucket.wholes and a not in bucket.values for a in sym.args):
        return False
    return is_light(sym.attr[0], bucket.seats.shapes[0], bucket.plan.numbers_of[sym](bucket.rows[0]))


def _is_read(bucket: Bucket, sym: Sym) -> bool:
    """Does a later stage make use of a result, besides other functions?"""
    return any(sym in stage.loads for stage in bucket.plan.stages)


def _bring(bucket: Bucket, exchange: Exchange, opaques: Sequence[Sym]) -> None:
    """Whole arguments to the owners of weights, where parts of them are elsewhere and they are not here yet."""
    if exchange.spread is None:
        return
    needed = dict.fromkeys(a for sym in opaques for a in sym.args if a.kind == FULL)
    missing = [a for a in needed if a not in bucket.wholes]
    if missing:
        parts = [[x.to(bucket.dtype) for x in bucket.values[a]] for a in missing]
        bucket.wholes |= dict(zip(missing, exchange.to_owners(parts), strict=True))


def _of_mine(bucket: Bucket, exchange: Exchange, sym: Sym) -> list[Tensor]:
    """The values of what is owned here, whole; a matrix is never kept for more than that."""
    if sym in bucket.wholes:
        return bucket.wholes[sym]
    values = bucket.values[sym]
    if sym.kind == MATRIX:
        return [values[exchange.stakes[i].weight] for i in exchange.mine]
    return exchange.of_mine(values)


def _numbers_of_mine(bucket: Bucket, exchange: Exchange, sym: Sym) -> list[tuple[float, ...]]:
    """The host numbers of a call for what is owned here: for a part of a weight those of a weight of its shape."""
    everybodys, host = _numbers(bucket, sym), bucket.plan.numbers_of[sym]
    found = []
    for stake in (exchange.stakes[i] for i in exchange.mine):
        is_part = stake.shape != bucket.seats.shapes[stake.weight]
        row = bucket.rows[bucket.row_of[stake.weight]]
        found.append(host(row.at(stake.shape)) if is_part else everybodys[stake.weight])
    return found
