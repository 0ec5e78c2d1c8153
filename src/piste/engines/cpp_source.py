"""Writes the passes of a plan as C++ for the cpp engine.

Each pass becomes loop bodies (:mod:`piste.engines.cpp_loop`), a structure that leads a thread through them
(:mod:`piste.engines.cpp_visit`) and an ``extern "C"`` function that shares all weights of a bucket out to threads. Its
arguments are a table of
integers, one column after the other with an entry per weight: number of elements, parameter group, step number, the
addresses in ``Pass.columns``, and where axes or sizes matter the shapes and strides; and the hyper-parameters of every
group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from piste.codecs import Codec
from piste.engines.cpp_codecs import definitions
from piste.engines.cpp_host import host_function, hyper_names
from piste.engines.cpp_statements import TYPES
from piste.engines.cpp_visit import Visits
from piste.engines.kernel import Column, Pass, host_numbers
from piste.plan import Plan
from piste.symbol import ALL, Sym

__all__ = ["write"]


@cache
def _headers() -> str:
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("cpp_math.h", "cpp_runtime.h"))


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
            *host_function(numbers, hyper_names(plan)),
            *(
                line
                for name, one in passes.items()
                for line in _Writer(name, one, numbers, inverses, types, codecs, by_shape=plan.graph.by_shape).lines()
            ),
            "}  // namespace piste",
            "",
        ]
    )


class _Writer(Visits):
    """One pass: its loops, and the function that leads all weights through them."""

    def lines(self) -> list[str]:
        patterns = self.patterns()
        bodies = [line for pattern in patterns for line in self.body(pattern)]
        bodies += [line for pattern in self.together(patterns) for line in self.body(pattern, self.rows)]
        return [*bodies, *self.visitor(patterns), *self.function()]

    def function(self) -> list[str]:
        single, spread, count = self.single, self.spread, len(self.axes)
        lines = [
            f'extern "C" void {self.name}(int64_t n, int64_t threads, int64_t hyper, int64_t axes, const int64_t* T, '
            "const double* hp) {",
        ]
        pieces, parts, shares = "nullptr", "nullptr", "nullptr"
        if self.axes:
            pieces = "slots"
            lines += [
                f"  const Space space = {self.name}_space(T, n, (int)axes);",
                f"  int64_t* slots = pieces<{count}>(space);",
            ]
        lines.append(f"  const Tasks tasks(n, threads, T, {pieces});")
        if single:
            parts = "parts"
            lines += [
                f"  const bool peak[] = {{{_peaks(single)}}};",
                f"  double* parts = begun(tasks.count, {len(single)}, peak);",
            ]
        if spread:
            shares = "&shares"
            axes = ", ".join(str(self.axes.index(r.kind.keep)) for r in spread)
            lines += [
                f"  const int axes_of[] = {{{axes}}};",
                f"  const bool high[] = {{{_peaks(spread)}}};",
                f"  const Shares<R, {count}> shares(space, {len(spread)}, axes_of, high);",
            ]
        lines.append(f"  tasks.run({self.name}_work, {{T, n, (int)axes, hp, hyper, &tasks, {parts}, {shares}}});")
        return [*lines, *self.finish(), *(["  free(slots);"] if self.axes else []), "}"]

    def finish(self) -> list[str]:
        """Put partial results together, in the order of tasks."""
        lines: list[str] = []
        for place, reduction in enumerate(self.single):
            column = f"T[{self.place(Column('partial', reduction))} * n"
            which = f"{len(self.single)}, {place}, peak[{place}]"
            if reduction.kind == ALL:
                lines.append(f"  *(R*){column}] = (R)joined(parts, 0, tasks.count, {which});")
            else:
                one = f"joined(parts, tasks.first[w], tasks.first[w + 1], {which})"
                lines.append(f"  for (int64_t w = 0; w < n; ++w) *(R*){column} + w] = (R){one};")
        if self.single:
            lines.append("  free(parts);")
        if self.spread:
            columns = ", ".join(str(self.place(Column("partial", r))) for r in self.spread)
            lines += [f"  const int columns[] = {{{columns}}};", "  shares.finish(T, columns);"]
        return lines


def _peaks(reductions: Sequence[Sym]) -> str:
    """Which of them are peaks and no sums, as C++ has it."""
    return ", ".join("true" if r.op == "peak" else "false" for r in reductions)
