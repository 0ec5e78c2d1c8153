"""The compile engine: the reference engine's walk, written out for ``torch.compile``.

For users who want Inductor. Host numbers enter as tensors, so a change of learning rate compiles nothing; a change in
which weights have gradients does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.engines.edges import at_edges
from piste.engines.reference import inputs, load, settle
from piste.ops import EVALUATE
from piste.plan import Plan
from piste.symbol import HOST

__all__ = ["Compiled"]


def _walk(plan: Plan, number: int) -> Callable[[list[list[Tensor]], Tensor], list[list[Tensor]]]:
    """A compiled function: inputs of a stage, weight by weight, and host numbers -> its results."""
    stage, column = plan.stages[number], inputs(plan)[0]
    names = {sym: f"load[{i}]" for i, sym in enumerate(stage.loads)}
    lines = ["def walk(loads, table):", "    results = []", "    for load, h in zip(loads, table.unbind()):"]
    for sym in stage.compute:
        args = [f"h[{column[a]}]" if a.kind == HOST else names[a] for a in sym.args]
        names[sym] = f"x{len(names)}"
        lines.append(f"        {names[sym]} = OPS[{sym.op!r}]({', '.join(args)})")
    lines += [f"        results.append([{', '.join(names[s] for s in stage.results)}])", "    return results"]
    space: dict[str, Any] = {"OPS": EVALUATE}
    exec(compile("\n".join(lines), f"<piste compile stage {id(plan)}.{number}>", "exec"), space)
    return torch.compile(space["walk"])


class Compiled:
    """See the head of this module."""

    name = "compile"

    def begin(self, bucket: Bucket) -> None:
        bucket.set_columns(inputs(bucket.plan)[1])

    @at_edges
    def run(self, bucket: Bucket, stage: int) -> None:
        plan, part, count = bucket.plan, bucket.plan.stages[stage], len(bucket)
        walk = plan.lowered.get((self.name, stage)) or plan.lowered.setdefault((self.name, stage), _walk(plan, stage))
        loads = [[load(bucket, part, sym, weight) for sym in part.loads] for weight in range(count)]
        rows = [[bucket.number(c, weight) for c in range(len(bucket.columns))] for weight in range(count)]
        table = torch.tensor(rows, dtype=bucket.dtype, device=bucket.device)
        for weight, values in enumerate(walk(loads, table)):
            known = dict(zip(part.loads, loads[weight], strict=True)) | dict(zip(part.results, values, strict=True))
            settle(bucket, part, weight, known)
