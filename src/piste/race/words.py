"""Numbers and names as a reader wants them: few digits, a unit, a dash for the unknown. For terminal and report."""

from __future__ import annotations

import html
import math
import re
import statistics
from typing import Final

UNKNOWN: Final = "\N{EN DASH}"
MINUS: Final = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits; no exponent where plain notation stays short."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # 0.9999 is to be 1.00
    exponent = math.floor(math.log10(abs(rounded)))
    text = f"{value:.{max(0, digits - 1 - exponent)}f}" if -5 < exponent < 6 else f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def short(value: float | None, digits: int = 3) -> str:
    """As ``number``, without the zeros that only fill up the digits."""
    text = number(value, digits)
    mantissa, mark, exponent = text.partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + mark + exponent


def fixed(value: float, places: int, *, signed: bool = False) -> str:
    """``value`` with ``places`` digits after the point, ``+`` in front of positive ones if ``signed``."""
    if not math.isfinite(value):
        return number(value)
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def places_for(values: list[float]) -> int:
    """Digits after the point that show two digits of the typical (median) distance among ``values``.

    One number of places for a whole column keeps the points under each other.
    """
    widths = [abs(value) for value in values if math.isfinite(value) and value != 0]
    if not widths:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(statistics.median(widths)))))


def interval(low: float, high: float, places: int, *, signed: bool = False) -> str:
    """``[low, high]``, or nothing where there is no interval."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{fixed(low, places, signed=signed)}, {fixed(high, places, signed=signed)}]"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if not math.isfinite(seconds):
        return number(seconds)
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if abs(seconds) * factor < 999.5:
            return f"{number(seconds * factor)} {unit}"
    if seconds < 119.5:
        return f"{number(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 7_170 else f"{number(seconds / 3600)} h"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    if not math.isfinite(count):
        return number(count)
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def percent(fraction: float, *, signed: bool = False) -> str:
    """A fraction in per cent, whole unless it is small."""
    if not math.isfinite(fraction):
        return number(fraction)
    value = 100 * fraction
    places = 0 if abs(value) >= 2.95 or value == 0 else 1
    return f"{fixed(value, places, signed=signed)} %"


def count(amount: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def moment(iso: str) -> str:
    """``2026-11-23T10:05:00Z`` as ``2026-11-23 10:05 UTC``; any other text as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?(Z|\+00:00)", iso)
    return f"{found[1]} {found[2]} UTC" if found else iso


def listing(names: list[str], longest: int = 3) -> str:
    """``a``, ``a and b``, ``a, b and c``, ``a, b, c and 4 more``: at most ``longest`` by name."""
    if len(names) > longest:
        names = [*names[:longest], f"{len(names) - longest} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def no_result(*, is_open: bool) -> str:
    """Of a contender without a score: whether it may still come."""
    return "not yet" if is_open else "no result"


def single_line(text: str) -> str:
    """``text`` without line breaks and other control characters, which no label can show."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def label(text: str, longest: int = 40) -> str:
    """``text`` as a picture may show it: one line, cut where too long, and inert.

    plotly reads a subset of HTML in every text it draws and turns entities back into characters, so
    escaping is what makes a name appear as it is written.
    """
    line = single_line(text)
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return html.escape(line, quote=False)
