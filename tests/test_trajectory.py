"""SAF and MESA against their formula typed in NumPy, and what happens when their part of the loss is missing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import piste

SAMPLES, CLASSES, RATE = 24, 3, 0.1


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def divergence(now: Any, past: Any, tau: float) -> float:
    """From the paper: the past is the target."""

    def softmax(z: Any) -> Any:
        e = np.exp(z / tau - (z / tau).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    q, p = softmax(past), softmax(now)
    return float(tau**2 * (q * (np.log(q) - np.log(p))).sum(-1).mean())


def epochs(n: int) -> Any:
    """Batches in another order in every epoch."""
    for e in range(n):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(e))
        for index in order.chunk(3):
            yield e, index


def test_saf_holds_to_predictions_of_epochs_ago() -> None:
    model = net()
    x, y = data()
    optimizer = piste.SAF(torch.optim.SGD(model.parameters(), RATE), SAMPLES, CLASSES, lag=2, start=3)
    history: dict[tuple[int, int], Any] = {}
    terms = []
    for e, index in epochs(7):
        logits = model(x[index])
        term = optimizer.trajectory_loss(logits, index)
        now = logits.detach().numpy()
        for i, z in zip(index.tolist(), now, strict=True):
            history[e, i] = np.float16(z).astype(np.float64)
        expected = 0.0
        if e >= 3:
            expected = 0.3 * divergence(now, np.stack([history[e - 2, i] for i in index.tolist()]), 5.0)
            terms.append(expected)
        assert term.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        (nn.functional.cross_entropy(logits, y[index]) + term).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(terms) > 0


def test_the_gradient_is_that_of_the_term() -> None:
    """The past is a constant, and tau^2 keeps the size of gradients."""
    model = net()
    x, _ = data()
    optimizer = piste.SAF(torch.optim.SGD(model.parameters(), 0.0), SAMPLES, CLASSES, lag=1, start=1)
    index = torch.arange(SAMPLES)
    optimizer.trajectory_loss(model(x) + torch.eye(CLASSES)[0], index)
    logits = model(x).detach().requires_grad_()
    optimizer.trajectory_loss(logits, index).backward()
    soft = [
        torch.softmax(z / 5.0, -1) for z in (logits.detach(), (logits.detach() + torch.eye(CLASSES)[0]).half().double())
    ]
    assert logits.grad is not None
    assert float((soft[0] - soft[1]).abs().max()) > 0.0
    torch.testing.assert_close(logits.grad, 0.3 * 5.0 * (soft[0] - soft[1]) / SAMPLES, rtol=2e-2, atol=1e-5)


def test_mesa_holds_to_the_average() -> None:
    model = net()
    x, y = data()
    optimizer = piste.MESA(torch.optim.SGD(model.parameters(), RATE), model, decay=0.9, start=2)
    average: dict[str, Tensor] = {}
    for step, (_, index) in enumerate(epochs(4)):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        logits = model(x[index])
        seen = {n: b.clone() for n, b in model.named_buffers()}
        term = optimizer.trajectory_loss(logits, x[index])
        assert model.training
        assert all(torch.equal(seen[n], b) for n, b in model.named_buffers()), "the teacher moves no statistics"
        expected = 0.0
        if step >= 2:
            teacher = net().eval()
            teacher.load_state_dict({**average, **buffers})
            expected = 0.8 * divergence(logits.detach().numpy(), teacher(x[index]).detach().numpy(), 5.0)
            assert expected > 0
        assert term.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        (nn.functional.cross_entropy(logits, y[index]) + term).backward()
        optimizer.step()
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            new = p.detach().clone()
            average[n] = new if step == 0 else 0.9 * average[n] + 0.1 * new


def made(kind: str, model: nn.Module) -> Any:
    base = piste.SGD(model.parameters(), lr=RATE, momentum=0.9)
    return piste.SAF(base, SAMPLES, CLASSES, lag=1, start=1) if kind == "SAF" else piste.MESA(base, model, decay=0.8)


def term_of(kind: str, optimizer: Any, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
    found: Tensor = optimizer.trajectory_loss(logits, index if kind == "SAF" else x)
    return found


def train(kind: str, model: nn.Module, optimizer: Any, batches: list[Tensor]) -> None:
    x, y = data()
    for index in batches:

        def closure(index: Tensor = index) -> Tensor:
            optimizer.zero_grad()
            logits = model(x[index])
            loss = nn.functional.cross_entropy(logits, y[index])
            loss = loss + term_of(kind, optimizer, logits, x[index], index)
            loss.backward()
            return loss

        assert optimizer.step(closure).ndim == 0


@pytest.mark.parametrize("kind", ["SAF", "MESA"])
def test_resume_is_bitwise(kind: str) -> None:
    batches = [index for _, index in epochs(6)]
    model = net()
    optimizer = made(kind, model)
    train(kind, model, optimizer, batches[:9])
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    train(kind, model, optimizer, batches[9:])
    again = net()
    other = made(kind, again)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(kind, again, other, batches[9:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["SAF", "MESA"])
def test_forgetting_the_term_is_refused(kind: str) -> None:
    model = net()
    x, y = data()
    optimizer = made(kind, model)
    before = copy.deepcopy(list(model.parameters()))
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="trajectory_loss"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_bad_input_is_refused() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), RATE)
    with pytest.raises(ValueError, match="start=1 with lag=2"):
        piste.SAF(base, SAMPLES, CLASSES, lag=2, start=1)
    with pytest.raises(ValueError, match="samples=0"):
        piste.SAF(base, 0, CLASSES)
    with pytest.raises(ValueError, match="temperature=0"):
        piste.MESA(base, model, temperature=0)
    optimizer = piste.SAF(base, SAMPLES, CLASSES)
    logits = model(data()[0])
    for index, words in (
        (torch.arange(SAMPLES) + 1, "legal: 0 to 23"),
        (torch.arange(SAMPLES) - 1, "legal: 0 to 23"),
        (torch.arange(3), "n whole numbers"),
        (torch.rand(SAMPLES), "n whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.trajectory_loss(logits, index)
    with pytest.raises(ValueError, match="no 'trajectory'"):
        optimizer.load_state_dict(base.state_dict())
    other = piste.SAF(base, SAMPLES + 1, CLASSES)
    with pytest.raises(ValueError, match="expected"):
        optimizer.load_state_dict(other.state_dict())


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        x, _ = data()
        model = net().eval()
        optimizer = piste.SAF(torch.optim.SGD(model.parameters(), 0.0), SAMPLES, CLASSES, lag=1, start=1)
        order = torch.arange(SAMPLES)
        optimizer.trajectory_loss(model(x[order[rank::2]]), order[rank::2])
        with torch.no_grad():
            model[3].bias += torch.tensor([1.0, 0.0, 0.0])
        mine = order[:10] if rank == 0 else order[10:]  # samples have moved, and sizes differ
        term = optimizer.trajectory_loss(model(x[mine]), mine)
        torch.save(
            {"term": term.item(), "visits": optimizer.state_dict()["trajectory"]["visits"]}, f"{folder}/{rank}.pt"
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_tell_each_other_what_they_saw(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["visits"].tolist() == [2] * SAMPLES
        assert found["term"] > 0.01
