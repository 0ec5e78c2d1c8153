"""Writes the passes of a plan as C++ for the cpp engine.

Each pass becomes loop bodies (:mod:`piste.engines.cpp_loop`), a structure that leads a thread through them
(:mod:`piste.engines.cpp_visit`) and an ``extern "C"`` function that shares all weights of a bucket out to threads. Its
arguments are a table of
integers, one column after the other with an entry per weight: number of elements, parameter group, step number, the
addresses in ``Pass.columns``, and where axes or sizes matter the shapes and strides; and the hyper-parameters of every
group.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from piste.codecs import Codec
from piste.engines.cpp_codecs import definitions
from piste.engines.cpp_host import host_function, hyper_names
from piste.engines.cpp_statements import JOIN, START, TYPES
from piste.engines.cpp_visit import Visits
from piste.engines.kernel import Column, Pass, host_numbers
from piste.plan import Plan
from piste.symbol import ALL

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
            out = f"T[{self.place(Column('partial', reduction))} * n{'' if reduction.kind == ALL else ' + w'}]"
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
                out = f"(R*){self.entry(Column('partial', reduction))}"
                lines.append(f"    shares.finish(grid, w, {place}, {axes}, {out}, {JOIN[reduction.op]});")
            lines.append("  }")
        return lines
