"""Writes codecs as C++: two functions for each, that decode and encode a stretch of numbers.

The formulas are those of :mod:`piste.codecs`, as :mod:`piste.engines.lane_text` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from piste.codecs import GOLDEN, STRIDE, Codec
from piste.engines.lane_text import INTEGERS, MEASURE_START, Syntax, TextLanes

__all__ = ["TILE", "code_offset", "cpp_types", "definitions", "phase", "rest_offset"]

#: numbers that are decoded at a time, a multiple of every block; a few such buffers stay in the fastest cache
TILE = 1024

_SYNTAX = Syntax(
    declare="const {kind} {name} = {text};",
    kinds={"real": "float", "whole": "int32_t", "truth": "bool"},
    real="{!r}f",
    quotient="{} / {}",
    ratio="{} / {}",
    left="(int32_t)((uint32_t){} << {})",
    bits="bits_as<int32_t>({})",
    pattern="bits_as<float>({})",
    number="(float){}",
    truncated="(int32_t){}",
    where="{} ? {} : {}",
)
_LANES = TextLanes(_SYNTAX)
_BETTER = {"max": ">", "min": "<"}


def cpp_types(codec: Codec) -> tuple[str, str]:
    """The integers that codes and their second tensor are read as."""
    return f"{INTEGERS[codec.codes]}_t", "void" if codec.rest is None else f"{INTEGERS[codec.rest]}_t"


def phase(where: str, step: str) -> str:
    """Where the thresholds of a weight stand in a step."""
    return f"(uint32_t){where} + (uint32_t){step} * {GOLDEN}u"


def definitions(codecs: Sequence[Codec]) -> list[str]:
    """``decode_NAME`` and ``encode_NAME`` of each codec.

    Both begin at a block. ``i`` elements on from there, ``first + i`` elements of the weight have gone before.
    """
    strides = ", ".join(str(i * STRIDE & 0xFFFF) for i in range(TILE))
    table = [f"const int64_t TILE = {TILE};", f"static const int32_t STRIDES[TILE] = {{{strides}}};"]
    return [*table, *(line for codec in codecs for line in (*_decode(codec), *_encode(codec)))]


def _arguments(codec: Codec, *, written: bool) -> str:
    codes, rest = cpp_types(codec)
    constant = "" if written else "const "
    return f"{constant}{codes}* __restrict c, {constant}{rest}* __restrict s"


def _loops(codec: Codec) -> list[tuple[str, str, str, str, str]]:
    """The loops over ``n`` numbers from ``b`` on: count, place from there, place of the code, reading, joining."""
    if codec.packed:
        return [
            ("half", "i", "b / 2 + i", "c[b / 2 + i] & 15", "= {}"),
            ("n - half", "half + i", "b / 2 + i", "c[b / 2 + i] >> 4", "|= {} << 4"),
        ]
    return [("n", "i", "b + i", "c[b + i]", "= {}")]


def _frame(codec: Codec, inside: list[str]) -> list[str]:
    """Work on whole blocks, whose loops have a known length, and on what is left."""
    block = codec.block or TILE
    half = ["const int half = (n + 1) / 2;"] if codec.packed else []
    return [
        "  const auto work = [&](int64_t b, const int n) INLINE_LAMBDA {",
        *(f"    {line}" for line in (*half, *inside)),
        "  };",
        "  int64_t b = 0;",
        f"  for (; b + {block} <= length; b += {block}) work(b, {block});",
        "  if (b < length) work(b, (int)(length - b));",
        "}",
    ]


def _simd(count: str, lines: list[str], clause: str = "") -> list[str]:
    return [
        f"#pragma omp simd{clause}",
        f"for (int i = 0; i < {count}; ++i) {{",
        *(f"  {line}" for line in lines),
        "}",
    ]


def code_offset(codec: Codec) -> str:
    """How far the code of element ``base`` of a weight is from its first code."""
    if not codec.packed:
        return "base"
    return f"line * {_SYNTAX.codes_of_row(codec)} + column / 2"


def rest_offset(codec: Codec) -> str:
    """How far the words of the block that begins at element ``base`` are from the first, or its own number."""
    return _SYNTAX.words_before(codec, "column") if codec.block else "base"


def _words(codec: Codec) -> list[str]:
    """Where the words of a block are."""
    return [f"s[b / {codec.block} * {codec.count} + {k}]" for k in range(codec.count)] if codec.block else []


def _decode(codec: Codec) -> list[str]:
    inside = [f"const int32_t word{k} = {word};" for k, word in enumerate(_words(codec))]
    for count, place, _, read, _ in _loops(codec):
        lines = [f"const int32_t code = {read};"]
        rest = [_LANES.lane(f"word{k}", lines) for k in range(len(_words(codec)))]
        if not codec.block and codec.rest is not None:
            lines.append("const int32_t own = s[i];")
            rest = [_LANES.lane("own", lines)]
        value = codec.decode(_LANES, _LANES.lane("code", lines), rest)
        lines.append(f"x[b + {place}] = {value.text};")
        inside += _simd(count, lines)
    arguments = _arguments(codec, written=False)
    head = f"static void decode_{codec.name}({arguments}, float* __restrict x, int64_t length) {{"
    return [head, *_frame(codec, inside)]


def _encode(codec: Codec) -> list[str]:
    inside = _measured(codec) if codec.block else []
    inside.append(f"const int32_t start = ((uint32_t)(first + b) * {STRIDE}u + phase) & 0xffff;")
    for count, place, target, _, join in _loops(codec):
        lines = [
            f"const float v = x[b + {place}];",
            f"const int32_t threshold = (STRIDES[{place}] + start) & 0xffff;",
        ]
        words = [_LANES.lane(f"word{k}", lines) for k in range(len(_words(codec)))]
        threshold = _LANES.lane("threshold", lines)
        code, *own = codec.encode(_LANES, _LANES.lane("v", lines, real=True), words, threshold)
        lines.append(f"c[{target}] {join.format(f'({cpp_types(codec)[0]})({code.text}')});")
        if own:
            lines.append(f"s[i] = ({cpp_types(codec)[1]}){own[0].text};")
        inside += _simd(count, lines)
    arguments = _arguments(codec, written=True)
    head = f"static void encode_{codec.name}({arguments}, const float* __restrict x, int64_t first, int64_t length, "
    return [head, "    uint32_t phase) {", *_frame(codec, inside)]


def _measured(codec: Codec) -> list[str]:
    """The word of a block."""
    lines = ["const float v = x[b + i];"]
    lanes = codec.measure(_LANES, _LANES.lane("v", lines, real=True))
    for i, (lane, how) in enumerate(zip(lanes, codec.measures, strict=True)):
        lines.append(f"m{i} = {lane.text} {_BETTER[how]} m{i} ? {lane.text} : m{i};")
    starts = [f"int32_t m{i} = {MEASURE_START[how]};" for i, how in enumerate(codec.measures)]
    clause = "".join(f" reduction({how} : m{i})" for i, how in enumerate(codec.measures))
    after: list[str] = []
    known = [_LANES.lane(f"m{i}", after) for i in range(len(lanes))]
    words = codec.words(_LANES, *known)
    kept = [f"const int32_t word{k} = {place} = {words[k].text};" for k, place in enumerate(_words(codec))]
    return [*starts, *_simd("n", lines, clause), *after, *kept]
