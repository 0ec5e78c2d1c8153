"""Composer's convention, played by a small trainer and scaler: its pins exclude this version of torch.

What is played is documented in its guides to SAM and to numerics and in ``composer.trainer``: closures clear gradients,
run all micro-batches, add to the dictionary of losses they are given, and under float16 return None after an overflow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piste
from piste.integrations import composer

RATE, STEPS, SIZE, MICRO = 1e-2, 5, 8, 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(SIZE, 4, generator=generator), torch.randint(3, (SIZE,), generator=generator)


def parts_of(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(MICRO), data[1].split(MICRO), strict=True))


class Scaler(torch.amp.GradScaler):
    """Unscales behind every pass of a closure, which then returns None if something overflowed, in whatever process."""

    others_overflow: Sequence[int] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__("cpu", **settings)
        self.passes = 0

    def step(self, optimizer: torch.optim.Optimizer, *, closure: Callable[..., Any]) -> Any:  # type: ignore[override]
        def scaled(**keywords: Any) -> Any:
            self._per_optimizer_states.pop(id(optimizer), None)
            optimizer.zero_grad()
            loss = closure(**keywords)
            self.unscale_(optimizer)
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            self.passes += 1
            overflow = any(x.item() for x in found) or self.passes in self.others_overflow
            return None if overflow else loss

        return optimizer.step(closure=scaled)


class Trainer:
    """As much of the trainer as an optimizer sees of it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler | None = None) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.logged: list[float] = []
        self.synced: list[bool] = []
        self.spoil: set[int] = set()  # numbers of passes whose loss overflows

    def passes(self, data: tuple[Tensor, Tensor], losses: dict[str, float], ddp_sync: bool = True) -> Tensor:
        self.optimizer.zero_grad()
        self.synced.append(ddp_sync)
        total = torch.zeros(())
        for x, y in parts_of(data):
            loss = nn.functional.cross_entropy(self.model(x), y) / (SIZE // MICRO)
            losses["total"] = losses.get("total", 0.0) + loss.item()
            total += loss.detach()
            if len(self.synced) in self.spoil:
                loss = loss * torch.inf
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return total

    def fit(self, steps: int = STEPS, start: int = 0) -> Trainer:
        for t in range(start, start + steps):
            data, losses = batch(t), {}

            def closure(loss_dict: Any = losses, data: Any = data, **keywords: Any) -> Any:
                total = self.passes(data, loss_dict, **keywords)
                return total if self.scaler is not None else total.item()

            if self.scaler is None:
                self.optimizer.step(closure=closure)
            elif getattr(self.optimizer, "_step_supports_amp_closure", False):
                self.scaler.step(self.optimizer, closure=closure)
                self.scaler.update()
            else:
                closure()
                super(Scaler, self.scaler).step(self.optimizer)
                self.scaler.update()
            self.logged.append(losses["total"])
        return self


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(data[0]), data[1])

    losses = []
    for t in range(STEPS):
        if isinstance(optimizer, piste.SAM):
            step = piste.sharpness_step(optimizer, model, loss_fn, parts_of(batch(t)), accumulate="batch")
            losses.append(step.item())
            continue
        optimizer.zero_grad()
        parts = [loss_fn(model, part) / (SIZE // MICRO) for part in parts_of(batch(t))]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    return losses


TWO_PASS: dict[str, Callable[[torch.optim.Optimizer, nn.Module | None], piste.SAM]] = {
    "sam": lambda inner, model: piste.SAM(inner, rho=0.2, model=model),
    "every second": lambda inner, model: piste.SAM(inner, rho=0.2, interval=2, model=model),
    "gsam": lambda inner, model: piste.GSAM(inner, rho=0.2, model=model),
    "looksam": lambda inner, model: piste.LookSAM(inner, rho=0.2, k=3, model=model),
    "esam": lambda inner, model: piste.ESAM(inner, rho=0.2, gamma=1.0, model=model),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return piste.AdamW(model.named_parameters(), lr=RATE)


def same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_one_pass_needs_nothing(scale: float | None) -> None:
    model, expected = net(), net()
    trainer = Trainer(model, adamw(model), None if scale is None else Scaler(init_scale=scale)).fit()
    losses = by_hand(expected, adamw(expected))
    same(model, expected)
    assert trainer.logged == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("kind", sorted(TWO_PASS))
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_two_passes_by_hand(kind: str, scale: float | None) -> None:
    """Micro-batches, BatchNorm, and losses that are those of first passes."""
    model, expected = net(), net()
    optimizer = composer.two_passes(TWO_PASS[kind](adamw(model), model))
    trainer = Trainer(model, optimizer, None if scale is None else Scaler(init_scale=scale)).fit()
    losses = by_hand(expected, TWO_PASS[kind](adamw(expected), None))
    same(model, expected)
    assert trainer.logged == pytest.approx(losses, rel=1e-5)


def test_without_it_losses_are_counted_twice() -> None:
    """Why there is two_passes() at all."""
    model = net()
    logged = Trainer(model, TWO_PASS["sam"](adamw(model), model)).fit(1).logged
    assert logged[0] > 1.5 * nn.functional.cross_entropy(net()(batch(0)[0]), batch(0)[1]).item()


def test_which_passes_average_over_processes() -> None:
    for kind, expected in {"sam": [False, True], "gsam": [True, True], "every second": [True, False, True]}.items():
        model = net()
        trainer = Trainer(model, composer.two_passes(TWO_PASS[kind](adamw(model), model)))
        trainer.fit(2 if kind == "every second" else 1)
        assert trainer.synced == expected


@pytest.mark.parametrize("spoilt", [1, 2])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_overflow_skips_the_step(spoilt: int, elsewhere: bool) -> None:
    """Here, or in another process, which this one learns from None alone."""
    model = net()
    scaler = Scaler(init_scale=2.0**10)
    trainer = Trainer(model, composer.two_passes(TWO_PASS["sam"](adamw(model), model)), scaler)
    if elsewhere:
        scaler.others_overflow = [spoilt]
    else:
        trainer.spoil = {spoilt}
    weights = copy.deepcopy([*model.parameters()])
    trainer.fit(1)
    assert all(map(torch.equal, model.parameters(), weights))
    assert trainer.optimizer.steps == 1
    assert len(trainer.synced) == spoilt
    assert scaler.get_scale() == (2.0**10 if elsewhere else 2.0**9)
    trainer.fit(1, start=1)
    assert not any(map(torch.equal, model.parameters(), weights))


def test_an_overflow_in_a_plain_step() -> None:
    model = net()
    trainer = Trainer(model, composer.two_passes(TWO_PASS["every second"](adamw(model), model)), Scaler())
    trainer.spoil = {1}
    weights = copy.deepcopy([*model.parameters()])
    trainer.fit(1)
    assert all(map(torch.equal, model.parameters(), weights))
    trainer.fit(1, start=1)
    assert trainer.synced[1:] == [False, True]  # the second step is still the one that climbs


def test_resume() -> None:
    whole, half, rest = net(), net(), net()
    make = lambda model: composer.two_passes(TWO_PASS["looksam"](adamw(model), model))  # noqa: E731
    Trainer(whole, make(whole)).fit(4)
    first = Trainer(half, make(half)).fit(2)
    rest.load_state_dict(half.state_dict())
    second = Trainer(rest, make(rest))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.fit(2, start=2)
    assert all(map(torch.equal, whole.state_dict().values(), rest.state_dict().values()))


def test_refusals() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"optimizer=AdamW; legal: piste.SAM"):
        composer.two_passes(adamw(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma=1"):
        composer.two_passes(piste.ESAM(adamw(model)))
    optimizer = composer.two_passes(piste.SAM(adamw(model)))
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
