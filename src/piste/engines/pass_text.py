"""What writers of a pass know whatever their language: which column is where, and what all languages write alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piste.codecs import Codec
from piste.engines.kernel import Column, Pass, all_columns, coded, is_divided, single, spread
from piste.symbol import COMMON_TEXT, Sym

__all__ = ["OPERATIONS", "PHASE", "ROW", "PassWriter"]

#: what a pass over codes has besides its tensors: the length of rows, and where the thresholds of rounding begin
ROW, PHASE = Column("row", ""), Column("phase", "")

#: operations of elements that C++ and Triton have the same text for
OPERATIONS = COMMON_TEXT | {"scratch": "{}", "expand": "{0}"}


class PassWriter:
    """One pass.

    Args:
        one: the pass.
        numbers: the host numbers of the plan, in the order in which kernels have them.
        inverses: which of them stands for dividing by another.
        codecs: by home, where numbers are stored as codes.
    """

    #: columns of the table before those of the pass
    fixed_columns: int

    def __init__(
        self, one: Pass, numbers: Sequence[Sym], inverses: Mapping[Sym, Sym], codecs: Mapping[str, Codec]
    ) -> None:
        self.one, self.inverses = one, inverses
        self.numbers = {sym: i for i, sym in enumerate(numbers)}
        self.columns = all_columns(one, codecs)
        self.codecs = coded(one, codecs)
        self.single, self.spread = single(one), spread(one)

    @property
    def geometry(self) -> int:
        """The first column after those of the pass: sizes and strides of axes."""
        return self.fixed_columns + len(self.columns)

    def place(self, column: Column) -> int:
        """Which column of the table has this argument. Symbols compare by identity only: ``==`` makes a symbol."""
        return self.fixed_columns + next(
            i
            for i, (source, key) in enumerate(self.columns)
            if source == column.source
            and (key is column.key or (isinstance(key, str) and isinstance(column.key, str) and key == column.key))
        )

    def operation(self, sym: Sym) -> tuple[str, tuple[Sym, ...]]:
        """What is worked out for a symbol, and of what: a product where it is divided by a host number."""
        if is_divided(sym):
            return "mul", (sym.args[0], self.inverses[sym.args[1]])
        return sym.op, sym.args
