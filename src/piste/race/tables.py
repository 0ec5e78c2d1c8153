"""Tables that never cut a number: what a terminal has no room for is left out as a whole column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["fitting"]


def fitting(
    console: Console, columns: Sequence[str], least_needed: Sequence[str], make: Callable[[Sequence[str]], Table]
) -> tuple[Table, list[str]]:
    """The widest table that a console has room for, and the columns that it is without.

    Args:
        console: where it is to be shown.
        columns: that it has where there is room.
        least_needed: those that may be left out, in this order.
        make: the table with so many columns.
    """
    boundless = console.options.update_width(10_000)
    kept, left_out = list(columns), []
    table = make(kept)
    for name in least_needed:
        if console.measure(table, options=boundless).maximum <= console.width:
            break
        if name in kept:
            kept.remove(name)
            left_out.append(name)
            table = make(kept)
    return table, left_out
