"""Tensors of numbers in few bits: torch works out the formulas of :mod:`piste.codecs`, by row and block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.codecs import STRIDE, Codec, phase_at, row_length

__all__ = ["decode", "encode", "fresh"]


class _Torch:
    """Lanes that are tensors."""

    def bits(self, x: Tensor) -> Tensor:
        return x.contiguous().view(torch.int32)

    def real(self, i: Tensor) -> Tensor:
        return i.to(torch.int32).contiguous().view(torch.float32)

    def number(self, i: Tensor) -> Tensor:
        return i.to(torch.float32)

    def whole(self, x: Tensor) -> Tensor:
        return x.to(torch.int32)

    def minimum(self, a: Any, b: Any) -> Tensor:
        return torch.clamp(a, max=b) if not isinstance(b, Tensor) else torch.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Tensor:
        return torch.clamp(a, min=b) if not isinstance(b, Tensor) else torch.maximum(a, b)

    def where(self, test: Tensor, yes: Any, no: Any) -> Tensor:
        return torch.where(test, yes, no)


_LANES = _Torch()
_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.amax(2, keepdim=True),
    "min": lambda x: x.amin(2, keepdim=True),
}


def fresh(codec: Codec, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes and rest of a tensor of zeros, contiguous; every codec stores zero as zeros.

    Packed codes and words have the rows of ``like`` as their first axis, if it has rows.
    """
    shape, length = tuple(like.shape), row_length(like.shape)
    rows = shape[:1] if len(shape) > 1 else ()
    coded = (*rows, _bytes(codec, length)) if codec.packed else shape
    codes = torch.zeros(coded, dtype=codec.codes, device=like.device)
    if codec.rest is None:
        return codes, None
    words = (-(-length // codec.block), codec.count) if codec.count > 1 else (-(-length // max(1, codec.block)),)
    beside = (*rows, *words) if codec.block else shape
    if codec.rest == torch.int16:  # processes cannot send each other whole numbers of 16 bits, only their bytes
        return codes, torch.zeros((*beside, 2), dtype=torch.uint8, device=like.device)
    return codes, torch.zeros(beside, dtype=codec.rest, device=like.device)


def _bytes(codec: Codec, n: int) -> int:
    """Bytes that n packed codes take: a block that is cut off has halves of its own."""
    return n // codec.block * (codec.block // 2) + (n % codec.block + 1) // 2


def decode(codec: Codec, codes: Tensor, rest: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The numbers, as float32 of this shape."""
    out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    if not out.numel():
        return out
    table, length = _table(codec, codes, rest, shape), row_length(shape)
    for part in _parts(codec, length):
        numbers = part.numbers(out.view(-1, length))
        code = part.codes(table.codes).to(torch.int32)
        if codec.packed:
            code = torch.cat((code & 15, code >> 4), 2)[..., : numbers.shape[2]]
        numbers.copy_(codec.decode(_LANES, code, [x.to(torch.int32) for x in part.along(codec, table)]))
    return out


def encode(
    codec: Codec, x: Tensor, codes: Tensor, rest: Tensor | None, *, step: int | Tensor | None, phase: int = 0
) -> None:
    """Store numbers.

    Args:
        codec: how.
        x: the numbers, of any floating dtype.
        codes: where their codes go, as :func:`fresh` made them.
        rest: where the rest goes.
        step: the weight's own step number, which moves the thresholds, as a number or as a tensor of one number; None
            rounds to the nearest.
        phase: where the thresholds of this weight begin, 16 bits.
    """
    if not x.numel():
        return
    if not codes.is_contiguous():  # a weight that lies otherwise: codes go by rows
        packed = codes.contiguous()
        encode(codec, x, packed, rest, step=step, phase=phase)
        codes.copy_(packed)
        return
    table, length = _table(codec, codes, rest, x.shape), row_length(x.shape)
    thresholds = torch.full((x.numel(),), 0x8000, dtype=torch.int32, device=x.device)
    if step is not None:
        torch.arange(x.numel(), out=thresholds)
        thresholds = (thresholds * STRIDE + phase_at(step, phase)) & 0xFFFF
    rows = x.reshape(-1, length).to(torch.float32)
    for part in _parts(codec, length):
        numbers, words, along = part.numbers(rows), [], part.along(codec, table)
        if codec.block:
            measured = zip(codec.measures, codec.measure(_LANES, numbers), strict=True)
            for place, word in zip(along, codec.words(_LANES, *(_OVER[how](x) for how, x in measured)), strict=True):
                place.copy_(word)
                words.append(place.to(torch.int32))
        code, *own = codec.encode(_LANES, numbers, words, part.numbers(thresholds.view_as(rows)))
        if codec.packed:
            half = (code.shape[2] + 1) // 2
            code = torch.nn.functional.pad(code, (0, 2 * half - code.shape[2]))
            code = code[..., :half] | (code[..., half:] << 4)
        part.codes(table.codes).copy_(code)
        for place, value in zip(along, own, strict=False):
            place.copy_(value)


class _Table(NamedTuple):
    """What holds a tensor, as whole numbers: codes by row, and words by row, block and place (or a number of its own
    for each code)."""

    codes: Tensor
    rest: Tensor | None


def _table(codec: Codec, codes: Tensor, rest: Tensor | None, shape: Sequence[int]) -> _Table:
    rows = shape[0] if len(shape) > 1 else 1
    whole = _integers(codes, codec.codes).view(rows, -1)
    if rest is None or codec.rest is None:
        return _Table(whole, None)
    return _Table(whole, _integers(rest, codec.rest).view(rows, -1, codec.count))


def _integers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of a tensor of codes, words or rests of this dtype as whole numbers in a row."""
    whole = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return tensor.detach().reshape(-1).view(whole.get(dtype, dtype))


class _Part(NamedTuple):
    """Blocks of one length, at the same places in every row."""

    blocks: int
    inside: slice
    coded: slice
    words: slice

    def numbers(self, rows: Tensor) -> Tensor:
        """Of all numbers those in these blocks, by row and block."""
        return torch.unflatten(rows[:, self.inside], 1, (self.blocks, -1))

    def codes(self, rows: Tensor) -> Tensor:
        return torch.unflatten(rows[:, self.coded], 1, (self.blocks, -1))

    def along(self, codec: Codec, table: _Table) -> list[Tensor]:
        """The words of the blocks; or the numbers of their own that codes have."""
        if table.rest is None:
            return []
        if not codec.block:
            return [table.rest.view_as(table.codes).unsqueeze(1)]
        return [table.rest[:, self.words, k : k + 1] for k in range(codec.count)]


def _parts(codec: Codec, length: int) -> list[_Part]:
    """The full blocks of a row, and the one that is cut off."""
    everything = slice(None)
    if not codec.block:
        return [_Part(1, everything, everything, everything)]
    full, per = length // codec.block, 2 if codec.packed else 1
    cut = full * codec.block
    found = [_Part(full, slice(0, cut), slice(0, cut // per), slice(0, full))] if full else []
    rest = _Part(1, slice(cut, None), slice(cut // per, None), slice(full, None))
    return [*found, rest] if cut < length else found
