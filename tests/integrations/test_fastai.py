"""piste in fastai: real learners on tiny models, against loops and schedules written by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piste

pytest.importorskip("fastai")

from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper

from piste.integrations.fastai import LearnerOptimizer, PisteCallback, opt_func

N, BATCH = 32, 8
RATE = 1e-2


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def batches(size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    x, y = samples()
    return list(zip(x.split(size), y.split(size), strict=True))


def loaders(size: int = BATCH) -> DataLoaders:
    data = list(zip(*samples(), strict=True))
    return DataLoaders(DataLoader(data, bs=size, num_workers=0), DataLoader(data, bs=N, num_workers=0))


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Callable[..., Learner]]:
    def make(
        optimizer: Any, *callbacks: Any, model: nn.Module | None = None, size: int = BATCH, **others: Any
    ) -> Learner:
        made = optimizer if callable(optimizer) else opt_func(optimizer)
        settings = {"loss_func": nn.CrossEntropyLoss(), "cbs": list(callbacks), "path": tmp_path, **others}
        learn = Learner(loaders(size), net() if model is None else model, opt_func=made, **settings)
        learn.remove_cb(learn.progress)
        learn.logger = lambda *_: None
        return learn

    return make


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def close(a: nn.Module, b: nn.Module) -> None:
    for name, x in a.state_dict().items():
        torch.testing.assert_close(
            x, b.state_dict()[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def equal(a: Any, b: Any) -> bool:
    """Of two state dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def by_hand(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: int,
    *,
    size: int = BATCH,
    micro: int | None = None,
    clip: float | None = None,
) -> nn.Module:
    """A plain loop; optimizers with two passes are climbed by hand, with BatchNorm's statistics put back."""
    model = net()
    model.train()
    optimizer = make(model)
    for x, y in batches(size) * epochs:
        parts = list(zip(x.split(micro or size), y.split(micro or size), strict=True))

        def backward(parts: list[tuple[Tensor, Tensor]] = parts) -> None:
            for a, b in parts:
                (nn.functional.cross_entropy(model(a), b) / len(parts)).backward()

        optimizer.zero_grad()
        backward()
        if isinstance(optimizer, piste.SAM):
            if optimizer.needs_two_passes:
                optimizer.first_step()
                kept = copy.deepcopy(dict(model.named_buffers()))
                backward()
                for name, buffer in model.named_buffers():
                    buffer.copy_(kept[name])
            optimizer.descend()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def spared(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return piste.param_groups(model, weight_decay=weight_decay)


# one pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(piste.presets))
def test_every_preset_trains(learner: Any, name: str) -> None:
    learn = learner(opt_func(name, engine="reference"), PisteCallback)
    before = copy.deepcopy(learn.model)
    learn.fit(1, RATE)
    assert not same(before, learn.model)
    assert all(x.isfinite().all() for x in learn.model.parameters())
    assert learn.opt.hypers[0]["lr"] == RATE


def test_it_is_the_plain_loop(learner: Any) -> None:
    learn = learner("ranger", wd=0.3)
    learn.fit(2, RATE)
    expected = by_hand(lambda model: piste.Ranger(spared(model, 0.3), lr=RATE), 2)
    assert same(learn.model, expected)


@pytest.mark.parametrize("true_wd", [True, False])
@pytest.mark.parametrize("bn_bias", [True, False])
def test_what_weight_decay_means(learner: Any, true_wd: bool, bn_bias: bool) -> None:
    """Learner's word on biases and norms, which OptimWrapper forgets, and opt_func's on decoupling."""
    learn = learner(opt_func("sgd_momentum", true_wd=true_wd), wd=0.3, wd_bn_bias=bn_bias)
    learn.fit(2, RATE)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = piste.param_groups(model, weight_decay=0.3, decay_norm_and_bias=bn_bias)
        return piste.SGD(groups, lr=RATE, momentum=0.9, decoupled_weight_decay=true_wd)

    assert same(learn.model, by_hand(make, 2))


def test_decay_that_comes_later(learner: Any) -> None:
    """torch's SGD knows no decoupled decay: ours stands in before anybody asks for decay."""
    preset = piste.presets.from_mapping({"sgd": {"optimizer": torch.optim.SGD, "wd": {"true_wd": True}}})["sgd"]
    learn = learner(opt_func(preset))
    learn.fit(1, RATE)
    learn.fit(1, RATE, wd=0.3)
    assert isinstance(learn.opt.base, piste.SGD)
    group = learn.opt.opt.param_groups[0]
    assert (group["weight_decay"], group["decoupled_weight_decay"]) == (0.3, True)


def test_options_and_the_sheets_partial(learner: Any) -> None:
    learn = learner(opt_func("ranger", use_gc=False, k=3))
    learn.opt_func = partial(learn.opt_func, eps=1e-4)
    learn.fit(1, RATE)
    group = learn.opt.opt.param_groups[0]
    assert (group["use_gc"], group["k"], group["eps"]) == (False, 3, 1e-4)
    learn.opt_func = partial(learn.opt_func, eps=1e-2)
    learn.fit(1, reset_opt=True)
    assert learn.opt.hypers[0]["eps"] == 1e-2
    with pytest.raises(ValueError, match=r"unknown option 'epz'.*'eps'"):
        learner(partial(opt_func("ranger"), epz=1e-4)).fit(1)
    with pytest.raises(ValueError, match=r"no optimizer 'rangr'.*'ranger'"):
        opt_func("rangr")


def test_a_partials_learning_rate_is_the_learners(learner: Any) -> None:
    learn = learner(opt_func("adamw", lr=3e-4))
    learn.fit(1)
    assert learn.lr == learn.opt.hypers[0]["lr"] == 3e-4


def test_the_model_tells_names_scales_and_formats() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    made = opt_func("amos", model=model)(list(model.parameters()), lr=RATE)
    plain = piste.Amos.groups(model)
    assert {n: g["scale"] for g in made.opt.param_groups for n in g["param_names"]} == {
        n: g["scale"] for g in plain for n in g["param_names"]
    }
    made = opt_func("adamw", model=model, state="8bit")(list(model.parameters()), lr=RATE)
    formats = {n: g["state"] for g in made.opt.param_groups for n in g["param_names"]}
    assert formats == {"0.weight": "fp32", "1.weight": "8bit", "1.bias": "8bit"}


# hyper-parameters ----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What the optimizer's groups hold at each step."""

    order = 99

    def before_fit(self) -> None:
        self.rates: list[float] = []
        self.momenta: list[Any] = []

    def before_step(self) -> None:
        group = self.learn.opt.opt.param_groups[0]
        self.rates.append(group["lr"])
        self.momenta.append(group["betas"] if "betas" in group else group.get("momentum"))


def curves(name: str, schedule: str) -> tuple[list[float], list[Any]]:
    optimizer = piste.create(name, net(), lr=RATE)
    follow = piste.schedules.named(schedule)(optimizer, 2 * N // BATCH)
    rates, momenta = [], []
    for _ in range(2 * N // BATCH):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["betas"] if "betas" in group else group.get("momentum"))
        optimizer.step()
        follow.step()
    return rates, momenta


@pytest.mark.parametrize("name", ["ranger", "rmsprop", "sgd", "sgd_momentum", "adan", "amos", "adafactor"])
@pytest.mark.parametrize("schedule", ["one_cycle", "flat_cosine"])
def test_curves_are_those_of_our_schedules(learner: Any, name: str, schedule: str) -> None:
    """Momentum too: betas[0], or momentum, or neither where a preset says so. fastai computes in float32."""
    learn = learner(opt_func(name, engine="reference"), Watch())
    fit = learn.fit_one_cycle if schedule == "one_cycle" else learn.fit_flat_cos
    fit(2, RATE)
    rates, momenta = curves(name, schedule)
    assert learn.watch.rates == pytest.approx(rates, rel=1e-4)
    assert learn.recorder.hps["lr"] == pytest.approx(rates, rel=1e-4)
    for seen, expected in zip(learn.watch.momenta, momenta, strict=True):
        assert seen == (None if expected is None else pytest.approx(expected, rel=1e-4))
    if schedule == "one_cycle":
        first = [m[0] if isinstance(m, tuple) else m or 0.0 for m in momenta]
        assert learn.recorder.hps["mom"] == pytest.approx(first, rel=1e-4)


def test_names_of_hyper_parameters() -> None:
    weights = list(nn.Linear(3, 2).parameters())
    ranger = opt_func("ranger")(weights, lr=RATE).hypers[0]
    assert (ranger["mom"], ranger["sqr_mom"], ranger["alpha"]) == (0.95, 0.999, 0.5)  # alpha is Lookahead's
    rmsprop = opt_func("rmsprop")(weights, lr=RATE).hypers[0]
    assert (rmsprop["mom"], rmsprop["sqr_mom"]) == (0.9, 0.99)
    optimizer = opt_func("adamw")(weights, lr=RATE)
    optimizer.set_hypers(sqr_mom=0.99, eps=1e-3, wd=0.2)
    group = optimizer.opt.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.99), 1e-3, 0.2)
    with pytest.raises(ValueError, match="adamw has no 'epsilon'"):
        optimizer.set_hyper("epsilon", 1e-3)


def splitter(model: nn.Sequential) -> list[list[Tensor]]:
    return [list(model[:2].parameters()), list(model[2:].parameters())]


def test_freezing_and_discriminative_rates(learner: Any) -> None:
    """Two groups to fastai, four inside: with and without decay."""
    learn = learner("adamw", Watch(), splitter=splitter, wd=0.1)
    body, head = copy.deepcopy(learn.model[0]), copy.deepcopy(learn.model[3])
    learn.freeze()
    learn.fit(1, RATE)
    assert same(body, learn.model[0])
    assert not same(head, learn.model[3])
    assert learn.model[1].weight.requires_grad  # fastai trains norms of frozen groups
    learn.unfreeze()
    assert not learn.opt.opt.state  # fastai begins anew
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    assert not same(body, learn.model[0])
    low, high = (hypers["lr"] for hypers in learn.opt.hypers)
    assert high / low == pytest.approx(100)
    assert [g["lr"] for g in learn.opt.opt.param_groups] == [low, low, high, high]
    assert [g["weight_decay"] for g in learn.opt.opt.param_groups] == [0.1, 0.0, 0.1, 0.0]


def test_fine_tune_and_lr_find(learner: Any) -> None:
    learn = learner("ranger", splitter=splitter)
    learn.fine_tune(1, base_lr=RATE)
    before, state = copy.deepcopy(learn.model), copy.deepcopy(learn.opt.state_dict()["state"])
    found = learn.lr_find(num_it=20, show_plot=False)  # where it cannot load what it saved, fastai warns
    assert 0 < found.valley < 10
    assert same(before, learn.model)
    assert equal(learn.opt.state_dict()["state"], state)


# what a loop does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ranger", "sgd_momentum", "sam+adamw", "looksam+adamw", "schedulefreeadamw"])
def test_a_saved_learner_goes_on_bit_by_bit(learner: Any, name: str) -> None:
    whole = learner(name, PisteCallback)
    whole.fit(1, RATE)
    whole.save("half")
    whole.fit(1, RATE)
    half = learner(name, PisteCallback, model=net(seed=5))
    half.load("half")
    half.fit(1, RATE)
    assert same(whole.model, half.model)


def test_export(learner: Any) -> None:
    learn = learner("ranger", PisteCallback)
    learn.fit(1, RATE)
    state = copy.deepcopy(learn.opt.state_dict())
    learn.dls.new_empty = lambda: learn.dls  # these have no data set of fastai's
    learn.export()
    assert equal(learn.opt.state_dict(), state)
    assert pickle.loads(pickle.dumps(learn.opt_func)).keywords["name"] == "ranger"


def test_accumulation_is_the_large_batch(learner: Any) -> None:
    """Without BatchNorm, which sees micro-batches."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    small = learner("adamw", GradientAccumulation(16), model=model())
    small.fit(2, RATE)
    large = learner("adamw", model=model(), size=16)
    large.fit(2, RATE)
    close(small.model, large.model)


def test_clipping(learner: Any) -> None:
    learn = learner("adamw", GradientClip(0.05))
    learn.fit(1, RATE)
    assert same(learn.model, by_hand(lambda model: piste.AdamW(spared(model, 0.01), lr=RATE), 1, clip=0.05))


class HalfOnCPU(MixedPrecision):
    """fastai's callback is for CUDA: the same with a scaler and autocast of the CPU."""

    def __init__(self, scale: float, enabled: bool = True) -> None:
        super().__init__()
        self.scale, self.enabled = scale, enabled

    def before_fit(self) -> None:
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=1000)
        self.scales: list[float] = []

    def after_fit(self) -> None:
        self.last = self.learn.scaler.get_scale()
        super().after_fit()


@pytest.mark.parametrize("name", ["adamw", "sam+adamw", "gsam+adamw"])
def test_mixed_precision(learner: Any, name: str) -> None:
    """A power of two as scale changes no bit, so it is the unscaled run; both passes are in bfloat16."""
    half = HalfOnCPU(2.0**10)
    scaled = learner(name, PisteCallback, half)
    scaled.fit(1, RATE)
    plain = learner(name, PisteCallback, HalfOnCPU(1.0))
    plain.fit(1, RATE)
    close(scaled.model, plain.model)
    full = learner(name, PisteCallback)
    full.fit(1, RATE)
    assert not same(scaled.model, full.model)
    assert half.last == 2.0**10


@pytest.mark.parametrize("which", ["first", "second"])
def test_an_overflow_skips_the_step(learner: Any, which: str) -> None:
    class Overflow(Callback):
        order = 8

        def before_fit(self) -> None:
            self.calls = 0

        def before_backward(self) -> None:
            self.calls += 1
            if self.calls == (1 if which == "first" else 2):
                self.learn.loss_grad = self.learn.loss_grad * torch.inf

    class One(Callback):
        def before_batch(self) -> None:
            if self.learn.iter:
                raise CancelBatchException

    half = HalfOnCPU(2.0**10, enabled=False)
    learn = learner("sam+adamw", PisteCallback, half, Overflow, One)
    weights = copy.deepcopy([*learn.model.parameters()])
    learn.fit(1, RATE)
    assert all(map(torch.equal, learn.model.parameters(), weights))
    assert half.last == 2.0**9
    assert learn.opt.two_pass.steps == 1
    learn.remove_cbs([Overflow, One])
    learn.fit(1, RATE)
    assert not any(map(torch.equal, learn.model.parameters(), weights))


def test_without_a_scaler_an_infinite_loss_skips_two_passes(learner: Any) -> None:
    class Overflow(Callback):
        def before_backward(self) -> None:
            self.learn.loss_grad = self.learn.loss_grad * torch.inf

    learn = learner("sam+adamw", PisteCallback, Overflow)
    weights = copy.deepcopy([*learn.model.parameters()])
    learn.fit(1, RATE)
    assert all(map(torch.equal, learn.model.parameters(), weights))


# two passes ----------------------------------------------------------------------------------------------------------

TWO_PASS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "sam": lambda inner: piste.SAM(inner, rho=0.2),
    "gsam": lambda inner: piste.GSAM(inner, rho=0.2, alpha=0.3),
    "looksam": lambda inner: piste.LookSAM(inner, rho=0.2, k=3),
}
OPTIONS: dict[str, dict[str, Any]] = {"sam": {}, "gsam": {"alpha": 0.3}, "looksam": {"k": 3}}


@pytest.mark.parametrize("kind", sorted(TWO_PASS))
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("micro", [None, BATCH])
def test_two_passes_by_hand(learner: Any, kind: str, clip: float | None, micro: int | None) -> None:
    """Also with micro-batches (one climb for all, and BatchNorm moves in first passes only) and clipping."""
    callbacks = [PisteCallback]
    callbacks += [] if clip is None else [GradientClip(clip)]
    callbacks += [] if micro is None else [GradientAccumulation(2 * BATCH)]
    learn = learner(opt_func(f"{kind}+adamw", rho=0.2, **OPTIONS[kind]), *callbacks)
    learn.fit(2, RATE)
    size = BATCH if micro is None else 2 * BATCH

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return TWO_PASS[kind](piste.AdamW(spared(model, 0.01), lr=RATE))

    close(learn.model, by_hand(make, 2, size=size, micro=micro, clip=clip))


def test_losses_and_what_others_see_are_of_the_first_pass(learner: Any) -> None:
    class Look(Callback):
        order = 20

        def before_fit(self) -> None:
            self.seen: list[tuple[float, bool]] = []

        def after_batch(self) -> None:
            if self.learn.training:
                again = nn.functional.cross_entropy(self.learn.pred.detach(), *self.learn.yb)
                self.seen.append((self.learn.loss.item(), torch.equal(again, self.learn.loss.detach())))

    learn = learner(opt_func("sam+sgd", rho=0.5), PisteCallback, Look)
    learn.fit(1, 1e-6)  # weights hardly move, so the losses of clean passes are known
    model = net()
    expected = [nn.functional.cross_entropy(model(x), y).item() for x, y in batches()]
    assert [loss for loss, _ in learn.look.seen] == pytest.approx(expected, abs=1e-4)
    assert all(still for _, still in learn.look.seen)


def test_a_failing_second_pass_leaves_the_weights(learner: Any) -> None:
    class Fails(Callback):
        calls = 0

        def before_backward(self) -> None:
            self.calls += 1
            if self.calls == 2:
                raise ZeroDivisionError("here")

    learn = learner("sam+adamw", PisteCallback, Fails())
    weights = copy.deepcopy([*learn.model.parameters()])
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, RATE)
    assert all(map(torch.equal, learn.model.parameters(), weights))


@pytest.mark.parametrize("name", ["sam+adamw", "schedulefreeadamw", "ranger21"])
def test_without_the_callback_it_fails_loudly(learner: Any, name: str) -> None:
    learn = learner(name)
    weights = copy.deepcopy([*learn.model.parameters()])
    with pytest.raises(RuntimeError, match=rf"{name.replace('+', '.')} needs PisteCallback"):
        learn.fit(1, RATE)
    assert all(map(torch.equal, learn.model.parameters(), weights))


def test_two_passes_with_one_cycle_freezing_and_lr_find(learner: Any) -> None:
    learn = learner("sam+ranger", PisteCallback, splitter=splitter)
    learn.freeze()
    learn.fit_one_cycle(1, RATE)
    learn.unfreeze()
    before = copy.deepcopy(learn.model)
    learn.lr_find(num_it=8, show_plot=False)
    assert same(before, learn.model)
    learn.fit_flat_cos(1, slice(1e-4, 1e-2))
    assert not same(before, learn.model)


def test_two_passes_inside_of_another_wrapper(learner: Any) -> None:
    learn = learner("lookahead+sam+sgd", PisteCallback)
    learn.fit(1, RATE)

    def make(model: nn.Module) -> piste.SAM:
        return piste.SAM(piste.SGD(model.parameters(), lr=RATE))

    close(learn.model, by_hand(make, 1))  # four steps: Lookahead looks back after six
    learn.fit(1, RATE)
    assert learn.opt.two_pass.steps == 8
    with pytest.raises(AssertionError):
        close(learn.model, by_hand(make, 2))


# optimizers that want to know the loop --------------------------------------------------------------------------------


def test_schedule_free_weights_are_averages_in_validation(learner: Any) -> None:
    class Seen(Callback):
        def before_fit(self) -> None:
            self.found: list[tuple[str, bool]] = []

        def after_batch(self) -> None:
            group = self.learn.opt.opt.param_groups[0]
            self.found.append(("train" if self.learn.training else "valid", group["train_mode"]))

    learn = learner("schedulefreeadamw", PisteCallback, Seen)
    learn.fit(2, RATE)
    assert set(learn.seen.found) == {("train", True), ("valid", False)}
    assert learn.opt.opt.param_groups[0]["train_mode"] is False  # what is saved and used is the average
    model = by_hand(lambda model: piste.ScheduleFreeAdamW(spared(model, 0.0), lr=RATE), 1)
    once = learner("schedulefreeadamw", PisteCallback)
    once.fit(1, RATE)
    assert not torch.equal(once.model[0].weight, model[0].weight)
    once.opt.opt.train()
    close(once.model, model)


def test_ranger21_is_told_the_length(learner: Any) -> None:
    learn = learner("ranger21", PisteCallback, Watch())
    learn.fit(2, RATE)
    expected = by_hand(lambda model: piste.Ranger21(spared(model, 1e-4), lr=RATE, total_steps=2 * N // BATCH), 2)
    assert same(learn.model, expected)
    assert learn.opt.opt.param_groups[0]["total_steps"] == 8
    learn.fit(3, 2 * RATE)  # another run with another rate: its schedule begins again
    group = learn.opt.opt.param_groups[0]
    assert (group["total_steps"], group["epochs"], group["schedule_step"]) == (12, 3, 12)
    for fit in (learn.fit_one_cycle, learn.fit_flat_cos):
        with pytest.raises(ValueError, match=r"ranger21 has a schedule of its own.*learn.fit"):
            fit(1, RATE)
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.opt.opt.param_groups[0]["total_steps"] == 12


def test_ranger21_counts_steps_not_batches(learner: Any) -> None:
    learn = learner("ranger21", PisteCallback, GradientAccumulation(2 * BATCH))
    learn.fit(3, RATE)
    group = learn.opt.opt.param_groups[0]
    assert (group["total_steps"], group["schedule_step"]) == (6, 6)


def test_ranger21_resumed_in_the_middle(learner: Any) -> None:
    whole = learner("ranger21", PisteCallback)

    class SaveFirst(Callback):
        order = 70

        def after_epoch(self) -> None:
            if self.learn.epoch == 0:
                self.learn.save("first")

    whole.add_cb(SaveFirst())
    whole.fit(3, RATE)
    rest = learner("ranger21", PisteCallback, model=net(seed=5)).load("first")
    rest.fit(3, RATE, start_epoch=1)
    assert same(whole.model, rest.model)


# refusals -------------------------------------------------------------------------------------------------------------


def test_refusals(learner: Any) -> None:
    with pytest.raises(ValueError, match=r"gamma below 1.*legal: gamma=1"):
        learner("esam+adamw", PisteCallback).fit(1)
    learner(opt_func("esam+adamw", gamma=1.0), PisteCallback).fit(1)
    with pytest.raises(ValueError, match="MixUp or CutMix with GradientAccumulation"):
        learner("sam+adamw", PisteCallback, MixUp(), GradientAccumulation(16)).fit(1)
    with pytest.raises(TypeError, match=r"opt=Optimizer; legal: .*opt_func"):
        learner(Adam, PisteCallback).fit(1)
    with pytest.raises(ValueError, match="group 1 of the splitter has no weights"):
        opt_func("adamw")([[torch.ones(2, requires_grad=True)], []], lr=RATE)
    with pytest.raises(TypeError, match="group 0 of the splitter is a dict"):
        opt_func("adamw")([{"params": [torch.ones(2)]}], lr=RATE)
    with pytest.raises(RuntimeError, match="trajectory_loss"):
        learner(opt_func("saf+sgd", samples=N, classes=3), PisteCallback).fit(1)


def test_mixup_with_two_passes(learner: Any) -> None:
    """Both passes are of the same mix."""

    class Mixes(Callback):
        order = 1

        def before_fit(self) -> None:
            self.inputs: list[Tensor] = []

        def before_backward(self) -> None:
            self.inputs.append(self.learn.xb[0].clone())

    learn = learner("sam+adamw", PisteCallback, MixUp(), Mixes, loss_func=CrossEntropyLossFlat())
    learn.fit(1, RATE)
    first, second = learn.mixes.inputs[::2], learn.mixes.inputs[1::2]
    assert len(first) == len(second) == N // BATCH
    assert all(map(torch.equal, first, second))
    assert not any(torch.equal(mixed, x) for mixed, (x, _) in zip(first, batches(), strict=True))


def test_predictions_need_no_optimizer(learner: Any) -> None:
    learn = learner("schedulefreeadamw", PisteCallback)
    assert learn.validate()[0] > 0
    assert learn.opt is None
    learn.fit(1, RATE)
    before = copy.deepcopy(learn.model)
    learn.validate()
    assert same(before, learn.model)


def test_it_is_an_optim_wrapper() -> None:
    optimizer = opt_func("adamw")(list(nn.Linear(2, 2).parameters()), lr=RATE)
    assert isinstance(optimizer, OptimWrapper)
    assert isinstance(optimizer, LearnerOptimizer)
    assert repr(optimizer).startswith("AdamW (")
    assert ParamScheduler.order > PisteCallback.order > GradientAccumulation.order
    assert PisteCallback.order < MixedPrecision.order < GradientClip.order
