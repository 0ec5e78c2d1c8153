"""The conformance matrix: every optimizer of the package keeps every promise on every engine.

The promises are functions in `tests/conformance/`; this file only spreads them over optimizers and engines. What is
written down for readers (`docs/conformance.md`) comes from the same functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import conformance_table
import interpreter
import pytest
import torch
from conformance import distributed, values
from conformance.matrix import Promise, promises
from conformance.subjects import GRAFTED, WRAPPED, Subject, subjects
from oracles.table import FORMULAS

import piste
from piste import optimizers, roster
from piste.registry import OPTIMIZERS

SUBJECTS = subjects()
PROMISES = promises()


# Inductor imports a part of torch that warns about itself.
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


def _marks(subject: Subject, engine: str) -> list[Any]:
    """Centralization turned round is the same part everywhere: on the slowest engine it can wait for the slow tests. So
    can Triton's interpreter, whose quick tests are tests/test_triton.py."""
    if engine == "triton":
        return [*interpreter.MARKS, pytest.mark.slow]
    return [pytest.mark.slow] if subject.variant and engine == "reference" else []


def cells(compiled: bool = False) -> list[Any]:
    return [
        pytest.param(
            promise, subject, engine, id=f"{promise.name}-{subject.id}-{engine}", marks=_marks(subject, engine)
        )
        for promise in PROMISES
        for subject in SUBJECTS
        if promise.applies(subject)
        for engine in promise.engines_for(subject)
        if (engine == "compile") == compiled
    ]


@pytest.mark.parametrize(("promise", "subject", "engine"), cells())
def test_promise(promise: Promise, subject: Subject, engine: str) -> None:
    promise.check(subject, engine)


@inductor
@pytest.mark.slow
@pytest.mark.parametrize(
    ("promise", "subject", "engine"),
    # what one promise has compiled the next one finds
    sorted(cells(compiled=True), key=lambda cell: SUBJECTS.index(cell.values[1])),
)
def test_compiled_promise(promise: Promise, subject: Subject, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights each, because every shape costs seconds of compilation.

    With centralization turned round, what torch.compile has traced is run as it is: Inductor, which takes most of the
    time, has seen the same operations without. Nothing of that is left to other tests.
    """
    if subject.variant:
        monkeypatch.setattr(roster, "_PLANS", {})
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    promise.check(subject, engine)


@inductor
def test_compiled_smoke() -> None:
    """The fast tests compile one optimizer, so that a broken compile engine is seen at once."""
    subject = next(s for s in SUBJECTS if s.name == "AdamW")
    values.engines_agree(subject, "compile")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[distributed.Results]:
    return distributed.together(tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@pytest.mark.parametrize("title", distributed.WAYS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.id)
def test_two_processes_equal_one(subject: Subject, title: str, two_processes: list[distributed.Results]) -> None:
    distributed.check(title, subject, two_processes)


@pytest.mark.parametrize("other", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
def test_nesterov_needs_momentum_without_dampening(other: dict[str, float], later: bool) -> None:
    """As in torch, which raises ValueError for both."""
    fresh = torch.nn.Parameter(torch.zeros(2))
    good = piste.SGD([torch.nn.Parameter(torch.zeros(2))], momentum=0.9, nesterov=True)

    def act() -> None:
        if later:
            good.add_param_group({"params": [fresh], **other})
        else:
            piste.SGD([fresh], nesterov=True, **other)

    with pytest.raises(ValueError, match="nesterov"):
        act()
    assert len(good.param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "word"), [({"k": 0}, "k"), ({"k": 1.5}, "k"), ({"alpha": 1.5}, "alpha"), ({"alpha": -0.1}, "alpha")]
)
def test_lookahead_refuses_illegal_numbers(settings: dict[str, float], word: str) -> None:
    inner = piste.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=f"{word}={settings[word]}"):
        piste.Lookahead(inner, **settings)  # type: ignore[arg-type]


def test_lookahead_wraps_optimizers_only() -> None:
    with pytest.raises((TypeError, ValueError), match="optimizer"):
        piste.Lookahead([torch.nn.Parameter(torch.zeros(2))])  # type: ignore[arg-type]


def test_every_optimizer_has_a_row() -> None:
    """A class that is exported but not registered would be in no promise; nor may the promises get lost."""
    assert len(PROMISES) >= 37
    classes = {s.name for s in SUBJECTS} - {WRAPPED, GRAFTED}
    assert classes == set(optimizers.__all__) == {info.name for info in OPTIMIZERS}
    assert {s.name for s in SUBJECTS} >= set(FORMULAS)


def test_the_published_page_is_current() -> None:
    """docs/conformance.md is what the table writes when every promise is kept: same rows, same columns, no fault."""
    expected = conformance_table.page(conformance_table.all_kept())
    assert conformance_table.PAGE.read_text(encoding="utf-8") == expected, "run: python tests/conformance_table.py"
