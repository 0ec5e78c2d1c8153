"""Writes codecs as Triton: lines that decode and encode the numbers of a tile.

The formulas are those of :mod:`piste.codecs`, as :mod:`piste.engines.lane_text` writes them. A tile is a row of lanes.
Where packed codes are in it, the lanes of a block are dealt to its two halves, so that a byte's codes are as far apart
in a block that a row cuts off as in a whole one.

Names that the kernel has: ``lane``, ``at`` (the element), ``line`` and ``col`` (its row and its place there), ``live``
(is it one?), ``row`` (length of rows), ``phase`` (where the thresholds stand), and for packed codes ``side`` and
``seat`` (which half of the block, and the place there) and ``first`` (where the block begins in its row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piste.codecs import STRIDE, Codec
from piste.engines.lane_text import INTEGERS, MEASURE_START, Syntax, TextLanes

__all__ = ["decoded", "encoded", "places", "scattered_places", "triton_types", "unit", "whole_places"]

_SYNTAX = Syntax(
    declare="{name} = {text}",
    kinds={"real": "", "whole": "", "truth": ""},
    real="{!r}",
    quotient="tl.div_rn({}, {})",
    ratio="{} // {}",
    left="{} << {}",
    bits="{}.to(tl.int32, bitcast=True)",
    pattern="{}.to(tl.float32, bitcast=True)",
    number="{}.to(tl.float32)",
    truncated="{}.to(tl.int32)",
    where="tl.where({}, {}, {})",
)
_LANES = TextLanes(_SYNTAX)


def triton_types(codec: Codec) -> tuple[str, str]:
    """The integers that codes and their second tensor are read as."""
    return f"tl.{INTEGERS[codec.codes]}", "" if codec.rest is None else f"tl.{INTEGERS[codec.rest]}"


def unit(codecs: Mapping[str, Codec]) -> int:
    """How many elements of a row belong together: the longest block."""
    return max((codec.block for codec in codecs.values()), default=0)


def places(codecs: Mapping[str, Codec], tile: int) -> list[str]:
    """The coordinates of a tile's lanes; over codes, rows are cut into pieces of :func:`unit`."""
    if not codecs:
        return [f"at = number * {tile} + lane", "live = at < size"]
    piece = unit(codecs) or tile
    packed = {codec.block for codec in codecs.values() if codec.packed}
    lines = [
        f"per_row = (row + {piece - 1}) // {piece}",
        f"block = number * {tile // piece} + lane // {piece}",
        "line = block // per_row",
    ]
    if packed:
        (half_of,) = packed  # one length for all of them, which divides the others
        lines += [
            f"first = block % per_row * {piece} + lane % {piece} // {half_of} * {half_of}",
            f"half = (tl.minimum(row - first, {half_of}) + 1) // 2",
            f"side = lane % {half_of} // {half_of // 2}",
            f"seat = lane % {half_of // 2}",
            "col = first + side * half + seat",
            f"live = (seat < half) & (col < row) & (col < first + {half_of})",
        ]
    else:
        lines += [f"col = block % per_row * {piece} + lane % {piece}", "live = col < row"]
    return [*lines, "at = line * row + col", "live = live & (at < size)"]


def whole_places(codecs: Mapping[str, Codec], tile: int) -> list[str]:
    """The same where the tile is one stretch of a weight whose rows need no telling apart."""
    lines = [f"at = number * {tile} + lane", "live = tl.full(lane.shape, 1, tl.int1)"]
    if codecs:
        lines += ["line = number * 0", "col = at"]
    for block in {codec.block for codec in codecs.values() if codec.packed}:
        lines += [
            f"first = number * {tile} + lane // {block} * {block}",
            f"side = lane % {block} // {block // 2}",
            f"seat = lane % {block // 2}",
        ]
    return lines


def scattered_places(codecs: Mapping[str, Codec]) -> list[str]:
    """The same for elements anywhere in their rows."""
    lines = ["line = at // row", "col = at % row"] if codecs else []
    for block in {codec.block for codec in codecs.values() if codec.packed}:
        lines += [
            f"first = col // {block} * {block}",
            f"half = (tl.minimum(row - first, {block}) + 1) // 2",
            "side = ((col - first) >= half).to(tl.int32)",
            "seat = col - first - side * half",
        ]
    return lines


def _code_place(codec: Codec) -> str:
    if not codec.packed:
        return "at"
    return f"(line * {_SYNTAX.codes_of_row(codec)} + first // 2 + seat)"


def _word_place(codec: Codec, number: int) -> str:
    """Where a word of the block is, or the number of its own that a code has."""
    return f"{_SYNTAX.words_before(codec, 'col')} + {number}" if codec.block else "at"


def decoded(codec: Codec, codes: str, rest: str, body: list[str]) -> str:
    """Adds lines that decode a tile; returns the name of its numbers.

    Args:
        codec: how they are stored.
        codes: the name of the pointer to the codes.
        rest: that of the pointer to what else there is, or nothing.
        body: the lines of the kernel so far.
    """
    code = f"e{len(body)}"
    body.append(f"{code} = tl.load({codes} + {_code_place(codec)}, mask=live, other=0).to(tl.int32)")
    if codec.packed:
        body.append(f"{code} = ({code} >> (side * 4)) & 15")
    words = []
    for number in range(codec.count if codec.rest is not None else 0):
        words.append(f"w{len(body)}")
        body.append(f"{words[-1]} = tl.load({rest} + {_word_place(codec, number)}, mask=live, other=0).to(tl.int32)")
    lanes = [_LANES.lane(word, body) for word in words]
    return str(codec.decode(_LANES, _LANES.lane(code, body), lanes).text)


def encoded(codec: Codec, value: str, codes: str, rest: str, tile: int, body: list[str]) -> None:
    """Adds lines that encode the numbers called `value`."""
    x = _LANES.lane(value, body, real=True)
    words = _measured(codec, value, rest, tile, body) if codec.block else []
    threshold = f"e{len(body)}"
    body.append(f"{threshold} = ((at & 0xffff).to(tl.int32) * {STRIDE} + phase) & 0xffff")
    code, *own = codec.encode(_LANES, x, [_LANES.lane(w, body) for w in words], _LANES.lane(threshold, body))
    kind, other = triton_types(codec)
    if codec.packed:
        body += _packed(codec, code.text, codes, kind, tile, len(body))
    else:
        body.append(f"tl.store({codes} + at, {code.text}.to({kind}), mask=live)")
    if own:
        body.append(f"tl.store({rest} + at, {own[0].text}.to({other}), mask=live)")


def _measured(codec: Codec, value: str, rest: str, tile: int, body: list[str]) -> list[str]:
    """The words of each lane's block, stored."""
    blocks, kind = tile // codec.block, triton_types(codec)[1]
    known = []
    for lane, how in zip(codec.measure(_LANES, _LANES.lane(value, body, real=True)), codec.measures, strict=True):
        name = f"e{len(body)}"
        own = f"tl.reshape(tl.where(live, {lane.text}, {MEASURE_START[how]}), ({blocks}, {codec.block}))"
        body.append(f"{name} = tl.{how}({own}, axis=1)")
        known.append(_LANES.lane(name, body))
    names = []
    for number, word in enumerate(codec.words(_LANES, *known)):
        name = f"w{len(body)}"
        wide = f"tl.broadcast_to(tl.expand_dims({word.text}, 1), ({blocks}, {codec.block}))"
        body.append(f"{name} = tl.reshape({wide}, ({tile},))")
        place = f"{rest} + {_word_place(codec, number)}"
        body.append(f"tl.store({place}, {name}.to({kind}), mask=live & (col % {codec.block} == 0))")
        names.append(name)
    return names


def _packed(codec: Codec, code: str, codes: str, kind: str, tile: int, serial: int) -> Sequence[str]:
    """Both halves of each byte lie in lanes of their own, which name the same place."""
    shape = f"({tile // codec.block}, 2, {codec.block // 2})"
    own = f"tl.where(live, {code}, 0) << (side * 4)"
    return [
        f"bytes{serial} = tl.sum(tl.reshape({own}, {shape}), axis=1)",
        f"place{serial} = tl.min(tl.reshape({_code_place(codec)}, {shape}), axis=1)",
        f"used{serial} = tl.max(tl.reshape(live.to(tl.int32), {shape}), axis=1) > 0",
        f"tl.store({codes} + place{serial}, bytes{serial}.to({kind}), mask=used{serial})",
    ]
