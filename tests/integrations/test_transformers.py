"""piste in a real Trainer, against loops written by hand."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import piste
from piste.integrations import transformers as integration
from piste.integrations.transformers import SharpnessTrainer

SIZE, BATCH = 24, 6


class Net(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        middle: list[nn.Module] = [nn.BatchNorm1d(7)] if norm else []
        self.layers = nn.Sequential(nn.Linear(5, 7), *middle, nn.Tanh(), nn.Linear(7, 2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.layers(x)
        return {"loss": (out - y).square().mean(), "out": out}


def trainer_kwargs(*args: Any, **overrides: Any) -> dict[str, Any]:
    """On an engine that compiles nothing."""
    return integration.trainer_kwargs(*args, **({"engine": "reference"} | overrides))


def create(*args: Any, **overrides: Any) -> Any:
    return piste.create_with_schedule(*args, engine="reference", **overrides)


def net(dtype: torch.dtype = torch.float64, *, norm: bool = False) -> Net:
    torch.manual_seed(3)
    return Net(norm=norm).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(SIZE, n, generator=generator, dtype=dtype) for n in (5, 2))
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def batches(dtype: torch.dtype = torch.float64, size: int = BATCH, count: int = 6) -> Iterator[dict[str, Tensor]]:
    """What a trainer that does not shuffle sees."""
    rows = data(dtype)
    for i in range(count):
        some = [rows[(i * size + j) % SIZE] for j in range(size)]
        yield {name: torch.stack([row[name] for row in some]) for name in ("x", "y")}


def train(
    model: nn.Module, args: TrainingArguments, kind: type[Trainer], dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Trainer:
    trainer = kind(model=model, args=args, train_dataset=data(dtype), **kwargs)
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return a.equal(b) if isinstance(a, Tensor) else a == b


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-11) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


NAMES = ["adamw", "ranger", "ranger21", "rangeradabelief", "lion", "prodigy", "schedulefreeadamw", "lookahead+sgd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_trainer_does_what_a_loop_does(name: str, tmp_path: Path) -> None:
    """Weights, learning rates and clipping of six steps."""
    model, mine, args = net(), net(), arguments(tmp_path, max_grad_norm=0.5)
    trainer = train(model, args, Trainer, **trainer_kwargs(name, model, args))
    optimizer, schedule = create(name, mine, 6)
    rates = []
    for batch in batches():
        mine(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_close(model, mine)
    assert logged(trainer, "learning_rate") == rates
    assert weights(net())[0].sub(weights(model)[0]).abs().max() > 0


@pytest.mark.parametrize("schedule", ["constant", "flat_cosine", "one_cycle", "untuned_warmup", "warmup_stable_decay"])
def test_our_schedules(schedule: str, tmp_path: Path) -> None:
    model, args = net(), arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer = train(model, args, Trainer, **trainer_kwargs("adamw", model, args, schedule=schedule, lr=0.25))
    expected = piste.schedules.named(schedule)(torch.optim.AdamW(net().parameters(), lr=0.25), 8)
    rates = []
    for _ in range(8):
        rates += expected.get_last_lr()
        expected.optimizer.step()
        expected.step()
    assert logged(trainer, "learning_rate") == rates


def test_the_length_is_the_trainers(tmp_path: Path) -> None:
    """Epochs, accumulation and a last step that is not full: only the trainer knows; so it is asked again."""
    model = net()
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=3)
    trainer = train(model, args, Trainer, **trainer_kwargs("ranger21", model, args))
    assert trainer.state.max_steps == 4
    assert {group["total_steps"] for group in trainer.optimizer.param_groups} == {4}
    assert len(set(logged(trainer, "learning_rate"))) == 1
    args.num_train_epochs = 3
    trainer.train()
    assert {group["total_steps"] for group in trainer.optimizer.param_groups} == {6}


# learning rate, decay, schedule: whose? -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments_say", "overrides", "lr", "decay", "sources"),
    [
        ({}, {}, None, 0.01, ("the preset", "the preset")),
        ({"learning_rate": 0.5}, {}, 0.5, 0.01, ("TrainingArguments.learning_rate", "the preset")),
        ({"weight_decay": 0.3}, {}, None, 0.3, ("the preset", "TrainingArguments.weight_decay")),
        ({"learning_rate": 0.5}, {"lr": 5e-5, "weight_decay": 0.0}, 5e-5, 0.0, ("an override", "an override")),
    ],
)
def test_whose_settings(
    arguments_say: dict[str, Any],
    overrides: dict[str, Any],
    lr: float | None,
    decay: float,
    sources: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, args = net(), arguments(tmp_path, **arguments_say)
    with caplog.at_level(logging.INFO, logger="piste"):
        optimizer, _ = trainer_kwargs("ranger", model, args, **overrides)["optimizers"]
    center = piste.presets["ranger"].lr_prior.center
    assert center != 5e-5
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (center if lr is None else lr, decay)
    for setting, source in zip(("lr", "weight_decay"), sources, strict=True):
        assert any(f"{setting}={group[setting]}, from {source}" in line for line in caplog.messages)


@pytest.mark.parametrize("said", [{"lr_scheduler_type": "cosine"}, {"warmup_steps": 2}])
def test_a_schedule_of_the_arguments_counts(said: dict[str, Any], tmp_path: Path) -> None:
    model, mine, args = net(), net(), arguments(tmp_path, **said)
    trainer = train(model, args, Trainer, **trainer_kwargs("ranger", model, args, lr=0.5))
    theirs = train(mine, args, Trainer, optimizers=(piste.create("ranger", mine, lr=0.5, engine="reference"), None))
    assert logged(trainer, "learning_rate") == logged(theirs, "learning_rate")
    ours = trainer_kwargs("ranger", model, args, schedule="flat_cosine")["optimizers"]
    assert ours[1] is not None


def test_arguments_that_say_nothing_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_kwargs("adamw", net(), TrainingArguments(str(tmp_path)))
    assert not caplog.records
    trainer_kwargs("adamw", net(), arguments(tmp_path, adam_beta2=0.95))
    assert [record.levelname for record in caplog.records if "adam_beta2" in record.message] == ["WARNING"]


def test_callbacks_of_others_stay(tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        count = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.count += 1

    model, args, steps = net(), arguments(tmp_path), Steps()
    train(model, args, Trainer, **trainer_kwargs("adamw", model, args, callbacks=[steps]))
    assert steps.count == 6


# resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ranger", {}),
        ("ranger21", {}),
        ("schedulefreeadamw", {}),
        ("adamw", {"state": "8bit"}),
        ("sam+adamw", {}),
        ("gsam+adamw", {"rho_min": 0.01}),
        ("looksam+sgd_momentum", {"k": 2}),
        ("lookahead+sam+adamw", {}),
    ],
)
def test_resuming_goes_on_bit_by_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, train_sampling_strategy="random")

    def run(**how: Any) -> tuple[Net, Trainer]:
        model = net(torch.float32, norm=True)
        keywords = trainer_kwargs(name, model, args, **options)
        trainer = SharpnessTrainer(model=model, args=args, train_dataset=data(torch.float32), **keywords)
        trainer.train(**how)
        return model, trainer

    whole, first = run()
    resumed, second = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(a.equal(b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert identical(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()
    assert logged(first, "learning_rate")[3:] == logged(second, "learning_rate")[3:]


@pytest.mark.parametrize("name", ["schedulefreeadamw", "sam+schedulefreeadamw"])
def test_schedule_free_evaluates_the_average(name: str, tmp_path: Path) -> None:
    seen = []

    class Modes(TrainerCallback):
        def on_evaluate(self, *_: Any, optimizer: Any, model: Any, **__: Any) -> None:
            with torch.no_grad():
                losses = [model(**batch)["loss"] for batch in batches(size=8, count=3)]
            seen.append((optimizer.param_groups[0]["train_mode"], float(torch.stack(losses).mean())))

    model = net()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, label_names=["y"])
    keywords = trainer_kwargs(name, model, args, callbacks=[Modes()])
    trainer = train(model, args, SharpnessTrainer, eval_dataset=data(), **keywords)
    assert [mode for mode, _ in seen] == [False, False]
    assert logged(trainer, "eval_loss") == pytest.approx([loss for _, loss in seen])
    before = weights(model)
    trainer.optimizer.train()
    assert not all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


# two passes -----------------------------------------------------------------------------------------------------------


def sam_by_hand(
    model: nn.Module, lr: float, rho: float, clip: float, steps: Iterator[list[dict[str, Tensor]]]
) -> list[float]:
    """Foret et al. 2021 with plain SGD: climb with the gradient of all micro-batches; clip the second gradient."""
    parameters, losses = list(model.parameters()), []

    def gradient(micro: list[dict[str, Tensor]]) -> tuple[list[Tensor], float]:
        loss = torch.stack([model(**batch)["loss"] for batch in micro]).mean()
        return list(torch.autograd.grad(loss, parameters)), loss.item()

    for micro in steps:
        here = weights(model)
        g, loss = gradient(micro)
        losses.append(loss)
        norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
        with torch.no_grad():
            for p, x in zip(parameters, g, strict=True):
                p.add_(rho * x / norm)
        g, _ = gradient(micro)
        norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
        with torch.no_grad():
            for p, before, x in zip(parameters, here, g, strict=True):
                p.copy_(before - lr * min(1.0, clip / float(norm + 1e-6)) * x)  # 1e-6: torch's clipping
    return losses


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_sam_by_hand(accumulate: int, tmp_path: Path) -> None:
    model, mine = net(), net()
    size = BATCH // accumulate
    args = arguments(
        tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_grad_norm=0.7
    )
    keywords = trainer_kwargs("sam+sgd", model, args, lr=0.3, rho=0.2, schedule="constant")
    trainer = train(model, args, SharpnessTrainer, **keywords)
    stream = batches(size=size, count=6 * accumulate)
    losses = sam_by_hand(mine, 0.3, 0.2, 0.7, ([next(stream) for _ in range(accumulate)] for _ in range(6)))
    assert_close(model, mine)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)  # the clean loss, once; logs are in float32
    assert trainer.state.global_step == 6


def test_a_last_step_that_is_not_full(tmp_path: Path) -> None:
    """Five micro-batches in steps of two: the third step has one."""
    model, mine = net(), net()
    args = arguments(
        tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1
    )
    train(model, args, SharpnessTrainer, **trainer_kwargs("sam+sgd", model, args, lr=0.3, rho=0.2, schedule="constant"))
    rows = data()
    micro = [
        {name: torch.stack([row[name] for row in rows[i : i + 5]]) for name in ("x", "y")} for i in range(0, SIZE, 5)
    ]
    sam_by_hand(mine, 0.3, 0.2, 1e9, iter([micro[:2], micro[2:4], micro[4:]]))
    assert_close(model, mine)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("asam+adamw", {}),
        ("gsam+adamw", {"rho_min": 0.01}),
        ("looksam+sgd_momentum", {"k": 3}),
        ("sam+ranger", {"interval": 2}),
        ("esam+adamw", {"gamma": 1.0}),
        ("adamw", {}),
    ],
)
def test_the_family_does_what_a_loop_does(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, mine = net(norm=True), net(norm=True)
    args = arguments(tmp_path, max_grad_norm=0.5)
    train(model, args, SharpnessTrainer, **trainer_kwargs(name, model, args, lr=0.1, **options))
    optimizer, schedule = create(name, mine, 6, lr=0.1, **options)
    for batch in batches():
        if isinstance(optimizer, piste.SAM):
            piste.sharpness_step(optimizer, mine, lambda model, batch: model(**batch)["loss"], batch, clip=0.5)
        else:
            mine(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    for a, b in zip(model.state_dict().values(), mine.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert model.layers[1].num_batches_tracked == 6  # BatchNorm moves in the first pass only


def test_what_takes_labels_out_of_a_batch_finds_them_again(tmp_path: Path) -> None:
    class Taking(SharpnessTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            y = inputs.pop("y")
            return (model(**inputs, y=y)["out"] - y).square().mean()

    models = []
    for kind in (Taking, SharpnessTrainer):
        model, args = net(), arguments(tmp_path)
        train(model, args, kind, **trainer_kwargs("sam+sgd", model, args))
        models.append(model)
    assert_close(*models)


def test_before_a_trainer_of_ones_own(tmp_path: Path) -> None:
    class Doubled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 2

    class Mine(SharpnessTrainer, Doubled):
        pass

    models = []
    for kind, lr in ((Mine, 0.1), (SharpnessTrainer, 0.2)):  # SAM's way is as long whatever the loss is multiplied by
        model, args = net(), arguments(tmp_path)
        train(model, args, kind, **trainer_kwargs("sam+sgd", model, args, lr=lr))
        models.append(model)
    assert_close(*models)


def test_statistics_of_a_sam_that_was_not_told_its_model(tmp_path: Path) -> None:
    model, args = net(norm=True), arguments(tmp_path)
    sam = piste.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, args, SharpnessTrainer, optimizers=(sam, None))
    assert model.layers[1].num_batches_tracked == 6


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    models = []
    for accumulate in (1, 3):
        model = net()
        args = arguments(
            tmp_path, per_device_train_batch_size=BATCH // accumulate, gradient_accumulation_steps=accumulate
        )
        train(model, args, SharpnessTrainer, **trainer_kwargs("gsam+ranger", model, args, rho=0.3))
        models.append(model)
    assert_close(*models)


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast round each pass, and the second pass sees the weights that climbed."""
    single = torch.float32
    model, mine, args = net(single), net(single), arguments(tmp_path, bf16=True)
    train(model, args, SharpnessTrainer, single, **trainer_kwargs("sam+sgd", model, args, lr=0.3, rho=0.2))
    optimizer, schedule = create("sam+sgd", mine, 6, lr=0.3, rho=0.2)
    for batch in batches(single):
        for half in (optimizer.first_step, optimizer.second_step):
            with torch.autocast("cpu", torch.bfloat16):
                loss = mine(**batch)["loss"]
            loss.backward()
            half()
        schedule.step()
        optimizer.zero_grad()
    assert_close(model, mine, 1e-6)
    exact = net(single)
    train(exact, arguments(tmp_path), SharpnessTrainer, single, **trainer_kwargs("sam+sgd", exact, args, lr=0.3))
    assert not exact.layers[0].weight.equal(model.layers[0].weight)


@pytest.mark.parametrize("broken", [1, 2])
@pytest.mark.parametrize("name", ["sam+sgd", "gsam+adamw"])
def test_a_pass_that_overflows_is_skipped_by_a_scaler(broken: int, name: str, tmp_path: Path) -> None:
    """No device here has float16 autocast with a scaler, so the scaler is put in by hand."""
    calls = 0

    class Breaking(SharpnessTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return super().compute_loss(*args, **kwargs) * (torch.inf if calls == 2 + broken else 1.0)

    model, mine, args = net(), net(), arguments(tmp_path, max_steps=3)
    keywords = trainer_kwargs(name, model, args, lr=0.1, schedule="constant")
    trainer = Breaking(model=model, args=args, train_dataset=data(), **keywords)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    optimizer, _ = create(name, mine, 3, lr=0.1, schedule="constant")
    for i, batch in enumerate(batches(count=3)):
        if i != 1:
            piste.sharpness_step(optimizer, mine, lambda model, batch: model(**batch)["loss"], batch)
    assert_close(model, mine, 1e-9)
    assert scaler.get_scale() == 512.0
    assert trainer.lr_scheduler.state_dict()["last_epoch"] == 2  # a step that was skipped is none of the schedule's


@pytest.mark.parametrize("broken", [1, 2])
def test_an_error_in_a_pass_leaves_the_weights(broken: int, tmp_path: Path) -> None:
    class Breaking(SharpnessTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == broken:
                raise ArithmeticError("broken")
            return super().compute_loss(*args, **kwargs)

    model, args = net(), arguments(tmp_path)
    before = weights(model)
    with pytest.raises(ArithmeticError):
        train(model, args, Breaking, **trainer_kwargs("sam+sgd", model, args))
    assert all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


# refusals -------------------------------------------------------------------------------------------------------------


def test_a_stock_trainer_with_two_passes_says_what_to_do(tmp_path: Path) -> None:
    model, args = net(), arguments(tmp_path)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"second half of a step.*piste\.integrations"):
        train(model, args, Trainer, **trainer_kwargs("sam+adamw", model, args))
    assert all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


def test_esam_needs_a_loss_for_each_sample(tmp_path: Path) -> None:
    model, args = net(), arguments(tmp_path)
    with pytest.raises(ValueError, match="gamma=1"):
        train(model, args, SharpnessTrainer, **trainer_kwargs("esam+adamw", model, args))


def test_sharded_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = net(), arguments(tmp_path)
    trainer = SharpnessTrainer(model=model, args=args, train_dataset=data(), **trainer_kwargs("sam+sgd", model, args))
    state, kind = trainer.accelerator.state, type(trainer.accelerator.distributed_type)
    monkeypatch.setattr(state, "distributed_type", kind.FSDP)
    with pytest.raises(ValueError, match="FSDP, in which two passes were not tried"):
        trainer.create_optimizer()


def test_a_schedule_without_its_callback_says_what_is_missing(tmp_path: Path) -> None:
    model, args = net(), arguments(tmp_path)
    with pytest.raises(RuntimeError, match="callbacks="):
        train(model, args, Trainer, optimizers=trainer_kwargs("ranger", model, args)["optimizers"])


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "model=NoneType", {"model": None}),
        (TypeError, "args=dict", {"args": {}}),
        (ValueError, "no optimizer 'adamv'", {"name": "adamv"}),
        (ValueError, "no schedule 'one_cicle'", {"schedule": "one_cicle"}),
        (ValueError, "unknown option 'epz'", {"epz": 1}),
    ],
)
def test_wrong_arguments(error: type[Exception], message: str, changes: dict[str, Any], tmp_path: Path) -> None:
    right = {"name": "adamw", "model": net(), "args": arguments(tmp_path)}
    with pytest.raises(error, match=message):
        trainer_kwargs(**(right | changes))


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_a_framework_that_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("piste.integrations.transformers", "piste.integrations.accelerate"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}: pip install 'piste\[{missing}\]'"):
        importlib.import_module("piste.integrations.transformers")
