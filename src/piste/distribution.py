"""Which process does the matrix work of which weight.

Rules know nothing of it. Every weight whose rule calls functions of whole matrices gets an owner among the processes
that share it, so that what each has to do in a step comes out even; the owner calls the functions and keeps the
matrices (factors, roots, bases). A weight that is more than a process's share of the work, and that the functions see
in blocks, is divided among several. Everything that goes element by element stays where it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.costs import flops
from piste.exchange import Box, Exchange, Stake, Team, gathered_flat
from piste.roster import Member, real
from piste.sharding import Spread, is_sharded, joined, local, spread_of, together
from piste.shares import Blocks, Cut, Share
from piste.storage import State, allocate, compute_dtype
from piste.symbol import FULL, HOST, MATRIX, Row, Sym, compile_host, topological
from piste.variants import Graph

__all__ = ["Job", "Sharing", "check_distribute", "dealt", "divided", "whole_matrices"]

#: steps over which costs are averaged: far from the first, and as many as most renewals are apart
_PROBED = range(1000, 1100)


def check_distribute(owner: str, wish: Any) -> Any:
    """The group of processes that share work; None or ``"auto"`` as they are.

    Raises:
        ValueError: it is nothing of the kind, or this process is not in it.
    """
    if wish is None or (isinstance(wish, str) and wish == "auto"):
        return wish
    legal = "legal: None, 'auto', a process group, or a device mesh of one axis, that this process is in"
    try:
        group = wish.get_group() if hasattr(wish, "get_group") else wish
        rank = torch.distributed.get_rank(group)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{owner} got distribute={wish!r}; {legal} ({error})") from error
    if rank < 0:
        raise ValueError(f"{owner} got distribute={wish!r}; {legal}")
    return group


def dealt(costs: Sequence[float], loads: list[float]) -> list[int]:
    """An owner for each piece of work: the largest first, each to whoever has the least so far.

    Args:
        costs: of the pieces.
        loads: what each process has to do already; brought up to date.

    >>> from piste.distribution import dealt
    >>> dealt([5, 3, 3, 2, 1], [0.0, 0.0])
    [0, 1, 1, 0, 1]
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


class Job(NamedTuple):
    """The work on one weight: its shape, its cost, and what sees it in blocks, if anything does."""

    shape: tuple[int, ...]
    cost: float
    blocks: Blocks | None = None


#: the owner of a weight; or the owners of its parts, and these
Dealt = tuple[tuple[int, ...], "Cut | None"]


def divided(jobs: Sequence[Job], loads: list[float]) -> list[Dealt]:
    """Who works on what. Weights that are more than an even share of all the work are divided, where blocks allow it.

    Those that stay whole are dealt out first; the others fill up what that leaves uneven.

    Args:
        jobs: the weights.
        loads: what each process has to do already; brought up to date.
    """
    share = (sum(job.cost for job in jobs) + sum(loads)) / len(loads)
    cuts = [job.blocks.edges(job.shape) if job.blocks is not None and job.cost > share else None for job in jobs]
    whole = [i for i, cut in enumerate(cuts) if cut is None]
    found: dict[int, Dealt] = {
        i: ((owner,), None) for i, owner in zip(whole, dealt([jobs[i].cost for i in whole], loads), strict=True)
    }
    for i, cut in enumerate(cuts):
        if cut is not None:
            found[i] = _poured(jobs[i], *cut, loads)
    return [found[i] for i in range(len(jobs))]


def _poured(job: Job, axis: int, edges: tuple[int, ...], loads: list[float]) -> Dealt:
    """A weight given out so that what processes have to do comes to one level, as far as whole blocks allow."""
    owners: list[int] = []
    ends = [0]
    reached = 0.0
    for rank, room in enumerate(_rooms(loads, job.cost)):
        reached += room
        end = round((len(edges) - 1) * reached / job.cost)
        if end > ends[-1]:
            owners.append(rank)
            ends.append(end)
    at = tuple(edges[end] for end in ends)
    for owner, (start, stop) in zip(owners, pairwise(at), strict=True):
        loads[owner] += job.cost * (stop - start) / edges[-1]
    assert job.blocks is not None
    return tuple(owners), Cut(job.blocks, job.shape, axis, at) if len(owners) > 1 else None


def _rooms(loads: Sequence[float], amount: float) -> list[float]:
    """What each process takes of an amount of work that raises those with the least to one level."""
    rising = sorted(loads)
    level = 0.0
    for count in range(1, len(rising) + 1):
        level = (amount + sum(rising[:count])) / count
        if count == len(rising) or level <= rising[count]:
            break
    return [max(0.0, level - load) for load in loads]


class Sharing:
    """The owners of one optimizer's weights. Once dealt out a weight stays with its owner.

    Args:
        wish: ``None``: every process does all; ``"auto"``: weights that are spread over processes are shared by these;
            a group: other weights are shared by its processes.
    """

    def __init__(self, wish: Any) -> None:
        self.wish = wish if wish is None or wish == "auto" else Team(wish)
        self.shares: dict[Tensor, Share] = {}
        self._teams: dict[Any, Team | None] = {}
        self._loads: dict[Any, list[float]] = {}

    def deal(self, members: Sequence[Member], hp: Sequence[Mapping[str, float]]) -> list[Member]:
        """The members with their shares, and with what a checkpoint brought where it belongs."""
        fresh = [m for m in members if m.p not in self.shares]
        jobs: dict[Any, Job | None] = {}
        teams = [self._team(m.p) for m in fresh]
        known: list[Job | None] = []
        for m, team in zip(fresh, teams, strict=True):
            key = m.group, id(m.variants), m.p.shape
            if team is not None and key not in jobs:
                jobs[key] = _job(m, hp[m.group])
            known.append(None if team is None else jobs[key])
        for team in dict.fromkeys(t for t in teams if t is not None):
            work = [(m.p, job) for m, t, job in zip(fresh, teams, known, strict=True) if t is team and job is not None]
            if work and team.mesh is None:
                _agree(team, [p for p, _ in work])
            loads = self._loads.setdefault(id(team.group), [0.0] * team.size)
            parts = divided([job for _, job in work], loads)
            self.shares |= {p: Share(team, *part) for (p, _), part in zip(work, parts, strict=True)}
        found = [m._replace(share=self.shares.get(m.p)) for m in members]
        _settle(found)
        return found

    def _team(self, p: Tensor) -> Team | None:
        """The processes that share the work on a weight; None if each does all of it."""
        if self.wish is None:
            return None
        if not is_sharded(p):
            team = self.wish if isinstance(self.wish, Team) else None
            return None if team is None or team.size == 1 else team
        spread = spread_of(p)
        assert spread is not None
        if spread.mesh not in self._teams:
            self._teams[spread.mesh] = _team_of(spread.mesh)
        # other placements (strided shards of two meshes in one) are gathered by torch, on every process
        plain = all(type(x).__name__ in ("Shard", "Replicate") for x in spread.placements)
        return self._teams[spread.mesh] if plain else None


def _team_of(mesh: Any) -> Team | None:
    """The processes of a mesh, if there is one group of all of them."""
    if mesh.size() == 1:
        return None
    if mesh.ndim == 1:
        return Team(mesh.get_group(), mesh)
    everybody = torch.distributed.group.WORLD
    return Team(everybody, mesh) if mesh.size() == torch.distributed.get_world_size() else None


def _job(member: Member, hp: Mapping[str, float]) -> Job | None:
    """Operations that functions of whole matrices take in a step on a weight, on average; None if it needs none."""
    shape = tuple(real(member.p).shape)
    states = [s for s in member.states.values() if s.kind_of(member.p.ndim) == MATRIX]
    first = member.variants.graph(Row(hp, member.state.get("step", 0) + 1), shape)
    if not member.p.numel() or not (states or _opaques(first)):
        return None
    graphs = [member.variants.graph(Row(hp, t), shape) for t in _PROBED]
    if not all(map(_can_be_shared, {first, *graphs})) or not any(map(_opaques, {first, *graphs})):
        return None
    last = dict(zip(graphs, _PROBED, strict=True))
    per_graph = {g: _graph_cost(g, Row(hp, t, shape)) for g, t in last.items()}
    cost = sum(per_graph[g] for g in graphs) / len(graphs)
    # all that is called, and all that is kept, has to belong to the same blocks
    calls = [sym.attr[0] for graph in {first, *graphs} for sym in _opaques(graph)]
    blocks = {id(found): found for found in (_blocks(x) for x in (*calls, *(s.start for s in states)))}
    (only, *others) = blocks.values()
    return Job(shape, cost, None if others else only)


def _blocks(function: Any) -> Blocks | None:
    """What cuts weights into the blocks of which a function sees each alone; None if it sees weights."""
    found = getattr(function, "blocks", None) or getattr(function, "__self__", None)
    return found if hasattr(found, "edges") and hasattr(found, "places") else None


def _opaques(graph: Graph) -> list[Sym]:
    return [sym for sym in topological(graph.outputs.values()) if sym.op == "opaque"]


def _graph_cost(graph: Graph, row: Row) -> float:
    total = 0.0
    for sym in _opaques(graph):
        host = compile_host([a for a in sym.args if a.kind == HOST])
        total += flops(sym.attr[0], row.shape, host(row))
    return total


def _can_be_shared(graph: Graph) -> bool:
    """Do matrices stay among themselves? A number taken of a matrix would be missing where the matrix is not."""
    return all(
        s.kind in (FULL, MATRIX) if s.op == "opaque" else s.kind == MATRIX or all(a.kind != MATRIX for a in s.args)
        for s in topological(graph.outputs.values())
    )


def _agree(team: Team, weights: Sequence[Tensor]) -> None:
    """Refuse to share work on weights, or gradients, that are not the same on all processes."""
    words = repr([(tuple(p.shape), str(p.dtype), p.grad is None) for p in weights]).encode()
    sums = [float(zlib.crc32(words))]
    for tensors in (weights, [p.grad for p in weights if p.grad is not None]):
        norms = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64).cpu() for x in tensors]
        sums.append(float(torch.stack(norms).sum()) if norms else 0.0)
    own = torch.tensor(sums, dtype=torch.float64, device=weights[0].device)
    found = own.new_empty(team.size * len(sums))
    with together("the first step that shares matrix work", team.size):
        gathered_flat(found, own, team.group)
    table = found.view(team.size, -1).cpu()
    for column, what in enumerate(("weights of other shapes", "other weights", "other gradients")):
        values = table[:, column]
        differs = ~torch.isclose(values, values[0], rtol=1e-6 if column else 0.0, atol=0.0, equal_nan=True)
        if differs.any():
            other = int(differs.nonzero()[0])
            raise ValueError(
                f"distribute= shares matrix work over {team.size} processes, and process {other} has {what} than "
                "process 0; legal: replicas of one model whose gradients have been averaged (as "
                "DistributedDataParallel does), or distribute=None"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Matrices between owners and checkpoints


def _matrices(members: Sequence[Member]) -> list[tuple[Member, str, State]]:
    """The matrices that weights keep, by name."""
    return [
        (m, name, state)
        for m in members
        for name, state in m.states.items()
        if name in m.state and state.kind_of(m.p.ndim) == MATRIX
    ]


def _expected(member: Member, state: State) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and the dtype of a matrix that a weight keeps."""
    there = allocate(state, torch.empty(member.p.shape, device="meta"))
    return tuple(there.shape), state.dtype or compute_dtype(member.p.dtype)


def _stakes(entries: Sequence[tuple[Member, Sequence[int]]]) -> tuple[list[Stake], list[Box]]:
    """Who keeps which part of these matrices, of members and shapes; and where each is in what its owner keeps."""
    pairs = [m.share.matrix_stakes(i, shape) for i, (m, shape) in enumerate(entries) if m.share is not None]
    return [stake for same in pairs for stake, _ in same], [box for same in pairs for _, box in same]


def _settle(members: Sequence[Member]) -> None:
    """Bring whole matrices, as checkpoints hold them, to their owners, and nobody else."""
    parted: dict[Any, list[tuple[Member, str]]] = {}
    for m, name, state in _matrices(members):
        kept = m.state[name]
        if m.share is None:
            m.state[name] = kept.full_tensor() if is_sharded(kept) else kept
        elif is_sharded(kept):
            parted.setdefault((m.share.team, spread_of(kept), kept.dtype), []).append((m, name))
        elif m.share.mine is None:
            m.state[name] = kept.new_empty(0) if kept.numel() else kept
        elif m.share.cut is not None and tuple(kept.shape) == _expected(m, state)[0]:
            stakes, _ = _stakes([(m, kept.shape)])
            m.state[name] = torch.cat([kept[box] for _, owner, box in stakes if owner == m.share.team.rank])
    for (team, spread, _), entries in parted.items():
        kept = [m.state[name] for m, name in entries]
        stakes, _ = _stakes([(m, x.shape) for (m, _), x in zip(entries, kept, strict=True)])
        exchange = Exchange(team, spread, [x.shape for x in kept], stakes, "the first step from a checkpoint")
        (wholes,) = exchange.to_owners([[local(x) for x in kept]])
        there: dict[int, list[Tensor]] = {}
        for i, whole in zip(exchange.mine, wholes, strict=True):
            there.setdefault(stakes[i].weight, []).append(whole)
        for i, (m, name) in enumerate(entries):
            own = there.get(i, [local(kept[i]).new_empty(0)])
            m.state[name] = torch.cat(own) if len(own) > 1 else own[0]


def whole_matrices(members: Sequence[Member]) -> dict[Tensor, dict[str, Tensor]]:
    """By weight, the matrices that their owners keep, for a checkpoint; every process has to call this.

    Of weights that are spread over processes they come spread evenly over the same processes, so that none needs
    memory for all of them; of others, whole on every process.
    """
    from torch.distributed.tensor import Shard

    found: dict[Tensor, dict[str, Tensor]] = {}
    alike: dict[Any, list[tuple[Member, str, tuple[int, ...]]]] = {}
    for m, name, state in _matrices(members):
        if m.share is not None and not is_sharded(m.state[name]):
            shape, dtype = _expected(m, state)
            parted = m.share.team.mesh is not None and bool(shape)
            alike.setdefault((m.share.team, dtype, parted), []).append((m, name, shape))
    for (team, _, parted), entries in alike.items():
        spread = Spread(team.mesh, (Shard(0),) * team.mesh.ndim) if parted else None
        stakes, boxes = _stakes([(m, shape) for m, _, shape in entries])
        shapes = [shape for _, _, shape in entries]
        exchange = Exchange(team, spread, shapes, stakes, "state_dict() of an optimizer that shares its work")
        kept = [m.state[name] for m, name, _ in entries]
        own = [kept[stakes[i].weight][boxes[i]] for i in exchange.mine]
        (parts,) = exchange.from_owners([own], kept[0]).wait()
        for (m, name, shape), part in zip(entries, parts, strict=True):
            found.setdefault(m.p, {})[name] = part.clone() if spread is None else joined(part, spread, shape)
    return found
