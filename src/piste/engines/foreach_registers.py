"""Registers of a stage that is written as Python: which list of tensors holds a value, and what may be overwritten.

The uses of every value are counted, so that a result goes into a buffer whose content has died: a state's own
storage where the new state replaces it, else a temporary.
"""

from __future__ import annotations

from piste.engines.foreach_math import HELPERS
from piste.plan import Stage
from piste.symbol import ALL, HOST, Sym, topological

__all__ = ["Columns", "Registers"]


class Columns:
    """The host numbers that generated code asks for, numbered."""

    def __init__(self) -> None:
        self.roots: list[Sym] = []
        self.index: dict[str, int] = {}

    def text(self, sym: Sym) -> str:
        if sym.op == "const":
            return repr(float(sym.attr))
        key = repr(sym)
        if key not in self.index:
            self.index[key] = len(self.roots)
            self.roots.append(sym)
        return f"h[{self.index[key]}]"


class Registers:
    """The lines of one stage, and where its values are meanwhile."""

    def __init__(self, stage: Stage, columns: Columns, cast: frozenset[str]) -> None:
        self.stage, self.columns, self.cast = stage, columns, cast
        self.lines: list[str] = []
        self.register: dict[Sym, str] = {}
        self.owner: dict[Sym, str] = {}  # register may be overwritten: "temp", or the home it is
        self.homes = sorted({*(h for h in stage.loads.values() if h != "value"), *stage.writes})
        self.inputs = {s: f"v{i}" for i, s in enumerate(s for s, home in stage.loads.items() if home == "value")}
        self.left: dict[Sym, int] = {}
        for sym in stage.compute:
            for arg in sym.args:
                self.left[arg] = self.left.get(arg, 0) + 1
        for sym in stage.results:
            self.left[sym] = self.left.get(sym, 0) + 1
        self.cone = {t: set(topological([s])) for t, s in stage.writes.items()}
        self.temps = 0

    def home(self, name: str) -> str:
        return f"s{self.homes.index(name)}"

    def load(self, sym: Sym, name: str) -> None:
        if name == "value":
            self.register[sym] = self.inputs[sym]
        elif name in self.cast:
            self.assign(sym, f"cast({self.home(name)}, dtype)")
        else:
            self.register[sym] = self.home(name)
            if name in self.stage.writes:
                self.owner[sym] = name

    def store(self, copies: list[tuple[str, str]]) -> None:
        """Move results home. One that lies in another home which is overwritten here is taken out first."""
        moves = [(home, register) for home, register in copies if home != register]
        overwritten = {home for home, _ in moves}
        for i, (home, register) in enumerate(moves):
            if register in overwritten:
                self.lines.append(f"w{i} = clone({register})")
                moves[i] = (home, f"w{i}")
        self.lines += [f"torch._foreach_copy_({home}, {register})" for home, register in moves]

    def value(self, sym: Sym) -> str:
        """The register that holds ``sym``; writes the code to compute it at the first call."""
        if sym not in self.register:
            self.compute(sym)
        return self.register[sym]

    def compute(self, sym: Sym) -> None:
        """Write the code that leaves ``sym`` in a register."""
        raise NotImplementedError

    def text(self, sym: Sym, beside: Sym) -> str:
        """``sym`` as an argument of an operation whose result is ``beside``."""
        if sym.kind == HOST:
            return self.columns.text(sym)
        register = self.value(sym)
        return f"{register} * n" if sym.kind == ALL and beside.kind != ALL else register

    def assign(self, sym: Sym, text: str) -> None:
        self.register[sym] = f"x{self.temps}"
        self.owner[sym] = "temp"
        self.temps += 1
        self.lines.append(f"{self.register[sym]} = {text}")

    def free(self, sym: Sym, result: Sym) -> bool:
        """May the register of ``sym`` be overwritten with ``result``, of which this is the last use?"""
        owner = self.owner.get(sym)
        if self.left[sym] != 1 or sym.kind != result.kind or owner is None:
            return False
        return owner == "temp" or result in self.cone[owner]

    def done(self, edges: list[Sym], result: Sym | None = None) -> None:
        """Note that operands were used, and let go of temporaries that nobody will use again."""
        for sym in edges:
            if sym.kind == HOST:
                continue
            self.left[sym] -= 1
            register = self.register[sym]
            reused = result is not None and self.register.get(result) == register
            if self.left[sym] == 0 and self.owner.get(sym) == "temp" and not reused:
                self.lines.append(f"del {register}")

    def into(self, acc: Sym, result: Sym, name: str, rest: str) -> None:
        """``result = name(acc, rest)``, in place of ``acc`` where that may be overwritten."""
        register = self.value(acc)
        function = name if name in HELPERS else f"torch._foreach_{name}"
        if self.free(acc, result):
            self.lines.append(f"{function}_({register}{rest})")
            self.register[result], self.owner[result] = register, self.owner[acc]
        else:
            self.assign(result, f"{function}({self.text(acc, result)}{rest})")

    def onto(self, result: Sym, name: str, rest: str) -> None:
        """One more operation on a result that has just been computed."""
        self.lines.append(f"torch._foreach_{name}_({self.register[result]}{rest})")
