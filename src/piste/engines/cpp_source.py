"""Writes the passes of a plan as C++ for the cpp engine.

Each pass becomes a loop body, one for every way in which the innermost axis of a weight can meet the axes that the pass
tells apart, and an ``extern "C"`` function that leads all weights of a bucket through it. Its arguments are a table of
integers, one column after the other with an entry per weight: number of elements, parameter group, step number, the
addresses in ``Pass.columns``, and where axes or sizes matter the shapes and strides; and the hyper-parameters of every
group.

Where states are stored as codes (:mod:`piste.engines.cpp_codecs`), a weight is taken tile by tile: what the loop reads
is decoded into a small buffer that stays in the cache, and what it wrote there is encoded before the next tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from piste.codecs import Codec
from piste.engines.cpp_codecs import code_offset, cpp_types, definitions, phase, rest_offset
from piste.engines.kernel import Column, Pass, host_roots, is_small
from piste.plan import Plan
from piste.symbol import ALL, FULL, HOST, Sym, host_node, topological

__all__ = ["FIXED_COLUMNS", "TYPES", "all_columns", "hyper_names", "write"]

#: columns of the table before the addresses: elements, group, step number
FIXED_COLUMNS = 3

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16"}

_ELEMENT = {
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
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}

_HOST = {
    **{op: text for op, text in _ELEMENT.items() if op in ("add", "sub", "mul", "div", "neg", "square", "where")},
    **{op: f"double{_ELEMENT[op]}" for op in _COMPARISONS},
    "pow": "__builtin_pow({}, {})",
    "mod": "modulo({}, {})",
    "floordiv": "__builtin_floor({} / {})",
    "abs": "__builtin_fabs({})",
    "sqrt": "__builtin_sqrt({})",
    "rsqrt": "(1 / __builtin_sqrt({}))",
    "exp": "__builtin_exp({})",
    "log": "__builtin_log({})",
    "minimum": "({1} < {0} ? {1} : {0})",
    "maximum": "({1} > {0} ? {1} : {0})",
    "lerp": "({0} + {2} * ({1} - {0}))",
}

_START = {"sum": "0", "total": "0", "peak": "-__builtin_inf()"}
_JOIN = {"sum": "Add()", "total": "Add()", "peak": "Peak()"}
_CLAUSE = {"sum": "+", "total": "+", "peak": "peak"}
#: how the innermost axis meets a choice of axes: not one of them, one of them, or with a stride known at run time
_OUT, _IN, _ANY = 0, 1, 2
#: functions of so many dependent operations that a loop with one of them is cut in front of it
_LONG = {"exp", "log", "cbrt", "softplus"}
#: stretches of memory that a processor is good at following at the same time
_STREAMS = 8


@cache
def _headers() -> str:
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("cpp_math.h", "cpp_runtime.h"))


def hyper_names(plan: Plan) -> list[str]:
    """The hyper-parameters that the host numbers of a plan depend on, in the order in which kernels take them."""
    return sorted({s.attr for s in topological(host_roots(plan)) if s.op == "hp"})


def write(
    plan: Plan,
    passes: Mapping[str, Pass],
    real: torch.dtype,
    homes: Mapping[str, torch.dtype],
    codecs: Mapping[str, Codec],
) -> str:
    """A whole source file.

    Args:
        plan: what the passes belong to.
        passes: by the name of their function.
        real: the precision of the arithmetic.
        homes: how the numbers in each home are stored.
        codecs: by home, where they are stored as codes.
    """
    inverses = _inverses(passes.values())
    numbers = [*host_roots(plan), *inverses.values()]
    types = {home: TYPES[dtype] for home, dtype in homes.items()} | dict.fromkeys(codecs, "float")
    return "\n".join(
        [
            _headers(),
            "namespace piste {",
            f"typedef {TYPES[real]} R;",
            "#pragma omp declare reduction(peak : R : omp_out = maximum(omp_out, omp_in)) "
            "initializer(omp_priv = -__builtin_inf())",
            *(definitions(list(dict.fromkeys(codecs.values()))) if codecs else []),
            *_host_function(numbers, hyper_names(plan)),
            *(
                line
                for name, one in passes.items()
                for line in _Writer(name, one, numbers, inverses, types, codecs, by_shape=plan.graph.by_shape).lines()
            ),
            "}  // namespace piste",
            "",
        ]
    )


def _inverses(passes: Iterable[Pass]) -> dict[Sym, Sym]:
    """One over each host number that something is divided by: a division costs as much as ten products."""
    found = {sym.args[1]: None for one in passes for sym in one.compute if _by_number(sym)}
    return {divisor: host_node("div", 1.0, divisor) for divisor in found}


def _by_number(sym: Sym) -> bool:
    return sym.op == "div" and sym.args[1].kind == HOST


def _literal(value: float) -> str:
    text = repr(float(value))
    return {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}.get(text, text)


def _host_function(roots: Sequence[Sym], hyper: Sequence[str]) -> list[str]:
    """Host numbers of one weight, in double as Python would work them out."""
    names: dict[Sym, str] = {}
    lines = ["static void numbers(const double* hp, double t, const int64_t* shape, int64_t n, int axes, R* h) {"]
    for sym in topological(roots):
        names[sym] = f"x{len(names)}"
        lines.append(f"  const double {names[sym]} = {_host_text(sym, names, hyper)};")
    lines += [f"  h[{i}] = (R){names[root]};" for i, root in enumerate(roots)]
    return [*lines, "}"]


def _host_text(sym: Sym, names: Mapping[Sym, str], hyper: Sequence[str]) -> str:
    if sym.op == "const":
        return _literal(sym.attr)
    if sym.op == "hp":
        return f"hp[{hyper.index(sym.attr)}]"
    if sym.op == "t":
        return "t"
    if sym.op == "shape":
        return f"double(shape[{sym.attr} * n])"
    if sym.op == "numel":
        return "product(shape, n, axes)"
    return _HOST[sym.op].format(*(names[a] for a in sym.args))


def coded(one: Pass, codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """The homes of a pass that are stored as codes, in the order of its columns."""
    return {str(c.key): codecs[str(c.key)] for c in one.columns if c.source == "home" and c.key in codecs}


def all_columns(one: Pass, codecs: Mapping[str, Codec]) -> list[Column]:
    """The arguments of a pass; over codes, second tensors too, and last the length of rows and where the thresholds of
    rounding begin."""
    codes = coded(one, codecs)
    second = [Column("rest", home) for home, codec in codes.items() if codec.rest is not None]
    return [*one.columns, *second, *([Column("row", ""), Column("phase", "")] if codes else [])]


def _place(symbols: Sequence[Sym], sought: Sym) -> int:
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


class _Writer:
    """One pass."""

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
        self.single = [r for r in one.partials if is_small(r.kind) and r.kind != one.space]
        self.spread = [r for r in one.partials if r.kind.keep and r.kind != one.space]
        full = sum(c.source == "home" and self.example(str(c.key)).kind == one.space for c in self.columns)
        self.rows = max(2, _STREAMS // max(1, full))

    def lines(self) -> list[str]:
        patterns = self.patterns()
        bodies = [line for pattern in patterns for line in self.body(pattern)]
        bodies += [line for pattern in self.together(patterns) for line in self.body(pattern, self.rows)]
        return [*bodies, *self.visitor(patterns), *self.entry()]

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
        early = self.below([*cut.args, *(sym for sym in stored if sym not in late)])
        # what the first loop has written cannot be read again
        written = {home for home, sym in self.one.writes.items() if sym in early}
        again = {sym for sym, home in self.one.loads.items() if home not in written}
        needed = self.below([sym for sym in stored if sym in late], early - again)
        inner = [line for line in self.inside if not line.stores]
        waiting = [line.sym for line in inner if line.sym in early and line.sym in needed and line.sym not in again]
        first = [line for line in self.inside if line.sym in early]
        second = [line for line in self.inside if line.sym in needed - set(waiting)]
        types = {sym: "bool" if sym.op in _COMPARISONS else "R" for sym in waiting}
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

    def below(self, results: Sequence[Sym], known: Iterable[Sym] = ()) -> set[Sym]:
        """What these results are worked out from, themselves included, down to loads and what is known."""
        ends, found, stack = {*known, *self.one.loads}, set[Sym](), list(results)
        while stack:
            sym = stack.pop()
            if sym not in found:
                found.add(sym)
                stack += () if sym in ends else sym.args
        return found

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
        source = next(
            i
            for i, c in enumerate(self.columns)
            if (c.key == home if home != "value" and isinstance(c.key, str) else c.key is sym and c.source == "value")
        )
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
        op, args = ("mul", (sym.args[0], self.inverses[sym.args[1]])) if _by_number(sym) else (sym.op, sym.args)
        text = _ELEMENT[op].format(*map(self.argument, args))
        name = self.names[sym] = f"x{len(self.names)}{self.row}"
        kind = "bool" if sym.op in _COMPARISONS else "R"
        self.add(f"const {kind} {name} = {text};", sym, hoisted=self.index(sym)[1])

    def argument(self, sym: Sym) -> str:
        if sym.kind != HOST:
            return self.names[sym]
        return f"R({_literal(sym.attr)})" if sym.op == "const" else f"h[{self.numbers[sym]}]"

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
        number = f"{_place(self.one.partials, reduction)}{'' if shared else self.row}"
        peak = reduction.op == "peak"
        wide = "R" if peak else "double"  # a sum grows beyond its terms, a peak is one of them
        general = _ANY in self.pattern
        if reduction.kind == self.one.space:
            self.inside.append(_Line(f"c{i}{self.row}[i] = R({value});", reduction, stores=True))
            return []
        before: list[str] = []
        if self.is_single(reduction):
            at = f"part[{_place(self.single, reduction)}]"
        else:
            place = _place(self.spread, reduction)
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
        self.before.append(f"{wide} a{number} = {_START[reduction.op]};")
        return [f"{at} = {_JOIN[reduction.op]}({at}, {'double' if self.is_single(reduction) else wide}(a{number}));"]

    def grow(self, old: str, value: str, reduction: Sym) -> None:
        """One more term of a reduction."""
        text = f"maximum({old}, {value})" if reduction.op == "peak" else f"{old} + {value}"
        self.inside.append(_Line(f"{old} = {text};", reduction, stores=True))

    def is_single(self, reduction: Sym) -> bool:
        return any(reduction is r for r in self.single)

    # the walk --------------------------------------------------------------------------------------------------------
    @property
    def grid(self) -> str:
        """A grid for weight w."""
        within = -1 if self.one.space == FULL else sum(1 << a for a in self.one.space.keep)
        strides = "true" if self.one.space == FULL else "false"
        tiled = ", true" if self.coded else ""
        return (
            f"Grid<{len(self.axes)}>(T + {self.widest} * n, {strides}, {within}, n, w, axes, {self.name}_keep{tiled})"
        )

    def visitor(self, patterns: list[tuple[int, ...]]) -> list[str]:
        shapes = f"T + ({self.widest} + 2 * axes) * n + w"
        changed = "weight != w" if self.by_shape else "group != T[n + w] || t != T[2 * n + w]"
        spread, single = len(self.spread), len(self.single)
        lines = []
        if self.axes:
            keep = ", ".join(str(sum(1 << a for a in axes)) for axes in self.axes)
            lines.append(f"static const int {self.name}_keep[] = {{{keep}}};")
        share_type = f"Shares<R, {len(self.axes)}, {spread}>" if spread else "void"
        lines += [
            f"struct {self.name}_visit {{",
            "  const int64_t* T; int64_t n; int axes; const double* hp; int64_t hyper; const Tasks* tasks;",
            f"  double* parts; const {share_type}* shares;",
            f"  int64_t group = -1, t = -1, weight = -1; R h[{max(1, len(self.numbers))}];",
            "  void operator()(int64_t task, int64_t w) {",
            f"    if ({changed}) {{",
            "      group = T[n + w]; t = T[2 * n + w]; weight = w;",
            f"      numbers(hp + group * hyper, (double)t, {shapes}, n, axes, h);",
            "    }",
            f"    double* part = parts + task * {single};",
        ]
        if self.axes:
            lines += self.walk(patterns)
        else:
            next_ = self.edge("(task + 1 - tasks->first[w]) * CHUNK")
            run = f"{self.body_name(())}(T, n, w, at, length, h, nullptr, nullptr, part, nullptr, nullptr{self.tile})"
            lines += [
                f"    const int64_t low = {self.edge('(task - tasks->first[w]) * CHUNK')};",
                f"    const int64_t high = task + 1 < tasks->first[w + 1] ? {next_} : T[w];",
                *self.tiled("const int64_t at = base, length = size;", f"{run};"),
            ]
        return [*lines, "  }", "};"]

    # codes -----------------------------------------------------------------------------------------------------------
    @property
    def tiles(self) -> str:
        return ", float (*tile)[TILE], int64_t base" if self.coded else ""

    @property
    def tile(self) -> str:
        return ", tile, base" if self.coded else ""

    def tiled(self, *work: str) -> list[str]:
        """Work on the elements from ``low`` to ``high``: at once, or between decoding and encoding a tile."""
        if not self.coded:
            return ["    const int64_t base = low, size = high - low;", *(f"    {line}" for line in work)]
        decodes, encodes = [], []
        for j, (home, codec) in enumerate(self.coded.items()):
            codes = f"({cpp_types(codec)[0]}*)T[{self.place_of(home)} * n + w] + {code_offset(codec)}"
            rest = "nullptr"
            if codec.rest is not None:
                offset = rest_offset(codec)
                beside = next(i for i, c in enumerate(self.columns) if c.source == "rest" and c.key == home)
                rest = f"({cpp_types(codec)[1]}*)T[{FIXED_COLUMNS + beside} * n + w] + {offset}"
            if home in self.one.loads.values():
                decodes.append(f"decode_{codec.name}({codes}, {rest}, tile[{j}], size);")
            if home in self.one.writes:
                encodes.append(f"encode_{codec.name}({codes}, {rest}, tile[{j}], base, size, phase);")
        row, start = (f"T[{FIXED_COLUMNS + len(self.columns) - back} * n + w]" for back in (2, 1))
        return [
            f"    float tile[{len(self.coded)}][TILE];",
            f"    const int64_t row = {row};",
            f"    const uint32_t phase = {phase(start, 't')};",
            "    int64_t size;",
            "    for (int64_t base = low; base < high; base += size) {",
            "      const int64_t line = base / row, column = base % row, end = base - column + row;",
            "      const int64_t stop = end < high ? end : high;",
            "      size = stop - base < TILE ? stop - base : TILE;",
            *(f"      {line}" for line in (*decodes, *work, *encodes)),
            "    }",
        ]

    def edge(self, place: str) -> str:
        """Where a task that would begin at this place does begin: over codes, at a whole block."""
        return f"begin_of_block({place}, T[{FIXED_COLUMNS + len(self.columns) - 2} * n + w])" if self.coded else place

    def place_of(self, home: str) -> int:
        """The column of a home."""
        return FIXED_COLUMNS + next(i for i, c in enumerate(self.columns) if c.source == "home" and c.key == home)

    def walk(self, patterns: list[tuple[int, ...]]) -> list[str]:
        count = len(self.axes)
        lines = [
            f"    const Grid<{count}> grid = {self.grid};",
            "    const int64_t slot = task - tasks->first[w], *s = grid.step[grid.rank - 1];",
            f"    double* share[{max(1, len(self.spread))}];",
        ]
        for place, reduction in enumerate(self.spread):
            axes = self.axes.index(reduction.kind.keep)
            lines.append(f"    share[{place}] = shares->of(grid, w, {place}, {axes}, slot);")
        arguments = f"(T, n, w, at, length, h, k, s, part, share, rows{self.tile})"
        calls = []
        for pattern in patterns[:-1]:
            test = " && ".join(f"s[{j}] == {step}" for j, step in enumerate(pattern))
            calls.append(f"  if ({test}) return {self.body_name(pattern)}{arguments};")
        calls.append(f"  {self.body_name(patterns[-1])}{arguments};")
        sums = [(place, self.axes.index(r.kind.keep)) for place, r in enumerate(self.spread) if r.op != "peak"]
        lines.append(f"    R* rows[{max(1, len(self.spread))}];")
        for place, _ in sums:
            lines.append(f"    RowSum<R> sum{place}(grid.size[grid.rank - 1], share[{place}]);")
            lines.append(f"    rows[{place}] = sum{place}.row;")
        takes = [f"  if (s[{axes}] == 1) sum{place}.take(k[{axes}], length);" for place, axes in sums]
        calls = [*takes, *calls]
        row = "[&](int64_t at, int64_t length, const int64_t* k) {"
        if not self.coded:
            lines += ["    const auto row = " + row, *(f"    {line}" for line in calls), "    };"]
            return [*lines, *self.groups(self.together(patterns), takes, arguments)]
        low, high = (self.edge(f"grid.edge(slot{more})") for more in ("", " + 1"))
        lines.append(f"    const int64_t low = {low}, high = slot + 1 < grid.slots ? {high} : grid.numel;")
        return [*lines, *self.tiled(f"grid.stretch(base, base + size, {row}", *calls, "});")]

    def groups(self, patterns: list[tuple[int, ...]], takes: list[str], arguments: str) -> list[str]:
        """The walk of single rows, and of some at once where there are functions for that."""
        if not patterns:
            return ["    grid.walk(slot, row);"]
        tests = [" && ".join(f"s[{j}] == {step}" for j, step in enumerate(pattern)) for pattern in patterns]
        # each row has addresses of its own, but for what grows along it
        shared = [f"grid.shared({axes})" for axes in sorted({self.axes.index(r.kind.keep) for r in self.spread})]
        known = " || ".join(f"({test})" for test in tests)
        return [
            f"    const bool known = {known};",
            "    const auto group = [&](int64_t at, int64_t length, const int64_t* k, int64_t across,",
            "                           const int64_t* next) {",
            *(f"    {line.replace('length)', f'length, {self.rows})')}" for line in takes),
            *(
                f"      if ({test}) {self.body_name(pattern, self.rows)}{arguments[:-1]}, across, next);"
                for test, pattern in zip(tests, patterns, strict=True)
            ),
            "    };",
            f"    const bool grouped = {' && '.join(['grid.rank > 1', *shared, 'known'])};",
            f"    grid.walk(slot, row, group, grouped ? {self.rows} : 1);",
        ]

    def entry(self) -> list[str]:
        single, spread = self.single, self.spread
        pieces = f"{self.grid}.slots" if self.axes else "chunks(T[w])"
        lines = [
            f'extern "C" void {self.name}(int64_t n, int64_t threads, int64_t hyper, int64_t axes, const int64_t* T, '
            "const double* hp) {",
            f"  const Tasks tasks(n, threads, T, [&](int64_t w) {{ return {pieces}; }});",
        ]
        parts, shares = "nullptr", "nullptr"
        if single:
            parts = "parts"
            starts = ", ".join(_START[r.op] for r in single)
            lines += [
                f"  const double start[] = {{{starts}}};",
                f"  double* parts = (double*)malloc((tasks.count + 1) * {len(single)} * sizeof(double));",
                f"  for (int64_t i = 0; i < tasks.count * {len(single)}; ++i) parts[i] = start[i % {len(single)}];",
            ]
        if spread:
            shares = "&shares"
            axes = ", ".join(str(self.axes.index(r.kind.keep)) for r in spread)
            starts = ", ".join(_START[r.op] for r in spread)
            peaks = ", ".join("true" if r.op == "peak" else "false" for r in spread)
            lines += [
                f"  const int axes_of[] = {{{axes}}};",
                f"  const double begin[] = {{{starts}}};",
                f"  const bool peak[] = {{{peaks}}};",
                f"  const Shares<R, {len(self.axes)}, {len(spread)}> shares(n, axes_of, begin, peak, "
                f"[&](int64_t w) {{ return {self.grid}; }});",
            ]
        made = f"{self.name}_visit{{T, n, (int)axes, hp, hyper, &tasks, {parts}, {shares}}}"
        lines.append(f"  tasks.run([&] {{ return {made}; }});")
        return [*lines, *self.finish(), "}"]

    def finish(self) -> list[str]:
        """Put partial results together, in the order of tasks."""
        lines: list[str] = []
        for place, reduction in enumerate(self.single):
            out = f"T[{self.place(reduction)} * n{'' if reduction.kind == ALL else ' + w'}]"
            join = f"value = {_JOIN[reduction.op]}(value, parts[task * {len(self.single)} + {place}]);"
            start = f"double value = {_START[reduction.op]};"
            if reduction.kind == ALL:
                lines += [
                    f"  {{ {start}",
                    f"    for (int64_t task = 0; task < tasks.count; ++task) {join}",
                    f"    *(R*){out} = (R)value; }}",
                ]
            else:
                lines += [
                    "  for (int64_t w = 0; w < n; ++w) {",
                    f"    {start}",
                    f"    for (int64_t task = tasks.first[w]; task < tasks.first[w + 1]; ++task) {join}",
                    f"    *(R*){out} = (R)value;",
                    "  }",
                ]
        if self.single:
            lines.append("  free(parts);")
        if self.spread:
            lines += ["  for (int64_t w = 0; w < n; ++w) {", f"    const Grid<{len(self.axes)}> grid = {self.grid};"]
            for place, reduction in enumerate(self.spread):
                axes = self.axes.index(reduction.kind.keep)
                out = f"(R*)T[{self.place(reduction)} * n + w]"
                lines.append(f"    shares.finish(grid, w, {place}, {axes}, {out}, {_JOIN[reduction.op]});")
            lines.append("  }")
        return lines

    def place(self, reduction: Sym) -> int:
        """The column of a partial result."""
        return FIXED_COLUMNS + next(
            i for i, c in enumerate(self.columns) if c.source == "partial" and c.key is reduction
        )
