"""Weights that several processes work on: parts of whole blocks are like weights of their own, and who gets which.

Checkpoints that go from four processes to two have such a weight in tests/test_distribution.py.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import piste
from piste.distribution import Job, divided
from piste.kronecker import Kronecker, kronecker

PROCESSES = 4
STEPS = 5
#: the first is most of the work; rows that no number of processes divides, axes in the middle, and what is no matrix.
#: No axis of a block is longer than the gradients of two steps have rank, which would leave eigenvectors open
SHAPES = ((301, 8), (12, 40), (6, 5), (40, 12), (4,), (7, 3, 70))
CASES: dict[str, dict[str, Any]] = {
    "meta": {"start": 2, "every": 2, "eps": 1e-2},
    "corrected": {"start": 2, "every": 2, "corrected": True, "graft": "none"},
    "google": {"form": "google", "root": "newton", "eps": 1e-2, "start": 1, "every": 2},
    "bf16": {"start": 2, "every": 2, "factors": "bf16", "preconditioner_gradients": True},
}


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a weight


@pytest.mark.parametrize(
    ("shape", "how", "axis", "edges"),
    [
        ((301, 8), kronecker(16, 16, backwards=True), 0, (*range(0, 301, 16), 301)),
        ((12, 40), kronecker(16, 16, backwards=True), 1, (0, 16, 32, 40)),
        ((40, 50), kronecker(16, 16, backwards=True), 0, (0, 16, 32, 40)),
        ((33, 20), kronecker(16, 16, backwards=True), 0, (0, 16, 33)),  # a row alone would be a vector
        ((7, 3, 70), kronecker(16, 1), 2, (0, 16, 32, 48, 64, 70)),
        ((1, 40, 1, 5), kronecker(16, 16), 1, (0, 16, 32, 40)),
        ((34, 3, 2), kronecker(16, 6, backwards=True), 0, (0, 16, 32, 34)),
    ],
)
def test_a_part_has_the_factors_that_it_has_within_the_weight(
    shape: tuple[int, ...], how: Kronecker, axis: int, edges: tuple[int, ...]
) -> None:
    """All of them, once each, in the order in which a weight of the part's shape has them."""
    assert how.edges(shape) == (axis, edges)
    x = torch.randint(-4, 5, (1, *shape), generator=torch.Generator().manual_seed(1)).float()
    whole = how.gram(x)[0]
    seen = torch.zeros_like(whole)
    for start, stop in pairwise(edges):
        places = how.places(shape, slice(start, stop))
        part = x.narrow(axis + 1, start, stop - start)
        assert torch.equal(torch.cat([whole[place] for place in places]), how.gram(part)[0])
        for place in places:
            seen[place] += 1
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((16, 8), kronecker(16, 16)),  # one block
        ((300, 8), kronecker(None, 16)),
        ((300, 8), kronecker(None, longest=100)),
        ((300, 8), kronecker(16, 16, one_sided=True)),
        ((10, 10, 3), kronecker(16, 100)),  # 100 = 10 x 10 is no axis of the weight
    ],
)
def test_what_parts_would_be_seen_otherwise_is_not_divided(shape: tuple[int, ...], how: Kronecker) -> None:
    assert how.edges(shape) is None


def test_what_is_more_than_an_even_share_fills_up_what_others_leave_uneven() -> None:
    how = kronecker(16, 16, backwards=True)
    jobs = [Job((320, 8), 60.0, how), Job((8, 8), 20.0, how), Job((320, 8), 20.0, how), Job((320, 8), 0.0, how)]
    loads = [0.0] * 4
    (first, cut), *others = divided(jobs, loads)
    assert others == [((0,), None), ((1,), None), ((2,), None)]
    assert first == (0, 1, 2, 3)
    assert cut is not None
    assert cut.edges == (0, 32, 48, 192, 320)  # 25 each would be 1 2/3 blocks, as many, and 8 1/3 twice
    assert loads == pytest.approx([26, 23, 27, 24])
    assert divided([Job((320, 8), 60.0), *jobs[1:]], [0.0] * 4)[0] == ((0,), None)  # it is seen whole
    assert divided(jobs[1:], [0.0, 60.0, 0.0]) == [((0,), None), ((2,), None), ((0,), None)]  # none is more
    owners, cut = divided(jobs[:1], [0.0] * 64)[0]
    assert len(owners) == 20  # a block is never divided
    assert cut is not None
    assert cut.edges == tuple(range(0, 321, 16))


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def train(options: dict[str, Any], mesh: DeviceMesh | None = None, **more: Any) -> tuple[dict[str, Any], int]:
    """Weights and states after some steps, whole, and the bytes of matrices that are kept here."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    def made(weights: list[nn.Parameter]) -> piste.Shampoo:
        return piste.Shampoo(weights, lr=1e-2, block_size=16, engine="foreach", **options, **more)

    weights = [nn.Parameter(spread(numbers(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = made(weights)
    for step in range(STEPS):
        for i, p in enumerate(weights):
            p.grad = spread(numbers(SHAPES[i], 100 * step + i))
        if options.get("preconditioner_gradients"):
            optimizer.give_preconditioner_gradients({p: p.grad + 1 for p in weights if p.grad is not None})
        optimizer.step()
        if step == 2:  # through a checkpoint, to owners anew
            saved = optimizer.state_dict()
            optimizer = made(weights)
            optimizer.load_state_dict(saved)
    names = ("factors", "roots", "bases")
    kept = sum(x.nbytes for entries in optimizer.state.values() for k, x in entries.items() if k in names)
    found = {f"{i}": p.detach() for i, p in enumerate(weights)}
    for i, entries in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{k}": x for k, x in entries.items() if isinstance(x, torch.Tensor)}
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in found.items()}, kept


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        all_four = init_device_mesh("cpu", (PROCESSES,))
        pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))["shard"]
        results = {
            (case, size, way): train(options, **({"mesh": mesh} if way == "shards" else {"distribute": mesh}))
            for case, options in CASES.items()
            for size, mesh in ((4, all_four), (2, pair))
            for way in ("replicas", "shards")
        }
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("divided")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.slow  # four processes that import torch
@pytest.mark.parametrize("way", ["replicas", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_divided_work_gives_what_one_process_gives(case: str, way: str, ranks: list[dict[Any, Any]]) -> None:
    """Weights, moments, and matrices; to rounding, for products of a stack may be rounded by how many are in it."""
    expected, alone = train(CASES[case], distribute=None)
    for size in (4, 2):
        for rank in ranks:
            found, kept = rank[case, size, way]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                close = {"rtol": 1e-5, "atol": 1e-5} if case != "bf16" else {"rtol": 2**-7, "atol": 1e-3}
                torch.testing.assert_close(found[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")
            assert 0 < kept <= alone * {4: 0.36, 2: 0.56}[size]
        assert sum(rank[case, size, way][1] for rank in ranks) == alone * PROCESSES / size
