"""The benchmarks run; what they find is looked at by people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as bench
from benchmarks import measure
from benchmarks.cases import CASES, SHAPES


def test_every_case_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"300 tensors of 16": [(4,)] * 3, "one": [(33, 2)]})
    monkeypatch.setattr(bench.measure, "import_seconds", lambda rounds: {"import piste, after torch": 0.01})
    bench.main(["--rounds", "2", "--threads", "1", "--out", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["speed"]) == 2 * len(CASES)
    assert all(ratio > 0 for row in results["speed"] for ratio in row["speed"].values())
    assert results["overheads"]["waking_AdamW"]["plans"] == 0


def test_memory_is_counted() -> None:
    """torch's foreach AdamW holds one buffer as large as the weights."""
    peak = measure.peak_extra_bytes(CASES[0].optimizers()["torch foreach"], [(1000,), (24, 1000)])
    assert 4 * 25_000 <= peak < 4 * 26_500


def test_lists_have_the_sizes_they_claim() -> None:
    def size(name: str) -> float:
        total = 0
        for shape in SHAPES[name]:
            count = 1
            for extent in shape:
                count *= extent
            total += count
        return total / 1e6

    assert size("transformer, 20 M") == pytest.approx(20, rel=0.01)
    assert size("ResNet-50, 25 M") == pytest.approx(25.557, rel=0.001)
