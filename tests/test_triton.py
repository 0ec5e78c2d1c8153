"""The triton engine, run by Triton's interpreter on the CPU; and its kernels, compiled for a GPU that nobody needs.

What runs here is the text that a GPU gets. What it does there, and how fast, has still to be seen on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from conformance import formats, lifetime, plans, tensors, values
from conformance.subjects import SMALL, Subject, subjects

import piste

pytestmark = interpreter.MARKS
SUBJECTS = subjects()
#: every kind of pass: plain, with norms of weights, with axes kept, over all weights, with a peak
SOME = [s for s in SUBJECTS if s.id in ("AdamW", "Adafactor", "Amos", "Lamb", "Prodigy", "Ranger21", "SM3")]


def named(subject: Subject) -> str:
    return subject.id


QUICK = ("AdamW", "Lamb", "SM3")


@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, id=s.id, marks=[] if s.id in QUICK else [pytest.mark.slow]) for s in SUBJECTS if not s.variant],
)
def test_parity_with_the_formulas(subject: Subject) -> None:
    """Float64, as for every engine."""
    values.follow_formula(subject, "triton", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SOME, ids=named)
def test_float32(subject: Subject) -> None:
    values.follow_reference(subject, "triton", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("subject", [s for s in SOME if s.id in ("AdamW", "Adafactor", "Ranger21")], ids=named)
@pytest.mark.parametrize(
    "promise",
    [values.parity, tensors.channels_last, tensors.non_contiguous, tensors.empty, tensors.zero_dimensional],
    ids=lambda promise: promise.__name__,
)
def test_every_shape_and_layout(subject: Subject, promise: Any) -> None:
    promise(subject, "triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    "promise",
    [lifetime.resume, formats.low_bits_resume, formats.remainder, tensors.mixed_dtypes, plans.no_recompiles],
    ids=lambda promise: promise.__name__,
)
def test_promises_that_any_rule_shows(promise: Any) -> None:
    promise(next(s for s in SUBJECTS if s.id == "AdamW"), "triton")


CODED = [
    pytest.param("AdamW", {"state": "8bit"}, marks=pytest.mark.slow),
    pytest.param("AdamW", {"state": "4bit"}, marks=pytest.mark.slow),
    pytest.param("AdamW", {"state": "bf16"}),
    pytest.param("Lion", {"state": "4bit", "weights": "stochastic"}),
    pytest.param("AdamW", {"weights": "kahan"}),
    pytest.param("AdamW", {"weights": "remainder"}),
]


@pytest.mark.parametrize(("name", "options"), CODED, ids=str)
def test_codes_are_those_of_native_code(name: str, options: dict[str, str]) -> None:
    """Bit by bit: rows that are whole blocks and rows that are not, vectors, and a weight too small to be coded."""
    kept = [_kept(name, options, engine) for engine in ("cpp", "triton")]
    for native, ours in zip(*kept, strict=True):
        assert torch.equal(native, ours)


def _kept(name: str, options: dict[str, str], engine: str) -> list[torch.Tensor]:
    """Weights and states after three steps."""
    numbers = torch.Generator().manual_seed(0)
    shapes, dtype = [(17, 301), (5000,), (16, 512), (3, 3)], torch.bfloat16 if "weights" in options else torch.float32
    params = [torch.nn.Parameter(torch.randn(s, generator=numbers).to(dtype)) for s in shapes]
    optimizer = getattr(piste, name)(params, lr=1e-2, engine=engine, **options)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = (torch.randn(p.shape, generator=numbers) * 2**i).to(dtype) if i != step else None
        optimizer.step()
    states = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
    return [*(p.detach() for p in params), *states]


_COMPILE = """
import sys, torch, piste, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from piste.engines import triton as engine
from piste.engines.native import native_passes

name, options = sys.argv[1], dict(word.split("=") for word in sys.argv[2:])
options |= {k: int(v) for k, v in options.items() if k == "total_steps"}
dtype = torch.bfloat16 if "weights" in options else torch.float32
weight = torch.nn.Parameter(torch.randn(64, 80).to(dtype))
optimizer = getattr(piste, name)([weight], engine="cpp", **options)
for _ in range(3):
    weight.grad = torch.randn_like(weight)
    optimizer.step()
(part,) = next(iter(optimizer._roster.layouts.values()))
seats = part.seats
homes = {home: own[0].dtype for home, own in seats.homes.items() if home not in seats.encoded} | {"g": dtype}
text = engine.write(seats.plan, native_passes(seats.plan), torch.float32, homes, seats.codecs)
signature = {"table": "*i64", "n": "i32", "axes": "i32", "host": "*fp32", "map": "*i64", "tiles": "i32",
             "parts": "*fp64", "ALIGNED": "constexpr"}
for kernel, function in engine._loaded(text).items():
    if kernel.startswith("stage") and not kernel.endswith("_tile"):
        source = ASTSource(function, signature, {"ALIGNED": True})
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        wide = all(f"{way}.global.v4.b32" in done.asm["ptx"] for way in ("ld", "st"))
        print(kernel, "wide" if wide else "narrow", len(done.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "AdamW", "AdamW state=8bit", "AdamW state=4bit", "AdamW state=bf16", "AdamW weights=remainder",
        "Lion state=4bit weights=kahan", "SGD weights=stochastic", "Lamb", "Adafactor", "SM3", "Ranger21 total_steps=9",
        "MADGRAD", "Prodigy",
    ],
)  # fmt: skip
def test_kernels_compile_for_a_gpu(words: str, tmp_path: Path) -> None:
    """Down to machine code for an H100; whole tiles are read and written four numbers at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE, *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert kernels
    assert all(int(size) > 0 for _, _, size in kernels)
    if words == "AdamW":
        assert {width for _, width, _ in kernels} == {"wide"}
