"""Two-pass steps on two real processes: DDP with local and averaged perturbations, and FSDP2's shards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import piste

PROCESSES, STEPS, RATE, RHO = 2, 7, 0.05, 0.3
KINDS = ("SAM", "GSAM", "LookSAM")
WAYS = ("local", "averaged", "sharded", "micro")

pytestmark = pytest.mark.slow  # two processes that import torch


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def optimizer_for(kind: str, model: nn.Module) -> Any:
    return getattr(piste, kind)(piste.SGD(model.parameters(), lr=RATE, momentum=0.9), RHO)


def pieces(t: int, n: int) -> list[tuple[Tensor, Tensor]]:
    x, y = batch(t)
    return list(zip(x.chunk(n), y.chunk(n), strict=True))


def train(kind: str, way: str, rank: int) -> list[Tensor]:
    model = net()
    wrapped = fully_shard(model) if way == "sharded" else nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_for(kind, model)
    for t in range(STEPS):
        if way == "micro":
            mine = pieces(t, 4)[2 * rank : 2 * rank + 2]
            piste.sharpness_step(optimizer, wrapped, loss_of, mine, accumulate="micro")
        else:
            perturbation = "local" if way == "local" else "averaged"
            data = pieces(t, PROCESSES)[rank]
            piste.sharpness_step(optimizer, wrapped, loss_of, data, perturbation=perturbation, clip=0.5)
    if way == "local":  # one process alone meets an overflow: all skip
        before = copy.deepcopy(list(model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.steps = 0
        piste.sharpness_step(
            optimizer, wrapped, lambda m, d: loss_of(m, d) * (torch.inf if rank else 1.0), batch(0), scaler=scaler
        )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert scaler.get_scale() == 2.0
    weights = (p.detach() for p in model.parameters())
    return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in weights]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        results = {f"{kind} {way}": train(kind, way, rank) for kind in KINDS for way in WAYS}
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("sharpness")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def alone(kind: str) -> list[Tensor]:
    """One process with whole batches: what averaged perturbations are to give."""
    model = net()
    optimizer = optimizer_for(kind, model)
    for t in range(STEPS):
        piste.sharpness_step(optimizer, model, loss_of, batch(t), clip=0.5)
    return [p.detach() for p in model.parameters()]


def of_pieces(n: int, clip: float) -> list[Tensor]:
    """SAM with a climb for each of n pieces, by hand: the mean of their second gradients."""
    model = net()
    inside = piste.SGD(model.parameters(), lr=RATE, momentum=0.9)
    weights = list(model.parameters())
    for t in range(STEPS):
        sums = [torch.zeros_like(p) for p in weights]
        for piece in pieces(t, n):
            g = torch.autograd.grad(loss_of(model, piece), weights)
            length = torch.stack([x.square().sum() for x in g]).sum().sqrt()
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, x in zip(moved.parameters(), g, strict=True):
                    p += RHO * x / length
            for s, x in zip(sums, torch.autograd.grad(loss_of(moved, piece), list(moved.parameters())), strict=True):
                s += x / n
        for p, s in zip(weights, sums, strict=True):
            p.grad = s
        nn.utils.clip_grad_norm_(weights, clip)
        inside.step()
    return [p.detach() for p in weights]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_processes_stay_together(kind: str, way: str, ranks: list[dict[str, list[Tensor]]]) -> None:
    first, second = (rank[f"{kind} {way}"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["averaged", "sharded"])
def test_one_perturbation_is_that_of_the_whole_batch(kind: str, way: str, ranks: list[dict[str, list[Tensor]]]) -> None:
    for a, b in zip(ranks[0][f"{kind} {way}"], alone(kind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("way", "n", "clip"), [("local", 2, 0.5), ("micro", 4, 1e9)])
def test_local_perturbations(way: str, n: int, clip: float, ranks: list[dict[str, list[Tensor]]]) -> None:
    for a, b in zip(ranks[0][f"SAM {way}"], of_pieces(n, clip), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
