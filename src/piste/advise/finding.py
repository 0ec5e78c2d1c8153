"""What a rule of advice is, and what it finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from piste.advise.setup import Setup

__all__ = ["SEVERITIES", "Finding", "Found", "Rule", "rule"]

#: the most serious first, with what each of them means
SEVERITIES = {
    "error": "training fails, or silently does something else than was asked for",
    "warning": "costs quality, speed or memory in most runs",
    "note": "worth knowing; harmless in many runs",
    "suggestion": "nothing is wrong; something else is worth a race",
}

#: what a rule has seen, in words, and the code that mends it; None where all is well
Found: TypeAlias = "tuple[str, str] | None"


@dataclass(frozen=True)
class Finding:
    """One thing that :func:`piste.advise` has to say.

    Args:
        rule: the name of the rule, stable from release to release.
        severity: ``"error"``, ``"warning"``, ``"note"`` or ``"suggestion"``.
        title: what is the matter, in a few words.
        detail: where, with this model's names and numbers.
        reason: why that is so, in general.
        fix: the code to write in place of what is there.
        source: paper, code or measurement behind it.

    >>> import piste, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> found = piste.advise(model, piste.Lion(piste.param_groups(model, weight_decay=0.1), lr=0.01))
    >>> found[0].rule, found[0].severity, found[0].fix
    ('lion-lr', 'warning', 'optimizer = piste.Lion(piste.param_groups(model, weight_decay=0.1), lr=0.001)')
    """

    rule: str
    severity: str
    title: str
    detail: str
    reason: str
    fix: str
    source: str


@dataclass(frozen=True)
class Rule:
    """A rule of advice: what it looks for, why, and who says so.

    Args:
        name: the function's, with hyphens.
        topic: the module it stands in.
        severity: a key of :data:`SEVERITIES`.
        title: as in :class:`Finding`, and so are ``source`` and ``reason``, the function's docstring.
        source: as there.
        reason: as there.
        check: the function.
    """

    name: str
    topic: str
    severity: str
    title: str
    source: str
    reason: str
    check: Callable[[Setup], Found]

    def __call__(self, setup: Setup) -> Finding | None:
        """What the rule finds in a setup, if anything."""
        found = self.check(setup)
        if found is None:
            return None
        return Finding(self.name, self.severity, self.title, found[0], self.reason, found[1], self.source)


def rule(severity: str, title: str, source: str) -> Callable[[Callable[[Setup], Found]], Rule]:
    """Make a rule of a function that looks at a setup; its docstring is the reason that readers are given."""

    def made(check: Callable[[Setup], Found]) -> Rule:
        topic = check.__module__.rpartition(".")[2]
        reason = " ".join((inspect.getdoc(check) or "").split())
        return Rule(check.__name__.replace("_", "-"), topic, severity, title, source, reason, check)

    return made
