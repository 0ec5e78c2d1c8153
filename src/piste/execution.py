"""Runs plans: picks the engine, sorts weights into buckets, and works them through stage by stage.

A step goes like this. Each weight's host numbers (hyper-parameters of its group, its own step number) lead through the
guards of its rule to a graph. The graphs of the step are cut into plans together, so that a total over all weights is
complete in the same stage everywhere. Weights with one plan, device and dtypes form a bucket. Then every bucket passes
stage 0, reductions are completed, opaque functions called, every bucket passes stage 1, and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piste.bucket import Bucket, Engine
from piste.engines.compiled import Compiled
from piste.engines.foreach import Foreach
from piste.engines.reference import Reference
from piste.plan import Plan, build
from piste.storage import State, allocate, compute_dtype
from piste.symbol import ALL, HOST, Graph, Row, Sym, Variants, compile_host, topological

__all__ = ["ENGINES", "Prepared", "Weight", "engine_for", "plans_built", "run"]

log = logging.getLogger("piste")

ENGINES: dict[str, Engine] = {e.name: e for e in (Reference(), Foreach(), Compiled())}

#: completes reductions across processes: gets one partial result per weight and ``"sum"`` or ``"peak"``
Collective = Callable[[list[Tensor], str], list[Tensor]]

_PLANS: dict[tuple[Graph, tuple[tuple[str, int], ...]], Plan] = {}
_ANNOUNCED: set[str] = set()


@dataclass(frozen=True)
class Weight:
    """One weight with its gradient, as a step sees it.

    Attributes:
        p, g: the weight and its gradient; complex ones as their real views.
        state: the weight's states by name; missing ones are allocated here.
        states: what the states are.
        variants: the rule, for this rank and these flags.
        row: host numbers.
    """

    p: Tensor
    g: Tensor
    state: dict[str, Any]
    states: Mapping[str, State]
    variants: Variants
    row: Row


def plans_built() -> int:
    """How many plans exist in this process. Training builds its plans in the first steps and none after."""
    return len(_PLANS)


def engine_for(name: str) -> Engine:
    """The engine of this name; ``"auto"`` is the fastest that works here."""
    if name == "auto":
        name = "foreach"
        if name not in _ANNOUNCED:
            _ANNOUNCED.add(name)
            log.info("engine='auto' takes 'foreach': the fastest of %s here", ", ".join(map(repr, ENGINES)))
    return ENGINES[name]


class Prepared:
    """The weights of a step in their buckets, to be used again as long as the same weights take the same step.

    Sorting costs microseconds a weight; :meth:`advance` does without where nothing but numbers has changed.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        graphs = _graphs(weights)
        self.buckets = _buckets(weights, graphs, _plans(frozenset(graphs)))
        self.states = [w.state for w in weights]
        self.counts = [w.row.t for w in weights]

    def advance(self, gradients: Sequence[Tensor], hp: Sequence[Mapping[str, float]]) -> bool:
        """Take these gradients, and the next step of every weight under these numbers per group.

        Returns:
            False, with nothing changed, if a weight has another plan by now or has been tampered with.
        """
        if [state.get("step") for state in self.states] != self.counts:
            return False
        following = []
        for bucket in self.buckets:
            rows = [Row(hp[row.group], row.t + 1, row.shape, row.group) for row in bucket.rows]
            graph = bucket.plan.graph
            if any(v.graph(rows[i], shape) is not graph for v, i, shape in bucket.rules):
                return False
            homes = {f"state.{n}": [self.states[i][n] for i in bucket.members] for n in graph.ordered_states}
            if any(_dtypes(tensors) != _dtypes(bucket.homes[home]) for home, tensors in homes.items()):
                return False
            following.append((rows, homes))
        for bucket, (rows, homes) in zip(self.buckets, following, strict=True):
            bucket.rows = rows
            bucket.homes.update(homes, g=[gradients[i] for i in bucket.members])
        self.counts = [count + 1 for count in self.counts]
        return True

    def finish(self) -> None:
        """Write the step numbers of a step that was taken, and let go of its gradients and buffers."""
        for state, count in zip(self.states, self.counts, strict=True):
            state["step"] = count
        for bucket in self.buckets:
            bucket.homes["g"] = []
            bucket.values, bucket.partials = {}, {}


def _dtypes(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    return {t.dtype for t in tensors}


def run(
    prepared: Prepared,
    engine: Engine,
    *,
    inverse_scale: Tensor | None = None,
    collective: Collective | None = None,
) -> dict[str, Tensor]:
    """Take one step.

    Args:
        prepared: the weights that have gradients, none of them empty.
        engine: see :func:`engine_for`.
        inverse_scale: what gradients are multiplied by as they are read, for rules traced with ``scaled=True``.
        collective: completes reductions across processes.

    Returns:
        The totals over all weights that the rules asked for, by name.
    """
    buckets = prepared.buckets
    for bucket in buckets:
        if inverse_scale is not None:
            _give_scale(bucket, inverse_scale)
        engine.begin(bucket)
    totals: dict[str, Tensor] = {}
    for stage in range(max(len(b.plan.stages) for b in buckets)):
        active = [b for b in buckets if stage < len(b.plan.stages)]
        for bucket in active:
            bucket.partials = {}
            engine.run(bucket, stage)
        _complete_reductions(active, totals, collective)
        for bucket in active:
            for sym in bucket.plan.stages[stage].opaques:
                bucket.values[sym] = _call_opaque(bucket, sym)
    prepared.finish()
    return totals


# ---------------------------------------------------------------------------------------------------------------------
# Before the first stage: graphs, plans, buckets


def _graphs(weights: Sequence[Weight]) -> list[Graph]:
    """The graph of each weight; weights of one rule and row share the walk through the guards."""
    found: dict[tuple[int, int], Graph] = {}
    graphs = []
    for w in weights:
        key = (id(w.variants), id(w.row))
        graph = found.get(key)
        if graph is None or w.variants.by_shape:
            graph = found[key] = w.variants.graph(w.row, tuple(w.p.shape))
        graphs.append(graph)
    return graphs


_STEP_PLANS: dict[frozenset[Graph], dict[Graph, Plan]] = {}


def _plans(graphs: frozenset[Graph]) -> dict[Graph, Plan]:
    """Plans for the graphs of one step, cut so that shared totals are complete in the same stage in all of them."""
    found = _STEP_PLANS.get(graphs)
    if found is None:
        found = _STEP_PLANS[graphs] = _aligned(graphs)
    return found


def _aligned(graphs: Iterable[Graph]) -> dict[Graph, Plan]:
    floors: dict[str, int] = {}
    while True:
        plans = {graph: _plan(graph, floors) for graph in graphs}
        latest: dict[str, int] = {}
        for plan in plans.values():
            for name, (_, stage) in plan.totals.items():
                latest[name] = max(latest.get(name, 0), stage + 1)
        if all(stage + 1 == latest[name] for plan in plans.values() for name, (_, stage) in plan.totals.items()):
            return plans
        floors = latest


def _plan(graph: Graph, floors: Mapping[str, int]) -> Plan:
    used = {s.attr for s in topological(graph.outputs.values()) if s.op == "total"}
    key = graph, tuple(sorted((name, floor) for name, floor in floors.items() if name in used))
    if key not in _PLANS:
        _PLANS[key] = build(graph, dict(key[1]))
    return _PLANS[key]


def _buckets(weights: Sequence[Weight], graphs: Sequence[Graph], plans: Mapping[Graph, Plan]) -> list[Bucket]:
    """Sort the weights by plan, device and dtypes."""
    found: dict[tuple[Any, ...], _Filling] = {}
    for position, (w, graph) in enumerate(zip(weights, graphs, strict=True)):
        for name in graph.ordered_states:
            if name not in w.state:
                w.state[name] = allocate(w.states[name], w.p)
        states = [w.state[name] for name in graph.ordered_states]
        key = (graph, w.p.device, w.p.dtype, w.g.dtype, *[state.dtype for state in states])
        filling = found.get(key)
        if filling is None:
            filling = found[key] = _Filling(Bucket(plans[graph], w.p.device, compute_dtype(w.p.dtype)))
        filling.add(position, w, states)
    return [filling.bucket for filling in found.values()]


class _Filling:
    """A bucket while weights are being put into it."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        names = bucket.plan.graph.ordered_states
        self.lists: list[list[Tensor]] = [[] for _ in range(2 + len(names))]
        bucket.homes = dict(zip(("p", "g", *(f"state.{n}" for n in names)), self.lists, strict=True))
        self.rows: dict[Any, int] = {}
        self.rules: set[Any] = set()

    def add(self, position: int, w: Weight, states: Sequence[Tensor]) -> None:
        bucket, by_shape = self.bucket, self.bucket.plan.graph.by_shape
        for tensors, tensor in zip(self.lists, (w.p, w.g, *states), strict=True):
            tensors.append(tensor)
        shape = tuple(w.p.shape) if by_shape or w.variants.by_shape else ()
        row = self.rows.setdefault((id(w.row), shape if by_shape else ()), len(bucket.rows))
        if row == len(bucket.rows):
            bucket.rows.append(w.row.at(shape) if by_shape else w.row)
        bucket.row_of.append(row)
        bucket.members.append(position)
        rule = (id(w.variants), row, shape)
        if rule not in self.rules:
            self.rules.add(rule)
            bucket.rules.append((w.variants, row, shape))


def _give_scale(bucket: Bucket, inverse_scale: Tensor) -> None:
    value = inverse_scale.to(bucket.device, bucket.dtype)
    for stage in bucket.plan.stages:
        for sym in stage.loads:
            if sym.op == "inverse_scale":
                bucket.values[sym] = [value]


# ---------------------------------------------------------------------------------------------------------------------
# Between stages


def _complete_reductions(buckets: list[Bucket], totals: dict[str, Tensor], collective: Collective | None) -> None:
    """Turn partial results into values: across processes where asked, and for totals across buckets."""
    shares: dict[str, list[Tensor]] = {}
    for bucket in buckets:
        for sym, partial in bucket.partials.items():
            if collective is not None:
                partial = collective(partial, "peak" if sym.op == "peak" else "sum")
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


def _call_opaque(bucket: Bucket, sym: Sym) -> list[Tensor]:
    """Call an opaque function on all weights of a bucket, those of equal shapes (and host numbers) at once."""
    function, batched = sym.attr
    host = compile_host([a for a in sym.args if a.kind == HOST])
    numbers = [host(row) for row in bucket.rows]
    taken = [bucket.values[a] for a in sym.args if a.kind != HOST]
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(bucket.row_of):
        key = i if not batched else (numbers[row], *(values[i].shape for values in taken))
        alike.setdefault(key, []).append(i)
    results: list[Tensor] = [torch.empty(0)] * len(bucket)
    for members in alike.values():
        given = iter(numbers[bucket.row_of[members[0]]])
        tensors = (torch.stack([v[i] for i in members]) if batched else v[members[0]] for v in taken)
        out = function(*(next(given) if a.kind == HOST else next(tensors) for a in sym.args))
        for i, result in zip(members, out if batched else [out], strict=True):
            results[i] = result
    return results
