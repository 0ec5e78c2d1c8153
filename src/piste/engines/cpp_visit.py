"""Writes the C++ that leads one task of a pass through its loops: the part of a weight that a thread works on.

Where the loops tell axes apart, they are called row by row. Where numbers are stored as codes
(:mod:`piste.engines.cpp_codecs`), a weight is taken tile by tile: what the loop reads
is decoded into a small buffer that stays in the cache, and what it wrote there is encoded before the next tile.
"""

from __future__ import annotations

from piste.engines.cpp_codecs import code_offset, cpp_types, phase, rest_offset
from piste.engines.cpp_loop import Loops
from piste.engines.kernel import Column
from piste.engines.pass_text import PHASE, ROW
from piste.symbol import FULL

__all__ = ["Visits"]


class Visits(Loops):
    """The loops of a pass, and a structure whose call is one task."""

    @property
    def grid(self) -> str:
        """A grid for weight w."""
        within = -1 if self.one.space == FULL else sum(1 << a for a in self.one.space.keep)
        strides = "true" if self.one.space == FULL else "false"
        tiled = ", true" if self.codecs else ""
        return (
            f"Grid<{len(self.axes)}>(T + {self.geometry} * n, {strides}, {within}, n, w, axes, {self.name}_keep{tiled})"
        )

    def visitor(self, patterns: list[tuple[int, ...]]) -> list[str]:
        shapes = f"T + ({self.geometry} + 2 * axes) * n + w"
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
        return ", tile, base" if self.codecs else ""

    def tiled(self, *work: str) -> list[str]:
        """Work on the elements from ``low`` to ``high``: at once, or between decoding and encoding a tile."""
        if not self.codecs:
            return ["    const int64_t base = low, size = high - low;", *(f"    {line}" for line in work)]
        decodes, encodes = [], []
        for j, (home, codec) in enumerate(self.codecs.items()):
            codes = f"({cpp_types(codec)[0]}*){self.entry(Column('home', home))} + {code_offset(codec)}"
            rest = "nullptr"
            if codec.rest is not None:
                offset = rest_offset(codec)
                rest = f"({cpp_types(codec)[1]}*){self.entry(Column('rest', home))} + {offset}"
            if home in self.one.loads.values():
                decodes.append(f"decode_{codec.name}({codes}, {rest}, tile[{j}], size);")
            if home in self.one.writes:
                encodes.append(f"encode_{codec.name}({codes}, {rest}, tile[{j}], base, size, phase);")
        row, start = self.entry(ROW), self.entry(PHASE)
        return [
            f"    float tile[{len(self.codecs)}][TILE];",
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
        return f"begin_of_block({place}, {self.entry(ROW)})" if self.codecs else place

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
        if not self.codecs:
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
