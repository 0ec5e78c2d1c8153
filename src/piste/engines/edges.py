"""Codes at the edges of a stage, for engines that work on whole tensors.

What a stage reads is decoded before it and what it writes is encoded after it, so that for the length of the stage the
numbers of a bucket exist in full. The cpp engine does the same for a thousand numbers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import repeat
from typing import TypeVar

from torch import Tensor

from piste.bucket import Bucket, beside
from piste.coding import decode, encode

__all__ = ["at_edges"]

_Engine = TypeVar("_Engine")


def at_edges(run: Callable[[_Engine, Bucket, int], None]) -> Callable[[_Engine, Bucket, int], None]:
    """An engine's ``run`` that meets plain numbers only."""

    @wraps(run)
    def run_decoded(engine: _Engine, bucket: Bucket, stage: int) -> None:
        part, stored = bucket.plan.stages[stage], bucket.homes
        used = [home for home in bucket.seats.codecs if home in part.writes or home in part.loads.values()]
        if not used:
            run(engine, bucket, stage)
            return
        bucket.homes = {**stored, **{home: _decoded(bucket, home) for home in used}}
        try:
            run(engine, bucket, stage)
            plain = bucket.homes
        finally:
            bucket.homes = stored
        for home in part.writes:
            if home in used:
                _encode(bucket, home, plain[home])

    return run_decoded


def _tensors(bucket: Bucket, home: str) -> list[tuple[Tensor, Tensor | None]]:
    codes = bucket.homes[home]
    return list(zip(codes, bucket.homes.get(beside(home), repeat(None)), strict=False))


def _decoded(bucket: Bucket, home: str) -> list[Tensor]:
    codec, weights = bucket.seats.codecs[home], bucket.homes["p"]
    return [decode(codec, *pair, tuple(p.shape)) for pair, p in zip(_tensors(bucket, home), weights, strict=True)]


def _encode(bucket: Bucket, home: str, numbers: Sequence[Tensor]) -> None:
    codec = bucket.seats.codecs[home]
    steps: Sequence[int | Tensor] = bucket.steps if bucket.clock is None else bucket.clock.unbind()
    each = zip(numbers, _tensors(bucket, home), steps, bucket.seats.phases, strict=True)
    for x, (codes, rest), step, phase in each:
        encode(codec, x, codes, rest, step=step, phase=phase)
