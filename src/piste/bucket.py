"""A bucket: the weights that share a plan, a device and dtypes, and are worked through together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from piste.plan import Plan
from piste.symbol import HOST, HostFunction, Row, Sym, compile_host

__all__ = ["Bucket", "Engine", "host_inputs"]


@dataclass(eq=False)
class Bucket:
    """Weights of one plan, device and choice of dtypes.

    Attributes:
        plan: what is done with them.
        dtype: the precision in which it is worked out.
        homes: tensors by where they live: ``"p"``, ``"g"``, ``"state.NAME"``; one per weight.
        rows: the distinct host rows of these weights (weights of one group and step share one).
        row_of: for each weight, its row.
        values: finished reductions, opaque results and scratch buffers, one per weight; reductions over all weights
            (kind ``ALL``) and the inverse loss scale have a single entry.
        partials: results of the reductions of the stage that ran last, per weight (per bucket for kind ``ALL``).
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    homes: dict[str, list[Tensor]]
    rows: list[Row]
    row_of: list[int]
    values: dict[Sym, list[Tensor]] = field(default_factory=dict)
    partials: dict[Sym, list[Tensor]] = field(default_factory=dict)
    columns: list[float | list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.row_of)

    def set_columns(self, host: HostFunction) -> None:
        """Work out the host numbers of this step: one float for the whole bucket where all weights agree."""
        table = [host(row) for row in self.rows]
        self.columns = []
        for column in zip(*table, strict=True):
            same = len(column) == 1 or column.count(column[0]) == len(column)
            self.columns.append(column[0] if same else [column[i] for i in self.row_of])

    def number(self, column: int, weight: int) -> float:
        """One host number of one weight."""
        values = self.columns[column]
        return values[weight] if isinstance(values, list) else values


class Engine(Protocol):
    """A way to run plans. Engines hold no state of their own; what they derive is kept in ``plan.lowered``."""

    @property
    def name(self) -> str: ...

    def begin(self, bucket: Bucket) -> None:
        """Make ready for a step: host numbers."""

    def run(self, bucket: Bucket, stage: int) -> None:
        """Work through one stage: leave partial results in ``bucket.partials``, kept values in ``bucket.values``."""


def host_inputs(plan: Plan) -> tuple[list[Sym], HostFunction]:
    """The host symbols that tensors meet in a plan, and the function that computes them."""
    found: dict[Sym, None] = {}
    for stage in plan.stages:
        for sym in (*stage.compute, *stage.writes.values()):
            found.update(dict.fromkeys(a for a in sym.args if a.kind == HOST))
    roots = list(found)
    return roots, compile_host(roots)
