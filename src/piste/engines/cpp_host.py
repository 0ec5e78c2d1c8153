"""Writes the host numbers of a plan as a C++ function: a kernel works them out for each weight, in double."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piste.engines.cpp_statements import ELEMENT, literal
from piste.engines.kernel import COMPARISONS, host_roots
from piste.plan import Plan
from piste.symbol import Sym, topological

__all__ = ["host_function", "hyper_names"]

_HOST = {
    **{op: text for op, text in ELEMENT.items() if op in ("add", "sub", "mul", "div", "neg", "square", "where")},
    **{op: f"double{ELEMENT[op]}" for op in COMPARISONS},
    "pow": "__builtin_pow({}, {})",
    "mod": "modulo({}, {})",
    "floordiv": "__builtin_floor({} / {})",
    "abs": "__builtin_fabs({})",
    "sqrt": "__builtin_sqrt({})",
    "rsqrt": "(1 / __builtin_sqrt({}))",
    "exp": "__builtin_exp({})",
    "log": "__builtin_log({})",
    "minimum": "({1} < {0} ? {1} : {0})",
    "maximum": "({1} > {0} ? {1} : {0})",
    "lerp": "({0} + {2} * ({1} - {0}))",
}


def hyper_names(plan: Plan) -> list[str]:
    """The hyper-parameters that the host numbers of a plan depend on, in the order in which kernels take them."""
    return sorted({s.attr for s in topological(host_roots(plan)) if s.op == "hp"})


def host_function(roots: Sequence[Sym], hyper: Sequence[str]) -> list[str]:
    """Host numbers of one weight, in double as Python would work them out."""
    names: dict[Sym, str] = {}
    lines = ["static void numbers(const double* hp, double t, const int64_t* shape, int64_t n, int axes, R* h) {"]
    for sym in topological(roots):
        names[sym] = f"x{len(names)}"
        lines.append(f"  const double {names[sym]} = {_host_text(sym, names, hyper)};")
    lines += [f"  h[{i}] = (R){names[root]};" for i, root in enumerate(roots)]
    return [*lines, "}"]


def _host_text(sym: Sym, names: Mapping[Sym, str], hyper: Sequence[str]) -> str:
    if sym.op == "const":
        return literal(sym.attr)
    if sym.op == "hp":
        return f"hp[{hyper.index(sym.attr)}]"
    if sym.op == "t":
        return "t"
    if sym.op == "shape":
        return f"double(shape[{sym.attr} * n])"
    if sym.op == "numel":
        return "product(shape, n, axes)"
    return _HOST[sym.op].format(*(names[a] for a in sym.args))
