"""The reference engine: the specification that the others are held against.

It works a plan out weight by weight and operation by operation, out of place, with the plain torch function of each
operation: any device, any precision, nothing fused, nothing reused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from piste.bucket import Bucket, host_inputs
from piste.engines.edges import at_edges
from piste.ops import EVALUATE, REDUCTIONS
from piste.plan import Plan, Stage
from piste.symbol import ALL, HOST, MATRIX, HostFunction, Sym

__all__ = ["Reference"]


def inputs(plan: Plan) -> tuple[dict[Sym, int], HostFunction]:
    """The column of each host number, and the function that fills the columns."""
    if "reference" not in plan.lowered:
        roots, host = host_inputs(plan)
        plan.lowered["reference"] = {sym: i for i, sym in enumerate(roots)}, host
    found: tuple[dict[Sym, int], HostFunction] = plan.lowered["reference"]
    return found


def load(bucket: Bucket, stage: Stage, sym: Sym, weight: int) -> Tensor:
    """One input of a stage, in the precision of the arithmetic."""
    home = stage.loads[sym]
    if home in bucket.homes:
        return bucket.homes[home][weight].to(bucket.dtype)
    value: Tensor = bucket.values[sym][0 if sym.kind == ALL else weight]
    return value


def settle(bucket: Bucket, stage: Stage, weight: int, known: Mapping[Sym, Tensor]) -> None:
    """Hand over one weight's results: partial reductions, kept values, and last the writes."""
    for reduction in stage.partials:
        value = known[reduction.args[0]]
        if reduction.op == "total":
            before = bucket.partials.get(reduction)
            bucket.partials[reduction] = [value.sum() if before is None else before[0] + value.sum()]
        else:
            share = REDUCTIONS[reduction.op](value, reduction.attr)
            bucket.partials.setdefault(reduction, []).append(share)
    for sym in stage.kept:
        # an opaque function may look at a matrix where it is, unless that changes before it is called
        stays = sym.kind == MATRIX and stage.loads.get(sym, "value") not in ("value", *stage.writes)
        bucket.values.setdefault(sym, []).append(known[sym] if stays else known[sym].clone())
    # a value that is nothing but another home's content must be taken before that home is overwritten
    results = {t: known[s].clone() if stage.loads.get(s) in stage.writes else known[s] for t, s in stage.writes.items()}
    for target, result in results.items():
        bucket.homes[target][weight].copy_(result)


def walk(bucket: Bucket, stage: Stage) -> None:
    """Work through a stage weight by weight; the host numbers are those of :func:`inputs`."""
    column = inputs(bucket.plan)[0]
    for weight in range(len(bucket)):
        known = {sym: load(bucket, stage, sym, weight) for sym in stage.loads}
        for sym in stage.compute:
            args = [bucket.number(column[a], weight) if a.kind == HOST else known[a] for a in sym.args]
            known[sym] = EVALUATE[sym.op](*args)
        settle(bucket, stage, weight, known)


class Reference:
    """See the head of this module."""

    name = "reference"

    def begin(self, bucket: Bucket) -> None:
        bucket.set_columns(inputs(bucket.plan)[1])

    @at_edges
    def run(self, bucket: Bucket, stage: int) -> None:
        walk(bucket, bucket.plan.stages[stage])
