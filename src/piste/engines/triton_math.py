"""What generated Triton kernels call: element functions with torch's meaning, and the last step of reductions.

On a GPU exp, log, cbrt and pow are those of libdevice, which are as exact as torch's; Triton's interpreter, which runs
kernels on a CPU, has numpy's instead. Division and square root are rounded to the nearest, as everywhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = [
    "INTERPRETED",
    "cbrt",
    "divide",
    "exp",
    "finish",
    "lerp",
    "log",
    "maximum",
    "minimum",
    "peak",
    "power",
    "root",
    "rroot",
    "sign",
    "softplus",
    "to_bf16",
]


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


#: are kernels run by the interpreter?
INTERPRETED = type(divide).__name__ == "InterpretedFunction"
_DEVICE = tl.constexpr(not INTERPRETED)


@triton.jit
def root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def rroot(x):
    return divide(x * 0 + 1, root(x))


@triton.jit
def exp(x):
    if _DEVICE:
        return libdevice.exp(x)
    else:
        return tl.exp(x)


@triton.jit
def log(x):
    if _DEVICE:
        return libdevice.log(x)
    else:
        return tl.log(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))."""
    small = exp(-tl.abs(x))
    if _DEVICE:
        rest = libdevice.log1p(small)
    else:  # what is lost in 1 + small is lost in both factors
        whole = 1 + small
        rest = tl.where(whole == 1, small, tl.log(whole) * divide(small, tl.where(whole == 1, whole, whole - 1)))
    return tl.where(x > 0, x, 0) + rest


@triton.jit
def cbrt(x):
    if _DEVICE:
        return libdevice.cbrt(x)
    else:  # a power, and a step of Newton's method
        size = tl.where(x == 0, x * 0 + 1, tl.abs(x))
        guess = tl.exp(tl.log(size) / 3)
        better = guess - divide(guess * guess * guess - size, 3 * guess * guess)
        return tl.where(x == 0, x, tl.where(x < 0, -better, better))


@triton.jit
def power(x, y):
    """The powers that rules use, as products where they are some."""
    if _DEVICE:
        other = libdevice.pow(x, y + x * 0)
    else:
        other = tl.exp(y * tl.log(x))
    one = x * 0 + 1
    found = tl.where(y == 2, x * x, other)
    found = tl.where(y == 0.5, root(x), found)
    found = tl.where(y == 1, x, found)
    found = tl.where(y == -1, divide(one, x), found)
    found = tl.where(y == -0.5, rroot(x), found)
    found = tl.where(y == 3, x * x * x, found)
    found = tl.where(y == -2, divide(one, x * x), found)
    return tl.where(y == 0, 1, found)


@triton.jit
def sign(x):
    """0 for a NaN, and never -0."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def minimum(x, y):
    """A NaN on either side is the result, and of equals the first."""
    return tl.where(y < x, y, tl.where(y != y, y, x))


@triton.jit
def maximum(x, y):
    return tl.where(y > x, y, tl.where(y != y, y, x))


@triton.jit
def lerp(a, b, w):
    """Exact at both ends."""
    near = tl.abs(w) < 0.5
    return tl.where(near, a, b) + tl.where(near, w, w - 1) * (b - a)


@triton.jit
def to_bf16(x):
    """The nearest, of two the one whose last bit is 0. The interpreter's own conversion cuts off."""
    if _DEVICE:
        return x.to(tl.bfloat16)
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        near = tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (near & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def peak(x, axis: tl.constexpr):
    """The largest; a NaN is larger than everything."""
    lost = x != x
    return tl.max(tl.where(lost, float("-inf"), x), axis=axis) + tl.sum(tl.where(lost, x, 0), axis=axis)


@triton.jit(do_not_specialize=["place", "count"])
def finish(parts, first, out, place, count, PEAK: tl.constexpr, WIDTH: tl.constexpr):
    """Puts the partial results of a weight together, in the order of its tiles.

    `parts` has `count` numbers for each tile, of which the one at `place` is meant; `first[w]` is the first tile of a
    weight, and `out` has one number per weight.
    """
    w = tl.program_id(0)
    low = tl.load(first + w)
    high = tl.load(first + w + 1)
    lane = tl.arange(0, WIDTH)
    if PEAK:
        total = tl.full((), float("-inf"), tl.float64)
    else:
        total = tl.full((), 0, tl.float64)
    for start in range(low, high, WIDTH):
        live = start + lane < high
        here = (start + lane).to(tl.int64) * count + place
        if PEAK:
            total = maximum(total, peak(tl.load(parts + here, mask=live, other=float("-inf")), 0))
        else:
            total += tl.sum(tl.load(parts + here, mask=live, other=0.0), axis=0)
    tl.store(out + w, total.to(out.dtype.element_ty))
