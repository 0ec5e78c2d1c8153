"""What only a GPU can show (``make test-gpu``): the whole matrix there, streams, memory that moves, waiting.

Written where there was none: `tests/test_triton.py` runs the same kernels in the interpreter, and compiles them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.device import On
from conformance.matrix import Promise, promises
from conformance.subjects import Subject, subjects

import piste
from piste.engines import triton as engine

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or engine.works_on(torch.device("cpu")), reason="needs a GPU, and TRITON_INTERPRET=0"
)
pytestmark = [pytest.mark.gpu, needs_gpu]

CELLS = [
    pytest.param(promise, subject, id=f"{promise.name}-{subject.id}")
    for promise in promises()
    if "cpp" in promise.engines
    for subject in subjects()
    if promise.applies(subject)
]


@pytest.mark.parametrize(("promise", "subject"), CELLS)
def test_promise(promise: Promise, subject: Subject) -> None:
    """Every promise, with every optimizer, and nothing interpreted."""
    with On("cuda"):
        promise.check(subject, "triton")


def weights(device: str = "cuda") -> list[torch.nn.Parameter]:
    numbers = torch.Generator().manual_seed(0)
    shapes = [(300, 70), (5000,), (3, 3), (1 << 20,)]
    return [torch.nn.Parameter(torch.randn(s, generator=numbers).to(device)) for s in shapes]


def gradients(params: list[torch.nn.Parameter], step: int) -> None:
    numbers = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=numbers).to(p.device)


def run(make: Any, engine: str, device: str = "cuda", steps: int = 8, **options: Any) -> list[torch.Tensor]:
    params = weights(device)
    optimizer = make(params, lr=1e-2, engine=engine, **options)
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("make", [piste.AdamW, piste.Lion, piste.Lamb], ids=lambda m: m.__name__)
def test_checked_kernels_give_what_native_code_gives(make: Any, state: str) -> None:
    """Also under the memory checker: weights that end within a tile, and one of many tiles."""
    for a, b in zip(run(make, "triton", state=state), run(make, "cpp", "cpu", state=state), strict=True):
        # an element whose code falls on the other side of a threshold is rare
        assert ((a - b).abs() > 1e-5 + 1e-5 * b.abs()).float().mean() < 1e-3


def test_a_side_stream_with_gradients_freed_early() -> None:
    """Their memory is written over on the main stream while the step waits behind other work."""
    expected = run(piste.AdamW, "triton")
    params, side = weights(), torch.cuda.Stream()
    optimizer = piste.AdamW(params, lr=1e-2, engine="triton")
    for step in range(8):
        gradients(params, step)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rubbish = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
        torch.cuda.current_stream().wait_stream(side)
        del rubbish
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p.detach().cpu(), e)


def test_steps_on_changing_streams() -> None:
    expected = run(piste.Lamb, "triton", clip_norm=1.0)
    params, streams = weights(), [torch.cuda.Stream() for _ in range(3)]
    optimizer = piste.Lamb(params, lr=1e-2, engine="triton", clip_norm=1.0)
    for step in range(8):
        gradients(params, step)
        stream = streams[step % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p.detach().cpu(), e)


def test_two_optimizers_on_two_streams() -> None:
    expected = run(piste.AdamW, "triton")
    pairs = [(weights(), torch.cuda.Stream()) for _ in range(2)]
    optimizers = [piste.AdamW(params, lr=1e-2, engine="triton") for params, _ in pairs]
    for step in range(8):
        for (params, stream), optimizer in zip(pairs, optimizers, strict=True):
            gradients(params, step)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for params, _ in pairs:
        for p, e in zip(params, expected, strict=True):
            assert torch.equal(p.detach().cpu(), e)


def test_weights_that_move() -> None:
    """``.data`` swapped between steps; and a model that goes to the CPU and comes back with its optimizer's state."""
    expected = run(piste.AdamW, "triton")
    params = weights()
    optimizer = piste.AdamW(params, lr=1e-2, engine="triton")
    for step in range(8):
        gradients(params, step)
        optimizer.step()
        for p in params:
            old, p.data = p.data, p.data.clone() if step % 2 else p.data.cpu().cuda()
            old.fill_(float("nan"))
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p.detach().cpu(), e)


def test_a_step_does_not_wait() -> None:
    """torch's own warning about synchronisation, as an error; gradients move, numbers change."""
    params = weights()
    optimizer = piste.AdamW(params, lr=1e-2, engine="triton", clip_norm=1.0)
    for step in range(4):
        gradients(params, step)
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_extra_memory_is_small() -> None:
    params = weights()
    optimizer = piste.Lamb(params, lr=1e-2, engine="triton")
    for step in range(3):
        gradients(params, step)
        optimizer.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 8 << 20
