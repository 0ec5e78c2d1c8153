"""The language that rules are written in.

Besides ``+ - * / **`` and comparisons, these functions are all a rule may use. Each takes symbols (piste reads the
rule), tensors (you call the rule yourself, in a debugger or a notebook) or plain numbers, and means the same on all
three. A tensor function of your own enters through :func:`opaque`.

Reductions name the axes they *keep*, because that is what survives: ``mean(g, keep=(0,))`` is the mean over everything
but the output channel, for a matrix and a convolution alike. Results keep reduced axes as size 1, so they broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from piste.symbol import ALL, FULL, HOST, Kind, LanguageError, Sym, host_node, nary, reduced, topological

__all__ = [
    "EVALUATE",
    "REDUCTIONS",
    "Value",
    "absolute",
    "cbrt",
    "clamp",
    "debias",
    "exp",
    "lerp",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "opaque",
    "peak",
    "rectifier",
    "rho",
    "rsqrt",
    "scratch",
    "sign",
    "size",
    "softplus",
    "sqrt",
    "square",
    "sum_",
    "tally",
    "total",
    "where",
]

#: a symbol, a tensor or a number: whatever a rule is being called with
Value: TypeAlias = Any


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    plain = isinstance(start, Tensor) and isinstance(end, Tensor) and isinstance(weight, float)
    return torch.lerp(start, end, weight) if plain else start + weight * (end - start)


def _where(condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else (x if condition else y)


def _extreme(elementwise: Callable[..., Tensor], side: str) -> Callable[[Any, Any], Any]:
    def apply(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return elementwise(x, y)
        return x.clamp(**{side: y}) if isinstance(x, Tensor) else y.clamp(**{side: x})

    return apply


#: what each element-wise operation means on tensors (or a tensor and a number): the one definition, used when a rule
#: is called on tensors and by the engines that work tensor by tensor
EVALUATE: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": lambda x, y: x**y,
    "mod": lambda x, y: x % y,
    "floordiv": lambda x, y: x // y,
    "neg": lambda x: -x,
    "abs": torch.abs,
    "sign": torch.sign,
    "square": lambda x: x * x,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "log": torch.log,
    "softplus": torch.nn.functional.softplus,
    "cbrt": lambda x: torch.sign(x) * torch.abs(x) ** (1 / 3),
    "minimum": _extreme(torch.minimum, "max"),
    "maximum": _extreme(torch.maximum, "min"),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "where": _where,
    "lerp": _lerp,
    "scratch": lambda x: x,
    "expand": lambda x, like: torch.zeros_like(like) + x,
}


def _axes(x: Tensor, keep: Sequence[int]) -> list[int]:
    return [axis for axis in range(x.ndim) if axis not in keep]


def _sum_tensor(x: Tensor, keep: Sequence[int]) -> Tensor:
    if not keep:
        return x.sum()
    axes = _axes(x, keep)
    return x.sum(axes, keepdim=True) if axes else x.clone()  # to torch, no axes are all of them


def _peak_tensor(x: Tensor, keep: Sequence[int]) -> Tensor:
    if not keep:
        return x.amax()
    axes = _axes(x, keep)
    return x.amax(axes, keepdim=True) if axes else x.clone()


#: what each reduction means on one tensor; engines add or compare the partial results
REDUCTIONS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {"sum": _sum_tensor, "peak": _peak_tensor}


def _apply(op: str, *values: Value) -> Value:
    if any(isinstance(v, Sym) for v in values):
        return nary(op, *values)
    if any(isinstance(v, Tensor) for v in values):
        return EVALUATE[op](*values)
    return host_node(op, *values).attr


# element by element --------------------------------------------------------------------------------------------------


def sqrt(x: Value) -> Value:
    """The square root."""
    return _apply("sqrt", x)


def rsqrt(x: Value) -> Value:
    """One over the square root."""
    return _apply("rsqrt", x)


def square(x: Value) -> Value:
    """``x * x``."""
    return _apply("square", x)


def cbrt(x: Value) -> Value:
    """The real cube root."""
    return _apply("cbrt", x)


def exp(x: Value) -> Value:
    """The exponential."""
    return _apply("exp", x)


def log(x: Value) -> Value:
    """The natural logarithm."""
    return _apply("log", x)


def absolute(x: Value) -> Value:
    """The absolute value."""
    return _apply("abs", x)


def sign(x: Value) -> Value:
    """-1, 0 or 1."""
    return _apply("sign", x)


def minimum(x: Value, y: Value) -> Value:
    """The smaller of the two."""
    return _apply("minimum", x, y)


def maximum(x: Value, y: Value) -> Value:
    """The larger of the two."""
    return _apply("maximum", x, y)


def clamp(x: Value, low: Value, high: Value) -> Value:
    """``x`` held within ``[low, high]``."""
    return minimum(maximum(x, low), high)


def where(condition: Value, x: Value, y: Value) -> Value:
    """``x`` where the condition holds, else ``y``; the only way to choose by data.

    One of the two has to be a value of the weight: two numbers have no precision to be chosen in
    (``maximum(sign(x), 0.0)`` is 1 where x is positive and 0 elsewhere, in the precision of x).
    """
    if (
        isinstance(condition, Sym)
        and condition.kind != HOST
        and all(not isinstance(v, Sym) or v.kind == HOST for v in (x, y))
    ):
        raise LanguageError(f"where chooses between the numbers {x!r} and {y!r}; one has to be a value of the weight")
    return _apply("where", condition, x, y)


def softplus(x: Value, beta: Value) -> Value:
    """``log(1 + exp(beta * x)) / beta``, a smooth ``max(x, 0)``; x itself where ``beta * x > 20``, as in torch."""
    scaled = beta * x
    return where(scaled > 20, x, _apply("softplus", scaled) * (1 / beta))


def lerp(start: Value, end: Value, weight: Value) -> Value:
    """``start + weight * (end - start)``: an exponential moving average takes ``weight = 1 - beta``."""
    return _apply("lerp", start, end, weight)


# reductions ----------------------------------------------------------------------------------------------------------


def _reduce(op: str, x: Value, keep: Sequence[int]) -> Value:
    if isinstance(x, Tensor):
        return REDUCTIONS[op](x, [axis % x.ndim for axis in keep])
    if not isinstance(x, Sym) or x.kind.level < 2:
        raise LanguageError(f"{op} reduces a weight's values, not {x!r}")
    if any(axis < 0 for axis in keep):
        raise LanguageError(f"keep={tuple(keep)} counts from the end; write ndim - 1 for the last axis")
    return nary(op, x, attr=tuple(sorted(keep)), kind=reduced(keep))


def _waits(x: Sym) -> bool:
    """Does it depend on a reduction over a weight, or on an opaque function?"""
    return any(sym.op in ("sum", "peak", "total", "opaque") for sym in topological([x]))


def _factored(x: Sym, keep: Sequence[int]) -> tuple[Sym, Callable[[Value], Value], bool]:
    """``x`` without what is the same for everything a reduction to ``keep`` combines, how that is put back on the
    result, and whether the reduction would have had to wait for it."""

    def common(factor: Sym) -> bool:
        return factor.kind.level <= 2 and set(factor.kind.keep) <= set(keep)

    if x.op == "square":
        rest, back, early = _factored(x.args[0], keep)
        if rest is not x.args[0]:
            return square(rest), lambda result: back(back(result)), early
    ways = [x.args, x.args[::-1]] if x.op == "mul" else [x.args] if x.op == "div" else []
    for inside, factor in (way for way in ways if way[0].kind == x.kind and common(way[1])):
        rest, back, early = _factored(inside, keep)
        return rest, partial(_with_factor, x.op, back, factor), early or _waits(factor)
    return x, lambda result: result, False


def _with_factor(op: str, back: Callable[[Value], Value], factor: Sym, result: Value) -> Value:
    return nary(op, back(result), factor)


def _gathered(x: Sym, keep: Sequence[int]) -> tuple[Value, bool]:
    """The sum of ``x``, and whether it is ready earlier than ``x`` is."""
    rest, back, early = _factored(x, keep)
    if rest.op == "lerp" and rest.args[2].kind == HOST and all(end.kind == FULL for end in rest.args[:2]):
        (start, before), (end, later) = (_gathered(each, keep) for each in rest.args[:2])
        if before or later:
            return back(lerp(start, end, rest.args[2])), True
    return back(_reduce("sum", rest, keep)), early


def sum_(x: Value, keep: Sequence[int] = ()) -> Value:
    """The sum over all axes but ``keep``.

    In a rule that piste reads, common factors come out of it, so that it does not have to wait for them: the mean of a
    clipped gradient is ready as early as that of the gradient. So do those of the two ends of an average.
    """
    return _gathered(x, keep)[0] if isinstance(x, Sym) and x.kind == FULL else _reduce("sum", x, keep)


def peak(x: Value, keep: Sequence[int] = ()) -> Value:
    """The largest value over all axes but ``keep``."""
    return _reduce("peak", x, keep)


def _count(x: Value, keep: Sequence[int]) -> Value:
    """How many values a reduction of ``x`` to ``keep`` combines into one."""
    if isinstance(x, Tensor):
        return x.numel() / max(1, torch.Size([x.shape[axis] for axis in keep]).numel())
    count: Value = nary("numel", kind=HOST) if x.kind.level > 2 else _extent(x.kind.keep)
    return count / _extent(keep)


def _extent(axes: Sequence[int]) -> Value:
    size: Value = 1.0
    for axis in axes:
        size = nary("shape", attr=axis, kind=HOST) * size
    return size


def size(x: Value) -> Value:
    """How many elements a weight's value has: a host number."""
    return _count(x, ())


def mean(x: Value, keep: Sequence[int] = ()) -> Value:
    """The mean over all axes but ``keep``."""
    return sum_(x, keep) / _count(x, keep)


def norm(x: Value, keep: Sequence[int] = ()) -> Value:
    """The Euclidean norm over all axes but ``keep``."""
    return sqrt(sum_(square(x), keep))


def total(x: Value, name: str) -> Value:
    """The sum of ``x`` over every weight of every group.

    Weights that follow different rules add to the same number when they use the same ``name``. A weight whose rule asks
    for the sum and makes no use of it adds to it all the same. Factors that would have to be waited for come out of a
    weight's share, as from :func:`sum_`.
    """
    if not isinstance(x, Sym):
        raise LanguageError(f"total({name!r}) spans every weight and exists only inside an optimizer's step")
    share, early = _gathered(x, ()) if x.kind == FULL else (x, False)
    return nary("total", share if early else x, attr=name, kind=ALL)


def tally(x: Value, name: str) -> Value:
    """The sum of a host number over every weight of every group that takes the step; as :func:`total` for the rest."""
    if not isinstance(x, Sym) or x.kind != HOST:
        raise LanguageError(f"tally({name!r}) adds host numbers of every weight, inside an optimizer's step; not {x!r}")
    return nary("tally", x, attr=name, kind=ALL)


# structure -----------------------------------------------------------------------------------------------------------


def scratch(x: Value, name: str) -> Value:
    """``x`` itself, kept in a buffer until the step ends.

    A value used on both sides of a reduction is otherwise computed again on the far side, which costs arithmetic but
    no memory. Ask for a buffer only where that is the worse bargain.
    """
    return nary("scratch", x, attr=name, kind=x.kind) if isinstance(x, Sym) else x


def opaque(function: Callable[..., Tensor], *values: Value, kind: Kind = FULL, batched: bool = True) -> Value:
    """A tensor function of your own (an orthogonalisation, an inverse root) as one step of a rule.

    Weights of equal shape are stacked, so ``function`` gets tensors of shape ``(n, *shape)`` and returns the same
    number of results; with ``batched=False`` it gets them one by one. It runs in torch, between two stages.
    """
    if any(isinstance(v, Sym) for v in values):
        return nary("opaque", *values, attr=(function, batched), kind=kind)
    return function(*(v[None] for v in values))[0] if batched else function(*values)


# bias correction and rectification: host numbers of the step ---------------------------------------------------------


def debias(x: Value, beta: Value, t: Value) -> Value:
    """An exponential moving average that began at zero, divided by the weight it has gathered: ``x / (1 - beta^t)``."""
    return x / (1 - beta**t)


def rho(beta2: Value, t: Value) -> Value:
    """Length of the simple moving average that is as noisy as Adam's at step ``t`` (Liu et al. 2019, eq. 4)."""
    rho_inf = 2 / (1 - beta2) - 1
    return rho_inf - 2 * t * beta2**t / (1 - beta2**t)


def rectifier(beta2: Value, t: Value) -> Value:
    """RAdam's factor r for the variance of the adaptive step (Liu et al. 2019, algorithm 2); needs ``rho > 4``."""
    rho_inf, rho_t = 2 / (1 - beta2) - 1, rho(beta2, t)
    return sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))
