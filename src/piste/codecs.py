"""How numbers are stored in few bits. Each codec is written once, as formulas over *lanes*, for every engine.

A lane is one number of many that are worked on alike: 32-bit integers and floats, and the operations of
:class:`Lanes`. In :mod:`piste.coding` torch works them out on whole tensors; a generating engine gives symbols instead
and gets code.

Four ideas:

* *Blocks.* Codes stand for numbers relative to a few words for each block of a weight's elements. Blocks begin anew
  with each row (each index of the first axis), so that a weight sharded by rows has the blocks of the whole one.
* *A ramp between two floats* (:class:`Ramp`). The bit pattern of a positive float grows like its logarithm. A second
  moment is the number of even steps from the block's largest pattern down to its smallest: nothing is ever stored as
  zero, and the resolution follows the spread of the block.
* *Fourth powers* (:class:`Powers`). A signed moment is about ``(code / 127)^4`` of the block's largest magnitude: fine
  steps at the top, and 28 octaves below it.
* *Rounding that keeps time.* A number is rounded up when its fraction exceeds a threshold that moves on by the golden
  ratio with every step. Changes far smaller than a code's step add up instead of being lost, with less noise than
  random thresholds make, and a step rounds in the same way wherever and in however many pieces it is taken.

docs/precision.md has the measurements behind the maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, overload

import torch
from torch import Tensor

__all__ = ["GOLDEN", "STRIDE", "Codec", "Lanes", "phase_at", "row_length"]

#: an integer, float or truth per lane
Lane: TypeAlias = Any

#: thresholds are 16 bits: that of element i in step t is ``i * STRIDE + t * GOLDEN + phase``, without what overflows
GOLDEN, STRIDE = 40503, 28183

_UNITY = 0x3F800000  # the pattern of 1.0
_SIGN, _MAGNITUDE = 0x8000, 0x7FFFFFFF
_INFINITY, _NAN, _LARGEST = 0x7F800000, 0x7FC00000, 0x7F7FFFFF
_ONE = 65536  # thresholds count in parts of this


@overload
def phase_at(step: int, phase: int) -> int: ...
@overload
def phase_at(step: Tensor, phase: int | Tensor) -> Tensor: ...
@overload
def phase_at(step: int | Tensor, phase: int) -> int | Tensor: ...
def phase_at(step: int | Tensor, phase: int | Tensor) -> int | Tensor:
    """Where the thresholds of a weight begin in a step, 16 bits; of many weights, for tensors of whole numbers."""
    return (step * GOLDEN + phase) & 0xFFFF


def row_length(shape: Sequence[int]) -> int:
    """How many numbers share the first index. Blocks begin anew in each such row; a vector is one row."""
    return math.prod(shape[1:] if len(shape) > 1 else shape)


class Lanes(Protocol):
    """What codecs compute with, besides Python's operators."""

    def bits(self, x: Lane) -> Lane:
        """The pattern of a float as an integer."""

    def real(self, i: Lane) -> Lane:
        """The float of a pattern."""

    def number(self, i: Lane) -> Lane:
        """An integer as a float, rounded to the nearest."""

    def whole(self, x: Lane) -> Lane:
        """A float as an integer, rounded towards zero."""

    def minimum(self, a: Lane, b: Lane) -> Lane: ...
    def maximum(self, a: Lane, b: Lane) -> Lane: ...
    def where(self, test: Lane, yes: Lane, no: Lane) -> Lane: ...


@dataclass(frozen=True)
class Codec:
    """A way to store float32 numbers.

    Attributes:
        name: what it is called in generated code.
        codes: dtype of the tensor that holds the codes.
        block: elements that share a word; 0 for none.
        packed: whether a byte holds two codes: the first half of a block in the low bits, the second in the high ones.
        rest: dtype of the second tensor: words of blocks, or a number per element; None for none. Numbers of ``int16``
            are held as two bytes, a last axis of ``uint8``.
        count: words that a block has.
    """

    name: str
    codes: torch.dtype
    block: int = 0
    packed: bool = False
    rest: torch.dtype | None = None
    count: int = 1

    #: how the lanes of :meth:`measure` are brought together over a block
    measures: ClassVar[tuple[str, ...]] = ()

    def measure(self, o: Lanes, x: Lane) -> tuple[Lane, ...]:
        """What has to be known of a block."""
        return ()

    def words(self, o: Lanes, *known: Lane) -> tuple[Lane, ...]:
        """The words of a block, as integers."""
        raise NotImplementedError

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        """The code of a number, and what goes into ``rest`` if that has a number per element."""
        raise NotImplementedError

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        """The number; ``rest`` has the words of its block, or its own, or nothing."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ramp(Codec):
    """Non-negative numbers as even steps from the largest pattern of the block down to its smallest.

    Its words are the largest pattern and the step. A block of zeros stays one; other zeros become the smallest of the
    others. A block with a NaN or an infinity is NaN.
    """

    levels: int = 255
    measures: ClassVar[tuple[str, ...]] = ("max", "min")

    def measure(self, o: Lanes, x: Lane) -> tuple[Lane, ...]:
        b = o.bits(x) & _MAGNITUDE
        return b, o.where(b > 0, b, _INFINITY)

    def words(self, o: Lanes, *known: Lane) -> tuple[Lane, ...]:
        top, low = known
        lost = top >= _INFINITY
        step = (top - o.minimum(low, top) + self.levels - 1) // self.levels
        return o.where(lost, _NAN, top), o.where(lost, 0, step)

    def ramp(self, rest: Sequence[Lane]) -> tuple[Lane, Lane]:
        """The largest pattern and the step."""
        top, step = rest
        return top, step

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        top, step = self.ramp(words)
        down = o.number(top - (o.bits(x) & _MAGNITUDE))
        parts = o.whole(o.minimum(down * (65536.0 / o.number(o.maximum(step, 1))), float(self.levels * _ONE)))
        return ((parts + threshold) >> 16,)

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        top, step = self.ramp(rest)
        return o.real(o.maximum(top - code * step, o.minimum(top, 1)))


@dataclass(frozen=True)
class ShortRamp(Ramp):
    """The same with three words of 16 bits: the halves of the largest pattern, and the step in units of ``2^shift``.

    So a ramp reaches down 60 octaves. Units are small against what a slow average moves in a step: a ramp has to be
    able to follow its smallest number down without leaping ahead of it.
    """

    shift: int = 9

    def words(self, o: Lanes, *known: Lane) -> tuple[Lane, ...]:
        top, low = known
        lost = top >= _INFINITY
        unit = self.levels << self.shift
        step = o.minimum((top - o.minimum(low, top) + unit - 1) // unit, 0xFFFF)
        return o.where(lost, _NAN, top) >> 16, o.where(lost, 0, top) & 0xFFFF, o.where(lost, 0, step)

    def ramp(self, rest: Sequence[Lane]) -> tuple[Lane, Lane]:
        upper, lower, step = rest
        return (upper << 16) | (lower & 0xFFFF), (step & 0xFFFF) << self.shift


@dataclass(frozen=True)
class Powers(Codec):
    """Signed numbers as fourth powers, relative to the block's largest magnitude, which is the word.

    A quarter of the difference of two patterns is that of their fourth roots, taken piece by piece as a straight line:
    exact where a number is the largest, and its own inverse. A block with a NaN or an infinity is NaN.
    """

    measures: ClassVar[tuple[str, ...]] = ("max",)

    def measure(self, o: Lanes, x: Lane) -> tuple[Lane, ...]:
        return (o.bits(x) & _MAGNITUDE,)

    def words(self, o: Lanes, *known: Lane) -> tuple[Lane, ...]:
        return known

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        root = o.real((((o.bits(x) & _MAGNITUDE) - words[0]) >> 2) + _UNITY)
        code = (o.whole(root * float(127 * _ONE)) + threshold) >> 16
        return (o.where(x < 0, -code, code),)

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        root = o.bits(o.number(code) * (1 / 127))
        (word,) = rest
        least = o.where(word >= _INFINITY, _NAN, 0)
        size = o.maximum(o.where(code == 0, 0, word + (((root & _MAGNITUDE) - _UNITY) << 2)), least)
        return o.real(size | (root & ~_MAGNITUDE))


@dataclass(frozen=True)
class FixedRamp(Codec):
    """Signed numbers as a sign and seven sizes, 3/4 of an octave apart below the block's largest, and zero.

    The word is the upper half of the largest pattern, rounded up.
    """

    measures: ClassVar[tuple[str, ...]] = ("max",)
    step: ClassVar[int] = 3 << 21

    def measure(self, o: Lanes, x: Lane) -> tuple[Lane, ...]:
        return (o.bits(x) & _MAGNITUDE,)

    def words(self, o: Lanes, *known: Lane) -> tuple[Lane, ...]:
        top = known[0]
        return (o.where(top >= _INFINITY, _NAN, o.minimum(top + 0xFFFF, _INFINITY - 1)) >> 16,)

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        magnitude = o.bits(x) & _MAGNITUDE
        parts = o.whole(o.minimum(o.number((words[0] << 16) - magnitude) * (_ONE / self.step), float(7 * _ONE)))
        size = o.where(magnitude > 0, 7 - ((parts + threshold) >> 16), 0)
        return (o.where(x < 0, size | 8, size),)

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        word, size = rest[0] << 16, code & 7
        found = o.real(o.where(size == 0, 0, o.maximum(word - (7 - size) * self.step, 0)))
        known = o.where(word >= _INFINITY, o.real(word), found)
        return o.where(code >= 8, -known, known)


def _half(o: Lanes, x: Lane, added: Lane, *, seen: bool = False) -> Lane:
    """The upper half of a pattern after something was added to its magnitude; nothing becomes infinite that was not."""
    b = o.bits(x)
    size = b & _MAGNITUDE
    rounded = o.where(size >= _INFINITY, size, o.minimum(size + added, _LARGEST))
    if seen:
        rounded = o.maximum(rounded, o.minimum(size, 1) << 16)
    return (rounded >> 16) | ((b >> 16) & _SIGN)


def _nearest(o: Lanes, x: Lane) -> Lane:
    """The nearest bfloat16, ties to even, as 16 bits."""
    return _half(o, x, 0x7FFF + ((o.bits(x) >> 16) & 1))


@dataclass(frozen=True)
class Half(Codec):
    """bfloat16, rounded by thresholds; ``seen`` numbers are never rounded to zero."""

    seen: bool = False

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        return (_half(o, x, threshold, seen=self.seen),)

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        return o.real(code << 16)


@dataclass(frozen=True)
class Kahan(Codec):
    """bfloat16, and beside it what rounding took away, as another bfloat16."""

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        code = _nearest(o, x)
        return code, _nearest(o, x - o.real(code << 16))

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        return o.real(code << 16) + o.real(rest[0] << 16)


@dataclass(frozen=True)
class Remainder(Codec):
    """bfloat16, rounded half away from zero, and beside it the rest of the pattern: nothing is lost."""

    def encode(self, o: Lanes, x: Lane, words: Sequence[Lane], threshold: Lane) -> tuple[Lane, ...]:
        b = o.bits(x)
        size = b & _MAGNITUDE
        size = o.where(size > _INFINITY, _NAN, size)
        upper = (size + 0x8000) >> 16
        return upper | ((b >> 16) & _SIGN), size - (upper << 16)

    def decode(self, o: Lanes, code: Lane, rest: Sequence[Lane]) -> Lane:
        size = ((code & 0x7FFF) << 16) + rest[0]
        return o.where(code < 0, -o.real(size), o.real(size))
