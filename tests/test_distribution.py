"""Matrix work shared over processes: four real processes over gloo, and pairs of them, against one.

One launch serves all checks; they are functions of a process that return what the parent compares. Where numbers do not
depend on the engine it is foreach, which compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import piste
from piste.costs import EIGEN, QR
from piste.distribution import dealt
from piste.kronecker import kronecker
from piste.registry import OPTIMIZERS
from scripts import scaling

PROCESSES = 4
STEPS = 5
# rows that no number of processes divides, fewer rows than processes, a convolution, and what is no matrix
SHAPES = ((18, 12), (12, 18), (13, 7), (3, 20), (6, 3, 2, 2), (18, 12), (11,), (1, 1), (12, 18))
FROZEN = 5  # never has a gradient
LATE = 1  # has its first one in the third step
MATRIX: list[tuple[str, dict[str, Any]]] = [
    ("Muon", {}),
    ("Muon", {"state": "8bit", "iteration": "polar_express"}),
    ("NorMuon", {"clip_norm": 1.0, "iteration": "deflated"}),
    ("Shampoo", {"start": 2, "every": 2, "block_size": 8}),
    ("Shampoo", {"start": 1, "every": 2, "form": "google", "root": "newton", "eps": 1e-2}),
    ("SOAP", {"every": 2, "max_size": 15, "factors": "bf16"}),
    ("PSGDKron", {"flat_start": 1, "probability_decay": 1.0, "least_probability": 0.5, "max_size": 15}),
]
#: the matrices of a small transformer: per block queries, keys and values, output, and two layers of a perceptron
BLOCK = ((96, 32), (32, 32), (64, 32), (32, 64))


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(i: int, step: int) -> torch.Tensor | None:
    waits = i == FROZEN or (i == LATE and step < 2)
    return None if waits else numbers(SHAPES[i], 100 * step + i)


def train(name: str, options: dict[str, Any], mesh: Any = None, **more: Any) -> dict[str, torch.Tensor]:
    """Weights and states after some steps, whole; sharded over a mesh if there is one."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    weights = [nn.Parameter(spread(numbers(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = getattr(piste, name)(weights, lr=1e-2, **options, **more)
    for step in range(STEPS):
        for i, p in enumerate(weights):
            g = gradient(i, step)
            p.grad = None if g is None else spread(g)
        optimizer.step()
    kept = {f"{i}": p.detach() for i, p in enumerate(weights)}
    for i, entries in optimizer.state_dict()["state"].items():
        kept |= {f"{i}.{k}": x for k, x in entries.items() if isinstance(x, torch.Tensor)}
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What each process does in a step: operations, bytes kept, bytes sent

COUNTED: dict[str, dict[str, Any]] = {
    "Muon": {"rule": "muon", "precision": "bf16"},  # the iteration of accelerators
    "Shampoo": {"start": 1, "every": 2, "graft": "none", "merge_dims": False},
    "SOAP": {"every": 2},
    # updates in every second step, even ones
    "PSGDKron": {"flat_start": 0, "probability_decay": 1e3, "least_probability": 0.5, "clip_rms": None},
}
TRANSFORMER = BLOCK * 6


def transformer(name: str, mesh: Any = None, **more: Any) -> tuple[piste.Optimizer, list[nn.Parameter]]:
    """An optimizer over the matrices of a small transformer, with gradients."""
    weights = []
    for i, shape in enumerate(TRANSFORMER):
        w, g = numbers(shape, i), numbers(shape, 50 + i)
        if mesh is not None:
            w, g = (distribute_tensor(x, mesh, [Shard(0)]) for x in (w, g))
        weights.append(nn.Parameter(w))
        weights[-1].grad = g
    return getattr(piste, name)(weights, engine="foreach", **COUNTED[name], **more), weights


def operations(optimizer: piste.Optimizer, steps: int) -> float:
    """Floating-point operations of products and decompositions in some steps."""

    def cubes(factor: float) -> Any:
        return lambda shape, *_, **__: factor * shape[:-2].numel() * shape[-1] ** 3

    known = {
        torch.ops.aten._linalg_eigh: cubes(EIGEN),
        torch.ops.aten.geqrf: cubes(QR / 2),
        torch.ops.aten.linalg_householder_product: cubes(QR / 2),
        torch.ops.aten.linalg_solve_triangular: lambda _, shape, **__: shape.numel() * shape[-2],
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        for _ in range(steps):
            optimizer.step()
    return float(counter.get_total_flops())


def matrices_kept(optimizer: piste.Optimizer) -> int:
    """Bytes of factors, roots and bases that are here."""
    names = ("factors", "roots", "bases")
    return sum(x.nbytes for entries in optimizer.state.values() for k, x in entries.items() if k in names)


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """The collectives of a block, each with the bytes that this process sends to others."""
    seen: list[tuple[str, int]] = []
    gathering = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = {name: getattr(dist, name) for name in (gathering, "all_to_all_single", "all_reduce")}
    here = dist.get_rank()

    def gather(out: torch.Tensor, own: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(("all_gather", own.nbytes * (dist.get_world_size() - 1)))
        return real[gathering](out, own, *args, **options)

    def to_all(out: torch.Tensor, own: torch.Tensor, outs: Any, ins: Any, **options: Any) -> Any:
        seen.append(("all_to_all", own.itemsize * sum(n for r, n in enumerate(ins) if r != here)))
        return real["all_to_all_single"](out, own, outs, ins, **options)

    def reduce(own: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(("all_reduce", 2 * own.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()))
        return real["all_reduce"](own, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, function in zip(real, (gather, to_all, reduce), strict=True):
            patch.setattr(dist, name, function)
        yield seen


def accounts(mesh: Any) -> dict[str, Any]:
    """Bytes kept, operations of steps 5 to 8, and the collectives of steps 9 and 10: one of them has a renewal."""
    found: dict[str, Any] = {}
    for name in COUNTED:
        for way, more in (("replicas", {"distribute": dist.group.WORLD}), ("shards", {"mesh": mesh})):
            optimizer, _ = transformer(name, **more)
            for _ in range(4):
                optimizer.step()
            entry = found[f"{name} {way}"] = {"operations": operations(optimizer, 4)}
            entry["kept"] = matrices_kept(optimizer)
            for step in (9, 10):
                with collectives() as seen:
                    optimizer.step()
                entry[step] = seen
    return found


def lone(**more: Any) -> torch.Tensor:
    """One matrix alone after one step."""
    p = nn.Parameter(numbers((9, 7), 1))
    p.grad = numbers((9, 7), 2)
    piste.Muon([p], **more).step()
    return p.detach()


def lonely() -> dict[str, Any]:
    """One owner among four processes."""
    with collectives() as seen:
        weight = lone(distribute=dist.group.WORLD)
    return {"weight": weight, "kinds": [kind for kind, _ in seen]}


# ---------------------------------------------------------------------------------------------------------------------
# Models: tied and frozen weights, accumulated gradients

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Muon", {}),
    ("NorMuon", {}),
    ("Shampoo", {"eps": 0.05, "start": 2, "every": 2, "block_size": 4}),
    ("SOAP", {"eps": 0.05, "every": 2, "max_size": 6}),
    ("PSGDKron", {"flat_start": 2, "probability_decay": 1.0, "least_probability": 0.5}),
    ("AdamW", {}),
    ("Adafactor", {}),
    ("Lamb", {}),
]


class Tied(nn.Module):
    """A table that makes predictions, too; a layer that is not trained; a vector shorter than there are processes.

    No axis of a preconditioned matrix is longer than gradients have rank, which would leave eigenvectors open.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(7, 6)
        self.wide = nn.Linear(6, 10)
        self.fixed = nn.Linear(10, 6).requires_grad_(False)
        self.back = nn.Linear(6, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        h = self.back(torch.tanh(self.fixed(torch.tanh(self.wide(self.table(words))))))
        return self.head(torch.cat([h[..., :3] * self.scale, h[..., 3:]], -1))


def learn(name: str, options: dict[str, Any], model: nn.Module, rank: int = 0, size: int = 1) -> list[torch.Tensor]:
    """Weights after some steps, each from two backward passes over this process's share of a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(piste, name)(trained, lr=1e-2, engine="foreach", **options)
    for step in range(STEPS):
        words = torch.randint(7, (2 * PROCESSES, 3), generator=torch.Generator().manual_seed(step))
        passes = words.chunk(size)[rank].chunk(2)
        optimizer.zero_grad()
        for number, part in enumerate(passes):
            last = number == len(passes) - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            idle = isinstance(model, nn.parallel.DistributedDataParallel) and not last
            with model.no_sync() if idle else nullcontext():  # type: ignore[operator]
                loss = nn.functional.cross_entropy(model(part).flatten(0, 1), part.roll(1, 1).flatten())
                (loss / len(passes)).backward()
        optimizer.step()
    weights = (p.detach() for p in model.parameters())
    return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in weights]


def models(rank: int, mesh: Any, pairs: Any) -> dict[str, list[list[torch.Tensor]]]:
    """Every optimizer on four processes and on two; and on two times two, where each shard has a replica."""
    pair, place = pairs["shard"], pairs["shard"].get_local_rank()
    found: dict[str, list[list[torch.Tensor]]] = {}
    for name, options in MODELS:
        runs = found[name] = []
        for group, at, size in ((dist.group.WORLD, rank, PROCESSES), (pair.get_group(), place, 2)):
            ddp = nn.parallel.DistributedDataParallel(Tied().double(), process_group=group)
            runs.append(learn(name, {**options, "distribute": group}, ddp, at, size))
        for on, at, size in ((mesh, rank, PROCESSES), (pair, place, 2), (pairs, rank, PROCESSES)):
            runs.append(learn(name, options, fully_shard(Tied().double(), mesh=on), at, size))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adamw in 8 bits": ("AdamW", {"state": "8bit"}),
    "adafactor": ("Adafactor", {}),
    "ranger": ("Ranger", {"k": 2}),
    "muon": ("Muon", {}),
    # the first weight is more than a quarter of the work, so that it is divided among four and not among two; gradients
    # of eight examples lack rank, and a ridge of 1e-12 would make a thousand of what rounding leaves there
    "shampoo": ("Shampoo", {"start": 2, "every": 2, "block_size": 64, "eps": 1e-2}),
    "soap": ("SOAP", {"every": 2}),
    "psgd": ("PSGDKron", {"flat_start": 1, "probability_decay": 1.0, "least_probability": 0.5}),
}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 90), nn.Tanh(), nn.Linear(90, 61), nn.Tanh(), nn.Linear(61, 3))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every process: four equal gradients are averaged without rounding."""
    for step in steps:
        optimizer.zero_grad()
        model(numbers((8, 96), step)).square().mean().backward()
        optimizer.step()


def setting(case: str, model: nn.Module, **more: Any) -> piste.Optimizer:
    name, options = SAVED[case]
    make = getattr(piste, name)
    optimizer: piste.Optimizer = make(model.named_parameters(), lr=1e-2, engine="foreach", **options, **more)
    return optimizer


def checkpoint(model: nn.Module, optimizer: piste.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resume(folder: str, model: nn.Module, optimizer: piste.Optimizer, **options: Any) -> None:
    found = checkpoint(model, optimizer)
    dcp.load(found, checkpoint_id=folder, **options)
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])


def whole(model: nn.Module, optimizer: piste.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds about the weights, whole."""
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
    return {f"{name}.{k}": torch.as_tensor(x).clone() for name, entries in state.items() for k, x in entries.items()}


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


def checkpoints(folder: str, mesh: Any, pairs: Any) -> dict[str, Any]:
    """Saved by four processes, resumed by each pair of them."""
    found: dict[str, Any] = {}
    pair = pairs["shard"]
    for case in [*SAVED, "soap of replicas"]:
        replicas = case not in SAVED
        name = case.removesuffix(" of replicas")

        def ready(on: Any, name: str = name, replicas: bool = replicas) -> tuple[nn.Module, piste.Optimizer]:
            group = on.get_group()
            model = (
                nn.parallel.DistributedDataParallel(net(), process_group=group)
                if replicas
                else fully_shard(net(), mesh=on)
            )
            return model, setting(name, model, **({"distribute": group} if replicas else {}))

        model, optimizer = ready(mesh)
        fit(model, optimizer, range(3))
        dcp.save(checkpoint(model, optimizer), checkpoint_id=f"{folder}/{case}")
        saved = whole(model, optimizer)
        fit(model, optimizer, range(3, 6))
        again, other = ready(pair)
        resume(f"{folder}/{case}", again, other, process_group=pair.get_group())
        loaded = whole(again, other)
        fit(again, other, range(3, 6))
        full, third = ready(mesh)
        set_optimizer_state_dict(
            full,
            third,
            {**get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))},
            options=StateDictOptions(full_state_dict=True),
        )
        found[case] = {
            "saved": saved,
            "loaded": loaded,
            "went on": weights_of(model),
            "resumed": weights_of(again),
            "last": whole(model, optimizer),
            "in full": whole(full, third),
        }
    return found


# ---------------------------------------------------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, str]:
    """Replicas that are none."""
    found = {}
    for what in ("weights of other shapes", "other weights", "other gradients"):
        odd = rank == 2
        p = nn.Parameter(torch.ones(3, 2 if odd and "shapes" in what else 3) * (2 if odd and "other w" in what else 1))
        p.grad = torch.ones_like(p) * (1 + odd)
        optimizer = piste.Muon([p], distribute=dist.group.WORLD)
        with pytest.raises(ValueError, match="legal: ") as error:
            optimizer.step()
        found[what] = f"{error.value} {optimizer.state[p]}"
    return found


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        results = {
            "replicas": [train(*case, distribute=dist.group.WORLD) for case in MATRIX],
            "shards": [train(*case, mesh) for case in MATRIX],
            "refusals": refusals(rank),
            "accounts": accounts(mesh),
            "lonely": lonely(),
            "models": models(rank, mesh, pairs),
            "checkpoints": checkpoints(folder, mesh, pairs),
        }
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shared")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


processes = pytest.mark.slow  # four processes that import torch


#: norms of whole weights are added up in another order over shards; products of stacks of another size round otherwise
LOOSE = {"shards": ("NorMuon", "Shampoo"), "replicas": ("Shampoo",)}


@processes
@pytest.mark.parametrize("way", ["replicas", "shards"])
@pytest.mark.parametrize("case", range(len(MATRIX)), ids=[f"{name}-{options}" for name, options in MATRIX])
def test_shared_work_gives_the_same_bits(case: int, way: str, ranks: list[dict[str, Any]]) -> None:
    """Weights, moments, codes and matrices, against one process that does everything."""
    expected = train(*MATRIX[case])
    loose = MATRIX[case][0] in LOOSE[way]
    for rank in ranks:
        found = rank[way][case]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if loose:
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(found[key], value), key


@processes
@pytest.mark.parametrize("way", ["replicas", "shards"])
@pytest.mark.parametrize("name", COUNTED)
def test_each_of_four_processes_does_a_third_at_most(name: str, way: str, ranks: list[dict[str, Any]]) -> None:
    """Products and decompositions, counted by torch; and the bytes of the matrices that are kept."""
    alone, kept = one_process(name)[:2]
    each = [rank["accounts"][f"{name} {way}"] for rank in ranks]
    assert sum(entry["operations"] for entry in each) == pytest.approx(alone)
    assert max(entry["operations"] for entry in each) <= alone / 3
    assert sum(entry["kept"] for entry in each) == kept
    assert max(entry["kept"] for entry in each) <= kept / 3


def one_process(name: str) -> tuple[float, int, int]:
    """Operations of steps 5 to 8, bytes of matrices, and bytes of other states."""
    optimizer, _ = transformer(name)
    for _ in range(4):
        optimizer.step()
    done, kept = operations(optimizer, 4), matrices_kept(optimizer)
    everything = sum(
        x.nbytes for entries in optimizer.state.values() for x in entries.values() if isinstance(x, torch.Tensor)
    )
    return done, kept, everything - kept


#: a step without a renewal
PLAIN = {"Muon": 9, "Shampoo": 9, "SOAP": 10, "PSGDKron": 9}


@processes
def test_one_collective_each_way(ranks: list[dict[str, Any]]) -> None:
    """Results alone where every process has the gradients, else gradients to the owners first."""
    for rank in ranks:
        kinds = {key: [kind for kind, _ in entry[PLAIN[key.split()[0]]]] for key, entry in rank["accounts"].items()}
        assert kinds == {
            "Muon replicas": ["all_gather"],
            "Muon shards": ["all_to_all"] * 2,
            "Shampoo replicas": ["all_gather"],
            "Shampoo shards": ["all_to_all"] * 2,
            "SOAP replicas": ["all_gather"] * 2,
            "SOAP shards": ["all_to_all"] * 4,
            "PSGDKron replicas": ["all_gather"],
            "PSGDKron shards": ["all_to_all"] * 2,
        }


@processes
def test_few_owners_among_many_send_no_padding(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["lonely"]["weight"], lone())
        assert rank["lonely"]["kinds"] == ["all_gather", "all_reduce"]  # are we replicas?, and the result


#: what docs/scaling.md says of the settings that were counted
FORMULAS = {
    "Muon": scaling.muon(),
    "Shampoo": scaling.shampoo(2, kronecker(1024, 1, backwards=True), graft=False),
    "SOAP": scaling.soap(2),
    "PSGDKron": scaling.psgd(0.5),
}


@pytest.mark.parametrize("name", COUNTED)
def test_formulas_of_one_process(name: str) -> None:
    """Operations, averaged over renewals, and bytes of matrices and other states."""
    family, (done, kept, others) = FORMULAS[name], one_process(name)
    weights = [scaling.Weight(shape) for shape in TRANSFORMER]
    assert done / 4 == pytest.approx(sum(map(family.work, weights)))
    assert kept == sum(family.matrices(w.shape) for w in weights)
    assert others == sum(family.state(w.shape) for w in weights)


@processes
@pytest.mark.parametrize("name", COUNTED)
def test_formulas_of_many_processes(name: str, ranks: list[dict[str, Any]]) -> None:
    family, weights = FORMULAS[name], [scaling.Weight(shape) for shape in TRANSFORMER]
    numbers_of = sum(w.shape[0] * w.shape[1] for w in weights)
    for way in ("replicas", "shards"):
        said = scaling.cost(family, weights, PROCESSES, sharded=way == "shards")
        each = [rank["accounts"][f"{name} {way}"] for rank in ranks]
        sent = [sum(size for _, size in entry[PLAIN[name]]) for entry in each]
        assert max(entry["operations"] for entry in each) / 4 == pytest.approx(said.work)
        if way == "replicas":
            assert set(sent) == {said.sent}
        else:  # what an owner of much has itself it need not send: the formula takes the mean
            assert sum(sent) == (family.brought + family.sent) * 4 * numbers_of * (PROCESSES - 1) / PROCESSES
            assert max(sent) == pytest.approx(said.sent, rel=0.15)


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("SGD", {"momentum": 0.9}, scaling.FAMILIES[0]),
        ("AdamW", {}, scaling.FAMILIES[1]),
        ("AdamW", {"state": "8bit"}, scaling.FAMILIES[2]),
        ("Adafactor", {}, scaling.FAMILIES[3]),
    ],
)
def test_bytes_that_formulas_say(name: str, options: dict[str, Any], family: scaling.Family) -> None:
    p = nn.Parameter(torch.zeros(64, 512))
    p.grad = torch.ones_like(p)
    optimizer = getattr(piste, name)([p], **options)
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) == family.state(p.shape)


def test_the_published_tables_are_current() -> None:
    assert scaling.page() in scaling.PAGE.read_text(encoding="utf-8"), "run: python -m scripts.scaling"


@processes
@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_models_learn_what_one_process_learns(name: str, options: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """1e-9: gradients in float64 are added up in another order, and divided by roots of small numbers."""
    expected = learn(name, options, Tied().double())
    for rank in ranks:
        for run in rank["models"][name]:
            for found, value in zip(run, expected, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


@processes
@pytest.mark.parametrize("case", [*SAVED, "soap of replicas"])
def test_checkpoints_go_from_four_processes_to_two(case: str, ranks: list[dict[str, Any]]) -> None:
    """Bit by bit; what follows differs by the order in which shards are added up."""
    for rank in ranks:
        entry = rank["checkpoints"][case]
        for before, after in (("saved", "loaded"), ("last", "in full")):
            assert entry[before].keys() == entry[after].keys()
            for key, value in entry[before].items():
                assert torch.equal(entry[after][key], value), (after, key)
        for found, value in zip(entry["resumed"], entry["went on"], strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@processes
def test_replicas_that_are_none_are_refused_before_anything_changes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for what, words in rank["refusals"].items():
            assert f"process 2 has {what} than process 0" in words
            assert words.endswith("{}")


def test_all_states_are_there_after_one_step() -> None:
    """torch's tools make a step to learn what a checkpoint holds, and load nothing else."""
    for info in OPTIMIZERS:
        weights = [nn.Parameter(numbers(shape, 1)) for shape in ((6, 5), (4,))]
        optimizer = info.optimizer(weights, engine="reference")
        names = []
        for step in range(4):
            for p in weights:
                p.grad = torch.zeros_like(p) if step == 0 else numbers(tuple(p.shape), step)
            optimizer.step()
            names.append([set(entries) for entries in optimizer.state.values()])
        assert names[0] == names[-1], info.name


def test_work_is_dealt_out_evenly() -> None:
    """The largest first, wherever they stand; and what was dealt out before counts."""
    loads = [0.0, 0.0, 0.0]
    assert dealt([3, 5, 3, 4, 5, 3, 4], loads) == [0, 0, 1, 2, 1, 0, 2]
    assert loads == [11, 8, 8]
    assert dealt([1, 1, 1], loads) == [1, 2, 1]


def test_a_group_that_is_none_is_refused() -> None:
    for wish in ("all", 4, True):
        with pytest.raises(ValueError, match=r"distribute=.*legal: None, 'auto', a process group"):
            piste.Muon([nn.Parameter(torch.ones(2, 2))], distribute=wish)
