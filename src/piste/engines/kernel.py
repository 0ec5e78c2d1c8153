"""What generated kernels have in common, whatever language they are written in: a stage as a few passes.

A *pass* runs over one index space. The pass over whole weights (kind ``FULL``) comes first; what is smaller than a
weight (rows, columns, one number) is written in passes of its own after it, because every element of a weight may read
the old value. Matrices, and numbers over all weights that an opaque function takes, are no business of a kernel: their
passes come before the others, and torch works them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from piste.codecs import Codec
from piste.plan import Plan, Stage
from piste.symbol import ALL, FULL, HOST, MATRIX, TENSOR, Kind, Sym, host_node

__all__ = [
    "COMPARISONS",
    "Column",
    "Pass",
    "all_columns",
    "coded",
    "host_numbers",
    "host_roots",
    "is_divided",
    "is_native",
    "is_small",
    "needed",
    "passes",
    "single",
    "spread",
]

#: operations whose results are truths
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}

Source = Literal["home", "value", "kept", "partial", "rest", "row", "phase"]


class Column(NamedTuple):
    """An argument of a pass with one entry per weight: where a tensor is stored.

    Attributes:
        source: ``"home"`` (weight, gradient or state, by name), ``"value"`` (a finished value), ``"kept"`` or
            ``"partial"`` (a result), ``"rest"`` (what a home's codes have beside them) or ``"phase"`` (no address:
            where thresholds begin).
        key: the name of the home, or the symbol.
    """

    source: Source
    key: str | Sym


@dataclass
class Pass:
    """One loop over the elements of an index space: of the weight, or of what is left of it on some axes."""

    space: Kind
    loads: dict[Sym, str] = field(default_factory=dict)
    compute: list[Sym] = field(default_factory=list)
    writes: dict[str, Sym] = field(default_factory=dict)
    kept: list[Sym] = field(default_factory=list)
    partials: list[Sym] = field(default_factory=list)

    @cached_property
    def axes(self) -> list[tuple[int, ...]]:
        """The choices of axes, other than all of them or none, on which something here is spread."""
        kinds = [s.kind for s in (*self.loads, *self.compute, *self.partials)]
        return list(dict.fromkeys(k.keep for k in kinds if k.keep and k != self.space))

    @cached_property
    def columns(self) -> list[Column]:
        """Its tensors, in the order in which a kernel takes them.

        That is the order of their first use, whatever they are called: two plans that differ in nothing but which
        state plays which part (positive-negative momentum takes turns) share one kernel.
        """
        homes = dict.fromkeys([*(home for home in self.loads.values() if home != "value"), *self.writes])
        return [
            *(Column("home", home) for home in homes),
            *(Column("value", sym) for sym, home in self.loads.items() if home == "value"),
            *(Column("kept", sym) for sym in self.kept),
            *(Column("partial", sym) for sym in self.partials),
        ]

    def kind_of(self, column: Column) -> Kind:
        """What a tensor has of the weight's axes."""
        key = column.key
        if isinstance(key, Sym):
            return key.kind
        written = self.writes.get(key)
        return written.kind if written is not None else next(s.kind for s, home in self.loads.items() if home == key)

    def column_of(self, sym: Sym, home: str) -> int:
        """Which of the columns a value is loaded from. Symbols compare by identity only: ``==`` makes a symbol."""
        return next(
            i
            for i, (source, key) in enumerate(self.columns)
            if (source == "home" and key == home if home != "value" else source == "value" and key is sym)
        )


def passes(stage: Stage) -> list[Pass]:
    """The passes of a stage in the order in which they must run."""
    found: dict[Kind, Pass] = {}

    def at(kind: Kind) -> Pass:
        return found.setdefault(kind, Pass(kind))

    for target, sym in stage.writes.items():
        at(sym.kind).writes[target] = sym
    for sym in stage.kept:
        if stage.loads.get(sym) != "value":  # that one is in its buffer already
            at(sym.kind).kept.append(sym)
    for reduction in stage.partials:
        at(reduction.args[0].kind).partials.append(reduction)
    for one in found.values():
        results = [*one.writes.values(), *one.kept, *(r.args[0] for r in one.partials)]
        below = needed(results, stage.loads)
        one.compute = [sym for sym in stage.compute if sym in below]
        used = {*results, *(a for sym in one.compute for a in sym.args)}
        one.loads = {sym: home for sym, home in stage.loads.items() if sym in used}
    return sorted(found.values(), key=lambda one: _rank(one.space))


def needed(results: Iterable[Sym], known: Iterable[Sym]) -> set[Sym]:
    """What these results are worked out from, themselves included, down to what is known."""
    ends, found, stack = {*known}, set[Sym](), list(results)
    while stack:
        sym = stack.pop()
        if sym not in found:
            found.add(sym)
            stack += () if sym in ends else sym.args
    return found


def _rank(space: Kind) -> tuple[int, int]:
    if space in (ALL, MATRIX):
        return 0, 0
    return (1, 0) if space == FULL else (2, -len(space.keep))


def host_roots(plan: Plan) -> list[Sym]:
    """The host numbers that the passes of a plan take, constants apart."""
    found: dict[Sym, None] = {}
    for stage in plan.stages:
        for sym in stage.compute:
            found.update(dict.fromkeys(a for a in sym.args if a.kind == HOST and a.op != "const"))
    return list(found)


def host_numbers(plan: Plan, passes: Iterable[Pass]) -> tuple[list[Sym], dict[Sym, Sym]]:
    """The host numbers that kernels take, and which of them stands for dividing by another.

    One over each number that something is divided by is worked out once: a division costs as much as ten products.
    """
    found = {sym.args[1]: None for one in passes for sym in one.compute if is_divided(sym)}
    inverses = {divisor: host_node("div", 1.0, divisor) for divisor in found}
    return [*host_roots(plan), *inverses.values()], inverses


def is_divided(sym: Sym) -> bool:
    """Is this a division by a host number?"""
    return sym.op == "div" and sym.args[1].kind == HOST


def is_native(one: Pass) -> bool:
    """Is this a pass for a kernel? The others are torch's."""
    return one.space not in (ALL, MATRIX)


def is_small(kind: Kind) -> bool:
    """Has a value of this kind one number per weight, or fewer?"""
    return kind in (ALL, TENSOR)


def single(one: Pass) -> list[Sym]:
    """The reductions of a pass to one number for each weight, or for all of them."""
    return [r for r in one.partials if r.kind != one.space and is_small(r.kind)]


def spread(one: Pass) -> list[Sym]:
    """The reductions of a pass that keep axes."""
    return [r for r in one.partials if r.kind != one.space and not is_small(r.kind)]


def coded(one: Pass, codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """The homes of a pass that are stored as codes, in the order of its columns."""
    return {str(c.key): codecs[str(c.key)] for c in one.columns if c.source == "home" and c.key in codecs}


def all_columns(one: Pass, codecs: Mapping[str, Codec]) -> list[Column]:
    """The arguments of a pass; over codes, second tensors too, and last the length of rows and where the thresholds of
    rounding begin."""
    codes = coded(one, codecs)
    second = [Column("rest", home) for home, codec in codes.items() if codec.rest is not None]
    return [*one.columns, *second, *([Column("row", ""), Column("phase", "")] if codes else [])]
