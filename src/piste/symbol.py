"""Symbols: what a rule is written on when piste reads it instead of running it.

A rule is plain Python over numbers and tensors. Called once with symbols in their place it leaves a graph of what it
computes, from which every engine is fed. Each symbol has a *kind*, which says how far its value reaches:

===============  ======================================================================================
``HOST``         a number per weight and step, computed on the host: lr, betas, bias corrections, sizes
``ALL``          one number over every weight of every group: a global norm
``reduced(())``  one number per weight, on the device: a norm of one tensor (``TENSOR`` for short)
``reduced(k)``   what is left of a weight when only the axes ``k`` are kept: rows, columns, channels
``FULL``         as large as the weight
``MATRIX``       a shape of its own, made and used by opaque matrix functions
===============  ======================================================================================

Host numbers may steer Python's ``if``: the branch taken is recorded as a guard, so a rule that says ``if rho > 5`` as
its paper does has one graph for each outcome, found again by evaluating the guards (:mod:`piste.variants`). Data may
not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, NoReturn

__all__ = [
    "ALL",
    "COMMON_TEXT",
    "FULL",
    "HOST",
    "MATRIX",
    "TENSOR",
    "HostFunction",
    "Kind",
    "LanguageError",
    "Row",
    "Sym",
    "Trace",
    "compile_host",
    "host_node",
    "host_operation",
    "reduced",
    "topological",
    "traces_made",
]


class LanguageError(TypeError):
    """A rule used something that has no meaning in the language of rules."""


@dataclass(frozen=True)
class Kind:
    """How far a value reaches; see the table at the head of this module."""

    level: int
    keep: tuple[int, ...] = ()

    def __str__(self) -> str:
        names = {0: "host", 1: "all", 3: "full", 4: "matrix"}
        return names.get(self.level) or f"reduced{self.keep}"


HOST, ALL, FULL, MATRIX = Kind(0), Kind(1), Kind(3), Kind(4)


def reduced(keep: Iterable[int] = ()) -> Kind:
    """The kind of a value of which only the axes ``keep`` (non-negative) are left."""
    return Kind(2, tuple(sorted(keep)))


TENSOR = reduced()


def _join(kinds: Iterable[Kind], op: str) -> Kind:
    """The kind of an element-wise result: the larger reach; kept axes unite."""
    result = HOST
    for kind in kinds:
        if MATRIX in (kind, result) and {kind.level, result.level} & {2, 3}:
            raise LanguageError(f"{_where()}: {op} mixes a matrix with a value of the weight's shape")
        if kind.level == result.level == 2:
            result = reduced(set(kind.keep) | set(result.keep))
        elif kind.level > result.level:
            result = kind
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The trace in progress, for error messages and for the interning of nodes

_CURRENT: ContextVar[Trace | None] = ContextVar("piste_trace", default=None)
_TRACES = 0


def traces_made() -> int:
    """How many graphs have been traced in this process; it stands still once training is under way."""
    return _TRACES


def _where() -> str:
    trace = _CURRENT.get()
    return f"rule {trace.rule!r}" if trace is not None and trace.rule else "a rule"


class Row(NamedTuple):
    """The host's view of a weight at one step: hyper-parameters, own step number, global shape."""

    hp: Mapping[str, float]
    t: int
    shape: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def at(self, shape: tuple[int, ...]) -> Row:
        """The same numbers for a weight of this shape."""
        return Row(self.hp, self.t, shape)


@dataclass
class Trace:
    """One reading of a rule, for the concrete host numbers of ``row``."""

    row: Row
    rule: str = ""
    nodes: dict[tuple[Any, ...], Sym] = field(default_factory=dict)
    path: list[tuple[Sym, bool]] = field(default_factory=list)
    decided: dict[Sym, bool] = field(default_factory=dict)

    def __enter__(self) -> Trace:
        global _TRACES
        _TRACES += 1
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._token)

    def node(self, op: str, args: tuple[Sym, ...] = (), attr: Any = None, kind: Kind | None = None) -> Sym:
        """The node for this operation; the same operation on the same arguments is the same node."""
        if kind is None:
            kind = _join((a.kind for a in args), op)
            if kind == ALL and any(a.kind == HOST and a.op != "const" for a in args):
                kind = TENSOR  # host numbers may differ from weight to weight
        key = (op, tuple(map(id, args)), repr(attr) if op == "const" else attr, kind)
        found = self.nodes.get(key)
        if found is None:
            found = self.nodes[key] = Sym(op, args, attr, kind)
        return found

    def guard(self, sym: Sym) -> bool:
        """Take the branch that the concrete numbers take, and remember that it was taken."""
        if sym.op == "const":
            return bool(sym.attr)
        known = self.decided.get(sym)
        if known is None:
            known = bool(compile_host([sym])(self.row)[0])
            self.decided[sym] = known
            self.path.append((sym, known))
        return known


# ---------------------------------------------------------------------------------------------------------------------
# Symbols

#: operations whose text is the same in Python, C++ and Triton, of host numbers as of elements
COMMON_TEXT = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "neg": "(-{})",
    "square": "({0} * {0})",
    "lt": "({} < {})",
    "le": "({} <= {})",
    "gt": "({} > {})",
    "ge": "({} >= {})",
    "eq": "({} == {})",
    "ne": "({} != {})",
}

#: host operation -> its Python text; the keys are the operations that exist for host numbers
_HOST_TEXT = COMMON_TEXT | {
    "div": "({} / {})",
    "pow": "({} ** {})",
    "mod": "({} % {})",
    "floordiv": "({} // {})",
    "abs": "abs({})",
    "sqrt": "sqrt({})",
    "rsqrt": "(1.0 / sqrt({}))",
    "exp": "exp({})",
    "log": "log({})",
    "minimum": "min({}, {})",
    "maximum": "max({}, {})",
    "where": "({1} if {0} else {2})",
    "lerp": "({0} + {2} * ({1} - {0}))",
}


class Sym:
    """A value that a rule will compute. Arithmetic on symbols makes symbols; nothing else is possible with them."""

    __slots__ = ("__weakref__", "args", "attr", "kind", "op")

    def __init__(self, op: str, args: tuple[Sym, ...], attr: Any, kind: Kind) -> None:
        self.op, self.args, self.attr, self.kind = op, args, attr, kind

    def __repr__(self) -> str:
        inside = ", ".join([*map(repr, self.args), *([] if self.attr is None else [str(self.attr)])])
        return f"{self.op}({inside})" if inside else self.op

    # arithmetic ------------------------------------------------------------------------------------------------------
    def __add__(self, other: Any) -> Sym:
        return binary("add", self, other)

    def __radd__(self, other: Any) -> Sym:
        return binary("add", other, self)

    def __sub__(self, other: Any) -> Sym:
        return binary("sub", self, other)

    def __rsub__(self, other: Any) -> Sym:
        return binary("sub", other, self)

    def __mul__(self, other: Any) -> Sym:
        return binary("mul", self, other)

    def __rmul__(self, other: Any) -> Sym:
        return binary("mul", other, self)

    def __truediv__(self, other: Any) -> Sym:
        return binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Sym:
        return binary("div", other, self)

    def __pow__(self, other: Any) -> Sym:
        return binary("pow", self, other)

    def __rpow__(self, other: Any) -> Sym:
        return binary("pow", other, self)

    def __mod__(self, other: Any) -> Sym:
        return binary("mod", self, other)

    def __floordiv__(self, other: Any) -> Sym:
        return binary("floordiv", self, other)

    def __neg__(self) -> Sym:
        return unary("neg", self)

    def __abs__(self) -> Sym:
        return unary("abs", self)

    def __lt__(self, other: Any) -> Sym:
        return binary("lt", self, other)

    def __le__(self, other: Any) -> Sym:
        return binary("le", self, other)

    def __gt__(self, other: Any) -> Sym:
        return binary("gt", self, other)

    def __ge__(self, other: Any) -> Sym:
        return binary("ge", self, other)

    def __eq__(self, other: Any) -> Sym:  # type: ignore[override]
        return binary("eq", self, other)

    def __ne__(self, other: Any) -> Sym:  # type: ignore[override]
        return binary("ne", self, other)

    __hash__ = object.__hash__

    # leaving the language --------------------------------------------------------------------------------------------
    def __bool__(self) -> bool:
        trace = _CURRENT.get()
        if self.kind != HOST or trace is None:
            raise LanguageError(f"{_where()} branches on data ({self!r}); choose element by element with ops.where")
        return trace.guard(self)

    def __index__(self) -> int:
        """A whole host number as a Python int (a loop count); another value selects another plan."""
        trace = _CURRENT.get()
        if self.kind != HOST or trace is None:
            raise LanguageError(f"{_where()} uses data ({self!r}) as a whole number")
        value = compile_host([self])(trace.row)[0]
        if value != int(value):
            raise LanguageError(f"{_where()} uses {self!r} = {value} as a whole number")
        trace.guard(binary("eq", self, int(value)))
        return int(value)

    __int__ = __index__

    def __float__(self) -> NoReturn:
        raise LanguageError(
            f"{_where()} turns {self!r} into a Python float, which would freeze it in the plan; "
            "use the functions of piste.ops in place of those of math"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LanguageError(
            f"{_where()} uses .{name}, which is not in the language of rules; "
            "see piste.ops for what is, and ops.opaque for a torch function of your own"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(func, "__name__", str(func))
        raise LanguageError(
            f"{_where()} calls torch.{name}, which is not in the language of rules; "
            "see piste.ops for what is, and ops.opaque for a torch function of your own"
        )


def host_node(op: str, *args: Sym | float) -> Sym:
    """A host operation outside any trace (engines rewrite formulas with it), with constants folded."""
    syms = tuple(a if isinstance(a, Sym) else Sym("const", (), float(a), HOST) for a in args)
    folded = _folded(op, syms)
    return Sym(op, syms, None, HOST) if folded is None else folded


@cache
def host_operation(op: str) -> Callable[..., float]:
    """What an operation means on Python's numbers."""
    slots = [f"x{i}" for i in range(3)]
    text = _HOST_TEXT[op].format(*slots)
    space: dict[str, Any] = dict(HOST_SPACE)
    exec(f"def operation({', '.join(f'{x}=None' for x in slots)}): return {text}", space)
    function: Callable[..., float] = space["operation"]
    return function


def _lift(value: Any) -> Sym:
    if isinstance(value, Sym):
        return value
    trace = _CURRENT.get()
    if isinstance(value, (bool, int, float)) and trace is not None:
        return trace.node("const", attr=value, kind=HOST)
    raise LanguageError(f"{_where()} mixes symbols with {type(value).__name__} {value!r}")


def _is_const(sym: Sym, value: float) -> bool:
    return sym.op == "const" and sym.attr == value


def _folded(op: str, args: tuple[Sym, ...]) -> Sym | None:
    """The operation worked out, where it needs no numbers that only a step will bring."""
    if all(a.op == "const" for a in args) and op in _HOST_TEXT:
        value = compile_host([Sym(op, args, None, HOST)])(Row({}, 0))[0]
        return Sym("const", (), value, HOST)
    if op in ("mul", "div") and _is_const(args[1], 1):
        return args[0]
    if op == "mul" and _is_const(args[0], 1):
        return args[1]
    if op == "mul" and all(a.kind == HOST for a in args) and any(_is_const(a, 0) for a in args):
        return Sym("const", (), 0.0, HOST)
    if op in ("add", "sub") and _is_const(args[1], 0):
        return args[0]
    if op == "add" and _is_const(args[0], 0):
        return args[1]
    return None


def unary(op: str, x: Sym) -> Sym:
    """Apply a one-argument operation of the language."""
    return nary(op, x)


def binary(op: str, x: Any, y: Any) -> Sym:
    """Apply a two-argument operation of the language; numbers become constants."""
    return nary(op, x, y)


def nary(op: str, *values: Any, attr: Any = None, kind: Kind | None = None) -> Sym:
    """Apply an operation of the language inside the current trace."""
    trace = _CURRENT.get()
    if trace is None:
        raise LanguageError(f"{op} on symbols outside a trace")
    args = tuple(map(_lift, values))
    if all(a.kind == HOST for a in args) and op not in _HOST_TEXT and kind is None:
        raise LanguageError(f"{_where()} applies {op} to host numbers, for which it does not exist")
    folded = _folded(op, args) if kind is None else None
    if folded is not None:
        return trace.node(folded.op, folded.args, folded.attr, folded.kind)
    return trace.node(op, args, attr, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Host numbers: one small Python function for all that a plan needs in a step

HostFunction = Callable[[Row], tuple[float, ...]]
HOST_SPACE = {"sqrt": math.sqrt, "exp": math.exp, "log": math.log}


def topological(roots: Iterable[Sym]) -> list[Sym]:
    """Every node below ``roots``, arguments before their users."""
    order: dict[Sym, None] = {}
    stack = [(r, False) for r in reversed(list(roots))]
    while stack:
        sym, ready = stack.pop()
        if sym in order:
            continue
        if ready:
            order[sym] = None
        else:
            stack.append((sym, True))
            stack.extend((a, False) for a in reversed(sym.args))
    return list(order)


def host_text(sym: Sym, names: Mapping[Sym, str]) -> str:
    if sym.op == "const":
        return f"float({str(sym.attr)!r})" if not math.isfinite(sym.attr) else repr(sym.attr)
    if sym.op == "hp":
        return f"hp[{sym.attr!r}]"
    if sym.op == "t":
        return "row.t"
    if sym.op == "shape":
        return f"row.shape[{sym.attr}]"
    if sym.op == "numel":
        return "row.numel"
    return _HOST_TEXT[sym.op].format(*(names[a] for a in sym.args))


def compile_host(roots: Sequence[Sym]) -> HostFunction:
    """A function of a :class:`Row` that gives the values of the host symbols ``roots``, in order."""
    names: dict[Sym, str] = {}
    lines = ["def host(row):", "    hp = row.hp"]
    for sym in topological(roots):
        names[sym] = f"x{len(names)}"
        lines.append(f"    {names[sym]} = {host_text(sym, names)}")
    lines.append(f"    return ({''.join(names[r] + ', ' for r in roots)})")
    space: dict[str, Any] = dict(HOST_SPACE)
    exec(compile("\n".join(lines), "<piste host numbers>", "exec"), space)
    function: HostFunction = space["host"]
    return function
