"""From a graph to a plan: the stages in which all weights are worked through.

A reduction has to be complete before its result is used, so a graph is cut there. Stage by stage, *all* weights pass
before the next stage begins; between the two, partial results are combined (and, on many devices, exchanged).

What crosses a cut is settled here, once for every engine:

* a new state or weight is stored in the stage that computes it, and read back, as stored, in later ones; or it is
  computed again and stored in a later one, where less is moved in this way;
* any other value is computed again from inputs that have not changed. A write is put off while an old value is needed;
* what a rule puts in ``scratch`` and what opaque functions take and give is kept in buffers that the plan declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from piste.symbol import FULL, HOST, HostFunction, Sym, compile_host, topological
from piste.variants import Graph

__all__ = ["Plan", "Stage", "build"]

_REDUCTIONS = ("sum", "peak", "total")
_LEAVES = ("g", "p", "state")
_GIVEN = ("inverse_scale", "tally", "skip", "number")  # known before the step


@dataclass
class Stage:
    """One pass over all weights.

    Attributes:
        loads: symbols that are read, with where from: ``"g"``, ``"p"``, ``"state.NAME"``, or ``"value"`` (a finished
            reduction, an opaque result, a scratch buffer, or what is known before the step, found under the symbol
            itself).
        compute: symbols to work out, arguments first.
        writes: where results go at the end of the stage: ``"p"`` or ``"state.NAME"``.
        partials: reductions whose argument is ready here; each engine reduces weight by weight.
        keeps: values to be kept in a buffer: scratch, and what an opaque function takes.
        opaques: opaque functions to call once the stage is over.
    """

    loads: dict[Sym, str] = field(default_factory=dict)
    compute: list[Sym] = field(default_factory=list)
    writes: dict[str, Sym] = field(default_factory=dict)
    partials: list[Sym] = field(default_factory=list)
    keeps: list[Sym] = field(default_factory=list)
    opaques: list[Sym] = field(default_factory=list)

    @property
    def kept(self) -> list[Sym]:
        """What the stage leaves in buffers: scratch values, and the arguments of opaque functions but their results."""
        taken = [a for o in self.opaques for a in o.args if a.kind != HOST and a.op != "opaque"]
        return list(dict.fromkeys([*self.keeps, *taken]))

    @property
    def results(self) -> list[Sym]:
        """Everything that must have been computed when the stage ends."""
        return [*(r.args[0] for r in self.partials), *self.kept, *self.writes.values()]


@dataclass(eq=False)
class Plan:
    """The stages of one graph. Engines keep what they derive from it in ``lowered``."""

    graph: Graph
    stages: list[Stage]
    lowered: dict[Any, Any] = field(default_factory=dict)

    @property
    def states(self) -> frozenset[str]:
        return self.graph.states

    @cached_property
    def tallies(self) -> list[tuple[Sym, HostFunction]]:
        """Sums of host numbers over every weight, and what gives the number of one weight."""
        found = [sym for sym in topological(self.graph.outputs.values()) if sym.op == "tally"]
        return [(sym, compile_host(sym.args)) for sym in found]

    @cached_property
    def numbers(self) -> list[Sym]:
        """What the host would work out and the device does: see :mod:`piste.selects`."""
        return [sym for sym in topological(self.graph.outputs.values()) if sym.op == "number"]

    @cached_property
    def totals(self) -> dict[str, tuple[Sym, int]]:
        """Reductions over every weight: name -> (symbol, stage of its partial sums)."""
        return {r.attr: (r, i) for i, s in enumerate(self.stages) for r in s.partials if r.op == "total"}

    @cached_property
    def numbers_of(self) -> dict[Sym, HostFunction]:
        """For every opaque function what gives the host numbers among its arguments, in order."""
        opaques = [opaque for stage in self.stages for opaque in stage.opaques]
        return {opaque: compile_host([a for a in opaque.args if a.kind == HOST]) for opaque in opaques}

    @cached_property
    def renews(self) -> bool:
        """Does it work out anew what steps in between only use: inverse roots, eigenbases?"""
        return any(getattr(o.attr[0], "renews", False) for stage in self.stages for o in stage.opaques)

    def text(self) -> str:
        """The plan in words, for people."""
        lines = []
        for number, stage in enumerate(self.stages):
            lines.append(f"stage {number}")
            lines += [f"  {r.op}{r.attr if r.attr else ''} of {r.args[0]!r}" for r in stage.partials]
            lines += [f"  {target} <- {sym!r}" for target, sym in stage.writes.items()]
        return "\n".join(lines)


def build(graph: Graph, floors: Mapping[str, int] | None = None) -> Plan:
    """Cut a graph into stages.

    Args:
        graph: what is to be computed.
        floors: for totals that other plans of the same step share, the stage before which their result is not
            complete anywhere.
    """
    nodes = topological(graph.outputs.values())
    ready = _ready(nodes, floors or {})
    due = {target: ready[sym] for target, sym in graph.outputs.items() if not target.startswith("watch.")}
    stages = _settled(graph, nodes, ready, due)
    if len(stages) == 1:
        return Plan(graph, stages)
    starts = due, dict.fromkeys(due, len(stages) - 1)
    return Plan(graph, min((_improved(graph, nodes, ready, start) for start in starts), key=_moved))


def _improved(graph: Graph, nodes: list[Sym], ready: Mapping[Sym, int], due: dict[str, int]) -> list[Stage]:
    """The stages with each write, one after the other, moved to where the least is moved."""
    stages = _settled(graph, nodes, ready, due)
    for target in due:
        for when in range(ready[graph.outputs[target]], len(stages)):
            other = _settled(graph, nodes, ready, due | {target: when})
            if _moved(other) < _moved(stages):
                due, stages = due | {target: when}, other
    return stages


def _settled(graph: Graph, nodes: list[Sym], ready: Mapping[Sym, int], due: Mapping[str, int]) -> list[Stage]:
    """The stages under these dates of writing, or the next later ones that are possible."""
    while True:
        late, stages = _stages(graph, nodes, ready, due)
        if not late:
            return stages
        due = {**due, **late}


def _moved(stages: list[Stage]) -> int:
    """How many tensors as large as the weight are read and written."""
    values = (sym for stage in stages for sym in (*stage.loads, *stage.writes.values(), *stage.kept))
    return sum(sym.kind == FULL for sym in values)


def _ready(nodes: list[Sym], floors: Mapping[str, int]) -> dict[Sym, int]:
    """The first stage in which each value can be used."""
    ready: dict[Sym, int] = {}
    for sym in nodes:
        stage = max((ready[a] for a in sym.args), default=0)
        if sym.op in _REDUCTIONS or sym.op == "opaque":
            stage += 1
        if sym.op == "total":
            stage = max(stage, floors.get(sym.attr, 0))
        ready[sym] = stage
    return ready


def _home(sym: Sym) -> str:
    """Where a leaf is stored."""
    return f"state.{sym.attr}" if sym.op == "state" else sym.op


def _stages(
    graph: Graph, nodes: list[Sym], ready: Mapping[Sym, int], due: Mapping[str, int]
) -> tuple[dict[str, int], list[Stage]]:
    """The stages under these dates of writing; or later dates, where an old value is needed for longer."""
    stored = {graph.outputs[t]: t for t in reversed(list(due)) if graph.outputs[t].op not in _LEAVES}
    reductions = [n for n in nodes if n.op in _REDUCTIONS]
    opaques = [n for n in nodes if n.op == "opaque"]
    scratches = [n for n in nodes if n.op == "scratch"]
    last = max([*due.values(), *(ready[r] - 1 for r in (*reductions, *opaques))], default=0)
    late: dict[str, int] = {}
    stages = []
    for number in range(last + 1):
        stage = Stage(
            writes={t: graph.outputs[t] for t, when in due.items() if when == number},
            partials=[r for r in reductions if ready[r] - 1 == number],
            opaques=[o for o in opaques if ready[o] - 1 == number],
            keeps=[s for s in scratches if ready[s] == number],
        )
        _fill(stage, number, ready, due, stored, late)
        stages.append(stage)
    return late, stages


def _fill(
    stage: Stage,
    number: int,
    ready: Mapping[Sym, int],
    due: Mapping[str, int],
    stored: Mapping[Sym, str],
    late: dict[str, int],
) -> None:
    """Find what the stage has to load and to compute."""
    computed: dict[Sym, None] = {}

    def visit(sym: Sym) -> None:
        if sym.kind == HOST or sym in computed or sym in stage.loads:
            return
        target = stored.get(sym)
        if target is not None and due[target] < number:
            stage.loads[sym] = target
        elif sym.op in _LEAVES:
            if due.get(_home(sym), number) < number:
                late[_home(sym)] = number
            stage.loads[sym] = _home(sym)
        elif sym.op in (*_REDUCTIONS, *_GIVEN, "opaque") or (sym.op == "scratch" and ready[sym] < number):
            stage.loads[sym] = "value"
        else:
            for arg in sym.args:
                visit(arg)
            computed[sym] = None

    for result in stage.results:
        visit(result)
    stage.compute = list(computed)
