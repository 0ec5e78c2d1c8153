"""Writes the passes of a plan as Triton kernels for the triton engine.

Each pass becomes a kernel over all weights of a bucket: one program works on one tile of one weight, and finds its
tensors through a table. A table has, one column after the other with an entry per weight: number of elements, row of
the host numbers, the addresses in ``Pass.columns``, and the sizes and strides of axes.

Sums and peaks that keep no axes leave a number per tile; those that keep some have a kernel of their own before the
pass, in which a program works on a few results, going along everything that is reduced. No result depends on the order
in which programs run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isinf, isnan

import torch

from piste.codecs import Codec
from piste.engines.kernel import (
    COMPARISONS,
    Column,
    Pass,
    all_columns,
    coded,
    host_numbers,
    is_divided,
    is_small,
    needed,
    single,
    spread,
)
from piste.engines.triton_codecs import decoded, encoded, places, triton_types, whole_places
from piste.plan import Plan
from piste.symbol import HOST, Sym

__all__ = ["ALONG", "FIXED_COLUMNS", "RESULTS", "TILE", "TYPES", "write"]

#: columns of the table before the addresses: elements, row of host numbers
FIXED_COLUMNS = 2
#: elements of a tile, a multiple of every block of codes
TILE = 1024
#: results of a reduction that a program works on, and how many elements at a time it goes along
RESULTS, ALONG = 32, 64

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

_ELEMENT = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "divide({}, {})",
    "pow": "power({}, {})",
    "neg": "(-{})",
    "abs": "tl.abs({})",
    "sign": "sign({})",
    "square": "({0} * {0})",
    "sqrt": "root({})",
    "rsqrt": "rroot({})",
    "exp": "exp({})",
    "log": "log({})",
    "cbrt": "cbrt({})",
    "softplus": "softplus({})",
    "minimum": "minimum({}, {})",
    "maximum": "maximum({}, {})",
    "lt": "({} < {})",
    "le": "({} <= {})",
    "gt": "({} > {})",
    "ge": "({} >= {})",
    "eq": "({} == {})",
    "ne": "({} != {})",
    "where": "tl.where({}, {}, {})",
    "lerp": "lerp({}, {}, {})",
    "scratch": "{}",
    "expand": "{0}",
}

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
        writer = _Writer(one, numbers, inverses, TYPES[real], homes, codecs)
        found += [writer.reduction(f"{name}_{i}", r) for i, r in enumerate(spread(one))]
        found.append(writer.kernel(name))
    return "\n\n".join("\n".join(lines) for lines in found) + "\n"


class _Writer:
    """One pass."""

    def __init__(
        self,
        one: Pass,
        numbers: Sequence[Sym],
        inverses: Mapping[Sym, Sym],
        real: str,
        homes: Mapping[str, torch.dtype],
        codecs: Mapping[str, Codec],
    ) -> None:
        self.one, self.real, self.homes, self.inverses = one, real, homes, inverses
        self.number_of = {sym: i for i, sym in enumerate(numbers)}
        self.count = len(numbers)
        self.columns = all_columns(one, codecs)
        self.codecs = coded(one, codecs)
        self.begin()

    def begin(self) -> None:
        self.body: list[str] = []
        self.names: dict[Sym, str] = {}
        self.pointers: dict[int, str] = {}
        self.offsets: dict[tuple[int, ...], str] = {}

    # a kernel over tiles ---------------------------------------------------------------------------------------------
    def kernel(self, name: str) -> list[str]:
        """A tile in the middle of a weight has no end to look out for, and lies as one stretch of memory: there, loads
        and stores are as wide as the device has them."""
        whole = f"(number + 1) * {TILE} <= size"
        if self.codecs:
            whole = f"({whole}) & ({self.entry('row')} == size)"
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
        self.begin()
        self.body.append(f"lane = tl.arange(0, {TILE})")
        if self.codecs:
            self.body += [f"row = {self.entry('row')}", f"phase = {self.entry('phase')}.to(tl.int32)"]
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

    def common(self) -> list[str]:
        """What a program is there for."""
        return [
            "program = tl.program_id(0).to(tl.int64)",
            "w = tl.load(map + program)",
            "number = tl.load(map + tiles + program)",
            "size = tl.load(table + w)",
            f"host = host + tl.load(table + n + w) * {max(1, self.count)}",
        ]

    def entry(self, source: str) -> str:
        place = next(i for i, c in enumerate(self.columns) if c.source == source)
        return f"tl.load(table + {FIXED_COLUMNS + place} * n + w)"

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
        found = single(self.one)
        for i, reduction in enumerate(found):
            value = self.whole(self.names[reduction.args[0]])
            if reduction.op == "peak":
                share = f"peak(tl.where(live, {value}, float('-inf')), 0)"
            else:
                share = f"tl.sum(tl.where(live, {value}, 0), axis=0)"
            self.body.append(f"tl.store(parts + program * {len(found)} + {i}, {share}.to(tl.float64))")

    # a kernel over results that keep axes ----------------------------------------------------------------------------
    def reduction(self, name: str, reduction: Sym) -> list[str]:
        self.begin()
        keep = reduction.kind.keep
        out = self.address(Column("partial", reduction))
        start = "float('-inf')" if reduction.op == "peak" else "0"
        wide = self.real if reduction.op == "peak" else "tl.float64"
        before = [
            *self.common(),
            *([f"row = {self.entry('row')}"] if self.codecs else []),
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
        if self.codecs:
            self.body += ["line = at // row", "col = at % row", *self.halves()]
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

    def halves(self) -> list[str]:
        """Where packed codes of any elements lie; see :mod:`piste.engines.triton_codecs`."""
        packed = {codec.block for codec in self.codecs.values() if codec.packed}
        if not packed:
            return []
        (block,) = packed
        return [
            f"first = col // {block} * {block}",
            f"half = (tl.minimum(row - first, {block}) + 1) // 2",
            "side = ((col - first) >= half).to(tl.int32)",
            "seat = col - first - side * half",
        ]

    # axes ------------------------------------------------------------------------------------------------------------
    def size(self, axis: int | str) -> str:
        return f"tl.load(table + ({FIXED_COLUMNS + len(self.columns)} + {axis}) * n + w)"

    def stride(self, axis: int | str) -> str:
        return f"tl.load(table + ({FIXED_COLUMNS + len(self.columns)} + axes + {axis}) * n + w)"

    def decompose(self, result: str, keep: Sequence[int], base: str) -> list[str]:
        """From the number of a result to where its first element is."""
        lines = [f"left = {result}", f"{base} = left * 0"]
        for axis in reversed(keep):
            lines += [f"{base} += left % {self.size(axis)} * {self.stride(axis)}", f"left = left // {self.size(axis)}"]
        return lines

    def offset(self, keep: tuple[int, ...]) -> str:
        """Where the number for the elements at ``at`` lies in a tensor that has these axes only."""
        if keep not in self.offsets:
            name = f"k{len(self.offsets)}"
            for i, axis in enumerate(keep):
                index = f"(at // {self.stride(axis)} % {self.size(axis)})"
                self.body.append(f"{name} = {f'{name} * {self.size(axis)} + ' if i else ''}{index}")
            self.offsets[keep] = name
        return self.offsets[keep]

    # values ----------------------------------------------------------------------------------------------------------
    def values(self, results: Sequence[Sym]) -> None:
        """Load and compute what these results need."""
        wanted = needed(results, self.one.loads)
        for sym, home in self.one.loads.items():
            if sym in wanted:
                self.names[sym] = self.load(sym, home)
        for sym in self.one.compute:
            if sym in wanted:
                self.compute(sym)

    def load(self, sym: Sym, home: str) -> str:
        pointer = self.pointer(self.one.columns[self.one.column_of(sym, home)])
        if home in self.codecs:
            codec = self.codecs[home]
            rest = self.pointer(Column("rest", home)) if codec.rest is not None else ""
            return decoded(codec, pointer, rest, self.body)
        if is_small(sym.kind):
            value = f"tl.load({pointer})"
        else:
            place = "at" if sym.kind == self.one.space else self.offset(sym.kind.keep)
            value = f"tl.load({pointer} + {place}, mask=live, other=0)"
        name = f"x{len(self.body)}"
        self.body.append(f"{name} = {value}.to({self.real})")
        return name

    def pointer(self, column: Column) -> str:
        place = self.place(column)
        if place not in self.pointers:
            name = self.pointers[place] = f"p{place}"
            self.body += [f"{name} = {self.address(column)}", "if ALIGNED:", f"    {name} = tl.multiple_of({name}, 16)"]
        return self.pointers[place]

    def place(self, column: Column) -> int:
        """Symbols compare by identity only: ``==`` makes a symbol."""
        source, key = column
        return next(
            i
            for i, c in enumerate(self.columns)
            if c.source == source
            and (c.key is key or (isinstance(key, str) and isinstance(c.key, str) and c.key == key))
        )

    def address(self, column: Column) -> str:
        key = column.key
        if column.source == "rest":
            kind = triton_types(self.codecs[str(key)])[1]
        elif key in self.codecs:
            kind = triton_types(self.codecs[str(key)])[0]
        else:
            kind = TYPES[self.homes[key]] if isinstance(key, str) else self.real
        return f"tl.load(table + {FIXED_COLUMNS + self.place(column)} * n + w).to(tl.pointer_type({kind}))"

    def compute(self, sym: Sym) -> None:
        args: tuple[Sym, ...] = sym.args
        op = sym.op
        if is_divided(sym):
            op, args = "mul", (sym.args[0], self.inverses[sym.args[1]])
        texts = [self.argument(a) for a in args]
        if op == "where" and args[0].op not in COMPARISONS:
            texts[0] = f"({texts[0]} != 0)"
        text = _ELEMENT[op].format(*texts)
        name = self.names[sym] = f"x{len(self.body)}"
        self.body.append(f"{name} = {text}")

    def argument(self, sym: Sym) -> str:
        if sym.kind != HOST:
            return self.names[sym]
        if sym.op == "const":
            return f"tl.full((), {_literal(sym.attr)}, {self.real})"
        if sym not in self.names:
            self.names[sym] = name = f"x{len(self.body)}"
            self.body.append(f"{name} = tl.load(host + {self.number_of[sym]})")
        return self.names[sym]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _literal(value: float) -> str:
    if isnan(value) or isinf(value):
        return f"float('{'nan' if isnan(value) else 'inf' if value == inf else '-inf'}')"
    return repr(float(value))
