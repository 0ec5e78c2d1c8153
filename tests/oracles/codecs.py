"""The codecs once more, in NumPy and double precision, from their description in docs/precision.md.

Typed apart from `piste.codecs`: nothing is imported from there. A pattern is the integer whose bits are those of a
float32.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

GOLDEN, STRIDE = 40503, 28183


def pattern(x: Array) -> Ints:
    """Of magnitudes."""
    return np.abs(x.astype(np.float32)).view(np.uint32).astype(np.int64)


def from_pattern(i: Ints) -> Array:
    return i.astype(np.uint32).view(np.float32)


def thresholds(n: int, step: int | None, phase: int) -> Ints:
    """16 bits for each element: a fraction of the distance between two codes."""
    if step is None:
        return np.full(n, 32768, dtype=np.int64)
    return (np.arange(n, dtype=np.int64) * STRIDE + step * GOLDEN + phase) % 65536


def _blocks(x: Array, size: int, step: int | None, phase: int, one: object) -> Array:
    flat, r = x.reshape(-1).astype(np.float32), thresholds(x.size, step, phase)
    row = x[0].size if x.ndim > 1 else x.size
    cuts = [(start + i, start + min(i + size, row)) for start in range(0, x.size, row) for i in range(0, row, size)]
    parts = [one(flat[i:j], r[i:j]) for i, j in cuts]  # type: ignore[operator]
    return np.concatenate(parts).reshape(x.shape)


def ramp(x: Array, size: int, levels: int, unit: int, step: int | None, phase: int = 0) -> Array:
    """Non-negative numbers, after storing: a ramp of patterns from the block's largest down, with steps in units."""

    def one(block: Array, r: Ints) -> Array:
        p = pattern(block)
        if not p.any():
            return np.zeros_like(block)
        least = int(p[p > 0].min())
        top = int(p.max())
        width = min(math.ceil((top - least) / (levels * unit)) * unit, 65535 * unit if unit > 1 else top)
        share = np.minimum(
            np.float32(top - p) * np.float32(np.float32(65536) / np.float32(max(width, 1))), levels * 65536
        )
        code = (share.astype(np.int64) + r) // 65536
        return from_pattern(np.maximum(top - code * width, 1))

    return _blocks(x, size, step, phase, one)


def powers(x: Array, size: int, step: int | None, phase: int = 0) -> Array:
    """Signed numbers: a quarter of the difference of patterns, in 127 steps."""

    def one(block: Array, r: Ints) -> Array:
        p = pattern(block)
        top = int(p.max())
        unity = 0x3F800000
        root = from_pattern((p - top) // 4 + unity)
        code = ((root * np.float32(127 * 65536)).astype(np.int64) + r) // 65536
        back = pattern((code.astype(np.float32) * np.float32(1 / 127)).astype(np.float32))
        found = np.where(code == 0, 0, np.maximum(top + 4 * (back - unity), 0))
        return np.where(block < 0, -from_pattern(found), from_pattern(found))

    return _blocks(x, size, step, phase, one)


def fixed(x: Array, size: int, step: int | None, phase: int = 0) -> Array:
    """Signed numbers in four bits: zero and seven sizes, 3/4 of an octave apart."""

    def one(block: Array, r: Ints) -> Array:
        p = pattern(block)
        top, width = math.ceil(int(p.max()) / 65536) * 65536, 3 * 2**21
        share = np.minimum(np.float32(top - p) * np.float32(65536 / width), 7 * 65536).astype(np.int64)
        down = (share + r) // 65536
        found = np.where((down == 7) | (p == 0), 0, np.maximum(top - down * width, 0))
        return np.where(block < 0, -from_pattern(found), from_pattern(found))

    return _blocks(x, size, step, phase, one)


def half(x: Array, step: int | None, phase: int = 0, *, seen: bool) -> Array:
    """The upper 16 bits, after a threshold was added; what was seen is never rounded to zero."""
    r = thresholds(x.size, step, phase).reshape(x.shape)
    p = pattern(x)
    upper = np.minimum(p + r, 0x7F7FFFFF) // 65536
    if seen:
        upper = np.where(p > 0, np.maximum(upper, 1), upper)
    found = from_pattern(upper * 65536)
    return np.where(np.signbit(x), -found, found)


def stored(x: Array, role: str, form: str, step: int | None, phase: int = 0) -> Array:
    """What comes back of a state of this role after it was stored."""
    if form == "bf16":
        return half(x, step, phase, seen=True)
    if role == "second_moment":
        return ramp(x, 256, 255, 1, step, phase) if form == "8bit" else ramp(x, 128, 15, 2**9, step, phase)
    return powers(x, 256, step, phase) if form == "8bit" else fixed(x, 128, step, phase)
