"""The benchmarks run; what they find is looked at by people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as bench
from benchmarks import gpu, matrices, measure, race, records
from benchmarks.algorithms import ALGORITHMS, LISTS
from benchmarks.cases import CASES, MEMORY, SHAPES, parameters


def test_every_case_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"300 tensors of 16": [(4,)] * 3, "one": [(33, 2)]})
    monkeypatch.setattr(
        bench.measure, "import_seconds", lambda rounds: {"import torch": 1.0, "import piste, after torch": 0.01}
    )
    bench.main(["--rounds", "2", "--threads", "1", "--out", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["speed"]) == 2 * len(CASES)
    for row in results["speed"]:
        assert all(0 < found["low"] <= found["median"] <= found["high"] for found in row["speed"].values())
        assert row["speed"]["torch foreach"]["median"] == 1
    assert {row["case"] for row in results["memory"]} == set(MEMORY)
    assert results["overheads"]["waking_AdamW"]["plans"] == 0
    assert results["overheads"]["scheduled"]["plans"] == 0


def test_memory_is_counted() -> None:
    """torch's foreach AdamW holds one buffer as large as the weights."""
    peak = measure.peak_extra_bytes(CASES[0].optimizers()["torch foreach"], [(1000,), (24, 1000)])
    assert 4 * 25_000 <= peak < 4 * 26_500


class Hoarder(torch.optim.SGD):
    """Keeps a buffer from step to step, and in every fifth needs another."""

    count = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.count += 1
        self.kept = torch.empty(1000)
        if self.count % 5 == 0:
            torch.empty(500)


def test_memory_that_is_kept_between_steps_and_rare_needs_are_counted() -> None:
    peak = measure.peak_extra_bytes(Hoarder, [(10,)])
    assert peak == 4 * 2000  # in every step the new buffer is made before the old one is let go

    class Rare(Hoarder):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.count += 1
            torch.empty(3000 if self.count % 6 == 0 else 10)

    assert measure.peak_extra_bytes(Rare, [(10,)]) == 4 * 3000


def test_state_is_no_extra_memory() -> None:
    """torch's foreach SGD with momentum works in place; its buffers are state."""
    peak = measure.peak_extra_bytes(CASES[1].optimizers()["torch foreach"], [(1000,), (24, 1000)])
    assert peak < 100


def test_garbage_of_an_earlier_measurement_is_not_counted() -> None:
    make = CASES[0].optimizers()["torch foreach"]
    alone = measure.peak_extra_bytes(make, [(16,)] * 50)
    for _ in range(20):
        cycle: list[object] = [torch.empty(10_000)]
        cycle.append(cycle)
    del cycle
    assert measure.peak_extra_bytes(make, [(16,)] * 50) == alone


def test_ratios_are_of_rounds() -> None:
    """A disturbance that doubles both times of a round leaves its ratio alone."""
    assert measure.ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == (2.0, 2.0, 2.0)
    assert measure.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)  # one round, as with --rounds 1


def test_the_opening_of_records_runs_small(capsys: pytest.CaptureFixture[str]) -> None:
    records.main(["--records", "3", "--rounds", "2", "--processor-time"])
    assert capsys.readouterr().out.startswith("3 records open in ")


def test_each_round_starts_with_another_job() -> None:
    order: list[str] = []
    measure.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"


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


def test_the_race_of_one_algorithm_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "LISTS", {"two tensors": [(33, 2), (5,)]})
    monkeypatch.setattr(race, "PACE_ELEMENTS", 1 << 10)
    asked = ["--rounds", "2", "--threads", "1", "--algorithm", "Ranger", "--steps", "20"]
    race.main([*asked, "--out", str(tmp_path / "race.json")])
    results = json.loads((tmp_path / "race.json").read_text())
    (row,) = results["lists"]["two tensors"]
    assert row["floor"]["median"] > 0
    assert row["speed"]["pytorch_optimizer"]["median"] > 0


def test_the_lists_are_those_of_their_models() -> None:
    sizes = {name: (len(shapes), sum(torch.Size(s).numel() for s in shapes)) for name, shapes in LISTS.items()}
    assert sizes["GPT-2 small: 148 tensors, 124 M"] == (148, 124_439_808)
    assert sizes["ResNet-50: 161 tensors, 26 M"] == (161, 25_557_032)


def test_every_peer_takes_a_step() -> None:
    """A peer that has changed its arguments would silently drop out of the tables."""
    for algorithm in ALGORITHMS:
        for name, make in algorithm.peers.items():
            if make is None or name == "torch compile":
                continue
            weights = parameters([(3, 2)])
            before = weights[0].detach().clone()
            optimizer = make(weights)
            for _ in range(8):  # some RAdams rest for five
                optimizer.step()
            assert not torch.equal(before, weights[0]), (algorithm.name, name)


def test_matrix_optimizers_run_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case and its list, with small weights; peers where they are installed."""
    monkeypatch.setattr(matrices, "LISTS", {name: [(6, 4), (4,), (4, 3, 2, 2)] for name in matrices.LISTS})
    out = tmp_path / "matrices.json"
    matrices.main(["--rounds", "2", "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())["lists"]
    for case in matrices.CASES:
        for name in case.lists:
            (row,) = [row for row in found[name] if row["case"] == case.name]
            assert row["worst"]["piste"] >= row["ordinary"]["piste"] > 0


def test_the_harness_for_gpus_runs_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line but CUDA's events: an element-wise rule and one with norms, in all formats, with peers."""
    out = tmp_path / "page.md"
    gpu.main(["--device", "cpu", "--smoke", "--optimizer", "AdamW", "Lamb", "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    for case in ("AdamW", "Lamb"):
        for form in gpu.FORMS:
            assert f"### {case}, three tensors, {form}\n" in page
    assert "| torch fused |" in page
    assert page.count("| piste |") == 2 * len(gpu.FORMS)


def test_without_a_run_there_are_no_figures() -> None:
    assert gpu.PAGE.read_text(encoding="utf-8").startswith(gpu.INTRODUCTION)
    assert "| " not in gpu.page(None)
    assert sum(torch.Size(s).numel() for s in gpu.LISTS[gpu.GPT_1B]) == pytest.approx(1.3e9, rel=0.02)
