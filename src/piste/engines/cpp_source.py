"""Writes the passes of a plan as C++ for the cpp engine.

Each pass becomes loop bodies (:mod:`piste.engines.cpp_loop`) and an ``extern "C"`` function that leads all weights of a
bucket through them. Its arguments are a table of
integers, one column after the other with an entry per weight: number of elements, parameter group, step number, the
addresses in ``Pass.columns``, and where axes or sizes matter the shapes and strides; and the hyper-parameters of every
group.

Where states are stored as codes (:mod:`piste.engines.cpp_codecs`), a weight is taken tile by tile: what the loop reads
is decoded into a small buffer that stays in the cache, and what it wrote there is encoded before the next tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from piste.codecs import Codec
from piste.engines.cpp_codecs import code_offset, cpp_types, definitions, phase, rest_offset
from piste.engines.cpp_loop import ELEMENT, FIXED_COLUMNS, JOIN, START, TYPES, Loops, literal
from piste.engines.kernel import COMPARISONS, Pass, host_numbers, host_roots
from piste.plan import Plan
from piste.symbol import ALL, FULL, Sym, topological

__all__ = ["hyper_names", "write"]

_HOST = {
    **{op: text for op, text in ELEMENT.items() if op in ("add", "sub", "mul", "div", "neg", "square", "where")},
    **{op: f"double{ELEMENT[op]}" for op in COMPARISONS},
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
    numbers, inverses = host_numbers(plan, passes.values())
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
        return literal(sym.attr)
    if sym.op == "hp":
        return f"hp[{hyper.index(sym.attr)}]"
    if sym.op == "t":
        return "t"
    if sym.op == "shape":
        return f"double(shape[{sym.attr} * n])"
    if sym.op == "numel":
        return "product(shape, n, axes)"
    return _HOST[sym.op].format(*(names[a] for a in sym.args))


class _Writer(Loops):
    """One pass: its loops, and the function that leads all weights through them."""

    def lines(self) -> list[str]:
        patterns = self.patterns()
        bodies = [line for pattern in patterns for line in self.body(pattern)]
        bodies += [line for pattern in self.together(patterns) for line in self.body(pattern, self.rows)]
        return [*bodies, *self.visitor(patterns), *self.entry()]

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
            starts = ", ".join(START[r.op] for r in single)
            lines += [
                f"  const double start[] = {{{starts}}};",
                f"  double* parts = (double*)malloc((tasks.count + 1) * {len(single)} * sizeof(double));",
                f"  for (int64_t i = 0; i < tasks.count * {len(single)}; ++i) parts[i] = start[i % {len(single)}];",
            ]
        if spread:
            shares = "&shares"
            axes = ", ".join(str(self.axes.index(r.kind.keep)) for r in spread)
            starts = ", ".join(START[r.op] for r in spread)
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
            join = f"value = {JOIN[reduction.op]}(value, parts[task * {len(self.single)} + {place}]);"
            start = f"double value = {START[reduction.op]};"
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
                lines.append(f"    shares.finish(grid, w, {place}, {axes}, {out}, {JOIN[reduction.op]});")
            lines.append("  }")
        return lines

    def place(self, reduction: Sym) -> int:
        """The column of a partial result."""
        return FIXED_COLUMNS + next(
            i for i, c in enumerate(self.columns) if c.source == "partial" and c.key is reduction
        )
