"""One graph for all outcomes: how a step is traced that a CUDA graph is to record.

A recorded step runs again without Python, so nothing that changes from step to step may be a Python number. Which those
are is known: the weight's own step number, and hyper-parameters that are tensors (the learning rate, the decay). What
follows from them alone would be worked out on the host, and is worked out on the device instead
(:mod:`piste.device_numbers`): to a plan it is a ``number``, a value per weight that is there when the step begins, as
a finished norm would be. So engines need to know nothing of it.

A branch on such a number (RAdam's rectification, Lookahead's k-th step) cannot be taken by Python either. The rule is
traced once for each way its branches can turn out, and the results are joined by ``where``. Branches on numbers that
stay on the host choose between graphs as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from piste.symbol import ALL, FULL, HOST, TENSOR, LanguageError, Row, Sym, Trace, topological
from piste.variants import Graph

__all__ = ["all_outcomes"]

_MOST_OUTCOMES = 256

Path = list[tuple[Sym, bool]]


@dataclass
class _Outcome(Trace):
    """A reading of a rule in which branches on device numbers turn out as ``prescribed``, and true beyond that."""

    device: frozenset[str] = frozenset()
    prescribed: tuple[bool, ...] = ()
    taken: Path = field(default_factory=list)

    def guard(self, sym: Sym) -> bool:
        if sym.op == "const" or not moves(sym, self.device):
            return super().guard(sym)
        if sym not in self.decided:
            place = len(self.taken)
            outcome = self.prescribed[place] if place < len(self.prescribed) else True
            self.decided[sym] = outcome
            self.taken.append((sym, outcome))
        return self.decided[sym]


def moves(sym: Sym, device: frozenset[str]) -> bool:
    """Does a host number change without Python: with the step, or with a hyper-parameter that is a tensor?"""
    return any(s.op == "t" or (s.op == "hp" and s.attr in device) for s in topological([sym]))


def all_outcomes(
    read: Callable[[Trace], Graph], row: Row, device: frozenset[str], *, skippable: bool, watch: bool
) -> tuple[Path, Graph]:
    """Trace a rule once for all steps.

    Args:
        read: reads the rule in a trace.
        row: host numbers; those in ``device`` are tensors.
        device: hyper-parameters that live on the device.
        skippable: nothing changes where the value ``skip`` is not 0.
        watch: the norm of the whole update is measured.

    Returns:
        The branches that were decided on the host, and the graph.
    """
    return _Reading(read, row, device).whole(skippable=skippable, watch=watch)


@dataclass
class _Reading:
    read: Callable[[Trace], Graph]
    row: Row
    device: frozenset[str]
    nodes: dict[tuple[Any, ...], Sym] = field(default_factory=dict)  # shared, so that equal values are one value
    states: frozenset[str] = frozenset()
    path: dict[Sym, bool] = field(default_factory=dict)
    outcomes: int = 0

    @cached_property
    def trace(self) -> Trace:
        return Trace(self.row, nodes=self.nodes)

    def whole(self, *, skippable: bool, watch: bool) -> tuple[Path, Graph]:
        outputs = self.below(())
        if skippable:
            skip = self.trace.node("gt", (self.trace.node("skip", kind=ALL), self.constant(0.0)), kind=ALL)
            for target, new in outputs.items():
                if not target.startswith("watch."):
                    outputs[target] = self.select(skip, self.old(target, new), new)
        if watch and "p" in outputs:
            change = self.trace.node("sub", (outputs["p"], self.old("p", outputs["p"])))
            node = self.trace.node("total", (self.trace.node("square", (change,)),), "update_norm", ALL)
            outputs["watch.update_norm"] = node
        return list(self.path.items()), Graph(self.lowered(outputs), self.states)

    # branches --------------------------------------------------------------------------------------------------------
    def below(self, outcomes: tuple[bool, ...]) -> dict[str, Sym]:
        """What becomes of the weight and its states where the first branches turn out like this."""
        self.outcomes += 1
        if self.outcomes > _MOST_OUTCOMES:
            raise LanguageError(f"a rule branches in more than {_MOST_OUTCOMES} ways on its step; capturable=False")
        trace = _Outcome(self.row, nodes=self.nodes, device=self.device, prescribed=outcomes)
        with trace:
            graph = self.read(trace)
        self.states |= graph.states
        self.path.update(trace.path)
        results = dict(graph.outputs)
        for place in reversed(range(len(outcomes), len(trace.taken))):
            others = self.below((*(outcome for _, outcome in trace.taken[:place]), False))
            results = self.joined(trace.taken[place][0], results, others)
        return results

    def joined(self, test: Sym, yes: Mapping[str, Sym], no: Mapping[str, Sym]) -> dict[str, Sym]:
        found = {}
        for target in dict.fromkeys((*yes, *no)):
            if target.startswith("watch.") and yes.get(target) is not no.get(target):
                raise LanguageError(f"a sum over all weights ({target[6:]}) stands behind a branch on the step")
            old = self.old(target, yes[target] if target in yes else no[target])
            found[target] = self.select(test, yes.get(target, old), no.get(target, old))
        return found

    def old(self, target: str, new: Sym) -> Sym:
        """What a weight or a state is before the step."""
        if target.startswith("state."):
            return self.trace.node("state", attr=target.removeprefix("state."), kind=new.kind)
        return self.trace.node("p", kind=FULL)

    def select(self, test: Sym, yes: Sym, no: Sym) -> Sym:
        return yes if yes is no else self.trace.node("where", (test, yes, no), kind=yes.kind)

    # host numbers ----------------------------------------------------------------------------------------------------
    def lowered(self, outputs: Mapping[str, Sym]) -> dict[str, Sym]:
        """The same, with values from the device in the place of what the host would work out in every step."""
        new: dict[Sym, Sym] = {}
        for sym in topological(outputs.values()):
            new[sym] = sym if sym.kind == HOST else self.with_numbers(sym, new)
        return {target: new[sym] for target, sym in outputs.items()}

    def with_numbers(self, sym: Sym, new: Mapping[Sym, Sym]) -> Sym:
        moving = {a for a in sym.args if a.kind == HOST and moves(a, self.device)}
        if moving and sym.op == "tally":
            raise LanguageError(f"tally({sym.attr!r}) adds {moving.pop()!r}, which changes with the step, on the host")
        op, args = sym.op, list(sym.args)
        if op == "div" and args[1] in moving:  # kernels multiply by one over a number, too
            op, args[1] = "mul", self.trace.node("div", (self.constant(1.0), args[1]))
        given = [self.given(a, new) for a in args]
        if op == "where" and args[0] in moving:
            given[0] = self.trace.node("gt", (given[0], self.constant(0.5)), kind=TENSOR)
        return self.trace.node(op, tuple(given), sym.attr, sym.kind)

    def given(self, argument: Sym, new: Mapping[Sym, Sym]) -> Sym:
        if argument.kind != HOST:
            return new[argument]
        if not moves(argument, self.device):
            return argument
        return self.trace.node("number", (argument,), kind=TENSOR)

    def constant(self, value: float) -> Sym:
        return self.trace.node("const", attr=value, kind=HOST)
