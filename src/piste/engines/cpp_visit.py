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

    def space(self) -> list[str]:
        """Where the weights lie, and which axes are told apart."""
        within = -1 if self.one.space == FULL else sum(1 << a for a in self.one.space.keep)
        strides, tiled = ("true" if yes else "false" for yes in (self.one.space == FULL, bool(self.codecs)))
        keep = ", ".join(str(sum(1 << a for a in axes)) for axes in self.axes)
        return [
            f"static const int {self.name}_keep[] = {{{keep}}};",
            f"static ONCE Space {self.name}_space(const int64_t* T, int64_t n, int axes) {{",
            f"  return {{T + {self.geometry} * n, {strides}, {tiled}, {within}, n, axes, {self.name}_keep}};",
            "}",
        ]

    def visitor(self, patterns: list[tuple[int, ...]]) -> list[str]:
        """The function that does some tasks, in a row."""
        changed = "weight != w" if self.by_shape else "group != T[n + w] || t != T[2 * n + w]"
        lines = [
            *(self.space() if self.axes else []),
            f"static ONCE void {self.name}_work(const Call& call, int64_t task, const int64_t last, int64_t w) {{",
            "  const int64_t *T = call.T, n = call.n, *first = call.tasks->first;",
            "  const int axes = call.axes;",
            f"  int64_t group = -1, t = -1, weight = -1; R h[{max(1, len(self.numbers))}];",
            *([f"  const Space space = {self.name}_space(T, n, axes);"] if self.axes else []),
            "  for (; task < last; ++task) {",
            "    while (task >= first[w + 1]) ++w;",
            f"    if ({changed}) {{",
            "      group = T[n + w]; t = T[2 * n + w]; weight = w;",
            f"      const int64_t* shapes = T + ({self.geometry} + 2 * axes) * n + w;",
            "      numbers(call.hp + group * call.hyper, (double)t, shapes, n, axes, h);",
            "    }",
            f"    Place<R> here = {{T, n, w, call.parts + task * {len(self.single)}}};",
        ]
        if self.axes:
            lines += self.walk(patterns)
        else:
            next_ = self.edge("(task + 1 - first[w]) * CHUNK")
            lines += [
                f"    const int64_t low = {self.edge('(task - first[w]) * CHUNK')};",
                f"    const int64_t high = task + 1 < first[w + 1] ? {next_} : T[w];",
                *self.tiled(f"{self.body_name(())}(here, h, base, size, nullptr, 0, nullptr);"),
            ]
        return [*lines, "  }", "}"]

    # codes -----------------------------------------------------------------------------------------------------------
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
            "    here.tile = tile;",
            f"    const int64_t row = {row};",
            f"    const uint32_t phase = {phase(start, 't')};",
            "    int64_t size;",
            "    for (int64_t base = low; base < high; base += size) {",
            "      const int64_t line = base / row, column = base % row, end = base - column + row;",
            "      const int64_t stop = end < high ? end : high;",
            "      size = stop - base < TILE ? stop - base : TILE;",
            "      here.base = base;",
            *(f"      {line}" for line in (*decodes, *work, *encodes)),
            "    }",
        ]

    def edge(self, place: str) -> str:
        """Where a task that would begin at this place does begin: over codes, at a whole block."""
        return f"begin_of_block({place}, {self.entry(ROW)})" if self.codecs else place

    def walk(self, patterns: list[tuple[int, ...]]) -> list[str]:
        """All rows of a task, each by the body for the way in which the innermost axis meets the choices of axes."""
        count, places = len(self.axes), range(len(self.spread))
        lines = [
            f"    const Grid<{count}> grid(space, w);",
            "    const int64_t slot = task - first[w], *s = here.s = grid.step[grid.rank - 1];",
        ]
        if self.spread:
            of = ", ".join(f"shares->of(grid, w, {place}, slot)" for place in places)
            lines += [
                f"    const Shares<R, {count}>* shares = (const Shares<R, {count}>*)call.shares;",
                f"    double* share[] = {{{of}}};",
                "    here.share = share;",
            ]
        sums = [place for place in places if self.spread[place].op != "peak"]
        if sums:
            axes = [self.axes.index(self.spread[place].kind.keep) for place in sums]
            lines += [
                f"    RowSum<R> sum{place}(grid.size[grid.rank - 1], share[{place}], {a});"
                for place, a in zip(sums, axes, strict=True)
            ]
            rows = ", ".join(f"sum{place}.row" if place in sums else "nullptr" for place in places)
            lines += [
                f"    RowSum<R>* const sum[] = {{{', '.join(f'&sum{place}' for place in sums)}}};",
                f"    R* rows[] = {{{rows}}};",
                f"    here.sum = sum, here.sums = {len(sums)}, here.rows = rows;",
            ]
        lines += self.chosen("single", patterns[:-1], 1, self.body_name(patterns[-1]))
        if self.codecs:
            low, high = (self.edge(f"grid.edge(slot{more})") for more in ("", " + 1"))
            lines.append(f"    const int64_t low = {low}, high = slot + 1 < grid.slots ? {high} : grid.numel;")
            return [*lines, *self.tiled("grid.stretch<R>(base, base + size, here, h, single);")]
        together = self.together(patterns)
        if not together:
            return [*lines, "    grid.walk<R>(slot, here, h, single);"]
        # each row has addresses of its own, but for what grows along it
        shared = [f"grid.shared({axes})" for axes in sorted({self.axes.index(r.kind.keep) for r in self.spread})]
        return [
            *lines,
            *self.chosen("together", together, self.rows, "nullptr"),
            f"    const bool grouped = {' && '.join(['together', 'grid.rank > 1', *shared])};",
            f"    grid.walk<R>(slot, here, h, single, together, grouped ? {self.rows} : 1);",
        ]

    def chosen(self, name: str, patterns: list[tuple[int, ...]], rows: int, otherwise: str) -> list[str]:
        """The body for the pattern that is found at run time."""
        choices = []
        for pattern in patterns:
            test = " && ".join(f"s[{j}] == {step}" for j, step in enumerate(pattern))
            choices.append(f"{test} ? {self.body_name(pattern, rows)} : ")
        return [f"    const Body<R> {name} = {''.join(choices)}{otherwise};"]
