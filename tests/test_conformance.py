"""The conformance matrix: every optimizer of the package keeps every promise on every engine.

The promises are functions in `tests/conformance/`; this file only spreads them over optimizers and engines. What is
written down for readers (`docs/conformance.md`) comes from the same functions.
"""

from __future__ import annotations

from typing import Any

import pytest
from conformance.matrix import Promise, promises
from conformance.subjects import Subject, subjects

SUBJECTS = subjects()
PROMISES = promises()


def cells() -> list[Any]:
    return [
        pytest.param(promise, subject, engine, id=f"{promise.name}-{subject.id}-{engine}")
        for promise in PROMISES
        for subject in SUBJECTS
        if promise.applies(subject)
        for engine in promise.engines
    ]


@pytest.mark.parametrize(("promise", "subject", "engine"), cells())
def test_promise(promise: Promise, subject: Subject, engine: str) -> None:
    promise.check(subject, engine)
