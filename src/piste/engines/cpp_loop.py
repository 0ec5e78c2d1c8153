"""Writes the loop bodies of a pass as C++: what is done with the elements of one run along the innermost axis.

There is one body for every way in which that axis can meet the axes that the pass tells apart, and some for rows that
lie side by side. A loop with a long function is cut in two, so that the processor finds independent work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from piste.codecs import Codec
from piste.engines.kernel import (
    COMPARISONS,
    Column,
    Pass,
    all_columns,
    coded,
    is_divided,
    is_small,
    needed,
    single,
    spread,
)
from piste.symbol import HOST, Sym

__all__ = ["ELEMENT", "FIXED_COLUMNS", "JOIN", "START", "TYPES", "Loops", "literal", "place_of"]

#: columns of the table before the addresses: elements, group, step number
FIXED_COLUMNS = 3

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16"}

ELEMENT = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "pow": "pow<R>({}, {})",
    "neg": "(-{})",
    "abs": "abs({})",
    "sign": "sign<R>({})",
    "square": "({0} * {0})",
    "sqrt": "sqrt({})",
    "rsqrt": "(1 / sqrt({}))",
    "exp": "exp({})",
    "log": "log({})",
    "cbrt": "cbrt({})",
    "softplus": "softplus({})",
    "minimum": "minimum<R>({}, {})",
    "maximum": "maximum<R>({}, {})",
    "lt": "({} < {})",
    "le": "({} <= {})",
    "gt": "({} > {})",
    "ge": "({} >= {})",
    "eq": "({} == {})",
    "ne": "({} != {})",
    "where": "({} ? {} : {})",
    "lerp": "lerp<R>({}, {}, {})",
    "scratch": "{}",
    "expand": "{0}",
}

START = {"sum": "0", "total": "0", "peak": "-__builtin_inf()"}
JOIN = {"sum": "Add()", "total": "Add()", "peak": "Peak()"}
_CLAUSE = {"sum": "+", "total": "+", "peak": "peak"}
#: how the innermost axis meets a choice of axes: not one of them, one of them, or with a stride known at run time
_OUT, _IN, _ANY = 0, 1, 2
#: functions of so many dependent operations that a loop with one of them is cut in front of it
_LONG = {"exp", "log", "cbrt", "softplus"}
#: stretches of memory that a processor is good at following at the same time
_STREAMS = 8


def literal(value: float) -> str:
    text = repr(float(value))
    return {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}.get(text, text)


def place_of(symbols: Sequence[Sym], sought: Sym) -> int:
    """Symbols compare by identity only: ``==`` makes a symbol."""
    return next(i for i, sym in enumerate(symbols) if sym is sought)


class _Line(NamedTuple):
    """A statement of a loop.

    Attributes:
        text: in C++.
        sym: what it works out, loads or stores.
        stores: whether it stores.
    """

    text: str
    sym: Sym
    stores: bool = False


class Loops:
    """The bodies of one pass."""

    def __init__(
        self,
        name: str,
        one: Pass,
        numbers: Sequence[Sym],
        inverses: Mapping[Sym, Sym],
        types: Mapping[str, str],
        codecs: Mapping[str, Codec],
        *,
        by_shape: bool,
    ) -> None:
        self.name, self.one, self.types, self.by_shape = name, one, types, by_shape
        self.coded = coded(one, codecs)
        self.numbers = {sym: i for i, sym in enumerate(numbers)}
        self.inverses = inverses
        self.axes = one.axes
        self.columns = all_columns(one, codecs)
        self.widest = FIXED_COLUMNS + len(self.columns)
        self.single = single(one)
        self.spread = spread(one)
        full = sum(c.source == "home" and self.example(str(c.key)).kind == one.space for c in self.columns)
        self.rows = max(2, _STREAMS // max(1, full))

    def patterns(self) -> list[tuple[int, ...]]:
        """How the innermost axis can meet the choices of axes, the general way last."""
        if not self.axes:
            return [()]
        every = sorted({a for keep in self.axes for a in keep})
        found = [tuple(_IN if a in keep else _OUT for keep in self.axes) for a in (*every, -1)]
        return [*dict.fromkeys(found), (_ANY,) * len(self.axes)]

    def together(self, patterns: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Patterns in which rows that lie side by side meet the same elements of something smaller than the weight."""
        return [] if self.coded else [p for p in patterns if _IN in p and _ANY not in p]

    # the loop --------------------------------------------------------------------------------------------------------
    def body(self, pattern: tuple[int, ...], rows: int = 1) -> list[str]:
        """The function for one row of memory, or for some at once: what they share is read and written once for all."""
        self.before: list[str] = []
        self.inside: list[_Line] = []
        self.accumulators: dict[str, str] = {}
        self.pattern = pattern
        after: list[str] = []
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
            after += self.results()
        loop = (rows == 1 and self.in_two()) or self.in_one()
        more = ", int64_t across, const int64_t* next" if rows > 1 else ""
        return [
            f"static ONCE void {self.body_name(pattern, rows)}(",
            "    const int64_t* T, int64_t n, int64_t w, int64_t at, int64_t length, const R* __restrict h,",
            f"    const int64_t* k, const int64_t* s, double* part, double** share, R** rows{self.tiles}{more}) {{",
            *(f"  {line}" for line in self.before),
            *loop,
            *(f"  {line}" for line in after),
            "}",
        ]

    def in_one(self) -> list[str]:
        """The loop, as vector code where that can be.

        Sums grow in the precision of the numbers for a few of them, then in double.
        """
        loop = ["  for (int64_t i = 0; i < length; ++i) {", *(f"    {line.text}" for line in self.inside), "  }"]
        if _ANY in self.pattern:
            return loop
        sums = [number for number, op in self.accumulators.items() if op != "peak"]
        pragma = f"  #pragma omp simd{self.clauses()}"
        if not sums:
            return [pragma, *loop]
        return [
            "  for (int64_t low = 0; low < length; low += RUN) {",
            "    const int64_t high = low + RUN < length ? low + RUN : length;",
            *(f"    R f{i} = 0;" for i in sums),
            f"  {pragma}",
            "    for (int64_t i = low; i < high; ++i) {",
            *(f"  {line}" for line in loop[1:]),
            *(f"    a{i} += f{i};" for i in sums),
            "  }",
        ]

    def in_two(self) -> list[str]:
        """Two loops, with a long function at the head of the second; none where there is no such function.

        A processor works on as many elements at once as it can hold instructions that wait. Of a long formula it holds
        few elements; of each half, twice as many, and each takes half as long. What the second half needs of the first
        waits in the cache.
        """
        cut = next((s for s in self.one.compute if s.op in _LONG and not is_small(s.kind)), None)
        if cut is None or _ANY in self.pattern or self.one.partials:
            return []
        late = {cut}
        for sym in self.one.compute:
            if any(a in late for a in sym.args):
                late.add(sym)
        stored = [line.sym for line in self.inside if line.stores]
        early = needed([*cut.args, *(sym for sym in stored if sym not in late)], self.one.loads)
        # what the first loop has written cannot be read again
        written = {home for home, sym in self.one.writes.items() if sym in early}
        again = {sym for sym, home in self.one.loads.items() if home not in written}
        later = needed([sym for sym in stored if sym in late], {*self.one.loads, *(early - again)})
        inner = [line for line in self.inside if not line.stores]
        waiting = [line.sym for line in inner if line.sym in early and line.sym in later and line.sym not in again]
        first = [line for line in self.inside if line.sym in early]
        second = [line for line in self.inside if line.sym in later - set(waiting)]
        types = {sym: "bool" if sym.op in COMPARISONS else "R" for sym in waiting}
        return [
            "  for (int64_t low = 0; low < length; low += HALVED) {",
            "    const int64_t high = low + HALVED < length ? low + HALVED : length;",
            *(f"    {types[sym]} w{i}[HALVED];" for i, sym in enumerate(waiting)),
            "    #pragma omp simd",
            "    for (int64_t i = low; i < high; ++i) {",
            *(f"      {line.text}" for line in first),
            *(f"      w{i}[i - low] = {self.names[sym]};" for i, sym in enumerate(waiting)),
            "    }",
            "    #pragma omp simd",
            "    for (int64_t i = low; i < high; ++i) {",
            *(f"      const {types[sym]} {self.names[sym]} = w{i}[i - low];" for i, sym in enumerate(waiting)),
            *(f"      {line.text}" for line in second),
            "    }",
            "  }",
        ]

    @property
    def tiles(self) -> str:
        return ", float (*tile)[TILE], int64_t base" if self.coded else ""

    def body_name(self, pattern: tuple[int, ...], rows: int = 1) -> str:
        return "_".join([f"{self.name}_body", *map(str, pattern), *([f"rows{rows}"] if rows > 1 else [])])

    def clauses(self) -> str:
        return "".join(
            f" reduction({_CLAUSE[op]} : {'a' if op == 'peak' else 'f'}{number})"
            for number, op in self.accumulators.items()
        )

    def meets(self, sym: Sym) -> int:
        return self.pattern[self.axes.index(sym.kind.keep)]

    def pointer(self, i: int, column: Column) -> None:
        key = column.key
        sym = key if isinstance(key, Sym) else self.example(key)
        kind = sym.kind
        stored = self.types[key] if isinstance(key, str) else "R"
        if column.source == "partial" and kind != self.one.space:
            return
        if key in self.coded:
            self.before.append(
                f"float* __restrict c{i}{self.row} = tile[{list(self.coded).index(str(key))}] + (at - base);"
            )
            return
        at = f"k{self.row}[{self.axes.index(kind.keep)}]" if kind.keep and kind != self.one.space else ""
        offset = f" + at{self.row}" if kind == self.one.space else f" + {at}" if at else ""
        self.before.append(f"{stored}* __restrict c{i}{self.row} = ({stored}*)T[{FIXED_COLUMNS + i} * n + w]{offset};")

    def example(self, home: str) -> Sym:
        """A symbol that is read from or written to this home."""
        written = self.one.writes.get(home)
        return written if written is not None else next(s for s, h in self.one.loads.items() if h == home)

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
            self.inside.append(_Line(text, sym))

    def index(self, sym: Sym) -> tuple[str, bool]:
        """Where a value lies in the loop, and whether it is the same in all of it."""
        if sym.kind == self.one.space and not is_small(sym.kind):
            return "i", False
        if is_small(sym.kind) or self.meets(sym) == _OUT:
            return "0", True
        return ("i" if self.meets(sym) == _IN else f"i * s[{self.axes.index(sym.kind.keep)}]"), False

    def compute(self, sym: Sym) -> None:
        op, args = ("mul", (sym.args[0], self.inverses[sym.args[1]])) if is_divided(sym) else (sym.op, sym.args)
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
                self.inside.append(_Line(f"put(c{i}{self.row}, i, R({self.names[sym]}));", sym, stores=True))
            elif column.source == "kept" and isinstance(column.key, Sym):
                self.inside.append(_Line(f"c{i}{self.row}[i] = R({self.names[column.key]});", column.key, stores=True))
            elif column.source == "partial" and isinstance(column.key, Sym):
                after += self.gather(i, column.key)
        return after

    def gather(self, i: int, reduction: Sym) -> list[str]:
        value = self.names[reduction.args[0]]
        shared = self.is_single(reduction) or (reduction.kind != self.one.space and self.meets(reduction) == _IN)
        number = f"{place_of(self.one.partials, reduction)}{'' if shared else self.row}"
        peak = reduction.op == "peak"
        wide = "R" if peak else "double"  # a sum grows beyond its terms, a peak is one of them
        general = _ANY in self.pattern
        if reduction.kind == self.one.space:
            self.inside.append(_Line(f"c{i}{self.row}[i] = R({value});", reduction, stores=True))
            return []
        before: list[str] = []
        if self.is_single(reduction):
            at = f"part[{place_of(self.single, reduction)}]"
        else:
            place = place_of(self.spread, reduction)
            axes = self.axes.index(reduction.kind.keep)
            at = f"(({wide}*)share[{place}])[k{self.row}[{axes}]]"
            if self.meets(reduction) != _OUT:
                step = "i" if self.meets(reduction) == _IN else f"i * s[{axes}]"
                if peak or general:
                    before = [f"{wide}* __restrict b{number} = ({wide}*)share[{place}] + k[{axes}];"]
                else:
                    before = [f"R* __restrict b{number} = rows[{place}];"]
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
        self.inside.append(_Line(f"{old} = {text};", reduction, stores=True))

    def is_single(self, reduction: Sym) -> bool:
        return any(reduction is r for r in self.single)
