"""Sharded weights: four real processes against one, bit by bit where every number has a thread of its own.

Rows that are no multiple of a block, fewer rows than processes, and shards without any rows are among the weights.
That every optimizer follows under ``fully_shard`` is a row of the conformance matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import piste

PROCESSES = 4
STEPS = 4
SHAPES = ((90, 96), (61, 300), (3, 1400), (7, 20, 5, 9), (5000,), (10,), (2, 2))
FORMATS: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("AdamW", {}, torch.float32),
    *[("AdamW", {"state": state}, torch.float32) for state in ("bf16", "8bit", "4bit")],
    *[("AdamW", {"state": "8bit", "weights": w}, torch.bfloat16) for w in ("stochastic", "kahan", "remainder")],
    *[("AdamW", {"state": "4bit", "engine": engine}, torch.float32) for engine in ("foreach", "reference")],
    *[(name, {"state": "8bit"}, torch.float32) for name in ("Adan", "Lion", "RAdam", "SGD", "Ranger")],
    ("Muon", {"state": "8bit"}, torch.float32),
    ("SOAP", {"every": 2, "max_size": 100}, torch.float32),
]


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def train(name: str, options: dict[str, Any], dtype: torch.dtype, mesh: Any = None) -> dict[str, torch.Tensor]:
    """Weights and states after some steps, whole."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    weights = [nn.Parameter(spread(numbers(shape, i).to(dtype))) for i, shape in enumerate(SHAPES)]
    optimizer = getattr(piste, name)(weights, lr=1e-2, **options)
    for step in range(STEPS):
        for i, p in enumerate(weights):
            p.grad = spread(numbers(tuple(p.shape), 100 * step + i).to(dtype))
        optimizer.step()
    kept = {f"{i}": p.detach() for i, p in enumerate(weights)}
    for i, entries in optimizer.state_dict()["state"].items():
        kept |= {f"{i}.{k}": x for k, x in entries.items() if isinstance(x, torch.Tensor)}
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in kept.items()}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 90), nn.Tanh(), nn.Linear(90, 61), nn.Tanh(), nn.Linear(61, 3))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(numbers((8, 96), step)).square().mean().backward()
        optimizer.step()


def sharded_net(mesh: Any) -> nn.Module:
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpoints(mesh: Any) -> dict[str, Any]:
    """What a sharded optimizer saves through torch's tools, and what it makes of an unsharded one's dictionary."""
    whole = StateDictOptions(full_state_dict=True)
    alone, model = net(), sharded_net(mesh)
    first = piste.AdamW(alone.named_parameters(), state="8bit")
    optimizer = piste.AdamW(model.named_parameters(), state="8bit")
    fit(alone, first, 3)
    optimizer.load_state_dict(first.state_dict())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.detach(), mesh, [Shard(0)]))
    saved = get_optimizer_state_dict(model, optimizer, options=whole)
    again = sharded_net(mesh)
    other = piste.AdamW(again.named_parameters(), state="8bit")
    set_optimizer_state_dict(again, other, saved, options=whole)
    fit(model, optimizer, 3)
    fit(alone, first, 3)
    return {
        "saved": saved["state"],
        "loaded": get_optimizer_state_dict(again, other, options=whole)["state"],
        "went on": [p.full_tensor().detach() for p in model.parameters()],
        "alone": [p.detach() for p in alone.parameters()],
        "moved": optimizer.load_state_dict(first.state_dict(), state="4bit")
        or [str(x["m"].dtype) for x in optimizer.state.values()],
    }


def policies(mesh: Any) -> dict[str, Any]:
    """One process alone meets a NaN, and all skip the step; norms are those of whole gradients."""
    p = nn.Parameter(distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]))
    optimizer = piste.AdamW([p], nonfinite="skip")
    p.grad = distribute_tensor(torch.full((8, 3), 2.0), mesh, [Shard(0)])
    optimizer.step()
    norm, taken = optimizer.last_step.gradient_norm, p.full_tensor().detach().clone()
    if dist.get_rank() == 2:
        p.grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    stayed = torch.equal(p.full_tensor().detach(), taken)
    return {"norm": norm, "skipped": optimizer.last_step.skipped, "stayed": stayed, "step": optimizer.state[p]["step"]}


def refusals(mesh: Any) -> dict[str, str]:
    found = {}
    columns = nn.Parameter(distribute_tensor(torch.ones(8, 4096), mesh, [Shard(1)]))
    vector = nn.Parameter(distribute_tensor(torch.ones(70_000), mesh, [Shard(0)]))
    for what, p, options in (
        ("columns", columns, {"state": "8bit"}),
        ("columns of weights", columns, {"weights": "kahan"}),
        ("vector", vector, {"state": "4bit"}),
    ):
        with pytest.raises(ValueError, match="legal: ") as error:
            piste.AdamW([p], **options)  # type: ignore[arg-type]
        found[what] = str(error.value)
    piste.AdamW([columns, vector])
    return found


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        results = {
            "formats": [train(*case, mesh) for case in FORMATS],
            "checkpoints": checkpoints(mesh),
            "policies": policies(mesh),
            "refusals": refusals(mesh),
        }
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


pytestmark = pytest.mark.slow  # four processes that import torch


@pytest.mark.parametrize("case", range(len(FORMATS)), ids=[f"{n}-{o}-{d}" for n, o, d in FORMATS])
def test_shards_are_what_they_would_be_within_the_whole(case: int, ranks: list[dict[str, Any]]) -> None:
    """Codes, words and weights, bit by bit; Ranger's centralization sums rows, which are whole on every process."""
    expected = train(*FORMATS[case])
    for rank in ranks:
        found = rank["formats"][case]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_checkpoints_are_those_of_whole_weights(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["checkpoints"]
    assert first["saved"]["0.weight"]["m"].dtype == torch.int8
    assert first["saved"]["0.weight"]["v.scale"].shape == (90, 1, 2)
    for name, entries in first["saved"].items():
        for key, value in entries.items():
            other = first["loaded"][name][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (name, key)


def test_a_sharded_optimizer_goes_on_from_a_whole_one(ranks: list[dict[str, Any]]) -> None:
    """Four equal gradients are averaged without rounding, so that only the codes' own rounding could differ."""
    for rank in ranks:
        for p, q in zip(rank["checkpoints"]["went on"], rank["checkpoints"]["alone"], strict=True):
            assert torch.equal(p, q)
        assert rank["checkpoints"]["moved"].count("torch.uint8") == 2


def test_processes_agree_about_nan_and_norms(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["policies"] == {"norm": pytest.approx(96**0.5), "skipped": True, "stayed": True, "step": 1}


def test_shards_that_codes_cannot_follow_are_refused(ranks: list[dict[str, Any]]) -> None:
    words = ranks[0]["refusals"]
    assert words["columns"].startswith("AdamW got state='8bit' for a weight sharded as (Shard(dim=1),)")
    assert words["columns of weights"].startswith("AdamW got weights='kahan' for a weight sharded")
    assert words["vector"].startswith("AdamW got state='4bit' for a sharded vector of 70,000 numbers")
