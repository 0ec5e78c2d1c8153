"""A bucket: the weights that share a plan, a device and dtypes, and are worked through together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from piste.codecs import Codec
from piste.exchange import Stake, Team
from piste.plan import Plan
from piste.sharding import Spread
from piste.storage import companion
from piste.symbol import HOST, HostFunction, Row, Sym, compile_host

__all__ = ["Bucket", "Engine", "Seats", "beside", "host_inputs"]


def beside(home: str) -> str:
    """The home of the second tensor of a codec: scales of a state, or what a weight's own format leaves out."""
    return f"state.{companion(home.removeprefix('state.'))}"


class Seats(NamedTuple):
    """What a bucket has step after step.

    Attributes:
        plan: what is done with its weights.
        device: where they are.
        dtype: the precision in which the plan is worked out.
        homes: tensors by where they live: ``"p"``, ``"state.NAME"``; one per weight, of sharded ones the part here.
        groups: for each weight, the index of its parameter group.
        shapes: the global shape of each weight.
        addresses: where each weight lies.
        codecs: by home, how its numbers are stored where they are not stored as they are; what else a codec needs is
            the home :func:`piste.bucket.beside`.
        phases: for each weight, where the thresholds of rounding begin.
        spread: how its weights lie on processes; None where they are all here.
        team: the processes that share the work of whole matrices; None where each does all of it.
        stakes: which of them works on which weight, or which part of it, and keeps its matrices.
        kept: what an engine derives from these tensors, under a key of its own. It lasts while they are the same
            objects and no weight has moved.
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    homes: dict[str, list[Tensor]]
    groups: list[int]
    shapes: list[tuple[int, ...]]
    addresses: list[int]
    codecs: dict[str, Codec]
    phases: list[int]
    spread: Spread | None
    team: Team | None
    stakes: list[Stake]
    kept: dict[Any, Any]

    @property
    def encoded(self) -> set[str]:
        """The homes that hold codes, or what belongs to codes."""
        return {*self.codecs, *map(beside, self.codecs)}


@dataclass(eq=False)
class Bucket:
    """Weights of one plan, device and choice of dtypes in one step.

    Attributes:
        seats: what they have in every step.
        homes: their tensors by where they live: those of ``seats``, and the gradients as ``"g"``.
        hp: the host numbers of every parameter group.
        steps: for each weight, its own step number.
        values: sequences of tensors: finished reductions, opaque results and scratch buffers, one per weight;
            reductions over all weights (kind ``ALL``) and the inverse loss scale have a single entry.
        partials: results of the reductions of the stage that ran last, per weight (per bucket for kind ``ALL``).
        wholes: where weights are spread over a team, whole values of those owned here, in their order.
        clock: of a step on the device, the step number of each weight; ``steps`` says nothing then.
    """

    seats: Seats
    homes: dict[str, list[Tensor]]
    hp: Sequence[Mapping[str, float]]
    steps: list[int]
    values: dict[Sym, Any] = field(default_factory=dict)
    partials: dict[Sym, Any] = field(default_factory=dict)
    columns: list[float | list[float]] = field(default_factory=list)
    wholes: dict[Sym, list[Tensor]] = field(default_factory=dict)
    clock: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def plan(self) -> Plan:
        return self.seats.plan

    @property
    def device(self) -> torch.device:
        return self.seats.device

    @property
    def dtype(self) -> torch.dtype:
        return self.seats.dtype

    @cached_property
    def _table(self) -> tuple[list[Row], list[int]]:
        graph, groups, steps = self.plan.graph, self.seats.groups, self.steps
        alike = groups.count(groups[0]) == len(groups) and (not graph.by_step or steps.count(steps[0]) == len(steps))
        if alike and not graph.by_shape:
            return [Row(self.hp[groups[0]], steps[0], self.seats.shapes[0])], [0] * len(steps)
        rows: list[Row] = []
        places: list[int] = []
        known: dict[Any, int] = {}
        for group, step, shape in zip(groups, steps, self.seats.shapes, strict=True):
            key = group, step if graph.by_step else 0, shape if graph.by_shape else ()
            if key not in known:
                known[key] = len(rows)
                rows.append(Row(self.hp[group], step, shape))
            places.append(known[key])
        return rows, places

    @property
    def rows(self) -> list[Row]:
        """The distinct host rows of these weights: those with the same numbers share one."""
        return self._table[0]

    @property
    def row_of(self) -> list[int]:
        """For each weight, its row."""
        return self._table[1]

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
    """A way to run plans. Engines hold no state of their own; what they derive is kept with the plan or the seats."""

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
