"""Sorts the weights of an optimizer into buckets, step after step.

Each weight's host numbers (hyper-parameters of its group, its own step number) lead through the guards of its rule to a
graph. The graphs of a step are cut into plans together, so that a total over all weights is complete in the same stage
everywhere. Weights with one plan, device and dtypes form a bucket.

The order that results is a *layout*. Layouts are kept: a step in which every weight has the graph and the formats it
had in an earlier step (all of them, as a rule) only puts new gradients and numbers in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piste.bucket import Bucket
from piste.plan import Plan, build
from piste.storage import State, allocate, compute_dtype
from piste.symbol import Row
from piste.variants import Graph, Variants

__all__ = ["Member", "Roster", "Sorted", "plans_built"]

_PLANS: dict[tuple[Graph, tuple[tuple[str, int], ...]], Plan] = {}
_MOST_LAYOUTS = 32  # Lookahead's phases and patterns of missing gradients; beyond that, sorting anew costs less


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
    """

    p: Tensor
    group: int
    state: dict[str, Any]
    states: Mapping[str, State]
    variants: Variants


class Sorted(NamedTuple):
    """A step, ready to run: its buckets, and the step number that each weight will have taken."""

    buckets: list[Bucket]
    counts: list[tuple[dict[str, Any], int]]

    def finish(self) -> None:
        """Write the step numbers."""
        for state, count in self.counts:
            state["step"] = count


class _Part(NamedTuple):
    """The members that make up one bucket of a layout."""

    plan: Plan
    state_dtypes: tuple[torch.dtype, ...]
    members: list[int]
    weights: list[Tensor]
    states: list[dict[str, Any]]


class _Layout(NamedTuple):
    """Parts, with the formats that all weights and gradients had."""

    parts: list[_Part]
    weights: list[torch.dtype]
    gradients: list[torch.dtype]


class Roster:
    """The weights of an optimizer with all layouts in which they have stepped."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.states = [m.state for m in members]
        self.shapes = [tuple(real(m.p).shape) for m in members]
        kinds: dict[Any, int] = {}
        # weights of one kind take the same way through the guards of the same rule
        self.kinds = [
            kinds.setdefault((m.group, id(m.variants), shape), len(kinds))
            for m, shape in zip(members, self.shapes, strict=True)
        ]
        self.layouts: dict[Any, _Layout] = {}

    def sort(self, gradients: Sequence[Tensor | None], hp: Sequence[Mapping[str, float]]) -> Sorted:
        """The step that these gradients (None: the weight rests) and numbers per group make."""
        active = [i for i, g in enumerate(gradients) if g is not None]
        counts = [(state, state.get("step", 0) + 1) for state in (self.states[i] for i in active)]
        starts = list(zip([self.kinds[i] for i in active], [t for _, t in counts], strict=True))
        first = dict(zip(reversed(starts), reversed(active), strict=True))  # a member for each kind and step number
        rows: dict[Any, Row] = {}
        ways = {start: self._way(i, start[1], hp, rows) for start, i in first.items()}
        graphs = [ways[start][0] for start in starts]
        row_of = {} if len(rows) == 1 else {i: ways[start][1] for i, start in zip(active, starts, strict=True)}

        key = (tuple(active), tuple(graphs))
        buckets = self._placed(self.layouts.get(key), gradients, rows, row_of)
        if buckets is None:
            if len(self.layouts) >= _MOST_LAYOUTS:
                self.layouts.clear()
            self.layouts[key] = self._layout(active, graphs, gradients)
            buckets = self._placed(self.layouts[key], gradients, rows, row_of)
        return Sorted(buckets or [], counts)

    def _way(self, i: int, t: int, hp: Sequence[Mapping[str, float]], rows: dict[Any, Row]) -> tuple[Graph, Row]:
        """The graph of a member's step, and its host numbers, shared by all weights for which they are the same."""
        group, variants = self.members[i].group, self.members[i].variants
        row = rows.get((group, t)) or Row(hp[group], t)
        graph = variants.graph(row, self.shapes[i])
        if graph.by_shape:
            shape = self.shapes[i]
            return graph, rows.setdefault((group, t, shape), row.at(shape))
        return graph, rows.setdefault((group, t), row)

    def _layout(self, active: Sequence[int], graphs: Sequence[Graph], gradients: Sequence[Tensor | None]) -> _Layout:
        """Sort the members of a step by plan, device and dtypes. Empty weights take their steps in no bucket."""
        plans = _aligned(dict.fromkeys(graphs))
        layout = _Layout([], [], [])
        parts: dict[Any, _Part] = {}
        for i, graph in zip(active, graphs, strict=True):
            (p, _, state, states, _), g = self.members[i], gradients[i]
            if g is None or not p.numel():
                continue
            names = graph.ordered_states
            for name in names:
                if name not in state:
                    state[name] = allocate(states[name], real(p))
            dtypes = tuple([state[name].dtype for name in names])
            key = (graph, p.device, p.dtype, g.dtype, dtypes)
            part = parts.get(key)
            if part is None:
                part = parts[key] = _Part(plans[graph], dtypes, [], [], [])
                layout.parts.append(part)
            part.members.append(i)
            part.weights.append(p)
            part.states.append(state)
        for part in layout.parts:
            layout.weights.extend(p.dtype for p in part.weights)
            layout.gradients.extend(g.dtype for i in part.members if (g := gradients[i]) is not None)
        return layout

    def _placed(
        self,
        layout: _Layout | None,
        gradients: Sequence[Tensor | None],
        rows: Mapping[Any, Row],
        row_of: Mapping[int, Row],
    ) -> list[Bucket] | None:
        """Buckets in a known layout; None if tensors have been replaced by others of another kind since."""
        if layout is None:
            return None
        buckets: list[Bucket] = []
        formats: tuple[list[torch.dtype], list[torch.dtype]] = [], []
        for part in layout.parts:
            homes: dict[str, list[Any]] = {"p": part.weights, "g": [gradients[i] for i in part.members]}
            for known, tensors in zip(formats, homes.values(), strict=True):
                known.extend([x.dtype for x in tensors])
            if part.weights[0].is_complex():
                homes = {home: [torch.view_as_real(x) for x in tensors] for home, tensors in homes.items()}
            for name, dtype in zip(part.plan.graph.ordered_states, part.state_dtypes, strict=True):
                tensors = homes[f"state.{name}"] = [state.get(name) for state in part.states]
                if any([x is None or x.dtype != dtype for x in tensors]):  # noqa: C419 (a list is twice as fast)
                    return None
            p = homes["p"][0]
            placed = _places(part.members, rows, row_of)
            buckets.append(Bucket(part.plan, p.device, compute_dtype(p.dtype), homes, *placed))
        return buckets if formats == (layout.weights, layout.gradients) else None


def _places(members: Sequence[int], rows: Mapping[Any, Row], row_of: Mapping[int, Row]) -> tuple[list[Row], list[int]]:
    """The distinct rows of these members, and for each member the place of its own."""
    if not row_of:
        return list(rows.values()), [0] * len(members)
    places: dict[int, int] = {}
    found: list[Row] = []
    for i in members:
        if id(row_of[i]) not in places:
            places[id(row_of[i])] = len(found)
            found.append(row_of[i])
    return found, [places[id(row_of[i])] for i in members]


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
