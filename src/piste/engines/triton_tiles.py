"""What programs of a Triton kernel are given: which tile of which weight each works on, and where axes are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.engines.kernel import is_small
from piste.engines.tables import Table
from piste.engines.triton_source import RESULTS, TILE
from piste.symbol import FULL, Kind

__all__ = ["Tiles", "axes_of", "result_tiles", "weight_tiles"]


class Tiles(NamedTuple):
    """The tiles of all weights: how many, which weight and which of its tiles each is, and each weight's first."""

    amount: int
    map: Tensor
    first: Tensor


def weight_tiles(bucket: Bucket, table: Table, space: Kind, unit: int) -> Tiles:
    """The tiles of a pass; `unit` is the length of pieces into which rows are cut, 0 where rows play no part."""
    sizes = table.space(space, bucket.homes["p"])
    if unit:
        pieces = [n // row * -(-row // unit) if n else 0 for n, row in zip(sizes, table.rows, strict=True)]
        sizes = [n * unit for n in pieces]
    return _tiles([-(-n // TILE) for n in sizes], bucket.device)


def result_tiles(bucket: Bucket, table: Table, space: Kind, kind: Kind) -> Tiles:
    """The results of this kind, some at a time; a weight without elements has none to be worked out."""
    sizes, results = (table.space(one, bucket.homes["p"]) for one in (space, kind))
    return _tiles([-(-n // RESULTS) if size else 0 for n, size in zip(results, sizes, strict=True)], bucket.device)


def _tiles(counts: Sequence[int], device: torch.device) -> Tiles:
    with torch.device("cpu"):
        first = torch.tensor([0, *accumulate(counts)])
        weight = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        number = torch.arange(len(weight)) - first[weight]
    return Tiles(len(weight), torch.cat((weight, number)).to(device), first.to(device))


def axes_of(bucket: Bucket, table: Table, space: Kind) -> list[int]:
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
