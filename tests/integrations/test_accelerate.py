"""piste behind accelerate's ``prepare``, against the same loops without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import piste
from piste.integrations.accelerate import sharpness_step

Batch = tuple[Tensor, Tensor]
STEPS = 5


@pytest.fixture(autouse=True)
def _an_accelerator_of_its_own() -> Iterator[None]:
    """Accelerators, also those of Trainers in other files, share a state; each test begins and ends without one."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def plain(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Without BatchNorm, which sees micro-batches otherwise than a large batch."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(100 + t)
    x, y = (torch.randn(12, n, generator=generator, dtype=dtype) for n in (5, 2))
    return x, y


def micro(data: Batch, count: int = 3) -> list[Batch]:
    return list(zip(data[0].chunk(count), data[1].chunk(count), strict=True))


def loss_fn(model: nn.Module, data: Batch) -> Tensor:
    return (model(data[0]) - data[1]).square().mean()


def create(name: str, model: nn.Module, **options: Any) -> Any:
    return piste.create_with_schedule(name, model, STEPS, engine="reference", **({"lr": 0.1} | options))


def weights(model: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in model.state_dict().values()]


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-11) -> None:
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def alone(name: str, model: nn.Module, *, clip: float | None = None, **options: Any) -> list[float]:
    """A loop without accelerate; its learning rates."""
    optimizer, schedule = create(name, model, **options)
    rates = []
    for t in range(STEPS):
        if isinstance(optimizer, piste.SAM):
            piste.sharpness_step(optimizer, model, loss_fn, batch(t), clip=clip)
        else:
            optimizer.zero_grad()
            loss_fn(model, batch(t)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    return rates


@pytest.mark.parametrize("name", ["adamw", "ranger", "ranger21", "lion", "schedulefreeadamw", "lookahead+sgd_momentum"])
def test_through_prepare(name: str) -> None:
    """Accumulation equal to the large batch, clipping, and our schedules, which a step put off does not move."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    theirs, mine = plain(), plain()
    model, optimizer, schedule = accelerator.prepare(theirs, *create(name, theirs))
    rates = []
    for t in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        for part in micro(batch(t)):
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(model, part))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert alone(name, mine, clip=0.5) == rates
    assert_close(theirs, mine)


def test_train_and_eval_reach_the_optimizer() -> None:
    accelerator, theirs = Accelerator(cpu=True), plain()
    model, optimizer, _ = accelerator.prepare(theirs, *create("schedulefreesgd", theirs))
    for t in range(2):
        accelerator.backward(loss_fn(model, batch(t)))
        optimizer.step()
    before = weights(theirs)
    optimizer.eval()
    assert not all(a.equal(b) for a, b in zip(before, weights(theirs), strict=True))
    optimizer.train()
    for a, b in zip(before, weights(theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["ranger", "adamw", "gsam+adamw", "looksam+sgd_momentum"])
def test_resuming_goes_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    def steps(over: range, load: Path | None = None, save: Path | None = None) -> nn.Module:
        accelerator, theirs = Accelerator(cpu=True), net(torch.float32)
        model, optimizer, schedule = accelerator.prepare(theirs, *create(name, theirs))
        if load is not None:
            accelerator.load_state(str(load))
        for t in over:
            data = batch(t, torch.float32)
            if "sam" in name:
                sharpness_step(accelerator, optimizer, model, loss_fn, data)
            else:
                optimizer.zero_grad()
                accelerator.backward(loss_fn(model, data))
                optimizer.step()
            schedule.step()
            if t == 2 and save is not None:
                accelerator.save_state(str(save))
        return theirs

    whole = steps(range(STEPS), save=tmp_path / "saved")
    resumed = steps(range(3, STEPS), load=tmp_path / "saved")
    assert all(a.equal(b) for a, b in zip(weights(whole), weights(resumed), strict=True))


# two passes -----------------------------------------------------------------------------------------------------------

FAMILY = ["sam+adamw", "asam+sgd_momentum", "gsam+adamw", "looksam+sgd_momentum"]


@pytest.mark.parametrize("name", FAMILY)
def test_all_ways_have_the_same_numbers(name: str) -> None:
    """The helper, closures, and halves by hand with the accelerator's clipping."""

    def by_helper(accelerator: Accelerator, optimizer: Any, model: nn.Module, data: Batch) -> None:
        sharpness_step(accelerator, optimizer, model, loss_fn, data)

    def by_closure(accelerator: Accelerator, optimizer: Any, model: nn.Module, data: Batch) -> None:
        def closure() -> Tensor:
            loss = loss_fn(model, data)
            accelerator.backward(loss)
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)

    def by_hand(accelerator: Accelerator, optimizer: Any, model: nn.Module, data: Batch) -> None:
        sharpness = optimizer.optimizer
        optimizer.zero_grad()
        accelerator.backward(loss_fn(model, data))
        if sharpness.needs_two_passes and sharpness.first_step():
            accelerator.backward(loss_fn(model, data))
        sharpness.descend()
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()

    mine = net()
    rates = alone(name, mine)
    for way in (by_helper, by_closure, by_hand):
        accelerator, theirs = Accelerator(cpu=True), net()
        model, optimizer, schedule = accelerator.prepare(theirs, *create(name, theirs))
        for t in range(STEPS):
            assert schedule.get_last_lr()[0] == rates[t]
            way(accelerator, optimizer, model, batch(t))
            schedule.step()
        assert_close(theirs, mine)


@pytest.mark.parametrize("name", FAMILY)
def test_accumulation_equals_the_large_batch(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    theirs, mine = plain(), plain()
    model, optimizer, schedule = accelerator.prepare(theirs, *create(name, theirs))
    for t in range(STEPS):
        sharpness_step(accelerator, optimizer, model, loss_fn, micro(batch(t)), accumulate="batch", clip=0.5)
        schedule.step()
    alone(name, mine, clip=0.5)
    assert_close(theirs, mine)


def test_bfloat16() -> None:
    """Through prepare, and in one autocast round both passes, which must not keep casts of weights that then moved."""
    single = torch.float32
    results = []
    for name, inside in (("sam+sgd", False), ("sam+sgd", True), ("sgd", False)):
        accelerator = Accelerator(cpu=True, mixed_precision="no" if inside else "bf16")
        theirs = plain(single)
        options = {"rho": 1.0} if "sam" in name else {}
        model, optimizer, _ = accelerator.prepare(theirs, *create(name, theirs, schedule="constant", **options))
        for t in range(STEPS):
            if "sam" in name:
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    sharpness_step(accelerator, optimizer, model, loss_fn, batch(t, single))
            else:
                optimizer.zero_grad()
                accelerator.backward(loss_fn(model, batch(t, single)))
                optimizer.step()
        results.append(theirs[0].weight)
        AcceleratorState._reset_state(True)
    prepared, surrounded, without = results
    torch.testing.assert_close(prepared, surrounded, rtol=0, atol=2e-3)  # the loss is in float32 in one of them
    assert (prepared - without).abs().max() > 2e-2


# a scaler: accelerate has none on a CPU, so it is put in by hand ------------------------------------------------------


def scaled(name: str, theirs: nn.Module) -> tuple[Accelerator, nn.Module, Any, Any]:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerator, *accelerator.prepare(theirs, *create(name, theirs))


@pytest.mark.parametrize("name", FAMILY)
def test_a_scaler_changes_no_number(name: str) -> None:
    theirs, mine = net(), net()
    accelerator, model, optimizer, schedule = scaled(name, theirs)
    for t in range(STEPS):
        sharpness_step(accelerator, optimizer, model, loss_fn, batch(t), clip=0.5)
        assert not optimizer.step_was_skipped
        schedule.step()
    alone(name, mine, clip=0.5)
    assert_close(theirs, mine, 1e-9)
    assert accelerator.scaler.get_scale() == 1024.0
    assert accelerator.scaler._get_growth_tracker() == STEPS


@pytest.mark.parametrize("broken", [1, 2])
@pytest.mark.parametrize("name", ["sam+adamw", "gsam+adamw"])
def test_an_overflow_skips_the_step_and_its_schedule(broken: int, name: str) -> None:
    theirs = plain()
    accelerator, model, optimizer, schedule = scaled(name, theirs)
    calls = 0

    def breaking(model: nn.Module, data: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_fn(model, data) * (torch.inf if calls == broken else 1.0)

    before = weights(theirs)
    sharpness_step(accelerator, optimizer, model, breaking, batch(0))
    schedule.step()
    assert all(a.equal(b) for a, b in zip(before, weights(theirs), strict=True))
    assert optimizer.step_was_skipped
    assert (accelerator.scaler.get_scale(), schedule.scheduler.last_epoch) == (512.0, 0)
    sharpness_step(accelerator, optimizer, model, breaking, batch(0))
    schedule.step()
    assert not optimizer.step_was_skipped
    assert schedule.scheduler.last_epoch == 1


@pytest.mark.parametrize("cleared", [True, False])
def test_a_closure_through_a_scaler_is_refused(cleared: bool) -> None:
    """accelerate hands closures to the scaler in a way that torch's own check does not see."""
    theirs = plain()
    accelerator, model, optimizer, _ = scaled("sam+sgd", theirs)
    sharpness_step(accelerator, optimizer, model, loss_fn, batch(0))

    def closure() -> Tensor:
        loss = loss_fn(model, batch(1))
        accelerator.backward(loss)
        return loss

    if cleared:
        optimizer.zero_grad()
    before = weights(theirs)
    with pytest.raises(RuntimeError, match=r"cannot be given to GradScaler.step.*scaler=scaler"):
        optimizer.step(closure)
    assert all(a.equal(b) for a, b in zip(before, weights(theirs), strict=True))
    sharpness_step(accelerator, optimizer, model, loss_fn, batch(1))  # and nothing is left of it
    assert not all(a.equal(b) for a, b in zip(before, weights(theirs), strict=True))


# refusals -------------------------------------------------------------------------------------------------------------


def prepared(name: str) -> tuple[Accelerator, nn.Module, Any]:
    accelerator, theirs = Accelerator(cpu=True, gradient_accumulation_steps=2), plain()
    return accelerator, *accelerator.prepare(theirs, create(name, theirs)[0])


@pytest.mark.parametrize(
    ("name", "unwrap", "had"),
    [
        ("adamw", lambda optimizer: optimizer, "AdamW, prepared"),
        ("lookahead+sam+adamw", lambda optimizer: optimizer, "Lookahead, prepared"),
        ("sam+adamw", lambda optimizer: optimizer.optimizer, "SAM"),
    ],
)
def test_what_is_no_prepared_two_pass_optimizer(name: str, unwrap: Callable[[Any], Any], had: str) -> None:
    accelerator, model, optimizer = prepared(name)
    with pytest.raises(TypeError, match=f"optimizer={had}; legal: what accelerator.prepare makes"):
        sharpness_step(accelerator, unwrap(optimizer), model, loss_fn, batch(0))


def test_steps_that_accelerate_puts_off() -> None:
    accelerator, model, optimizer = prepared("sam+adamw")
    with (
        accelerator.accumulate(model),
        pytest.raises(RuntimeError, match="list of all micro-batches and accumulate='batch'"),
    ):
        sharpness_step(accelerator, optimizer, model, loss_fn, batch(0))


def test_sharded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model, optimizer = prepared("sam+adamw")
    monkeypatch.setattr(accelerator.state, "distributed_type", type(accelerator.distributed_type).FSDP)
    with pytest.raises(ValueError, match="FSDP, in which two passes were not tried"):
        sharpness_step(accelerator, optimizer, model, loss_fn, batch(0))
