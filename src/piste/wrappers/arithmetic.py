"""Arithmetic of wrappers: a pipeline over weights and tensors that belong to them, outside of any optimizer's step."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste import execution
from piste.device_numbers import Counters, recording
from piste.execution import Member, Roster
from piste.slots import Part, Pipeline, program, update
from piste.storage import PLAIN, Formats, companion, keep_rest, weight_codec
from piste.variants import Variants

__all__ = ["Arithmetic", "formats_of", "stay"]


@update
def stay(p: Any) -> Any:
    """The weight as it is."""
    return p


def formats_of(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], states: Sequence[dict[str, Any]]
) -> list[Formats]:
    """How an optimizer stores these weights; what it keeps beside each of them is shown in ``states``."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for p, state in zip(weights, states, strict=True):
        group = groups.get(p, {})
        formats = Formats(weights=group.get("weights", "plain"), seed=group.get("seed", 0))
        codec = weight_codec(p, formats.weights)
        if codec is not None and codec.rest is not None:
            keep_rest(p, formats.weights, optimizer.state[p])
            state[companion("p")] = optimizer.state[p][companion("p")]
        found.append(formats if codec is not None else PLAIN)
    return found


class Arithmetic:
    """A part that is run on weights. They are sorted once, and again when they are others.

    Args:
        part: an ``update``, or an ``after``.
        capturable: may a CUDA graph record it? Then runs are counted on the device.
    """

    def __init__(self, part: Part, *, capturable: bool = False) -> None:
        self.pipeline = Pipeline(part) if part.slot == "update" else Pipeline(stay, after=(part,))
        self.capturable = capturable
        self._variants: dict[tuple[int, bool], Variants] = {}
        self._skippable = False
        self._roster = Roster([])
        self._recorded: list[Any] = []  # what recorded runs refer to, for as long as somebody may replay them
        self._groups: list[int] = []
        self._formats: list[Formats] = []

    def run(
        self,
        weights: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        groups: Sequence[int],
        hp: Sequence[Mapping[str, float]],
        engine: str,
        formats: Sequence[Formats] | None = None,
        gradients: Sequence[Tensor] | None = None,
        skip: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the part once.

        Args:
            weights: the weights.
            states: for each weight, its tensors by name; missing ones are allocated, ``"step"`` counts the runs.
            groups: for each weight, which of ``hp`` holds its numbers.
            hp: numbers.
            engine: as :func:`piste.execution.engine_for` takes it.
            formats: for each weight, how it is stored, from :func:`formats_of`.
            gradients: for each weight, what the part sees as ``g``; the weight itself for parts that see none.
            skip: on the device, whether nothing is to change (not 0); for what is ``capturable``.

        Returns:
            The totals that the part asked for, by name.
        """
        formats = [PLAIN] * len(weights) if formats is None else list(formats)
        setting = formats, skip is not None
        if not self._current(weights, states, groups) or setting != (self._formats, self._skippable):
            self._groups, (self._formats, self._skippable) = list(groups), setting
            members = [
                Member(p, group, state, self.pipeline.states, self._program(p.ndim), form)
                for p, state, group, form in zip(weights, states, groups, formats, strict=True)
            ]
            self._roster = Roster(members, self._counters(weights))
        step = self._roster.sort(list(weights if gradients is None else gradients), hp)
        totals = execution.take(step, engine, skip=skip)
        if recording():
            self._recorded.append(step.referred)
        return totals

    def _counters(self, weights: Sequence[Tensor]) -> Counters | None:
        """The counts on the device; those that are there go on as long as the weights are the same."""
        if not self.capturable:
            return None
        known = self._roster.counters
        return known if known is not None and known.serves(weights) else Counters(weights)

    def _current(self, weights: Sequence[Tensor], states: Sequence[dict[str, Any]], groups: Sequence[int]) -> bool:
        roster = self._roster
        return (
            len(weights) == len(roster.members)
            and all(map(operator.is_, weights, (m.p for m in roster.members)))
            and all(map(operator.is_, states, roster.states))
            and list(groups) == self._groups
            and (roster.counters is None or roster.counters.serves(weights))
        )

    def _program(self, ndim: int) -> Variants:
        key = ndim, self._skippable
        if key not in self._variants:
            device = frozenset[str]() if self.capturable else None
            self._variants[key] = program(self.pipeline, {}, ndim, device=device, skippable=self._skippable)
        return self._variants[key]
