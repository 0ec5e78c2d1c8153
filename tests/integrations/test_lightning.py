"""Lightning's own trainer with piste inside: names, schedules, two passes, averages, checkpoints, refusals."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

import piste
from integrations.lightning_process import process
from piste.integrations.lightning import ModelEMACallback, PisteModule, configure

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated"),  # Lightning 2.6 with torch 2.13
]
SAMPLES, RATE = 16, 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def smooth_network() -> nn.Module:
    """Without BatchNorm, for which micro-batches are not the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class Data(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 4, generator=generator)
        self.y = torch.randn(SAMPLES, 2, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def loader(size: int) -> DataLoader[Any]:
    return DataLoader(Data(), batch_size=size)


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(net(batch[0]), batch[1])


class Sum(Metric):
    """Changes what it keeps in place."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()))
        self.add_state("parts", [])

    def update(self, value: Tensor) -> None:
        self.total.add_(value.detach())
        self.parts.append(value.detach())

    def compute(self) -> Tensor:
        return self.total + torch.stack(self.parts).sum()


class _Steps:
    """What the modules of these tests do, whatever they are derived from."""

    def build(self, net: nn.Module, name: str, **settings: Any) -> Any:
        self.net, self.name, self.settings = net, name, settings
        self.seen: list[float] = []
        self.validated: list[list[Tensor]] = []
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.log("loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append([p.detach().clone() for p in self.net.parameters()])

    def configure_optimizers(self) -> Any:
        return configure(self, self.name, **self.settings)  # type: ignore[arg-type]


class Module(_Steps, PisteModule):
    pass


class PlainModule(_Steps, lightning.LightningModule):
    pass


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_checkpointing": False} | quiet | options
    )


def fit(net: nn.Module, name: str, size: int = 4, module: type[Any] = Module, **settings: Any) -> Any:
    options = settings.pop("trainer", {})
    made = module().build(net, name, **settings)
    trainer(**options).fit(made, loader(size))
    return made


def by_hand(net: nn.Module, name: str, pieces: int = 1, epochs: int = 2, **settings: Any) -> tuple[nn.Module, Any]:
    """The same run by ``sharpness_step``; the loss of each step beside it."""
    clip, autocast = settings.pop("clip", None), settings.pop("autocast", False)
    batches = [batch for _ in range(epochs) for batch in loader(4)]
    steps = [batches[i : i + pieces] for i in range(0, len(batches), pieces)]
    optimizer, schedule = piste.create_with_schedule(name, net, len(steps), **settings)
    losses = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            return loss_of(model, batch)

    for step in steps:
        losses.append(piste.sharpness_step(optimizer, net, loss_fn, step, accumulate="batch", clip=clip))
        schedule.step()
    return net, losses


def steps_of_shares(net: nn.Module, groups: list[list[int]], full: int) -> None:
    """SAM's steps on groups of batches, each batch weighing as in a group of the full number."""
    optimizer = piste.create("sam+sgd", net, lr=RATE, rho=0.3)
    batches = list(loader(4))
    for group in groups:
        share = len(group) / full
        step = [batches[i] for i in group]
        piste.sharpness_step(optimizer, net, lambda m, b, share=share: loss_of(m, b) * share, step, accumulate="batch")


def state(net: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in net.state_dict().values()]


def assert_same(a: nn.Module | list[Tensor], b: nn.Module | list[Tensor], **tolerance: float) -> None:
    first, second = (state(x) if isinstance(x, nn.Module) else x for x in (a, b))
    torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


# names and schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "rangeradabelief", "sgd_nesterov", "lookahead+adan", "schedulefreesgd"])
def test_names_and_companion_schedules(name: str) -> None:
    mine = network()
    optimizer, schedule = piste.create_with_schedule(name, mine, 8, lr=RATE)
    for batch in (batch for _ in range(2) for batch in loader(4)):
        optimizer.zero_grad()
        loss_of(mine, batch).backward()
        optimizer.step()
        schedule.step()
    if name == "schedulefreesgd":
        optimizer.eval()  # type: ignore[attr-defined]
    assert_same(fit(network(), name, lr=RATE).net, mine)


def test_ranger21_is_told_the_length_and_nothing_else_schedules() -> None:
    made = fit(network(), "ranger21", size=2, lr=1e-3, trainer={"accumulate_grad_batches": 2, "max_steps": 7})
    group = made.trainer.optimizers[0].param_groups[0]
    assert (group["total_steps"], group["lr"]) == (7, 1e-3)
    assert group["current_lr"] < 1e-3


class _Thaw(BaseFinetuning):
    """The first layer waits for the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class _Constant(Module):
    def configure_optimizers(self) -> Any:
        trained = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        return piste.AdamW(trained, lr=RATE)


def test_layers_are_thawed_beside_groups_with_names() -> None:
    net = network()
    before = net[0].weight.clone()
    made = _Constant().build(net, "adamw")
    trainer(callbacks=[_Thaw()], max_epochs=1).fit(made, loader(4))
    assert torch.equal(net[0].weight, before)
    runner = trainer(callbacks=[_Thaw()], max_epochs=2)
    runner.fit(made, loader(4))
    assert not torch.equal(net[0].weight, before)
    late = runner.optimizers[0].param_groups[1]
    assert late["param_names"] == ["group1.0", "group1.1"]


def test_schedules_move_once_for_each_step() -> None:
    made = fit(network(), "adamw", lr=RATE, schedule="one_cycle", trainer={"accumulate_grad_batches": 2})
    schedule = made.trainer.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == 4
    assert schedule.get_last_lr()[0] == pytest.approx(RATE / 1e5)  # the end of the cycle


def test_a_length_that_is_unknown_is_refused_by_schedules_that_need_it() -> None:
    endless = {"max_epochs": -1}
    for name, schedule in (("adamw", "one_cycle"), ("ranger21", None)):
        with pytest.raises(ValueError, match=f"{name}.*total_steps=, max_steps="):
            fit(network(), name, schedule=schedule, trainer=endless)
    stopped = Module().build(network(), "schedulefreesgd", lr=RATE, schedule="constant")
    stopped.on_train_epoch_end = lambda: setattr(stopped.trainer, "should_stop", True)
    trainer(**endless).fit(stopped, loader(8))
    assert stopped.trainer.global_step == 2
    assert fit(network(), "adamw", total_steps=50, schedule="one_cycle").trainer.global_step == 8


# two passes ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "sam+sgd_momentum": {"rho": 0.3},
    "asam+adamw": {"rho": 0.5},
    "gsam+sgd_momentum": {"rho": 0.3},
    "looksam+sgd_momentum": {"rho": 0.3, "k": 3},
    "esam+sgd_momentum": {"rho": 0.3, "gamma": 1.0},
}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", KINDS)
def test_two_passes_equal_a_loop_by_hand(name: str, clip: float | None, pieces: int) -> None:
    settings = KINDS[name] | {"lr": RATE}
    limits = {"accumulate_grad_batches": pieces, "gradient_clip_val": clip}
    made = fit(network(), name, trainer=limits, **settings)
    expected, losses = by_hand(network(), name, pieces, clip=clip, **settings)
    assert_same(made.net, expected, rtol=1e-6, atol=1e-7)
    assert made.trainer.global_step == len(losses)
    mean = torch.tensor(made.seen).reshape(len(losses), pieces).sum(1)  # Lightning divides what accumulates
    torch.testing.assert_close(mean, torch.stack(losses))
    assert float(made.trainer.callback_metrics["loss_epoch"]) == pytest.approx(
        float(torch.stack(losses[-4 // pieces :]).mean()), rel=1e-5
    )


@pytest.mark.parametrize("name", ["sam+sgd_momentum", "gsam+adamw", "looksam+adamw"])
def test_accumulation_equals_the_large_batch(name: str) -> None:
    settings = {"lr": RATE, "rho": 0.3}
    small = fit(smooth_network(), name, size=2, trainer={"accumulate_grad_batches": 4}, **settings)
    large = fit(smooth_network(), name, size=8, **settings)
    assert_same(small.net, large.net, rtol=1e-5, atol=1e-6)


def test_the_last_group_may_be_smaller() -> None:
    """As Lightning does it: divided by the full number."""
    limits = {"accumulate_grad_batches": 3, "max_epochs": 1}
    made = fit(smooth_network(), "sam+sgd", lr=RATE, rho=0.3, schedule="constant", trainer=limits)
    mine = smooth_network()
    groups = [[0, 1, 2], [3]]
    steps_of_shares(mine, groups, 3)
    assert_same(made.net, mine, rtol=1e-6, atol=1e-7)
    assert made.trainer.global_step == 2


def test_value_clipping_is_of_the_second_gradient() -> None:
    clipped = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "max_epochs": 1, "limit_train_batches": 1}
    before = smooth_network()
    made = fit(smooth_network(), "sam+sgd", lr=1.0, rho=0.3, weight_decay=0.0, schedule="constant", trainer=clipped)
    moved = [(a - b).abs().max() for a, b in zip(before.parameters(), made.net.parameters(), strict=True)]
    torch.testing.assert_close(torch.stack(moved), torch.full((4,), 1e-3), rtol=1e-3, atol=0)


def test_bfloat16_autocast_equals_a_loop_by_hand() -> None:
    made = fit(smooth_network(), "sam+sgd", lr=RATE, rho=0.3, trainer={"precision": "bf16-mixed"})
    expected, _ = by_hand(smooth_network(), "sam+sgd", lr=RATE, rho=0.3, autocast=True)
    assert_same(made.net, expected, rtol=1e-6, atol=1e-7)


def scaled(**options: Any) -> tuple[dict[str, Any], torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **options}, scaler


@pytest.mark.parametrize("name", ["sam+sgd_momentum", "gsam+sgd_momentum", "looksam+sgd_momentum"])
def test_a_scaler_unscales_once_and_is_updated_once(name: str) -> None:
    limits, scaler = scaled(accumulate_grad_batches=2, gradient_clip_val=0.5)
    made = fit(smooth_network(), name, lr=RATE, rho=0.3, trainer=limits)
    expected, _ = by_hand(smooth_network(), name, 2, lr=RATE, rho=0.3, clip=0.5)
    assert_same(made.net, expected, rtol=0.05, atol=3e-3)  # float16 against float32
    assert scaler.get_scale() == 2.0**11
    assert scaler.state_dict()["_growth_tracker"] == 1


def test_an_optimizer_may_unscale_by_itself() -> None:
    limits, scaler = scaled(max_epochs=1)
    made = fit(smooth_network(), "sam+ranger", lr=RATE, rho=0.3, amp_unscale=True, trainer=limits)
    assert_same(made.net, by_hand(smooth_network(), "sam+ranger", epochs=1, lr=RATE, rho=0.3)[0], rtol=0.05, atol=3e-3)
    assert scaler.get_scale() == 2.0**11


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's, of any skipped first step
@pytest.mark.parametrize(("bad_pass", "factor"), [(1, 1e38), (2, 1e38), (1, 1e20)])
def test_an_overflow_in_either_pass_skips_the_step(bad_pass: int, factor: float) -> None:
    """At 1e20 gradients are finite, and the square of their norm is not."""

    class Overflows(Module):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            with torch.autocast("cpu", enabled=False):
                loss = super().training_step(batch, batch_idx)
            return loss * factor if self.calls == bad_pass else loss

    limits, scaler = scaled(max_epochs=1, limit_train_batches=1)
    before = state(smooth_network())
    made = fit(smooth_network(), "sam+sgd", module=Overflows, lr=RATE, rho=0.3, trainer=limits)
    assert_same(made.net, before)
    assert scaler.get_scale() == 2.0**9
    assert made.trainer.optimizers[0].steps == 1


def test_an_optimizer_made_by_hand_moves_running_statistics_once() -> None:
    class ByHand(Module):
        def configure_optimizers(self) -> Any:
            return piste.SAM(torch.optim.SGD(self.parameters(), lr=RATE), rho=0.3)

    mine = network()
    optimizer = piste.SAM(torch.optim.SGD(mine.parameters(), lr=RATE), rho=0.3)
    for batch in loader(4):
        piste.sharpness_step(optimizer, mine, loss_of, batch)
    assert_same(fit(network(), "", module=ByHand, trainer={"max_epochs": 1}).net, mine, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_makes_no_step_without_a_scaler_either() -> None:
    class Infinite(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

    made = fit(
        smooth_network(), "sam+sgd", module=Infinite, lr=RATE, rho=0.3, schedule="constant", trainer={"max_epochs": 1}
    )
    mine = smooth_network()
    steps_of_shares(mine, [[0], [2], [3]], 1)
    assert_same(made.net, mine, rtol=1e-6, atol=1e-7)


def test_metrics_and_hooks_of_the_second_pass_count_nothing() -> None:
    class Counts(Module):
        def build(self, *args: Any, **settings: Any) -> Any:
            self.sum = Sum()
            self.passes: list[bool] = []
            return super().build(*args, **settings)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            loss = loss_of(self.net, batch)
            self.sum(loss)
            self.log("sum", self.sum, on_step=False, on_epoch=True)
            self.passes.append(self.second_pass)
            return {"loss": loss}

    made = fit(network(), "sam+sgd", module=Counts, lr=RATE, rho=0.3, trainer={"max_epochs": 1})
    _, losses = by_hand(network(), "sam+sgd", epochs=1, lr=RATE, rho=0.3)
    assert made.passes == [False, True] * 4
    assert float(made.trainer.callback_metrics["sum"]) == pytest.approx(2 * float(torch.stack(losses).sum()))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:Detected call of `lr_scheduler.step")
def test_a_batch_without_loss_is_left_out_of_both_passes() -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in self.left_out else loss_of(self.net, batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    def run(left_out: tuple[int, ...]) -> Any:
        made = Skips().build(smooth_network(), "sam+sgd", lr=RATE, rho=0.3, schedule="constant")
        made.left_out = left_out
        trainer(max_epochs=1, accumulate_grad_batches=2).fit(made, loader(4))
        return made

    for left_out, kept in (((0,), [[1], [2, 3]]), ((1,), [[0], [2, 3]]), ((0, 1), [[2, 3]])):
        mine = smooth_network()
        steps_of_shares(mine, kept, 2)
        assert_same(run(left_out).net, mine, rtol=1e-6, atol=1e-7)


def test_an_error_in_the_second_pass_leaves_the_weights() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.second_pass:
                raise KeyError("second")
            return loss_of(self.net, batch)

    made = Fails().build(network(), "sam+sgd", lr=RATE, rho=0.3)
    with pytest.raises(KeyError, match="second"):
        trainer().fit(made, loader(4))
    assert_same(list(made.net.parameters()), list(network().parameters()))
    assert not made.second_pass


def test_manual_optimization_takes_a_closure_over_all_micro_batches() -> None:
    class Manual(PlainModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer, pieces = self.optimizers(), list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))

            def closure() -> Tensor:
                losses = [loss_of(self.net, piece) / len(pieces) for piece in pieces]
                for loss in losses:
                    self.manual_backward(loss)
                return torch.stack(losses).sum().detach()

            self.seen.append(float(optimizer.step(closure=closure)))
            self.lr_schedulers().step()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    made = fit(smooth_network(), "gsam+adamw", size=8, module=Manual, lr=RATE, rho=0.3)
    expected, losses = by_hand(smooth_network(), "gsam+adamw", 2, lr=RATE, rho=0.3)
    assert_same(made.net, expected, rtol=1e-5, atol=1e-6)
    assert made.trainer.global_step == 4
    assert made.seen == pytest.approx([float(loss) for loss in losses], rel=1e-5)


def test_the_two_halves_on_lightning_s_own_wrapper_are_refused() -> None:
    """Its copy of the class has attributes of its own, so the step cannot know of the climb."""

    class Halves(PlainModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(loss_of(self.net, batch))
            self.optimizers().first_step()
            self.manual_backward(loss_of(self.net, batch))
            self.optimizers().second_step()

    with pytest.raises(RuntimeError, match="makes both gradients itself"):
        fit(network(), "sam+adamw", module=Halves)


def test_the_learning_rate_finder_runs_two_passes(tmp_path: Path) -> None:
    """It takes callbacks away for a while."""

    class Finds(Module):
        lr = RATE

    made = Finds().build(network(), "sam+sgd", rho=0.3)
    made.on_train_batch_end = lambda *arguments: None
    tuner = Tuner(trainer(default_root_dir=tmp_path))
    found = tuner.lr_find(made, loader(4), num_training=6, update_attr=False, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["loss"]) == 6
    assert_same(made.net, network())


# averages ------------------------------------------------------------------------------------------------------------


def test_schedule_free_validates_and_ends_with_the_average() -> None:
    made = Module().build(smooth_network(), "schedulefreeadamw", lr=RATE)
    trainer().fit(made, loader(4), loader(16))
    mine = smooth_network()
    optimizer = piste.create("schedulefreeadamw", mine, lr=RATE)
    averages = [state(mine)]
    for _ in range(2):
        for batch in loader(4):
            optimizer.zero_grad()
            loss_of(mine, batch).backward()
            optimizer.step()
        trained = copy.deepcopy(state(mine))
        optimizer.eval()  # type: ignore[attr-defined]
        averages.append(state(mine))
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, before in zip(mine.parameters(), trained, strict=True):
                p.copy_(before)
    validated = made.validated[-2:]
    assert_same(validated[0], averages[1])
    assert_same(validated[1], averages[2])
    assert_same(made.net, averages[2])
    again = trainer()
    again.validate(made, loader(16), verbose=False)
    assert_same(made.validated[-1], averages[2])


@pytest.mark.parametrize("name", ["sam+sgd_momentum", "adamw"])
def test_the_ema_callback_is_a_model_ema_after_each_step(name: str) -> None:
    ema = ModelEMACallback(decay=0.9)
    made = fit(network(), name, lr=RATE, trainer={"callbacks": [ema], "accumulate_grad_batches": 2})
    mine = network()
    optimizer, schedule = piste.create_with_schedule(name, mine, 4, lr=RATE)
    average = piste.ModelEMA(mine, 0.9)
    for group in [list(loader(4))[i : i + 2] for _ in range(2) for i in (0, 2)]:
        if isinstance(optimizer, piste.SAM):
            piste.sharpness_step(optimizer, mine, loss_of, group, accumulate="batch")
        else:
            optimizer.zero_grad()
            for batch in group:
                (loss_of(mine, batch) / 2).backward()
            optimizer.step()
        schedule.step()
        average.update()
    assert ema.ema is not None
    assert ema.ema.updates == 4
    with average.average():
        assert_same(made.net, mine, rtol=1e-6, atol=1e-7)


# checkpoints ---------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {},
    "ranger21": {"total_steps": 8},
    "gsam+adamw": {"rho": 0.3, "total_steps": 8},
    "looksam+sgd_momentum": {"rho": 0.3, "k": 3, "total_steps": 8},
    "schedulefreeadamw": {},
    "sam+schedulefreesgd": {"rho": 0.3},
    "schedulefreesgd": {"weights": "remainder"},
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # checkpoints without their ModelCheckpoint
@pytest.mark.parametrize("name", [*RESUMED, "ema"])
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    """From a checkpoint after three of eight steps, with validations in between, and from one after the whole fit."""

    def run(path: str | None = None, **options: Any) -> tuple[Any, lightning.Trainer]:
        settings = {"lr": RATE, "total_steps": 8} | RESUMED.get(name, {})
        made = Module().build(network(), "adamw" if name == "ema" else name, **settings)
        averages = [ModelEMACallback(decay=0.9)] if name == "ema" else []
        options |= {"precision": "bf16-true"} if "weights" in settings else {}
        runs = trainer(callbacks=[*averages, *options.pop("callbacks", [])], val_check_interval=2, **options)
        runs.fit(made, loader(4), loader(16), ckpt_path=path)
        return made, runs

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    whole, ran = run(callbacks=[saves], enable_checkpointing=True)
    resumed, _ = run(str(tmp_path / "step=4.ckpt"))
    assert_same(resumed.net, whole.net)
    assert_same(resumed.validated[-1], whole.validated[-1])
    unwatched, _ = run()
    assert_same(unwatched.net, whole.net)  # saving changes nothing

    ran.save_checkpoint(tmp_path / "end.ckpt")
    half, stopped = run(max_epochs=1)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    assert_same(run(str(tmp_path / "half.ckpt"))[0].net, whole.net)
    loaded = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    assert_same([loaded[f"net.{key}"] for key in whole.net.state_dict()], whole.net)
    assert half.trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_validation_has_what_was_validated(tmp_path: Path) -> None:
    made = Module().build(smooth_network(), "schedulefreesgd", lr=RATE)
    saves = ModelCheckpoint(tmp_path, filename="best")
    runs = trainer(max_epochs=1, callbacks=[saves], enable_checkpointing=True)
    runs.fit(made, loader(4), loader(16))
    loaded = torch.load(tmp_path / "best.ckpt", weights_only=False)["state_dict"]
    assert_same([loaded[f"net.{name}"] for name, _ in made.net.named_parameters()], made.validated[-1])
    fresh = Module().build(smooth_network(), "schedulefreesgd", lr=RATE)
    trainer().validate(fresh, loader(16), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert_same(fresh.validated[-1], made.validated[-1])


# refusals ------------------------------------------------------------------------------------------------------------


def test_two_passes_without_the_module_are_refused() -> None:
    class ByHand(PlainModule):
        def configure_optimizers(self) -> Any:
            return piste.SAM(torch.optim.SGD(self.parameters(), lr=RATE))

    for pieces in (1, 2):
        made = ByHand().build(network(), "")
        with pytest.raises(RuntimeError, match="PisteModule instead of LightningModule"):
            trainer(accumulate_grad_batches=pieces).fit(made, loader(4))
        assert_same(list(made.net.parameters()), list(network().parameters()))
    for name in ("sam+adamw", "schedulefreesgd"):
        with pytest.raises(TypeError, match=r"PlainModule\(piste.integrations.lightning.PisteModule\)"):
            fit(network(), name, module=PlainModule)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`", "ignore:Found `dataloader_iter`")
def test_what_cannot_be_made_right_is_refused(tmp_path: Path) -> None:
    class Alone(Module):
        def configure_callbacks(self) -> Any:
            return []

    class Deaf(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pass

    class Iterates(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
            return loss_of(self.net, next(dataloader_iter)[0])

    with pytest.raises(RuntimeError, match=r"configure_callbacks\(\) leaves out"):
        fit(network(), "adamw", module=Alone)
    with pytest.raises(RuntimeError, match=r"on_train_batch_start\(\) does not call super"):
        fit(network(), "sam+adamw", module=Deaf)
    with pytest.raises(RuntimeError, match="dataloader_iter"):
        fit(network(), "sam+adamw", module=Iterates)
    with pytest.raises(ValueError, match="gamma=1"):
        fit(network(), "esam+adamw")
    with pytest.raises(ValueError, match="SAM is inside of Lookahead"):
        fit(network(), "lookahead+sam+adamw")
    with pytest.raises(ValueError, match="perturbation='global'"):
        fit(network(), "sam+adamw", module=type("Global", (Module,), {"perturbation": "global"}))
    with pytest.raises(ValueError, match="averages by itself"):
        fit(network(), "schedulefreesgd", trainer={"callbacks": [ModelEMACallback()]})
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    for name, callbacks in (("schedulefreesgd", [saves]), ("adamw", [saves, ModelEMACallback()])):
        with pytest.raises(ValueError, match="save_weights_only=False"):
            fit(network(), name, trainer={"callbacks": callbacks, "enable_checkpointing": True})


def test_a_missing_lightning_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning",)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "piste.integrations.lightning")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'piste\[lightning\]'"):
        importlib.import_module("piste.integrations.lightning")


# processes -----------------------------------------------------------------------------------------------------------

PROCESSES = 2
RUNS = [
    (name, way)
    for name in ("sam+sgd_momentum", "gsam+sgd_momentum", "looksam+sgd_momentum")
    for way in ("averaged", "local")
]


def train_on_processes(rank: int, name: str, way: str) -> list[Tensor]:
    made = type("Processes", (Module,), {"perturbation": way})().build(smooth_network(), name, lr=RATE, rho=0.3)
    made.on_train_batch_end = lambda *arguments: None
    limits = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    mine = DataLoader(Data(), batch_size=2, sampler=range(rank, SAMPLES, PROCESSES))  # Lightning's own would shuffle
    trainer(strategy="ddp", devices=PROCESSES, use_distributed_sampler=False, **limits).fit(made, mine)
    return state(made.net)


def pieces_by_hand(name: str) -> list[Tensor]:
    """What two processes with local perturbations are to give: a climb for each, and the mean of what comes of both."""
    mine = smooth_network()
    optimizer, schedule = piste.create_with_schedule(name, mine, 4, lr=RATE, rho=0.3)
    for x, y in [*loader(8), *loader(8)]:
        pieces = [(x[rank::PROCESSES], y[rank::PROCESSES]) for rank in range(PROCESSES)]
        piste.sharpness_step(optimizer, mine, loss_of, pieces, accumulate="micro", clip=0.3)  # type: ignore[arg-type]
        schedule.step()
    return state(mine)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path), PROCESSES), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES))
    for name, way in RUNS:
        found = first[f"{name} {way}"]
        assert_same(found, second[f"{name} {way}"])
        if way == "averaged":
            assert_same(
                found, state(by_hand(smooth_network(), name, 2, lr=RATE, rho=0.3, clip=0.3)[0]), rtol=1e-5, atol=1e-6
            )
        elif not name.startswith("looksam"):  # which remembers something of each process
            assert_same(found, pieces_by_hand(name), rtol=1e-5, atol=1e-6)
