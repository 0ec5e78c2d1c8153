"""How a promise is declared, and the list of all cells.

A promise is a function ``check(subject, engine)`` that raises when it is broken. The decorator gives it a title for
the table and says where it applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from conformance.subjects import ENGINES, Subject

# What makes weights depend on each other by definition.
ONE_ESTIMATE = {"Prodigy": "one estimate for all weights"}
ONE_AVERAGE = dict.fromkeys(
    ("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"), "one share of the average for all weights of a group"
)

Check = Callable[[Subject, str], None]


@dataclass(frozen=True)
class Promise:
    """One column of the matrix."""

    name: str
    title: str
    check: Check
    engines: tuple[str, ...] = ENGINES
    compiled: bool = False  # also under `compile`, in the slow tests
    # ... and there with gradient centralization turned round, too? Its code is one walk over whatever plan there is,
    # Inductor takes seconds for each, and `engines_agree` has all of them.
    compiled_turned: bool = False
    not_for_wrappers: str = ""  # why wrappers have no such cell
    not_for: Mapping[str, str] = field(default_factory=dict)  # optimizers without one, and why
    # Also with gradient centralization the other way round? It is one part of a step, which the promises about numbers
    # hold right; where what is promised lies outside it (number formats, scaling, sizes), it is enough that some
    # optimizers centralize by default and the others do not.
    gc: bool = True

    def applies(self, subject: Subject) -> bool:
        excused = subject.name in self.not_for or (subject.wrapped and bool(self.not_for_wrappers))
        return not excused and (self.gc or not subject.variant)

    def engines_for(self, subject: Subject) -> tuple[str, ...]:
        """Where it is tried with this subject."""
        interpreted = "cpp" in self.engines and not subject.variant
        compiled = self.compiled and (self.compiled_turned or not subject.variant)
        return (*self.engines, *(["triton"] if interpreted else []), *(["compile"] if compiled else []))


PROMISES: list[Promise] = []


def promise(
    title: str,
    *,
    engines: tuple[str, ...] = ENGINES,
    compiled: bool = False,
    compiled_turned: bool = False,
    not_for_wrappers: str = "",
    not_for: Mapping[str, str] | None = None,
    gc: bool = True,
) -> Callable[[Check], Check]:
    """Adds a check to the matrix."""

    def add(check: Check) -> Check:
        given = engines, compiled, compiled_turned, not_for_wrappers, not_for or {}, gc
        PROMISES.append(Promise(check.__name__, title, check, *given))
        return check

    return add


def promises() -> list[Promise]:
    """All promises, in the order in which the table shows them."""
    from conformance import formats, lifetime, plans, refusals, scaling, tensors, values

    order = [values, tensors, formats, scaling, lifetime, plans, refusals]
    rank = {module.__name__: i for i, module in enumerate(order)}
    return sorted(PROMISES, key=lambda p: rank[p.check.__module__])
