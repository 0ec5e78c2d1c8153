"""Writes the loop bodies of a pass as C++: what is done with the elements of one run along the innermost axis.

There is one body for every way in which that axis can meet the axes that the pass tells apart, and some for rows that
lie side by side. A loop with a long function is cut in two, so that the processor finds independent work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piste.codecs import Codec
from piste.engines.cpp_statements import ANY, IN, OUT, Statements
from piste.engines.kernel import COMPARISONS, Pass, is_small, needed
from piste.symbol import Sym

__all__ = ["Loops"]

_CLAUSE = {"sum": "+", "total": "+", "peak": "peak"}
#: functions of so many dependent operations that a loop with one of them is cut in front of it
_LONG = {"exp", "log", "cbrt", "softplus"}
#: stretches of memory that a processor is good at following at the same time
_STREAMS = 8


class Loops(Statements):
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
        super().__init__(one, numbers, inverses, types, codecs)
        self.name, self.by_shape = name, by_shape
        full = sum(c.source == "home" and one.kind_of(c) == one.space for c in self.columns)
        self.rows = max(2, _STREAMS // max(1, full))

    def patterns(self) -> list[tuple[int, ...]]:
        """How the innermost axis can meet the choices of axes, the general way last."""
        if not self.axes:
            return [()]
        every = sorted({a for keep in self.axes for a in keep})
        found = [tuple(IN if a in keep else OUT for keep in self.axes) for a in (*every, -1)]
        return [*dict.fromkeys(found), (ANY,) * len(self.axes)]

    def together(self, patterns: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Patterns in which rows that lie side by side meet the same elements of something smaller than the weight."""
        return [] if self.codecs else [p for p in patterns if IN in p and ANY not in p]

    def body(self, pattern: tuple[int, ...], rows: int = 1) -> list[str]:
        """The function for one row of memory, or for some at once: what they share is read and written once for all."""
        self.collect(pattern, rows)
        loop = (rows == 1 and self.in_two()) or self.in_one()
        return [
            f"static ONCE void {self.body_name(pattern, rows)}(",
            "    const Place<R>& here, const R* __restrict h, int64_t at, int64_t length, const int64_t* k,",
            "    int64_t across, const int64_t* next) {",
            "  const int64_t *T = here.T, *s = here.s, n = here.n, w = here.w;",
            *(["  float (*tile)[TILE] = (float (*)[TILE])here.tile;"] if self.codecs else []),
            *(f"  {line}" for line in self.before),
            *loop,
            *(f"  {line}" for line in self.after),
            "}",
        ]

    def in_one(self) -> list[str]:
        """The loop, as vector code where that can be.

        Sums grow in the precision of the numbers for a few of them, then in double.
        """
        loop = ["  for (int64_t i = 0; i < length; ++i) {", *(f"    {line.text}" for line in self.inside), "  }"]
        if ANY in self.pattern:
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
        if cut is None or ANY in self.pattern or self.one.partials:
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

    def body_name(self, pattern: tuple[int, ...], rows: int = 1) -> str:
        return "_".join([f"{self.name}_body", *map(str, pattern), *([f"rows{rows}"] if rows > 1 else [])])

    def clauses(self) -> str:
        return "".join(
            f" reduction({_CLAUSE[op]} : {'a' if op == 'peak' else 'f'}{number})"
            for number, op in self.accumulators.items()
        )
