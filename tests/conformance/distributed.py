"""Promises that need two processes, over gloo on the CPU: DistributedDataParallel, and FSDP2 with sharded weights.

One pair of processes serves all optimizers, because starting them costs seconds. Optimizers that multiply matrices run
twice: with the work shared out, and with every process doing all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from conformance.subjects import Subject, subjects

PROCESSES = 2
STEPS = 8  # past RAdam's switch and one Lookahead sync
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP on two processes equals one": nn.parallel.DistributedDataParallel,
    "FSDP2 on two processes equals one": fully_shard,
}


def _model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    return [
        (
            torch.randn(4 * PROCESSES, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randn(4 * PROCESSES, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(STEPS)
    ]


def _train(subject: Subject, model: nn.Module, rank: int | None, **options: Any) -> list[torch.Tensor]:
    """All batches, or this process's half of each; the loss is a mean, so halves average to the whole."""
    optimizer = subject.make(model.parameters(), clip_norm=1.0, **options)
    for inputs, targets in _batches():
        if rank is not None:
            inputs, targets = (x.chunk(PROCESSES)[rank] for x in (inputs, targets))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    weights = (p.detach() for p in model.parameters())
    return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in weights]


def alone(subject: Subject) -> list[torch.Tensor]:
    """One process, whole batches."""
    return _train(subject, _model(), None)


def _runs(subject: Subject, spread: Callable[[nn.Module], nn.Module], rank: int) -> Iterator[list[torch.Tensor]]:
    """The final weights, once for each way of sharing out what there is to share."""
    ways = [{"distribute": None}, {"distribute": torch.distributed.group.WORLD}] if subject.by_matrix else [{}]
    for way in ways:
        yield _train(subject, spread(_model()), rank, **way)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    try:
        results = {
            title: {subject.id: list(_runs(subject, spread, rank)) for subject in subjects()}
            for title, spread in WAYS.items()
        }
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


Results = dict[str, dict[str, list[list[torch.Tensor]]]]


def together(folder: Path) -> list[Results]:
    """The final weights of every optimizer by way, as each process has them."""
    torch.multiprocessing.spawn(_process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def check(title: str, subject: Subject, ranks: list[Results]) -> None:
    """All processes hold the same bits, shared work or not; against one, gradients were summed in another order.

    1e-9: float64 rounding of a gradient, divided by roots of small second moments, over eight steps.
    """
    first, *others = (run for rank in ranks for run in rank[title][subject.id])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, alone(subject), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
