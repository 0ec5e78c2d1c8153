"""Runs the conformance matrix and writes it to docs/conformance.md: ``python tests/conformance_table.py``.

About three minutes, because the compile engine and the two-process runs are in it. `tests/test_conformance.py` checks
that the page in the repository is what this file writes when every promise is kept.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import interpreter
import torch
from conformance import distributed
from conformance.matrix import Promise, promises
from conformance.subjects import Subject, subjects

from piste.registry import OPTIMIZERS

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"

Cell = tuple[str, str, str]  # promise, subject, engine
Results = Mapping[Cell, bool]

LETTERS = {"reference": "R", "foreach": "F", "cpp": "N", "triton": "T", "compile": "C"}

INTRODUCTION = """\
# Conformance

Every optimizer of piste keeps the promises below. Each is a test of `tests/conformance/`, run for every optimizer of
the registry, with and without gradient centralization where that can play a part, and for the wrappers `Lookahead`
round AdamW and `Graft` of Adam and SGD. A new optimizer joins the table by joining the registry.

**R** kept on the reference engine · **F** on foreach · **N** on cpp (native code) · **T** on triton, interpreted on the
CPU with small weights, for each operation of a kernel is a call of Python there (`make test-gpu` runs all of it on a
GPU) · **C** on compile, where it is tried (each shape costs seconds) · **✓** kept, and the engine plays no part ·
**✗** broken · — does not apply (see below the table).

All of it is run in CI. Where each rank of a weight and each option of a step is a kernel to be built (N, C), all ranks
are held to the formulas and to the reference; what is promised besides is tried on a vector and a matrix, formats of
state and weights on a vector and matrices, one of them on four axes, too. T takes fewer steps, past every branch that a
step number opens, but for 1,000 scheduled steps (T: 8; R and F: 100) and 300 layers (T: 12; R: 30; F, and rules that
multiply matrices: 100). C is compiled by Inductor; with centralization turned round it is traced, and not compiled.

This page is written by `python tests/conformance_table.py`, which runs all of it; a test fails when the page and the
registry differ.
"""

NOT_YET = """\
Not in the table: peak extra memory (`make bench` measures it).
"""


def _columns() -> list[str]:
    return list(dict.fromkeys(s.name for s in subjects()))


def cells() -> list[tuple[Promise, Subject, str]]:
    """Everything there is to run, distribution apart."""
    return [(p, s, e) for p in promises() for s in subjects() if p.applies(s) for e in p.engines_for(s)]


def all_kept() -> dict[Cell, bool]:
    """The results of a library without a fault."""
    kept = {(p.name, s.id, e): True for p, s, e in cells()}
    return kept | {(title, s.id, ""): True for title in distributed.WAYS for s in subjects()}


def _mark(results: Results, promise: Promise, column: str) -> str:
    rows = [s for s in subjects() if s.name == column and promise.applies(s)]
    if not rows:
        return "—"
    tried = {e for s in rows for e in promise.engines_for(s)}
    held = {
        e: all(results[promise.name, s.id, e] for s in rows if e in promise.engines_for(s))
        for e in LETTERS if e in tried
    }  # fmt: skip
    if not all(held.values()):
        return "✗ " + " ".join(LETTERS[e] for e, fine in held.items() if not fine)
    return "✓" if promise.engines == ("reference",) else " ".join(LETTERS[e] for e in held)


def _way_mark(results: Results, title: str, column: str) -> str:
    return "✓" if all(results[title, s.id, ""] for s in subjects() if s.name == column) else "✗"


def _row(cells_: list[str]) -> str:
    return f"| {' | '.join(cells_)} |"


def page(results: Results) -> str:
    """The whole page."""
    columns = _columns()
    lines = [INTRODUCTION, _row(["promise", *columns]), _row(["---", *[":-:"] * len(columns)])]
    lines += [_row([p.title, *(_mark(results, p, c) for c in columns)]) for p in promises()]
    lines += [_row([title, *(_way_mark(results, title, c) for c in columns)]) for title in distributed.WAYS]
    lines += ["", NOT_YET]
    lines += ["Why a promise does not apply to the wrappers:", ""]
    lines += [f"* {p.title}: {p.not_for_wrappers}." for p in promises() if p.not_for_wrappers]
    reasons = [(p.title, name, why) for p in promises() for name, why in p.not_for.items()]
    lines += ["", "And to an optimizer:", "", *(f"* {title}, {name}: {why}." for title, name, why in reasons)]
    lines += ["", "## Where the expected numbers come from", ""]
    lines += [
        "Float64 formulas typed a second time, in NumPy (`tests/oracles/formulas.py`), for every optimizer; and:",
        "",
    ]
    lines += [_row(["optimizer", "compared live with", "source"]), _row(["---"] * 3)]
    lines += [_row([info.name, info.oracle, info.source]) for info in OPTIMIZERS]
    return "\n".join(lines) + "\n"


def _held(check: Callable[[], None], name: str) -> bool:
    try:
        check()
    except Exception:  # whatever it is, it is a broken promise, and the table goes on
        sys.stderr.write(f"BROKEN {name}\n{traceback.format_exc(limit=-3)}\n")
        return False
    return True


def run() -> dict[Cell, bool]:
    """Every check, in this process; two more processes for those that need them."""
    torch.set_num_threads(1)
    interpreter.quicken()
    results: dict[Cell, bool] = {}
    for p, s, e in cells():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*torch.jit.script_method.*", DeprecationWarning)
            warnings.filterwarnings("ignore", interpreter.ON_IDLE_LANES, RuntimeWarning)
            results[p.name, s.id, e] = _held(lambda p=p, s=s, e=e: p.check(s, e), f"{p.name} {s.id} {e}")
    with tempfile.TemporaryDirectory() as folder:
        ranks = distributed.together(Path(folder))
    for title in distributed.WAYS:
        for s in subjects():
            results[title, s.id, ""] = _held(lambda t=title, s=s: distributed.check(t, s, ranks), f"{title}: {s.id}")
    return results


if __name__ == "__main__":
    found = run()
    PAGE.write_text(page(found), encoding="utf-8")
    broken = sum(not kept for kept in found.values())
    sys.stdout.write(f"{PAGE.name}: {len(found) - broken} of {len(found)} cells kept\n")
    sys.exit(1 if broken else 0)
