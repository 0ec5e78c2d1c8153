"""Writes the stages of a plan as Python functions over lists of tensors, for the foreach engine.

Products are gathered into one host factor over numerators and denominators, which lets a sum become a single
``add(alpha)``, ``addcmul`` or ``addcdiv``. Where results go is said by :mod:`piste.engines.foreach_registers`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from piste.engines.foreach_registers import Registers
from piste.symbol import ALL, FULL, HOST, TENSOR, Sym, host_node

__all__ = ["Writer"]

_UNARY = {"sqrt", "rsqrt", "exp", "log", "abs", "sign"} & {n[9:] for n in dir(torch) if n.startswith("_foreach_")}
_PRODUCTS = ("mul", "div", "neg", "square")


class _Product(NamedTuple):
    """``factor * nums / dens``; ``edges`` are the operands that it uses up."""

    factor: Sym
    nums: list[Sym]
    dens: list[Sym]
    edges: list[Sym]


_ONE = host_node("add", 1.0, 0.0)


def _drop(steps: list[tuple[str, Sym]], operand: Sym) -> None:
    """Take out the first step with this operand (symbols compare by identity only: ``==`` makes a symbol)."""
    del steps[next(i for i, (_, arg) in enumerate(steps) if arg is operand)]


class Writer(Registers):
    """Writes one stage as source."""

    def write(self) -> str:
        stage = self.stage
        for sym, name in stage.loads.items():
            self.load(sym, name)
        partials = [self.partial(r) for r in stage.partials]
        kept = [self.keep(sym) for sym in stage.kept]
        copies = [(t, sym, self.value(sym)) for t, sym in stage.writes.items()]
        self.store([(self.home(t), register) for t, _, register in copies])
        inputs = [*(f"s{i}" for i in range(len(self.homes))), *self.inputs.values()]
        head = f"def stage(n, h, dtype, {', '.join(inputs)}):"
        back = f"    return [{', '.join(partials)}], [{', '.join(kept)}]"
        return "\n".join([head, *(f"    {line}" for line in self.lines), back])

    def compute(self, sym: Sym) -> None:
        if sym.op in _PRODUCTS:
            self.product(sym)
        elif sym.op in ("add", "sub"):
            self.sum(sym)
        elif sym.op == "lerp":
            self.lerp(sym)
        elif sym.op == "scratch":
            self.register[sym] = self.value(sym.args[0])
        else:
            self.call(sym)

    # operations ------------------------------------------------------------------------------------------------------
    def absorbed(self, sym: Sym, into: Sym) -> bool:
        """Is ``sym`` a product that need never stand alone?"""
        return sym.op in _PRODUCTS and sym.kind == into.kind and self.left[sym] == 1 and sym not in self.register

    def flatten(self, sym: Sym, *, top: bool) -> _Product:
        if not top:
            return _Product(_ONE, [sym], [], [sym])

        def side(arg: Sym) -> _Product:
            if arg.kind == HOST:
                return _Product(arg, [], [], [])
            return self.flatten(arg, top=self.absorbed(arg, sym))

        left = side(sym.args[0])
        if sym.op == "neg":
            return left._replace(factor=host_node("neg", left.factor))
        if sym.op == "square":
            base = sym.args[0]
            return _Product(_ONE, [base, base], [], [base])
        right = sym.args[1]
        if sym.op == "mul":
            other = side(right)
            factor = host_node("mul", left.factor, other.factor)
            return _Product(factor, left.nums + other.nums, left.dens + other.dens, left.edges + other.edges)
        if right.kind == HOST:
            return left._replace(factor=host_node("div", left.factor, right))
        return _Product(left.factor, left.nums, [*left.dens, right], [*left.edges, right])

    def product(self, sym: Sym) -> None:
        parts = self.flatten(sym, top=True)
        for arg in (*parts.nums, *parts.dens):
            self.value(arg)
        steps = [("mul", a) for a in parts.nums] + [("div", a) for a in parts.dens]
        if parts.factor.op != "const" or parts.factor.attr != 1 or not parts.nums:
            steps.append(("mul", parts.factor))
        if parts.nums:
            whole = [a for a in parts.nums if a.kind == sym.kind] or parts.nums
            first = next((a for a in whole if self.free(a, sym)), whole[0])
            _drop(steps, first)
            steps.sort(key=lambda step: step[1] is not first)  # its square comes before its register changes
            name, arg = steps.pop(0) if steps else ("mul", _ONE)
            self.into(first, sym, name, f", {self.text(arg, sym)}")
        else:  # a host number over tensors
            _drop(steps, parts.dens[0])
            self.into(parts.dens[0], sym, "reciprocal", "")
        for name, arg in steps:
            self.onto(sym, name, f", {self.text(arg, sym)}")
        self.done(parts.edges, sym)

    def sum(self, sym: Sym) -> None:
        x, y = sym.args
        if HOST in (x.kind, y.kind):
            self.shift(sym, x, y)
            return
        sign = 1.0 if sym.op == "add" else -1.0
        if sym.op == "add" and (x.kind != sym.kind or (not self.promising(x, sym) and self.promising(y, sym))):
            x, y = y, x
        term = self.flatten(y, top=self.absorbed(y, sym))
        shape = (len(term.nums), len(term.dens))
        if shape not in ((1, 0), (2, 0), (1, 1)):
            term, shape = _Product(_ONE, [y], [], [y]), (1, 0)
        args = [*term.nums, *term.dens]
        for arg in args:
            self.value(arg)
        self.value(x)
        name = {(1, 0): "add_scaled", (2, 0): "addcmul", (1, 1): "addcdiv"}[shape]
        operands = ", ".join(self.text(a, sym) for a in args)
        factor = self.columns.text(host_node("mul", sign, term.factor))
        self.into(x, sym, name, f", {operands}, {factor}")
        self.done([x, *term.edges], sym)

    def promising(self, sym: Sym, result: Sym) -> bool:
        """Will the register of ``sym`` be free to take ``result``?"""
        if sym in self.register:
            return self.free(sym, result)
        return sym.kind == result.kind and self.left[sym] == 1

    def shift(self, sym: Sym, x: Sym, y: Sym) -> None:
        """A tensor plus or minus a host number, or the reverse."""
        if y.kind == HOST:
            self.value(x)
            offset = y if sym.op == "add" else host_node("neg", y)
            self.into(x, sym, "add", f", {self.columns.text(offset)}")
            self.done([x], sym)
            return
        self.value(y)
        if sym.op == "add":
            self.into(y, sym, "add", f", {self.columns.text(x)}")
        else:
            self.into(y, sym, "mul", ", -1.0")
            self.onto(sym, "add", f", {self.columns.text(x)}")
        self.done([y], sym)

    def lerp(self, sym: Sym) -> None:
        start, end, weight = sym.args
        if any(a.kind == HOST for a in (start, end)) or start.kind != sym.kind:
            self.call(sym)
            return
        if weight.kind == HOST and self.absorbed(end, sym):
            term = self.flatten(end, top=True)
            if (len(term.nums), len(term.dens)) == (2, 0):
                for arg in (*term.nums, start):
                    self.value(arg)
                self.into(start, sym, "mul", f", {self.columns.text(host_node('sub', 1.0, weight))}")
                factor = self.columns.text(host_node("mul", weight, term.factor))
                self.onto(sym, "addcmul", f", {', '.join(self.text(a, sym) for a in term.nums)}, {factor}")
                self.done([start, *term.edges], sym)
                return
        self.value(end)
        self.value(start)
        self.into(start, sym, "lerp", f", {self.text(end, sym)}, {self.text(weight, sym)}")
        self.done(list(sym.args), sym)

    def call(self, sym: Sym) -> None:
        for arg in sym.args:
            self.text(arg, sym)
        first = sym.args[0]
        if sym.op in _UNARY:
            self.into(first, sym, sym.op, "")
        elif sym.op == "pow" and sym.args[1].kind == HOST and first.kind != HOST:
            self.into(first, sym, "pow", f", {self.text(sym.args[1], sym)}")
        elif sym.op in ("minimum", "maximum") and all(a.kind == sym.kind for a in sym.args):
            self.into(first, sym, sym.op, f", {self.text(sym.args[1], sym)}")
        else:
            count = 1 if sym.kind == ALL else "n"
            self.assign(sym, f"each({sym.op!r}, {count}, {', '.join(self.text(a, sym) for a in sym.args)})")
        self.done(list(sym.args), sym)

    # results ---------------------------------------------------------------------------------------------------------
    def partial(self, reduction: Sym) -> str:
        """Reduce weight by weight; a sum of squares needs no buffer for the squares."""
        value = reduction.args[0]
        whole = reduction.op == "total" or (reduction.op == "sum" and reduction.kind == TENSOR)
        if (
            whole
            and value.op == "square"
            and value.kind == FULL
            and self.left[value] == 1
            and value not in self.register
        ):
            base = value.args[0]
            text, edges = f"sum_of_squares({self.value(base)})", [base]
        else:
            op, keep = ("sum", ()) if reduction.op == "total" else (reduction.op, reduction.attr)
            text, edges = f"reduce({op!r}, {keep}, {self.value(value)})", [value]
        name = f"x{self.temps}"
        self.temps += 1
        self.lines.append(f"{name} = {f'total({text})' if reduction.op == 'total' else text}")
        self.done(edges)
        return name

    def keep(self, sym: Sym) -> str:
        register = self.value(sym)
        name = f"x{self.temps}"
        self.temps += 1
        self.lines.append(f"{name} = clone({register})")
        return name
