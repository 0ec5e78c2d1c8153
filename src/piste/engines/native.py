"""What engines with generated kernels do alike: take a plan's passes in order, and leave to others what is not theirs.

Passes over matrices and over numbers that only torch's functions take are worked out by the reference engine; buckets
that the kernels cannot take at all go to foreach.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from piste.bucket import Bucket
from piste.codecs import Codec
from piste.engines import reference
from piste.engines.foreach import Foreach
from piste.engines.kernel import Column, Pass, all_columns, is_native, passes
from piste.engines.tables import Table, copy_back, kinds_of
from piste.plan import Plan, Stage

__all__ = ["Built", "Native", "Step", "native_passes", "plain_homes"]


class Step(NamedTuple):
    """One pass of a stage; without a kernel it is torch's."""

    work: Pass
    kernel: Any
    columns: list[Column]


class Built(NamedTuple):
    """What an engine makes of the passes of a plan.

    Attributes:
        source: what was generated.
        kernels: by the name of the pass.
        inputs: what a launch needs besides tensors, as the engine has it.
    """

    source: str
    kernels: Mapping[str, Any]
    inputs: Any


class Kernels(NamedTuple):
    """A plan as kernels, for one choice of number formats.

    Attributes:
        source: what was generated.
        stages: the passes of each stage, in order.
        inputs: as they were built.
        by_axes: whether kernels ask for the sizes of axes.
        in_torch: whether some passes are torch's.
    """

    source: str
    stages: list[list[Step]]
    inputs: Any
    by_axes: bool
    in_torch: bool


class _Held(NamedTuple):
    kernels: Kernels
    table: Table


def _named_passes(plan: Plan) -> list[dict[str, Pass]]:
    """The passes of each stage in order, by the name that their kernel has."""
    return [{f"stage{i}_pass{j}": one for j, one in enumerate(passes(stage))} for i, stage in enumerate(plan.stages)]


def native_passes(plan: Plan) -> dict[str, Pass]:
    """The passes that are kernels, by the name of their function."""
    return {name: one for stage in _named_passes(plan) for name, one in stage.items() if is_native(one)}


def plain_homes(plan: Plan) -> dict[str, torch.dtype]:
    """All homes of a plan in float32: for showing a source."""
    return dict.fromkeys(["g", "p", *(f"state.{name}" for name in plan.graph.ordered_states)], torch.float32)


class Native(ABC):
    """An engine with generated kernels."""

    #: what it is called, and how many axes its kernels know; 0 for any number
    name: str
    most_axes = 0

    def __init__(self) -> None:
        self.instead = Foreach()

    @abstractmethod
    def takes(self, bucket: Bucket, homes: Mapping[str, torch.dtype]) -> bool:
        """Are these tensors something for the kernels?"""

    @abstractmethod
    def build(
        self,
        plan: Plan,
        native: Mapping[str, Pass],
        real: torch.dtype,
        homes: Mapping[str, torch.dtype],
        codecs: Mapping[str, Codec],
    ) -> Built | None:
        """Kernels for these passes of a plan; None where they cannot be made."""

    @abstractmethod
    def launch(self, bucket: Bucket, table: Table, inputs: Any, step: Step) -> None:
        """Lead all weights through one pass."""

    def begin(self, bucket: Bucket) -> None:
        if self.name not in bucket.seats.kept:
            bucket.seats.kept[self.name] = self._hold(bucket)
        held: _Held | None = bucket.seats.kept[self.name]
        if held is None:
            self.instead.begin(bucket)
            return
        held.table.settle(bucket)
        if held.kernels.in_torch:
            bucket.set_columns(reference.inputs(bucket.plan)[1])

    def _hold(self, bucket: Bucket) -> _Held | None:
        homes = {h: tensors[0].dtype for h, tensors in bucket.homes.items() if h not in bucket.seats.encoded}
        hidden = any(not at and p.numel() for at, p in zip(bucket.seats.addresses, bucket.homes["p"], strict=True))
        if hidden or not self.takes(bucket, homes):
            return None
        kernels = self._lowered(bucket, homes)
        if kernels is None:
            return None
        table = Table(bucket, kinds_of(bucket.plan), by_axes=kernels.by_axes)
        return None if self.most_axes and table.axes > self.most_axes else _Held(kernels, table)

    def _lowered(self, bucket: Bucket, homes: dict[str, torch.dtype]) -> Kernels | None:
        plan, codecs = bucket.plan, bucket.seats.codecs
        coded = tuple(sorted((h, c.name) for h, c in codecs.items()))
        key = (self.name, bucket.dtype, tuple(sorted(homes.items())), coded)
        if key not in plan.lowered:
            native = native_passes(plan)
            built = self.build(plan, native, bucket.dtype, homes, codecs)
            if built is None:
                return None
            stages = [
                [Step(one, built.kernels.get(name), all_columns(one, codecs)) for name, one in stage.items()]
                for stage in _named_passes(plan)
            ]
            plan.lowered[key] = Kernels(
                source=built.source,
                stages=stages,
                inputs=built.inputs,
                by_axes=plan.graph.by_shape or any(one.axes for one in native.values()),
                in_torch=any(step.kernel is None for stage in stages for step in stage),
            )
        found: Kernels = plan.lowered[key]
        return found

    def run(self, bucket: Bucket, stage: int) -> None:
        held: _Held | None = bucket.seats.kept[self.name]
        if held is None:
            self.instead.run(bucket, stage)
            return
        for step in held.kernels.stages[stage]:
            work = step.work
            if step.kernel is None:
                keeps = list(work.kept)
                reference.walk(bucket, Stage(work.loads, work.compute, work.writes, work.partials, keeps))
            else:
                self.launch(bucket, held.table, held.kernels.inputs, step)
            copy_back(bucket, work)
