"""Writes the passes of a plan as Triton kernels for the triton engine.

Each pass becomes a kernel over all weights of a bucket: one program works on one tile of one weight, and finds its
tensors through a table (:mod:`piste.engines.triton_values`).

Sums and peaks that keep no axes leave a number per tile; those that keep some have a kernel of their own before the
pass, in which a program works on a few results, going along everything that is reduced. No result depends on the order
in which programs run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from piste.codecs import Codec
from piste.engines.kernel import Column, Pass, host_numbers, is_small, spread
from piste.engines.pass_text import PHASE, ROW
from piste.engines.triton_codecs import encoded, places, scattered_places, whole_places
from piste.engines.triton_values import TYPES, Values
from piste.plan import Plan
from piste.symbol import Sym

__all__ = ["ALONG", "RESULTS", "TILE", "write"]

#: elements of a tile, a multiple of every block of codes
TILE = 1024
#: results of a reduction that a program works on, and how many elements at a time it goes along
RESULTS, ALONG = 32, 64

#: sizes and counts are no part of what is compiled
_HEAD = "@triton.jit(do_not_specialize=['n', 'axes', 'tiles'])"
_ARGUMENTS = "table, n, axes, host, map, tiles, parts, ALIGNED: tl.constexpr"


def write(
    plan: Plan,
    passes: Mapping[str, Pass],
    real: torch.dtype,
    homes: Mapping[str, torch.dtype],
    codecs: Mapping[str, Codec],
) -> str:
    """A whole source file: for each pass a kernel of its name, and ``NAME_I`` for its reduction I that keeps axes.

    Args:
        plan: what the passes belong to.
        passes: by the name of their kernel.
        real: the precision of the arithmetic.
        homes: how the numbers in each home are stored.
        codecs: by home, where they are stored as codes.
    """
    numbers, inverses = host_numbers(plan, passes.values())
    found = []
    for name, one in passes.items():
        given = one, numbers, inverses, TYPES[real], homes, codecs
        found += [_Results(*given).kernel(f"{name}_{i}", r) for i, r in enumerate(spread(one))]
        found.append(_Tiles(*given).kernel(name))
    return "\n\n".join("\n".join(lines) for lines in found) + "\n"


class _Tiles(Values):
    """The kernel of a pass, over tiles of weights."""

    def kernel(self, name: str) -> list[str]:
        """A tile in the middle of a weight has no end to look out for, and lies as one stretch of memory: there, loads
        and stores are as wide as the device has them."""
        whole = f"(number + 1) * {TILE} <= size"
        if self.codecs:
            whole = f"({whole}) & ({self.entry(ROW)} == size)"
        given = "table, n, axes, host, w, number, size, program, parts"
        return [
            "@triton.jit",
            f"def {name}_tile({given}, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):",
            *_indented(self.tile()),
            "",
            "",
            _HEAD,
            f"def {name}({_ARGUMENTS}):",
            *_indented(self.common()),
            f"    if {whole}:",
            f"        {name}_tile({given}, True, ALIGNED)",
            "    else:",
            f"        {name}_tile({given}, False, ALIGNED)",
        ]

    def tile(self) -> list[str]:
        self.body.append(f"lane = tl.arange(0, {TILE})")
        if self.codecs:
            self.body += [f"row = {self.entry(ROW)}", f"phase = {self.entry(PHASE)}.to(tl.int32)"]
        self.body += [
            "if WHOLE:",
            *_indented(whole_places(self.codecs, TILE)),
            "else:",
            *_indented(places(self.codecs, TILE)),
        ]
        self.values([*self.one.writes.values(), *self.one.kept, *(r.args[0] for r in self.stored())])
        self.store()
        self.gather()
        return self.body

    def stored(self) -> list[Sym]:
        """The reductions that this kernel has something to do with."""
        return [r for r in self.one.partials if r.kind == self.one.space or is_small(r.kind)]

    def store(self) -> None:
        """Stores come after all loads."""
        for column in self.one.columns:
            key = column.key
            if column.source == "home" and key in self.one.writes:
                value = self.whole(self.names[self.one.writes[str(key)]])
                if key in self.codecs:
                    rest = self.pointer(Column("rest", str(key))) if self.codecs[str(key)].rest is not None else ""
                    encoded(self.codecs[str(key)], value, self.pointer(column), rest, TILE, self.body)
                else:
                    value = f"to_bf16({value})" if self.homes[str(key)] == torch.bfloat16 else value
                    self.body.append(f"tl.store({self.pointer(column)} + at, {value}, mask=live)")
            elif column.source == "kept" and isinstance(key, Sym):
                self.body.append(f"tl.store({self.pointer(column)} + at, {self.whole(self.names[key])}, mask=live)")
            elif column.source == "partial" and isinstance(key, Sym) and key.kind == self.one.space:
                value = self.whole(self.names[key.args[0]])
                self.body.append(f"tl.store({self.pointer(column)} + at, {value}, mask=live)")

    def whole(self, value: str) -> str:
        """A value as one number for each lane; it may be the same for all of them."""
        name = f"x{len(self.body)}"
        self.body.append(f"{name} = {value} + tl.zeros(({TILE},), {self.real})")
        return name

    def gather(self) -> None:
        """The share of this tile in results that have no axes, as doubles."""
        for i, reduction in enumerate(self.single):
            value = self.whole(self.names[reduction.args[0]])
            if reduction.op == "peak":
                share = f"peak(tl.where(live, {value}, float('-inf')), 0)"
            else:
                share = f"tl.sum(tl.where(live, {value}, 0), axis=0)"
            self.body.append(f"tl.store(parts + program * {len(self.single)} + {i}, {share}.to(tl.float64))")


class _Results(Values):
    """The kernel of a reduction that keeps axes, over its results."""

    def kernel(self, name: str, reduction: Sym) -> list[str]:
        keep = reduction.kind.keep
        out = self.address(Column("partial", reduction))
        start = "float('-inf')" if reduction.op == "peak" else "0"
        wide = self.real if reduction.op == "peak" else "tl.float64"
        before = [
            *self.common(),
            *([f"row = {self.entry(ROW)}"] if self.codecs else []),
            f"out = {out}",
            f"result = number * {RESULTS} + tl.arange(0, {RESULTS})[:, None]",
            *self.decompose("result", keep, "base"),
            f"results = {' * '.join(self.size(a) for a in keep)}",
            f"total = tl.full(({RESULTS},), {start}, {wide})",
            "others = size // results",
            f"for begin in range(0, others, {ALONG}):",
        ]
        self.body += [
            f"other = begin + tl.arange(0, {ALONG})[None, :]",
            "rest = other + tl.zeros_like(result)",
            "at = base + tl.zeros_like(rest)",
            "for back in range(axes):",
            "    axis = axes - 1 - back",
            f"    kept = (({sum(1 << a for a in keep)} >> axis) & 1) != 0",
            f"    extent = tl.where(kept, 1, {self.size('axis')})",
            f"    at += rest % extent * {self.stride('axis')}",
            "    rest = rest // extent",
            "live = (result < results) & (other < others)",
        ]
        self.body += scattered_places(self.codecs)
        self.values([reduction.args[0]])
        value = self.names[reduction.args[0]]
        grid = f"({RESULTS}, {ALONG})"
        full = f"{value} + tl.zeros({grid}, {self.real})"
        if reduction.op == "peak":
            self.body.append(f"total = maximum(total, peak(tl.where(live, {full}, float('-inf')), 1))")
        else:
            self.body.append(f"total += tl.sum(tl.where(live, {full}, 0), axis=1).to(tl.float64)")
        place = f"out + number * {RESULTS} + tl.arange(0, {RESULTS})"
        after = f"tl.store({place}, total.to({self.real}), mask=number * {RESULTS} + tl.arange(0, {RESULTS}) < results)"
        text = [*before, *_indented(self.body), after]
        return [_HEAD, f"def {name}({_ARGUMENTS}):", *_indented(text)]

    def decompose(self, result: str, keep: Sequence[int], base: str) -> list[str]:
        """From the number of a result to where its first element is."""
        lines = [f"left = {result}", f"{base} = left * 0"]
        for axis in reversed(keep):
            lines += [f"{base} += left % {self.size(axis)} * {self.stride(axis)}", f"left = left // {self.size(axis)}"]
        return lines


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]
