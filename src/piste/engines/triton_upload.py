"""Sends numbers to a device from step to step: only where they differ from what is there, and without waiting for it.

A copy out of ordinary memory would make Python wait for everything that the device has still to do. So numbers go
through pinned memory, of which each table has a few pieces that take turns; an event tells when the device has taken
what is in one. On a CPU the same is done with plain memory.

A CUDA graph copies again in each of its replays, out of the memory that it was recorded with, and its kernels read
where they read then. So what a recorded step sends has memory of its own at both ends, which nothing else ever uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.device_numbers import recording

__all__ = ["Upload", "current_stream"]

#: pieces of pinned memory that a table may have: so many steps may Python be ahead of the device
MOST_PIECES = 8


class Piece(NamedTuple):
    """Memory that a copy starts from, and the event that follows it; None on a CPU, where copies are done at once."""

    memory: Tensor
    taken: Any


def current_stream(device: torch.device) -> int:
    """What tells apart the streams on which kernels may be launched now."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _piece(like: Tensor, device: torch.device) -> Piece:
    cuda = device.type == "cuda"
    memory = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=cuda)
    return Piece(memory, _event() if cuda else None)


class Upload:
    """One table on the device.

    A copy waits for the kernels that were launched before it on its stream, so that a table can be overwritten while
    they still run. For another stream that would not hold; there a new table is made.

    Args:
        device: where it is to be.
        recordable: may a CUDA graph record what is sent? Then there is always a piece that no copy has used: while a
            graph is recorded, nobody may ask the device whether it has done with one.

    Attributes:
        times: how often something was sent.
        recorded: the memory that recorded graphs copy from and to.
    """

    def __init__(self, device: torch.device, *, recordable: bool = False) -> None:
        self.device, self.recordable = device, recordable
        self.stream = 0
        self.known: Any = None
        self.there = torch.empty(0, device="cpu")
        self.pieces: deque[Piece] = deque()
        self.spare: Piece | None = None
        self.recorded: list[tuple[Piece, Tensor]] = []
        self.times = 0

    def send(self, known: Any, numbers: Callable[[], Tensor], stream: int) -> Tensor:
        """The table on the device.

        Args:
            known: what its numbers follow from; where it equals that of the last call, nothing is sent.
            numbers: makes the table, in ordinary memory.
            stream: where the kernels that read it are launched, see :func:`current_stream`.
        """
        if self.recordable and recording():
            return self._for_replays(numbers())
        if stream != self.stream or known != self.known:
            self._copy(numbers(), known, stream)
        if self.recordable and (self.spare is None or self.spare.memory.shape != self.there.shape):
            self.spare = _piece(self.there, self.device)
        return self.there

    def _copy(self, host: Tensor, known: Any, stream: int) -> None:
        if self.there.shape != host.shape or self.there.dtype != host.dtype or stream != self.stream:
            self.there = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        piece = self._free(host)
        piece.memory.copy_(host)
        self.there.copy_(piece.memory, non_blocking=True)
        if piece.taken is not None:
            piece.taken.record()
        self.known, self.stream = known, stream
        self.times += 1

    def _for_replays(self, host: Tensor) -> Tensor:
        """A table of the graph that is being recorded."""
        piece, self.spare = self.spare, None
        if piece is None or piece.memory.shape != host.shape:
            piece = _piece(host, self.device)
        there = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        there.copy_(piece.memory.copy_(host), non_blocking=True)
        self.recorded.append((piece, there))
        return there

    def _free(self, like: Tensor) -> Piece:
        """A piece that the device has done with; the oldest where there are enough of them, after waiting for it."""
        if self.pieces and self.pieces[0].memory.shape != like.shape:
            self.pieces.clear()  # torch keeps pinned memory until the copies that it knows of are done
        if self.pieces and (self.pieces[0].taken is None or self.pieces[0].taken.query()):
            piece = self.pieces.popleft()
        elif len(self.pieces) < MOST_PIECES:
            piece = _piece(like, self.device)
        else:
            piece = self.pieces.popleft()
            piece.taken.synchronize()
        self.pieces.append(piece)
        return piece
