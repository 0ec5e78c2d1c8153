"""The conformance matrix: every optimizer of the package keeps every promise on every engine.

The promises are functions in `tests/conformance/`; this file only spreads them over optimizers and engines. What is
written down for readers (`docs/conformance.md`) comes from the same functions.
"""

from __future__ import annotations

from typing import Any

import pytest
from conformance import values
from conformance.matrix import Promise, promises
from conformance.subjects import Subject, subjects

SUBJECTS = subjects()
PROMISES = promises()


# Inductor imports a part of torch that warns about itself.
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


def cells(compiled: bool = False) -> list[Any]:
    return [
        pytest.param(promise, subject, engine, id=f"{promise.name}-{subject.id}-{engine}")
        for promise in PROMISES
        for subject in SUBJECTS
        if promise.applies(subject)
        for engine in (("compile",) * promise.compiled if compiled else promise.engines)
    ]


@pytest.mark.parametrize(("promise", "subject", "engine"), cells())
def test_promise(promise: Promise, subject: Subject, engine: str) -> None:
    promise.check(subject, engine)


@inductor
@pytest.mark.slow
@pytest.mark.parametrize(("promise", "subject", "engine"), cells(compiled=True))
def test_compiled_promise(promise: Promise, subject: Subject, engine: str) -> None:
    """Two weights each, because every shape costs seconds of compilation."""
    promise.check(subject, engine)


@inductor
def test_compiled_smoke() -> None:
    """The fast tests compile one optimizer, so that a broken compile engine is seen at once."""
    subject = next(s for s in SUBJECTS if s.name == "AdamW")
    values.engines_agree(subject, "compile")
