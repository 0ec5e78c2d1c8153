"""Writes what C++ does with one element of a pass, statement by statement: before its loop, in it and after it.

What stays the same over a run of elements along the innermost axis is worked out before the loop. That depends on how
this axis meets the axes that the pass tells apart, a *pattern*; the loops themselves are in
:mod:`piste.engines.cpp_loop`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from piste.codecs import Codec
from piste.engines.kernel import COMPARISONS, Column, Pass, is_small
from piste.engines.pass_text import OPERATIONS, PassWriter
from piste.symbol import HOST, Sym

__all__ = ["ANY", "ELEMENT", "IN", "JOIN", "OUT", "START", "TYPES", "Line", "Statements", "literal"]

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16"}

ELEMENT = OPERATIONS | {
    "div": "({} / {})",
    "pow": "pow<R>({}, {})",
    "abs": "abs({})",
    "sign": "sign<R>({})",
    "sqrt": "sqrt({})",
    "rsqrt": "(1 / sqrt({}))",
    "exp": "exp({})",
    "log": "log({})",
    "cbrt": "cbrt({})",
    "softplus": "softplus({})",
    "minimum": "minimum<R>({}, {})",
    "maximum": "maximum<R>({}, {})",
    "where": "({} ? {} : {})",
    "lerp": "lerp<R>({}, {}, {})",
}

START = {"sum": "0", "total": "0", "peak": "-__builtin_inf()"}
JOIN = {"sum": "Add()", "total": "Add()", "peak": "Peak()"}
#: how the innermost axis meets a choice of axes: not one of them, one of them, or with a stride known at run time
OUT, IN, ANY = 0, 1, 2


def literal(value: float) -> str:
    text = repr(float(value))
    return {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}.get(text, text)


def _place_of(symbols: Sequence[Sym], sought: Sym) -> int:
    """Symbols compare by identity only: ``==`` makes a symbol."""
    return next(i for i, sym in enumerate(symbols) if sym is sought)


class Line(NamedTuple):
    """A statement of a loop.

    Attributes:
        text: in C++.
        sym: what it works out, loads or stores.
        stores: whether it stores.
    """

    text: str
    sym: Sym
    stores: bool = False


class Statements(PassWriter):
    """The statements for one row of memory, or for some rows at once: what these share is read and written once."""

    #: before the addresses: elements, group, step number
    fixed_columns = 3

    def __init__(
        self,
        one: Pass,
        numbers: Sequence[Sym],
        inverses: Mapping[Sym, Sym],
        types: Mapping[str, str],
        codecs: Mapping[str, Codec],
    ) -> None:
        super().__init__(one, numbers, inverses, codecs)
        self.types, self.axes = types, one.axes

    def collect(self, pattern: tuple[int, ...], rows: int) -> None:
        """Fill ``before``, ``inside`` and ``after``."""
        self.before: list[str] = []
        self.inside: list[Line] = []
        self.after: list[str] = []
        self.accumulators: dict[str, str] = {}
        self.pattern = pattern
        for r in range(rows):
            self.row = f"_{r}" if r else ""
            self.names: dict[Sym, str] = {}
            if r:
                after_k = ", ".join(f"k[{j}] + {r} * next[{j}]" for j in range(len(self.axes)))
                self.before.append(f"const int64_t at_{r} = at + {r} * across, k_{r}[] = {{{after_k}}};")
            for i, column in enumerate(self.one.columns):
                self.pointer(i, column)
            for sym, home in self.one.loads.items():
                self.load(sym, home)
            for sym in self.one.compute:
                self.compute(sym)
            self.after += self.results()

    def entry(self, column: Column) -> str:
        """What the table has for weight ``w``."""
        return f"T[{self.place(column)} * n + w]"

    def meets(self, sym: Sym) -> int:
        return self.pattern[self.axes.index(sym.kind.keep)]

    def pointer(self, i: int, column: Column) -> None:
        key, kind = column.key, self.one.kind_of(column)
        stored = self.types[key] if isinstance(key, str) else "R"
        if column.source == "partial" and kind != self.one.space:
            return
        if key in self.codecs:
            self.before.append(
                f"float* __restrict c{i}{self.row} = tile[{list(self.codecs).index(str(key))}] + (at - here.base);"
            )
            return
        at = f"k{self.row}[{self.axes.index(kind.keep)}]" if kind.keep and kind != self.one.space else ""
        offset = f" + at{self.row}" if kind == self.one.space else f" + {at}" if at else ""
        self.before.append(
            f"{stored}* __restrict c{i}{self.row} = ({stored}*)T[{self.fixed_columns + i} * n + w]{offset};"
        )

    def load(self, sym: Sym, home: str) -> None:
        name = self.names[sym] = f"x{len(self.names)}{self.row}"
        source = self.one.column_of(sym, home)
        index, hoisted = self.index(sym)
        self.add(f"const R {name} = get<R>(c{source}{self.row}, {index});", sym, hoisted=hoisted)

    def add(self, text: str, sym: Sym, *, hoisted: bool) -> None:
        """A statement before the loop or in it."""
        if hoisted:
            self.before.append(text)
        else:
            self.inside.append(Line(text, sym))

    def index(self, sym: Sym) -> tuple[str, bool]:
        """Where a value lies in the loop, and whether it is the same in all of it."""
        if sym.kind == self.one.space and not is_small(sym.kind):
            return "i", False
        if is_small(sym.kind) or self.meets(sym) == OUT:
            return "0", True
        return ("i" if self.meets(sym) == IN else f"i * s[{self.axes.index(sym.kind.keep)}]"), False

    def compute(self, sym: Sym) -> None:
        op, args = self.operation(sym)
        text = ELEMENT[op].format(*map(self.argument, args))
        name = self.names[sym] = f"x{len(self.names)}{self.row}"
        kind = "bool" if sym.op in COMPARISONS else "R"
        self.add(f"const {kind} {name} = {text};", sym, hoisted=self.index(sym)[1])

    def argument(self, sym: Sym) -> str:
        if sym.kind != HOST:
            return self.names[sym]
        return f"R({literal(sym.attr)})" if sym.op == "const" else f"h[{self.numbers[sym]}]"

    def results(self) -> list[str]:
        """Stores come after all loads of an element; returns what follows the loop."""
        after: list[str] = []
        for i, column in enumerate(self.columns):
            if column.source == "home" and column.key in self.one.writes:
                sym = self.one.writes[str(column.key)]
                self.inside.append(Line(f"put(c{i}{self.row}, i, R({self.names[sym]}));", sym, stores=True))
            elif column.source == "kept" and isinstance(column.key, Sym):
                self.inside.append(Line(f"c{i}{self.row}[i] = R({self.names[column.key]});", column.key, stores=True))
            elif column.source == "partial" and isinstance(column.key, Sym):
                after += self.gather(i, column.key)
        return after

    def gather(self, i: int, reduction: Sym) -> list[str]:
        value = self.names[reduction.args[0]]
        shared = self.is_single(reduction) or (reduction.kind != self.one.space and self.meets(reduction) == IN)
        number = f"{_place_of(self.one.partials, reduction)}{'' if shared else self.row}"
        peak = reduction.op == "peak"
        wide = "R" if peak else "double"  # a sum grows beyond its terms, a peak is one of them
        general = ANY in self.pattern
        if reduction.kind == self.one.space:
            self.inside.append(Line(f"c{i}{self.row}[i] = R({value});", reduction, stores=True))
            return []
        before: list[str] = []
        if self.is_single(reduction):
            at = f"here.part[{_place_of(self.single, reduction)}]"
        else:
            place = _place_of(self.spread, reduction)
            axes = self.axes.index(reduction.kind.keep)
            at = f"(({wide}*)here.share[{place}])[k{self.row}[{axes}]]"
            if self.meets(reduction) != OUT:
                step = "i" if self.meets(reduction) == IN else f"i * s[{axes}]"
                if peak or general:
                    before = [f"{wide}* __restrict b{number} = ({wide}*)here.share[{place}] + k[{axes}];"]
                else:
                    before = [f"R* __restrict b{number} = here.rows[{place}];"]
                self.before += [] if self.row else before
                self.grow(f"b{number}[{step}]", value, reduction)
                return []
        self.grow(f"{'a' if peak or general else 'f'}{number}", value, reduction)
        if number in self.accumulators:
            return []
        self.accumulators[number] = reduction.op
        self.before.append(f"{wide} a{number} = {START[reduction.op]};")
        return [f"{at} = {JOIN[reduction.op]}({at}, {'double' if self.is_single(reduction) else wide}(a{number}));"]

    def grow(self, old: str, value: str, reduction: Sym) -> None:
        """One more term of a reduction."""
        text = f"maximum({old}, {value})" if reduction.op == "peak" else f"{old} + {value}"
        self.inside.append(Line(f"{old} = {text};", reduction, stores=True))

    def is_single(self, reduction: Sym) -> bool:
        return any(reduction is r for r in self.single)
