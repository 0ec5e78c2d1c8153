"""Trials trained together: equal to trials trained alone, whatever trains them, and refused where they would not be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from piste.race import Splits, Task, packed
from piste.race.contenders import make_contenders
from piste.race.packed import run_pack, why_not
from piste.race.record import CONFIRM, DIVERGED, FINISHED, TUNE, RunKey, RunRecord
from piste.race.seeds import derived_seed, seed_everything
from piste.race.stack import Stack
from piste.race.task import load_task
from piste.race.training import run

CPU = torch.device("cpu")
# A curve, against that of the run alone: sums in another order differ by some 1e-7, and 60 steps let that grow.
TOLERANCE = 2e-3


def net(*inside: nn.Module) -> Callable[[], nn.Module]:
    # A bias that batch normalisation takes away again has no gradient but rounding, of which Adam makes whole steps.
    bias = not any(isinstance(layer, nn.BatchNorm1d) for layer in inside)
    return lambda: nn.Sequential(nn.Linear(4, 16, bias=bias), *inside, nn.Tanh(), nn.Linear(16, 1))


def splits() -> Splits:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=draw)
    y = x.sum(1, keepdim=True).sin()
    return Splits(train=(x[:50], y[:50]), valid=(x[50:70], y[50:70]), report=(x[70:], y[70:]))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


TASK = Task(name="net", model=net(), data=splits, loss=loss_of, steps=24, batch_size=10)


def both(task: Task, name: str, lrs: Sequence[float], schedule: str = "constant") -> list[tuple[RunRecord, RunRecord]]:
    """Records of the same runs, together and alone."""
    (contender,) = make_contenders([name], [schedule])
    about = (task.name, "f00d", contender.name, contender.optimizer, contender.schedule)
    keys = [RunKey(*about, {"lr": lr}, task.steps, 3, TUNE, "cpu", {}, packed=True) for lr in lrs]
    data = task.data()
    together = run_pack(task, data, contender, keys, lambda step: None)
    alone = [run(task, data, contender, replace(key, packed=False), lambda step: None) for key in keys]
    return list(zip(together, alone, strict=True))


def assert_alike(one: RunRecord, other: RunRecord, tolerance: float = TOLERANCE) -> None:
    assert (one.status, one.message) == (other.status, other.message)
    for name in ("step", "lr", "train_loss", "valid_loss", "valid_metric", "gradient_norm"):
        numbers, wanted = getattr(one.curve, name), getattr(other.curve, name)
        assert numbers == pytest.approx(wanted, rel=tolerance, abs=1e-5, nan_ok=True), name
    assert one.cost.gradient_evaluations == other.cost.gradient_evaluations
    assert one.cost.state_bytes == other.cost.state_bytes


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "ranger", "adan"])
def test_trials_on_digits_are_those_of_runs_alone(name: str) -> None:
    task = replace(load_task("digits_mlp").task, steps=60)
    (contender,) = make_contenders([name], [])
    lrs = [contender.lr_center * 10 ** (-place / 5) for place in range(8)]
    for one, other in both(task, name, lrs, contender.schedule):
        # An image whose two likeliest digits are a tie of 1e-6 may go either way.
        assert one.curve.valid_metric == pytest.approx(other.curve.valid_metric, abs=1.001 / 360)
        one.curve.valid_metric = other.curve.valid_metric
        assert_alike(one, other)
        assert one.finished


def square() -> nn.Module:
    """Full rank wherever a factor is made of its gradients: of a null space, one bit decides what basis SOAP takes."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def doubles() -> Splits:
    return Splits(**{name: tuple(tensor.double() for tensor in split) for name, split in vars(splits()).items()})


@pytest.mark.parametrize(
    "name",
    [
        *("sam+adamw", "looksam+adamw", "lookahead+sgd", "ranger21", "schedule_free_adamw", "muon", "prodigy", "soap"),
        *("lamb", "adafactor"),
        "torch.AdamW",
    ],
)
def test_whatever_trains_stays_within_its_own_trial(name: str) -> None:
    """Two passes, averages of weights, norms over the whole model, matrices, numbers that a group carries."""
    for one, other in both(replace(TASK, model=square, data=doubles), name, [1e-3, 1e-2]):
        assert_alike(one, other, tolerance=1e-11)
        assert one.finished


def test_one_that_diverges_hurts_no_other() -> None:
    """Most of the pack breaks, at steps of its own, and the rest moves to a smaller stack."""
    found = both(TASK, "sgd", [1e-2, 1e30, 3e-2, 1e6, 1e30, 1e12])
    assert [one.status for one, _ in found] == [FINISHED, DIVERGED, FINISHED, *3 * [DIVERGED]]
    assert len({one.cost.steps for one, _ in found}) > 1
    for one, other in found:
        assert (one.status, one.message) == (other.status, other.message)
    for one, other in (found[0], found[2]):
        assert_alike(one, other)


@pytest.mark.parametrize(
    "inside",
    [(nn.Dropout(0.5),), (nn.BatchNorm1d(16),), (nn.BatchNorm1d(16), nn.Dropout(0.2))],
    ids=["dropout", "batch norm", "both"],
)
@pytest.mark.parametrize("name", ["adamw", "sam+adamw"])
def test_masks_and_running_statistics_are_those_of_runs_alone(name: str, inside: tuple[nn.Module, ...]) -> None:
    def model() -> nn.Module:
        fresh = [type(layer)(layer.p if isinstance(layer, nn.Dropout) else 16) for layer in inside]  # type: ignore[call-arg]
        return net(*fresh)()

    task = replace(TASK, model=model)
    assert not why_not(task, splits(), CPU)
    for one, other in both(task, name, [1e-3, 1e-2]):
        assert_alike(one, other)


class Sampling(nn.Module):
    """Adds noise to what a linear layer gives, in the shape and the order in which that lies in memory."""

    def __init__(self, quiet: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 1)
        self.quiet, self.calls = quiet, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        hidden = self.first(x)
        if self.training and self.calls > self.quiet:
            hidden = hidden + torch.randn_like(hidden)
        out: Tensor = self.last(hidden)
        return out


def test_noise_comes_in_the_order_of_runs_alone() -> None:
    task = replace(TASK, model=lambda: Sampling(quiet=0))
    assert not why_not(task, splits(), CPU)
    for one, other in both(task, "adamw", [1e-3, 1e-2]):
        assert_alike(one, other)


def test_noise_that_begins_late_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="began to draw"):
        both(replace(TASK, model=lambda: Sampling(quiet=9)), "adamw", [1e-3, 1e-2])


def test_finding_out_whether_a_loss_draws_leaves_no_trace() -> None:
    stack = Stack(TASK, [net(nn.BatchNorm1d(16), nn.Dropout(0.5))()])
    before = torch.get_rng_state(), {name: buffer.clone() for name, buffer in stack.buffers.items()}
    stack._find_out_whether_it_draws(tuple(part[:10] for part in splits().train))
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(stack.buffers[name], buffer) for name, buffer in before[1].items())


def test_a_weight_that_stands_in_two_places_is_one() -> None:
    def tied() -> nn.Module:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 1))

    task = replace(TASK, model=tied)
    assert not why_not(task, splits(), CPU)
    for one, other in both(task, "adamw", [1e-3, 1e-2]):
        assert_alike(one, other)


def test_records_of_packs_have_no_times_and_ids_of_their_own() -> None:
    ((one, other),) = both(TASK, "adamw", [1e-3])
    assert one.id != other.id
    assert RunRecord.from_json(one.to_json()).key.packed
    assert '"packed"' not in other.to_json()  # which is as before there were packs
    times = ("step_seconds", "optimizer_seconds", "train_seconds", "evaluation_seconds", "compile_seconds")
    assert all(math.isnan(getattr(one.cost, name)) for name in times)
    assert all(map(math.isnan, one.curve.train_seconds))
    assert one.cost.peak_bytes == 0
    assert (one.cost.steps, one.cost.examples) == (24, 240)


class Counting(nn.Module):
    """Each call is another than the one before, by a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = net()(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(x) * (1 + 0.1 * self.calls)
        return out


class Branching(nn.Module):
    """Looks at numbers to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out if out.mean() > 0 else -out


def seeded_noise(model: nn.Module, batch: Any) -> Tensor:
    """Noise that depends on the weights' own seed: nothing a pack could draw once for all."""
    weight = next(model.parameters())
    return loss_of(model, batch) + weight.sum() * float(weight.detach()[0, 0])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": Branching}, "data-dependent"),
        ({"loss": seeded_noise}, "item"),
        ({"metric": lambda model, batch: float(loss_of(model, batch)), "metric_name": "m"}, "item"),
        ({"model": lambda: nn.Sequential(nn.Linear(4, 1200), nn.Linear(1200, 1200), nn.Linear(1200, 1))}, "parameters"),
    ],
    ids=["branch", "number", "metric", "size"],
)
def test_what_cannot_be_packed_is_said(changes: dict[str, Any], why: str) -> None:
    assert not why_not(TASK, splits(), CPU)
    assert why in why_not(replace(TASK, **changes), splits(), CPU)


def test_other_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packed._plain
    monkeypatch.setattr(packed, "_plain", lambda *arguments: 1.001 * plain(*arguments))
    assert "differently" in why_not(TASK, splits(), CPU)
    monkeypatch.setattr(packed, "_plain", plain)
    monkeypatch.setattr(packed, "_plain_scores", lambda *arguments: (0.0, 0.0))
    assert "scores" in why_not(TASK, splits(), CPU)


def test_what_goes_wrong_in_a_pack_is_raised() -> None:
    with pytest.raises(RuntimeError, match="data-dependent"):
        both(replace(TASK, model=Branching), "adamw", [1e-3, 1e-2])


# What a step draws


def drawing(draws: Callable[[int], Any], seen: list[Any], every: int) -> Task:
    """A task that draws in its loss, in each ``every``-th call, and notes what."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            calls.append(0)
            if not len(calls) % every:
                seen.append((len(calls), draws(0)))
        return loss_of(model, batch)

    calls: list[int] = []
    return replace(TASK, loss=loss)


def without_a_trace(_: int) -> float:
    """The generator is afterwards as it was: whoever looks at it does not see that something was drawn."""
    with torch.random.fork_rng(devices=[]):
        return float(torch.rand(()))


def drawn_in_step(draw: Callable[[int], Any], step: int) -> Any:
    seed_everything(derived_seed(3, f"step {step}"))
    return draw(0)


@pytest.mark.parametrize("every", [1, 5])  # step 5 is one between evaluations, whose seeds are spared
@pytest.mark.parametrize(
    "draw",
    [lambda _: random.random(), lambda _: np.random.rand(), lambda _: float(torch.rand(())), without_a_trace],
    ids=["random", "numpy", "torch", "torch, forked"],
)
def test_steps_are_seeded_wherever_they_draw(draw: Callable[[int], Any], every: int) -> None:
    """Also where the first draw comes late, after steps that seemed to need no seeds."""
    seen: dict[str, list[Any]] = {}
    for name in ("adamw", "sgd", "sam+adamw"):
        task = drawing(draw, seen.setdefault(name, []), every if "sam" not in name else 1)
        (contender,) = make_contenders([name], ["constant"])
        key = RunKey(
            "net", "", contender.name, contender.optimizer, "constant", {"lr": 1e-3}, 24, 3, CONFIRM, "cpu", {}
        )
        assert run(task, splits(), contender, key, lambda step: None).status == FINISHED
    first, second, twice = (found[-(24 // every) :] for found in (seen["adamw"], seen["sgd"], seen["sam+adamw"]))
    values = [value for _, value in first]
    assert values == [value for _, value in second]
    assert len(set(values)) == len(values)
    assert values == [drawn_in_step(draw, step) for step in range(every, 25, every)]
    if every == 1:
        assert values == [value for _, value in seen["sam+adamw"][-48::2]]
    assert twice
