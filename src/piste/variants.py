"""The graphs of a rule: one for each way its branches on host numbers can turn out.

A rule is traced when a combination of outcomes occurs for the first time. The conditions it met on the way make a
decision tree, written out as one small function, by which later steps find the graph again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from piste.symbol import HOST_SPACE, MATRIX, Row, Sym, host_text, topological

__all__ = ["Fork", "Graph", "Variants"]

_SHAPE = ("shape", "numel")


@dataclass(frozen=True, eq=False)
class Graph:
    """What one variant of a rule computes: the new weight (``"p"``) and the new states, by name."""

    outputs: Mapping[str, Sym]
    states: frozenset[str]  # every state that is read or written
    by_shape: bool = False  # do its host numbers depend on the weight's shape?
    by_step: bool = False  # ... or on its step number?

    @cached_property
    def reduces(self) -> bool:
        """Does anything in it depend on more than one element of a weight?"""
        nodes = topological(self.outputs.values())
        return any(s.op in ("sum", "peak", "opaque") or s.kind == MATRIX or bool(s.kind.keep) for s in nodes)

    @cached_property
    def totals(self) -> frozenset[str]:
        """Names of the reductions over every weight."""
        return frozenset(s.attr for s in topological(self.outputs.values()) if s.op == "total")

    @cached_property
    def ordered_states(self) -> tuple[str, ...]:
        return tuple(sorted(self.states))

    _interned: ClassVar[dict[tuple[Any, ...], Graph]] = {}

    def interned(self) -> Graph:
        """The one graph of this structure: ranks and variants that compute the same share plans and buckets."""
        number: dict[Sym, int] = {}
        rows: list[Any] = [tuple(self.outputs), self.states]
        for sym in topological(self.outputs.values()):
            number[sym] = len(number)
            attr = repr(sym.attr) if sym.op == "const" else sym.attr
            rows.append((sym.op, tuple(number[a] for a in sym.args), attr, sym.kind))
        rows.append(tuple(number[s] for s in self.outputs.values()))
        # what lies below a number is worked out once for a step, before it
        used = {sym.op for sym in needed_by(self.outputs.values(), stop="number")}
        described = replace(self, by_shape=not used.isdisjoint(_SHAPE), by_step="t" in used)
        return self._interned.setdefault(tuple(rows), described)


def needed_by(roots: Iterable[Sym], *, stop: str) -> set[Sym]:
    """Every node below ``roots``, but not what lies below operations of this name."""
    found, stack = set[Sym](), list(roots)
    while stack:
        sym = stack.pop()
        if sym not in found:
            found.add(sym)
            stack += () if sym.op == stop else sym.args
    return found


@dataclass
class Fork:
    """A host condition of a rule, and what was found behind either outcome."""

    test: Sym
    branches: dict[bool, Fork | Graph] = field(default_factory=dict)


@dataclass
class Variants:
    """All graphs of one rule under one choice of static flags; a graph is traced when it is first needed."""

    trace: Callable[[Row], tuple[list[tuple[Sym, bool]], Graph]]
    root: Fork | Graph | None = None
    by_shape: bool = False  # do guards depend on the weight's shape?
    reads: list[str] = field(default_factory=list)  # the hyper-parameters that guards depend on
    find: Callable[[Row], Graph | None] = lambda row: None  # the whole tree as one function

    def graph(self, row: Row, shape: tuple[int, ...]) -> Graph:
        """The graph for these host numbers and a weight of this shape."""
        found = self.find(row.at(shape) if self.by_shape else row)
        return found if found is not None else self._add(row.at(shape))

    def _add(self, row: Row) -> Graph:
        path, graph = self.trace(row)
        graph = graph.interned()
        met = topological(s for s, _ in path)
        self.by_shape |= any(s.op in _SHAPE for s in met)
        self.reads = sorted({*self.reads, *(s.attr for s in met if s.op == "hp")})
        if path:
            fork = self.root if isinstance(self.root, Fork) else Fork(path[0][0])
            self.root = fork
            for (_, outcome), (following, _) in pairwise(path):
                fork = fork.branches.setdefault(outcome, Fork(following))  # type: ignore[assignment]
            fork.branches[path[-1][1]] = graph
        else:
            self.root = graph
        self.find = _compile_tree(self.root)
        return graph


def _compile_tree(root: Fork | Graph) -> Callable[[Row], Graph | None]:
    """A decision tree as one function of a row."""
    graphs: list[Graph] = []
    lines = ["def find(row):", "    hp = row.hp"]

    def write(node: Fork | Graph | None, names: dict[Sym, str], indent: str) -> None:
        if node is None:
            lines.append(f"{indent}return None")
        elif isinstance(node, Graph):
            lines.append(f"{indent}return graphs[{len(graphs)}]")
            graphs.append(node)
        else:
            for sym in topological([node.test]):
                if sym not in names:
                    names[sym] = f"x{len(names)}"
                    lines.append(f"{indent}{names[sym]} = {host_text(sym, names)}")
            lines.append(f"{indent}if {names[node.test]}:")
            write(node.branches.get(True), dict(names), indent + "    ")
            write(node.branches.get(False), names, indent)

    write(root, {}, "    ")
    space: dict[str, Any] = {**HOST_SPACE, "graphs": graphs}
    exec(compile("\n".join(lines), "<piste guards>", "exec"), space)
    find: Callable[[Row], Graph | None] = space["find"]
    return find
