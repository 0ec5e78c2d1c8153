"""Sorts the weights of an optimizer into buckets, step after step.

Each weight's host numbers (hyper-parameters of its group, its own step number) lead through the guards of its rule to a
graph. The graphs of a step are cut into plans together, so that a total over all weights is complete in the same stage
everywhere. Weights with one plan, device and dtypes form a bucket.

The order that results is a *layout*. Layouts are kept: a step in which the same weights have gradients, and the graphs
they had in an earlier step (all of them, as a rule), only puts new gradients and numbers in place. What is done per
weight here is done by functions that run over whole lists, because with hundreds of small weights it is the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from piste.bucket import Bucket, Seats, beside
from piste.codecs import STRIDE, Codec
from piste.device_numbers import Clock, Counters, recording
from piste.plan import Plan, build
from piste.sharding import first_element, is_sharded, local, matching, spread_of
from piste.shares import Share
from piste.storage import PLAIN, Formats, State, codec_for, companion, compute_dtype, keep_rest, stored, weight_codec
from piste.symbol import Row
from piste.variants import Graph, Variants

__all__ = ["Member", "Roster", "Sorted", "plans_built", "real"]

_PLANS: dict[tuple[Graph, tuple[tuple[str, int], ...]], Plan] = {}
_MOST_LAYOUTS = 32  # Lookahead's phases and patterns of missing gradients; beyond that, sorting anew costs less
_MOST_STEPS = 4096  # step numbers of one kind of weight whose graphs are remembered

_dtype, _device, _is_cpu = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")


def plans_built() -> int:
    """How many plans exist in this process. Training builds its plans in the first steps and none after."""
    return len(_PLANS)


class Member(NamedTuple):
    """One weight of an optimizer.

    Attributes:
        p: the weight.
        group: index of its parameter group.
        state: its states by name, with ``"step"``; missing ones are allocated when a rule first needs them.
        states: what the states are.
        variants: its rule.
        formats: how the weight and its states are stored.
        share: who works on its matrices and keeps them; None if every process does.
    """

    p: Tensor
    group: int
    state: dict[str, Any]
    states: Mapping[str, State]
    variants: Variants
    formats: Formats = PLAIN
    share: Share | None = None


class Sorted(NamedTuple):
    """A step, ready to run: its buckets, and the step number that each weight will have taken (on the device: 0)."""

    buckets: list[Bucket]
    states: Sequence[dict[str, Any]]
    counts: Sequence[int]
    counters: Counters | None = None
    clocks: Sequence[Clock] = ()

    @property
    def renews(self) -> bool:
        """Are inverse roots or eigenbases worked out anew in it?"""
        return any(bucket.plan.renews for bucket in self.buckets)

    @property
    def referred(self) -> tuple[Any, ...]:
        """What a CUDA graph that recorded the step refers to: it has to live for as long as somebody may replay it."""
        return self.counters, self.clocks, [bucket.seats for bucket in self.buckets]

    def finish(self, skip: Tensor | None = None) -> None:
        """Write the step numbers; on the device, unless ``skip`` is not 0 there."""
        if self.counters is not None:
            self.counters.advance(self.clocks, skip)
            return
        for state, count in zip(self.states, self.counts, strict=True):
            state["step"] = count


class _Part(NamedTuple):
    """The members that make up one bucket of a layout, and what they were when it was made."""

    members: list[int]
    seats: Seats
    states: list[dict[str, Any]]
    gradient_dtype: torch.dtype


class Roster:
    """The weights of an optimizer with the layouts in which they have stepped."""

    def __init__(self, members: Sequence[Member], counters: Counters | None = None) -> None:
        self.members, self.counters = members, counters
        self.sharded = any(is_sharded(m.p) for m in members)
        self.weights = [local(m.p) for m in members]
        self.states = [m.state for m in members]
        self.groups = [m.group for m in members]
        self.shapes = [tuple(real(m.p).shape) for m in members]
        self.empty = {i for i, m in enumerate(members) if not m.p.numel()}
        self.shared = any(m.share is not None for m in members)
        self.plain = all(m.formats == PLAIN for m in members)
        kinds: dict[Any, int] = {}
        # weights of one kind take the same way through the guards of the same rule
        self.kinds = [
            kinds.setdefault((m.group, id(m.variants), shape), len(kinds))
            for m, shape in zip(members, self.shapes, strict=True)
        ]
        self.example = dict(zip(reversed(self.kinds), reversed(range(len(members))), strict=True))
        self.known: list[dict[int, Graph]] = [{} for _ in kinds]  # by kind: step number -> graph
        self.known_for: Any = None
        self.layouts: dict[Any, list[_Part]] = {}
        self.clocks: dict[Any, list[Clock]] = {}  # by the weights that have gradients

    def sort(self, gradients: Sequence[Tensor | None], hp: Sequence[Mapping[str, float]]) -> Sorted:
        """The step that these gradients (None: the weight rests) and numbers per group make."""
        if self.sharded:  # a weight may have been given other memory since
            self.weights = [local(m.p) for m in self.members]
            gradients = [
                None if g is None else local(matching(g, m.p)) for m, g in zip(self.members, gradients, strict=True)
            ]
        resting = any(map(is_, gradients, repeat(None)))
        active = [i for i, g in enumerate(gradients) if g is not None] if resting else list(range(len(gradients)))
        if not active:
            return Sorted([], [], [])
        states = _pick(self.states, active) if resting else self.states
        if self.counters is None:
            counts = _next(states)
        else:  # they are on the device, and decide nothing here
            counts = [0] * len(active)
            self.counters.settle(self.states, active)
        graphs = self._graphs(_pick(self.kinds, active) if resting else self.kinds, counts, hp)
        alike = graphs.count(graphs[0]) == len(graphs)
        key = tuple(active) if resting else None, graphs[0] if alike else tuple(graphs)
        layout = self.layouts.get(key)
        if layout is None or not self._fits(layout, gradients):
            if self.counters is not None and recording():
                raise RuntimeError(
                    "the first step with these weights and settings is being recorded into a CUDA graph; take one "
                    "like it before the recording begins, so that states and tables are there"
                )
            if len(self.layouts) >= _MOST_LAYOUTS:
                self.layouts.clear()
            layout = self.layouts[key] = self._layout(active, graphs, gradients)
        buckets = self._placed(layout, gradients, counts, active, hp)
        return Sorted(buckets, states, counts, self.counters, self._clocks(key[0], active))

    def _clocks(self, key: Any, active: Sequence[int]) -> list[Clock]:
        """The counts of the weights that step, device by device."""
        if self.counters is None:
            return []
        if key not in self.clocks:
            device_of = [self.counters.place[i][0] for i in active]
            alike = [
                [i for i, d in zip(active, device_of, strict=True) if d == one] for one in dict.fromkeys(device_of)
            ]
            self.clocks[key] = [self.counters.clock(members) for members in alike]
        return self.clocks[key]

    def _graphs(self, kinds: Sequence[int], counts: Sequence[int], hp: Sequence[Mapping[str, float]]) -> list[Graph]:
        """The graph of each weight's step. Guards are evaluated once per kind and step number."""
        if counts.count(counts[0]) == len(counts):
            found = {kind: self._graph(kind, counts[0], hp) for kind in self.example}
            return [found[kind] for kind in kinds]
        deciding = [[hp[m.group][name] for name in m.variants.reads] for m in map(self._example, self.example)]
        if deciding != self.known_for:
            self.known, self.known_for = [{} for _ in self.known], deciding
        known = self.known
        try:
            return [known[kind][t] for kind, t in zip(kinds, counts, strict=True)]
        except KeyError:
            return [self._remembered(kind, t, hp) for kind, t in zip(kinds, counts, strict=True)]

    def _remembered(self, kind: int, t: int, hp: Sequence[Mapping[str, float]]) -> Graph:
        known = self.known[kind]
        if t not in known:
            if len(known) >= _MOST_STEPS:
                known.clear()
            known[t] = self._graph(kind, t, hp)
        return known[t]

    def _example(self, kind: int) -> Member:
        return self.members[self.example[kind]]

    def _graph(self, kind: int, t: int, hp: Sequence[Mapping[str, float]]) -> Graph:
        member = self._example(kind)
        return member.variants.graph(Row(hp[member.group], t), self.shapes[self.example[kind]])

    def _layout(self, active: Sequence[int], graphs: list[Graph], gradients: Sequence[Tensor | None]) -> list[_Part]:
        """Sort the members of a step by plan, device and dtypes. Empty weights take their steps in no bucket."""
        parts: list[_Part] = []
        plans = _aligned(dict.fromkeys(graphs))
        for graph, plan in plans.items():
            alike = len(plans) == 1
            members = list(active) if alike else [i for i, g in zip(active, graphs, strict=True) if g is graph]
            if self.empty:
                members = [i for i in members if i not in self.empty]
            self._allocate(graph, members)
            for same in self._by_format(graph, members, gradients):
                parts.append(self._part(plan, same, gradients))
        return parts

    def _allocate(self, graph: Graph, members: Sequence[int]) -> None:
        for name in graph.ordered_states:
            for i in members:
                if name not in self.states[i]:
                    m = self.members[i]
                    elsewhere = m.share is not None and m.share.mine is None
                    part = None if m.share is None else m.share.shape
                    m.state.update(stored(name, m.states[name], real(m.p), m.formats, elsewhere=elsewhere, part=part))
        for i in () if self.plain else members:
            m = self.members[i]
            keep_rest(m.p, m.formats.weights, m.state)

    def _phase(self, i: int) -> int:
        """Where the thresholds of a weight begin: 16 bits that its place and its group's seed decide.

        A shard begins where its first element stands within the weight.
        """
        m = self.members[i]
        return (crc32(f"{m.formats.seed} {i}".encode()) + first_element(m.p) * STRIDE) & 0xFFFF

    def _codecs(self, graph: Graph, i: int) -> dict[str, Codec]:
        """How the homes of a weight are stored, where not as they are."""
        if self.plain:
            return {}
        m = self.members[i]
        found = {f"state.{n}": codec_for(m.states[n], real(m.p), m.formats.state) for n in graph.ordered_states}
        found["p"] = weight_codec(m.p, m.formats.weights)
        return {home: codec for home, codec in found.items() if codec is not None}

    def _by_format(self, graph: Graph, members: list[int], gradients: Sequence[Tensor | None]) -> Iterable[list[int]]:
        """Members of one device and choice of dtypes together."""
        if not members:
            return []
        weights, states, given = (_pick(items, members) for items in (self.weights, self.states, gradients))
        kept = [list(map(itemgetter(name), states)) for name in graph.ordered_states]
        columns = [list(map(_dtype, tensors)) for tensors in (weights, given, *kept)]
        columns.append(_devices(weights))
        if self.sharded:
            columns.append([spread_of(self.members[i].p) for i in members])
        if self.shared:
            columns.append([share and share.team for share in (self.members[i].share for i in members)])
        if not self.plain:
            columns.append([tuple(self._codecs(graph, i).items()) for i in members])
        if all(column.count(column[0]) == len(column) for column in columns):
            return [members]
        alike: dict[Any, list[int]] = {}
        for i, *key in zip(members, *columns, strict=True):
            alike.setdefault(tuple(key), []).append(i)
        return alike.values()

    def _part(self, plan: Plan, members: list[int], gradients: Sequence[Tensor | None]) -> _Part:
        weights, states = _pick(self.weights, members), _pick(self.states, members)
        homes = {"p": weights} if not weights[0].is_complex() else {"p": [torch.view_as_real(p) for p in weights]}
        for name in plan.graph.ordered_states:
            homes[f"state.{name}"] = self._here(map(itemgetter(name), states))
        codecs = self._codecs(plan.graph, members[0])
        for home, codec in codecs.items():
            if codec.rest is not None:
                homes[beside(home)] = self._here(map(itemgetter(companion(home.removeprefix("state."))), states))
        shares = [self.members[i].share for i in members]
        team = shares[0].team if shares[0] is not None else None
        shapes = _pick(self.shapes, members)
        stakes = [x for i, share in enumerate(shares) if share is not None for x in share.stakes(i, shapes[i])]
        seats = Seats(
            plan, weights[0].device, compute_dtype(homes["p"][0].dtype), homes,
            _pick(self.groups, members), shapes, _addresses(weights),
            codecs, [self._phase(i) for i in members] if codecs else [], spread_of(self.members[members[0]].p),
            team, stakes, {},
        )  # fmt: skip
        if self.counters is not None:
            seats.kept["clock"] = self.counters.clock(members)
        return _Part(members, seats, states, gradients[members[0]].dtype)  # type: ignore[union-attr]

    def _fits(self, layout: list[_Part], gradients: Sequence[Tensor | None]) -> bool:
        """Are the tensors of a known layout still those for which it was made?"""
        return all(
            self._unchanged(part, _pick(self.weights, part.members), _pick(gradients, part.members)) for part in layout
        )

    def _unchanged(self, part: _Part, weights: list[Tensor], gradients: list[Tensor]) -> bool:
        """Have they the dtypes, the places and the states that they had then?"""
        return (
            set(map(_dtype, gradients)) == {part.gradient_dtype}
            and _addresses(weights) == part.seats.addresses
            and all(
                all(map(is_, tensors, self._here(_states(part.states, home))))
                for home, tensors in part.seats.homes.items()
                if home != "p"
            )
        )

    def _here(self, tensors: Iterable[Any]) -> list[Any]:
        """Of sharded tensors the part that is here."""
        return [local(x) for x in tensors] if self.sharded else list(tensors)

    def _placed(
        self,
        layout: list[_Part],
        gradients: Sequence[Tensor | None],
        counts: Sequence[int],
        active: Sequence[int],
        hp: Sequence[Mapping[str, float]],
    ) -> list[Bucket]:
        """Buckets in this layout, with gradients and numbers of this step."""
        whole = len(layout) == 1 and len(layout[0].members) == len(active)
        count_of = {} if whole else dict(zip(active, counts, strict=True))
        buckets: list[Bucket] = []
        for part in layout:
            given = _pick(gradients, part.members)
            if given[0].is_complex():
                given = [torch.view_as_real(g) for g in given]
            steps = list(counts) if whole else [count_of[i] for i in part.members]
            bucket = Bucket(part.seats, {**part.seats.homes, "g": given}, hp, steps)
            if self.counters is not None:
                bucket.clock = part.seats.kept["clock"].next()
            buckets.append(bucket)
        return buckets


def _next(states: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the steps that weights with these states now take."""
    try:
        taken = list(map(itemgetter("step"), states))
    except KeyError:
        taken = [state.get("step", 0) for state in states]
    alike = taken.count(taken[0]) == len(taken)
    return [taken[0] + 1] * len(taken) if alike else [t + 1 for t in taken]


def _devices(weights: list[Tensor]) -> list[Any]:
    """The device of each weight; to ask whether it is the CPU costs half of asking which it is."""
    return [True] * len(weights) if all(map(_is_cpu, weights)) else list(map(_device, weights))


def _states(states: list[dict[str, Any]], home: str) -> Iterable[Tensor | None]:
    """What the weights have under this home now; a state may have been taken away."""
    name = home.removeprefix("state.")
    try:
        return list(map(itemgetter(name), states))
    except KeyError:
        return [state.get(name) for state in states]


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where the numbers of these tensors lie: what shows that a weight was moved or its ``.data`` replaced."""
    return list(map(Tensor.data_ptr, tensors))


def _pick(items: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
    if len(chosen) == len(items):
        return list(items)
    return list(itemgetter(*chosen)(items)) if len(chosen) > 1 else [items[i] for i in chosen]


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as its real view, with an axis of two at the end; a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _aligned(graphs: Iterable[Graph]) -> dict[Graph, Plan]:
    """Plans for the graphs of one step, cut so that shared totals are complete in the same stage in all of them."""
    floors: dict[str, int] = {}
    while True:
        plans = {graph: _plan(graph, floors) for graph in graphs}
        ready = [(name, stage + 1) for plan in plans.values() for name, (_, stage) in plan.totals.items()]
        latest: dict[str, int] = {}
        for name, stage in ready:
            latest[name] = max(latest.get(name, 0), stage)
        if all(stage == latest[name] for name, stage in ready):
            return plans
        floors = latest


def _plan(graph: Graph, floors: Mapping[str, int]) -> Plan:
    key = graph, tuple(sorted((name, floor) for name, floor in floors.items() if name in graph.totals))
    if key not in _PLANS:
        _PLANS[key] = build(graph, dict(key[1]))
    return _PLANS[key]
