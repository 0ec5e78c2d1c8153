"""Codecs as text: lanes that are names of variables in a generated program, and what is done with them a line of it.

The formulas are those of :mod:`piste.codecs`; a language brings its way of writing them, a :class:`Syntax`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from piste.codecs import Codec

__all__ = ["INTEGERS", "MEASURE_START", "Lane", "Syntax", "TextLanes"]

#: the integers that stored numbers are read as
INTEGERS = {
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.bfloat16: "int16",
    torch.float32: "int32",
}
#: what no number of a block is beyond
MEASURE_START = {"max": "0", "min": "0x7fffffff"}

REAL, WHOLE, TRUTH = "real", "whole", "truth"


class Syntax(NamedTuple):
    """How a language writes the operations of lanes: templates, whose places are names or literals.

    Attributes:
        declare: a new name, by what it names (``kind``, ``name``, ``text``).
        kinds: what the three kinds of numbers are called.
        real: a literal float.
        quotient: of floats.
        ratio: of whole numbers that are not negative.
        left: a shift to the left, without overflow.
        bits, pattern: the pattern of a float, and the float of a pattern.
        number, truncated: a whole number as a float, and a float as a whole number.
        where: a choice.
    """

    declare: str
    kinds: dict[str, str]
    real: str
    quotient: str
    ratio: str
    left: str
    bits: str
    pattern: str
    number: str
    truncated: str
    where: str

    def codes_of_row(self, codec: Codec) -> str:
        """How many codes a row of ``row`` numbers has."""
        blocks, left = self.ratio.format("row", codec.block), f"row % {codec.block} + 1"
        return f"({blocks} * {codec.block // 2} + {self.ratio.format(f'({left})', 2)})"

    def words_before(self, codec: Codec, column: str) -> str:
        """How many words of blocks come before those of the block in which this column of row ``line`` is."""
        per_row = self.ratio.format(f"(row + {codec.block - 1})", codec.block)
        return f"(line * ({per_row}) + {self.ratio.format(column, codec.block)}) * {codec.count}"


class Lane:
    """A variable of the generated program, or a constant."""

    def __init__(self, text: str, real: bool, lines: list[str], syntax: Syntax) -> None:
        self.text, self.real, self.lines, self.syntax = text, real, lines, syntax

    def made(self, text: str, kind: str) -> Lane:
        name = f"y{len(self.lines)}"
        self.lines.append(self.syntax.declare.format(kind=self.syntax.kinds[kind], name=name, text=text))
        return Lane(name, kind == REAL, self.lines, self.syntax)

    def join(self, template: str, other: Any, *, flip: bool = False, kind: str = "") -> Lane:
        a, b = self.text, self.literal(other)
        left, right = (b, a) if flip else (a, b)
        return self.made(template.format(left, right), kind or (REAL if self.real else WHOLE))

    def literal(self, value: Any, *, real: bool | None = None) -> str:
        if isinstance(value, Lane):
            return value.text
        if self.real if real is None else real:
            return self.syntax.real.format(float(value))
        return "(-2147483647 - 1)" if value == -(2**31) else str(int(value))

    def __add__(self, other: Any) -> Lane:
        return self.join("{} + {}", other)

    def __radd__(self, other: Any) -> Lane:
        return self.join("{} + {}", other, flip=True)

    def __sub__(self, other: Any) -> Lane:
        return self.join("{} - {}", other)

    def __rsub__(self, other: Any) -> Lane:
        return self.join("{} - {}", other, flip=True)

    def __mul__(self, other: Any) -> Lane:
        return self.join("{} * {}", other)

    def __truediv__(self, other: Any) -> Lane:
        return self.join(self.syntax.quotient, other)

    def __rtruediv__(self, other: Any) -> Lane:
        return self.join(self.syntax.quotient, other, flip=True)

    def __floordiv__(self, other: Any) -> Lane:
        return self.join(self.syntax.ratio, other)

    def __and__(self, other: Any) -> Lane:
        return self.join("{} & {}", other)

    def __or__(self, other: Any) -> Lane:
        return self.join("{} | {}", other)

    def __lshift__(self, other: Any) -> Lane:
        return self.join(self.syntax.left, other)

    def __rshift__(self, other: Any) -> Lane:
        return self.join("{} >> {}", other)

    def __neg__(self) -> Lane:
        return self.made(f"-{self.text}", REAL if self.real else WHOLE)

    def __lt__(self, other: Any) -> Lane:
        return self.join("{} < {}", other, kind=TRUTH)

    def __gt__(self, other: Any) -> Lane:
        return self.join("{} > {}", other, kind=TRUTH)

    def __ge__(self, other: Any) -> Lane:
        return self.join("{} >= {}", other, kind=TRUTH)

    def __eq__(self, other: object) -> Lane:  # type: ignore[override]
        return self.join("{} == {}", other, kind=TRUTH)

    __hash__ = None  # type: ignore[assignment]


class TextLanes:
    """The operations of :class:`piste.codecs.Lanes` on such lanes."""

    def __init__(self, syntax: Syntax) -> None:
        self.syntax = syntax

    def lane(self, name: str, lines: list[str], *, real: bool = False) -> Lane:
        """A variable that the program has already; what is done with it becomes further lines."""
        return Lane(name, real, lines, self.syntax)

    def bits(self, x: Lane) -> Lane:
        return x.made(self.syntax.bits.format(x.text), WHOLE)

    def real(self, i: Lane) -> Lane:
        return i.made(self.syntax.pattern.format(i.text), REAL)

    def number(self, i: Lane) -> Lane:
        return i.made(self.syntax.number.format(i.text), REAL)

    def whole(self, x: Lane) -> Lane:
        return x.made(self.syntax.truncated.format(x.text), WHOLE)

    def minimum(self, a: Lane, b: Any) -> Lane:
        return self.where(b < a if isinstance(b, Lane) else a > b, b, a)

    def maximum(self, a: Lane, b: Any) -> Lane:
        return self.where(b > a if isinstance(b, Lane) else a < b, b, a)

    def where(self, test: Lane, yes: Any, no: Any) -> Lane:
        real = any(isinstance(v, float) or (isinstance(v, Lane) and v.real) for v in (yes, no))
        literal = (test.literal(v, real=real) for v in (yes, no))
        return test.made(self.syntax.where.format(test.text, *literal), REAL if real else WHOLE)
