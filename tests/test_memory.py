"""What `piste memory` says, held against what training really allocates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import piste
from benchmarks.measure import peak_extra_bytes
from piste.race.command import command
from piste.race.options import bytes_of

NO_MOMENTS = ("madgrad", "mirrormadgrad", "schedulefreesgd")


class Net(nn.Module):
    """Large and small weights, an embedding, tied weights, a frozen one, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)
        self.inner = nn.Linear(64, 80)
        self.conv = nn.Conv2d(8, 16, 6)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.out = nn.Linear(64, 100, bias=False)
        self.out.weight = self.words.weight
        self.norm = nn.BatchNorm1d(64)


def step(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    optimizer.step()


def measured(optimizer: Any) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("state", piste.STATE_FORMATS)
@pytest.mark.parametrize("name", piste.list_optimizers())
def test_state_to_the_byte(name: str, state: str) -> None:
    model = Net()
    if state != "fp32" and name in NO_MOMENTS:
        with pytest.raises(ValueError, match="no moments"):
            piste.estimate_memory(model, name, state=state)
        return
    optimizer = piste.create(name, model, state=state, engine="foreach")
    # past a synchronisation of Lookahead; a step of Shampoo takes long, and its first has all there is
    for _ in range(1 if name.startswith("shampoo") else 8):
        step(model, optimizer)
    cost = piste.estimate_memory(model, name, state=state)
    assert cost.state == measured(optimizer)


@pytest.mark.parametrize("weights", piste.WEIGHT_FORMATS)
def test_weights_and_gradients(weights: str) -> None:
    """Tied weights count once, frozen ones have no gradient; bfloat16 weights may keep something beside themselves."""
    model = Net().to(torch.bfloat16)
    cost = piste.estimate_memory(model, "adamw", weights=weights)
    parameters = list(model.parameters())
    assert cost.weights == sum(x.nbytes for x in (*parameters, *model.buffers()))
    assert cost.gradients == sum(p.nbytes for p in parameters if p.requires_grad)
    assert cost.parameters == sum(p.numel() for p in parameters if p.requires_grad)
    optimizer = piste.create("adamw", model, weights=weights)
    step(model, optimizer)
    assert cost.state == measured(optimizer)
    assert cost.peak == cost.weights + cost.gradients + cost.state + cost.extra


@pytest.mark.parametrize(
    ("name", "moved"), [("sgd", 12), ("sgd_momentum", 20), ("lion", 20), ("adamw", 28), ("adan", 44), ("ademamix", 36)]
)
def test_traffic_is_that_of_the_sheet(name: str, moved: int) -> None:
    with torch.device("meta"):
        model = nn.Linear(512, 512, bias=False)
    cost = piste.estimate_memory(model, name)
    assert cost.moved == moved * cost.parameters
    assert cost.extra == 0


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("ranger", 28 + 4 + 8 / 6),  # AdamW's, the gradient once more for its mean, slow weights at every sixth step
        ("prodigy", 20 + 28),  # g, s, x0 and p for the estimate, then as AdamW
        ("lookahead+adamw", 28 + (8 + 8) / 6),  # p and slow weights, read and written at every sixth step
        ("sam+adamw", 4 + 12 + 8 + 8 + 28),  # g for its norm; g and p to climb; a copy before, and back
    ],
)
def test_several_passes_are_counted(name: str, moved: float) -> None:
    with torch.device("meta"):
        model = nn.Linear(4096, 4096, bias=False)
    cost = piste.estimate_memory(model, name)
    assert cost.moved / cost.parameters == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize(
    "name", ["lookahead+adamw", "sam+adamw", "asam+lion", "gsam+ranger", "looksam+adamw", "sam+lookahead+adan"]
)
def test_state_of_wrappers_to_the_byte(name: str, state: str) -> None:
    model = Net()
    optimizer = piste.create(name, model, state=state, engine="foreach")
    for _ in range(8):
        if getattr(optimizer, "needs_two_passes", False):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.first_step()  # type: ignore[attr-defined]
        step(model, optimizer)
    saved = optimizer.state_dict()["state"]
    held = [*optimizer.buffers()]  # type: ignore[attr-defined]
    cost = piste.estimate_memory(model, name, state=state)
    assert cost.state == sum(x.nbytes for x in held) + measured(SimpleNamespace(state=saved))


@pytest.mark.parametrize("name", ["esam+sgd", "saf+adamw", "mesa+adamw"])
def test_wrappers_that_need_the_data_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs .*; legal: what is inside"):
        piste.estimate_memory(nn.Linear(8, 8), name)


def test_nothing_is_allocated() -> None:
    """A hundred billion numbers."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(32_000, 32_000) for _ in range(100)))
    cost = piste.estimate_memory(model, "adamw", state="4bit")
    assert cost.parameters > 1e11
    assert cost.state < 1.07 * cost.parameters


def test_the_model_stays_as_it_was() -> None:
    model = Net()
    before = {name: (p.data_ptr(), p.grad) for name, p in model.named_parameters()}
    piste.estimate_memory(model, "ranger21", state="8bit")
    assert before == {name: (p.data_ptr(), p.grad) for name, p in model.named_parameters()}


MATRIX_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("muon", {"matrices": (nn.ParameterList,), "heads": ()}),
    ("shampoo_meta", {"start": 4, "every": 4}),
    ("shampoo_google", {"every": 4}),
    ("soap", {"every": 4}),
    ("soap", {"every": 4, "factors": "bf16"}),
]


@pytest.mark.parametrize("shapes", [[(128, 400)], [(96, 96)] * 5], ids=["one", "five"])
@pytest.mark.parametrize(("name", "settings"), MATRIX_OPTIMIZERS, ids=lambda x: x if isinstance(x, str) else "")
def test_matrices_and_their_workspace(name: str, settings: dict[str, Any], shapes: list[tuple[int, int]]) -> None:
    """Factors and roots to the byte; buffers as torch's profiler sees them allocated in steps with a refresh.

    Google's form draws its roots by coupled Newton, of a stack on a GPU and matrix by matrix on a CPU. The estimate is
    of the stack, and of five matrices a CPU holds somewhat over half as much.
    """
    model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])
    cost = piste.estimate_memory(model, name, **settings)
    square = sum(a * a + b * b for a, b in shapes)
    factor = 2 if settings.get("factors") == "bf16" else 4
    other = {"soap": 4, "muon": 0}.get(name, 4)
    assert cost.matrices == square * (other and factor + other)
    assert cost.state - cost.matrices == sum(a * b for a, b in shapes) * (4 if name == "muon" else 8)
    assert 0 < cost.workspace < cost.extra
    seen = peak_extra_bytes(lambda params: piste.create(name, nn.ParameterList(params), **settings), shapes)
    one_by_one = name == "shampoo_google" and len(shapes) > 1
    assert 0.75 < cost.extra / seen < (2.0 if one_by_one else 1.3)


def test_no_matrices_no_workspace() -> None:
    cost = piste.estimate_memory(Net(), "adamw")
    assert cost.matrices == cost.workspace == 0


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(command, ["memory", *arguments])
    return result.exit_code, result.output


def test_the_table() -> None:
    code, text = run("char_transformer", "--optimizers", "adamw,madgrad", "--bandwidth", "1TB/s", "--fit", "1.2MiB")
    assert code == 0
    assert "115,431 numbers are trained" in text
    assert "1,000 GB/s, as given" in text
    assert "madgrad has no bf16, 8bit, 4bit: it keeps no moments" in text
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert ["adamw", "fp32"] in [line[:2] for line in lines]
    assert any("yes" in line for line in lines)
    assert any("over" in line for line in lines)


def test_the_table_of_matrix_optimizers() -> None:
    code, text = run("char_transformer", "--optimizers", "soap,adamw", "--bandwidth", "1TB/s", "--state", "fp32")
    assert code == 0
    assert "matrices: what of it is factors" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("soap", "adamw"))}
    assert "0" in rows["adamw"]
    assert rows["soap"].count("MiB") + rows["soap"].count("KiB") >= 4


def test_a_factory(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(1000, 1000)\n")
    asked = ["--model", "nets:net", "--bandwidth", "1TB/s", "--state", "fp32"]
    result = subprocess.run(
        [sys.executable, "-c", "from piste.cli import main; main()", "memory", *asked],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "nets:net: 1,001,000 numbers are trained" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name one model"),
        (("char_transformer", "--model", "a:b"), "name one model"),
        (("--model", "no_such_module:net"), "no_such_module"),
        (("--model", "json:loads"), "json:loads raises TypeError"),
        (("char_transformer", "--fit", "3"), "'3' is not legal; legal: a number above 0 with its unit"),
        (("char_transformer", "--bandwidth", "3GB"), "'3GB' is not legal"),
        (("char_transformer", "--state", "7bit"), "'7bit' is not legal; legal: fp32, bf16, 8bit, 4bit"),
        (("char_transformer", "--optimizers", "adamq"), "did you mean"),
        (("no_such_task",), "no task 'no_such_task'"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], words: str) -> None:
    code, text = run(*arguments)
    assert code != 0
    assert words in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("80GB", 80e9), ("1.5 tb", 1.5e12), ("512B", 512), ("3kib", 3072)]
)
def test_sizes_are_read(text: str, count: float) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24", "-1GB", "0GB", "1iB", "1GB/s", "1e3GB"])
def test_other_sizes_are_not(text: str) -> None:
    with pytest.raises(ValueError, match="legal: a number above 0 with its unit"):
        bytes_of(text)
