"""Writes what all Triton kernels of a pass do: find their tensors in the table, load numbers and compute with them.

A table has, one column after the other with an entry per weight: number of elements, row of the host numbers, the
columns of the pass, and the sizes and strides of axes. What a kernel goes over is not said here
(:mod:`piste.engines.triton_source`): ``at`` is the element that a lane stands for, ``live`` says whether it is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from piste.codecs import Codec
from piste.engines.kernel import COMPARISONS, Column, Pass, is_small, needed
from piste.engines.pass_text import OPERATIONS, PassWriter
from piste.engines.triton_codecs import decoded, triton_types
from piste.symbol import HOST, Sym

__all__ = ["TYPES", "Values"]

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

_ELEMENT = OPERATIONS | {
    "div": "divide({}, {})",
    "pow": "power({}, {})",
    "abs": "tl.abs({})",
    "sign": "sign({})",
    "sqrt": "root({})",
    "rsqrt": "rroot({})",
    "exp": "exp({})",
    "log": "log({})",
    "cbrt": "cbrt({})",
    "softplus": "softplus({})",
    "minimum": "minimum({}, {})",
    "maximum": "maximum({}, {})",
    "where": "tl.where({}, {}, {})",
    "lerp": "lerp({}, {}, {})",
}


class Values(PassWriter):
    """The lines of a kernel's body, as they grow.

    Args:
        one, numbers, inverses, codecs: see :class:`PassWriter`.
        real: the precision of the arithmetic.
        homes: how the numbers in each home are stored.
    """

    fixed_columns = 2

    def __init__(
        self,
        one: Pass,
        numbers: Sequence[Sym],
        inverses: Mapping[Sym, Sym],
        real: str,
        homes: Mapping[str, torch.dtype],
        codecs: Mapping[str, Codec],
    ) -> None:
        super().__init__(one, numbers, inverses, codecs)
        self.real, self.homes = real, homes
        self.body: list[str] = []
        self.names: dict[Sym, str] = {}
        self.pointers: dict[int, str] = {}
        self.offsets: dict[tuple[int, ...], str] = {}

    def common(self) -> list[str]:
        """What a program is there for."""
        return [
            "program = tl.program_id(0).to(tl.int64)",
            "w = tl.load(map + program)",
            "number = tl.load(map + tiles + program)",
            "size = tl.load(table + w)",
            f"host = host + tl.load(table + n + w) * {max(1, len(self.numbers))}",
        ]

    def entry(self, column: Column) -> str:
        return f"tl.load(table + {self.place(column)} * n + w)"

    # axes ------------------------------------------------------------------------------------------------------------
    def size(self, axis: int | str) -> str:
        return f"tl.load(table + ({self.geometry} + {axis}) * n + w)"

    def stride(self, axis: int | str) -> str:
        return f"tl.load(table + ({self.geometry} + axes + {axis}) * n + w)"

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
            name = self.pointers[place] = f"p{place - self.fixed_columns}"
            self.body.append(f"{name} = {self.address(column)}")
            if self.one.kind_of(column) == self.one.space:
                self.body += ["if ALIGNED:", f"    {name} = tl.multiple_of({name}, 16)"]
        return self.pointers[place]

    def address(self, column: Column) -> str:
        key = column.key
        if column.source == "rest":
            kind = triton_types(self.codecs[str(key)])[1]
        elif key in self.codecs:
            kind = triton_types(self.codecs[str(key)])[0]
        else:
            kind = TYPES[self.homes[key]] if isinstance(key, str) else self.real
        return f"{self.entry(column)}.to(tl.pointer_type({kind}))"

    def compute(self, sym: Sym) -> None:
        op, args = self.operation(sym)
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
            self.body.append(f"{name} = tl.load(host + {self.numbers[sym]})")
        return self.names[sym]


def _literal(value: float) -> str:
    return repr(float(value)) if isfinite(value) else f"float('{float(value)}')"
