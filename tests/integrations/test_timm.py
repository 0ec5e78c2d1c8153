"""piste in timm: its factory, parameter groups, schedulers, scaler and checkpoints, on one of its test models."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piste

pytest.importorskip("timm")

import timm
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler

from piste.integrations.timm import register

RATE = 1e-2


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """All names, and a registry that is timm's own again afterwards."""
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    register()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def batch(t: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int = 6,
    *,
    model: nn.Module | None = None,
    start: int = 0,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net() if model is None else model
    optimizer = make(model)
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        optimizer.step()
    return model, optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def without_decay(groups: list[dict[str, Any]]) -> set[Any]:
    return {p for group in groups for p in group["params"] if group["weight_decay"] == 0}


@pytest.mark.parametrize("name", sorted(piste.presets))
def test_every_preset_trains(name: str) -> None:
    model, optimizer = train(
        lambda m: create_optimizer_v2(m, f"piste.{name.replace('_', '-')}", lr=RATE, engine="reference"), 6
    )
    assert type(optimizer).__name__ == piste.presets[name].optimizer.__name__
    assert {group["lr"] for group in optimizer.param_groups} == {RATE}
    assert not same(model, net())


def test_names(caplog: pytest.LogCaptureFixture) -> None:
    known = list_optimizers("piste.*")
    assert {"piste.ranger21", "piste.sgd-nesterov", "piste.sam+adamw", "piste.lookahead+lion"} <= set(known)
    assert "piste.saf+adamw" not in known  # needs logits and indices
    with caplog.at_level(logging.WARNING):
        register()  # again
        assert register("RangerAdaBelief", "sam + sgd_momentum".replace(" ", "")) == [
            "piste.rangeradabelief",
            "piste.sam+sgd-momentum",
        ]
    assert not caplog.records  # timm warns of names that it knows
    assert list_optimizers("piste.*") == known
    with pytest.raises(ValueError, match="no optimizer 'rangr'"):
        register("rangr")


def test_a_preset_of_ones_own() -> None:
    heavy = piste.presets.from_mapping({"heavy": {"optimizer": piste.SGD, "hyperparameters": {"momentum": 0.99}}})
    assert register(heavy["heavy"]) == ["piste.heavy"]
    assert create_optimizer_v2(net(), "piste.heavy").param_groups[0]["momentum"] == 0.99
    lighter = piste.presets.from_mapping({"heavy": {"optimizer": piste.SGD, "hyperparameters": {"momentum": 0.5}}})
    register(lighter["heavy"])
    assert create_optimizer_v2(net(), "piste.heavy").param_groups[0]["momentum"] == 0.5


def test_underscores_mean_something_else_to_timm() -> None:
    """What the docs warn of; where this fails, timm has changed and the docs and names can be simpler."""
    assert type(create_optimizer_v2(net(), "piste.sgd_nesterov")) is torch.optim.SGD
    with pytest.raises(ValueError, match="nogc not found"):
        create_optimizer_v2(net(), "piste.ranger_nogc")


def test_weight_decay_is_timms() -> None:
    model = net()
    optimizer = create_optimizer_v2(model, "piste.ranger", lr=RATE, weight_decay=0.1)
    assert without_decay(optimizer.param_groups) == {model[0].bias, model[1].weight, model[1].bias, model[3].bias}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    optimizer = create_optimizer_v2(model, "piste.ranger", lr=RATE, weight_decay=0.1, filter_bias_and_bn=False)
    assert not without_decay(optimizer.param_groups)
    optimizer = create_optimizer_v2(model, "piste.ranger", lr=RATE)
    assert without_decay(optimizer.param_groups) == set(model.parameters())


def test_what_decay_means_is_the_presets() -> None:
    trained, _ = train(lambda m: create_optimizer_v2(m, "piste.sgd-momentum", lr=RATE, weight_decay=0.3))
    expected, _ = train(
        lambda m: piste.SGD(piste.param_groups(m, 0.3), lr=RATE, momentum=0.9, decoupled_weight_decay=True)
    )
    for a, b in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_learning_rate_momentum_and_options() -> None:
    def group(name: str, **given: Any) -> dict[str, Any]:
        found: dict[str, Any] = create_optimizer_v2(net(), f"piste.{name}", **given).param_groups[0]
        return found

    assert group("ranger")["lr"] == piste.presets["ranger"].lr_prior.center
    assert (group("sgd")["momentum"], group("sgd-momentum")["momentum"]) == (0, 0.9)  # 0.9 is timm's default
    assert group("sgd", momentum=0.8)["momentum"] == 0.8
    ranger = group("ranger", eps=1e-4, betas=(0.9, 0.99), k=3, use_gc=False)
    assert (ranger["eps"], ranger["betas"], ranger["k"], ranger["use_gc"]) == (1e-4, (0.9, 0.99), 3, False)
    assert group("ranger21", total_steps=100)["total_steps"] == 100
    assert create_optimizer_v2(net(), "piste.adamw", foreach=True)._engine_name == "foreach"
    with pytest.raises(ValueError, match="unknown option 'eps'"):
        group("lion", eps=1e-4)  # timm would drop it
    with pytest.raises(ValueError, match="legal: no betas"):
        group("sgd", betas=(0.9, 0.99))
    assert [g["lr"] for g in create_optimizer_v2(net().parameters(), "piste.adamw", lr=RATE).param_groups] == [RATE]


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum"])
def test_layer_decay_under_timms_schedulers(name: str) -> None:
    """They multiply lr_scale into lr. piste.SGD has a setting of that name, which must not count it once more."""
    model = timm.create_model("test_vit", num_classes=3)
    optimizer = create_optimizer_v2(
        model, f"piste.{name}", lr=RATE, weight_decay=0.1, layer_decay=0.5, engine="reference"
    )
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 2
    scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=0, cycle_limit=1)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [RATE * g["lr_scale"] for g in optimizer.param_groups]
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(before, (p for g in optimizer.param_groups for p in g["params"]), strict=True)
    ]
    expected = [g["lr"] for g in optimizer.param_groups for _ in g["params"]]
    assert moved == pytest.approx(expected, rel=1e-2)
    scheduler.step(5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(RATE / 2 * optimizer.param_groups[0]["lr_scale"])


def test_arguments_of_timms_own_script() -> None:
    said = Namespace(opt="piste.ranger21", lr=RATE, weight_decay=0.05, momentum=0.9, opt_eps=1e-6, opt_betas=None)
    optimizer = create_optimizer_v2(net(), **optimizer_kwargs(said), total_steps=100)
    group = optimizer.param_groups[0]
    assert (type(optimizer), group["lr"], group["eps"], group["total_steps"]) == (piste.Ranger21, RATE, 1e-6, 100)


def test_our_groups() -> None:
    model = net()
    groups = partial(piste.param_groups, weight_decay=0.2)
    optimizer = create_optimizer_v2(model, "piste.adamw", param_group_fn=groups, lr=RATE)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "3.weight"]
    optimizer = create_optimizer_v2(model, "piste.amos", param_group_fn=piste.Amos.groups, lr=RATE)
    assert [g["scale"] for g in optimizer.param_groups] == [g["scale"] for g in piste.Amos.groups(model)]


def test_names_of_weights_that_the_model_spares() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    optimizer = create_optimizer_v2(model, "piste.adamw", weight_decay=0.1)
    assert model.no_weight_decay() & {
        n for n, p in model.named_parameters() if p in without_decay(optimizer.param_groups)
    }


def test_a_schedule_of_ours() -> None:
    optimizer = create_optimizer_v2(net(), "piste.adamw", lr=RATE)
    schedule = piste.schedules.one_cycle(optimizer, 10)
    assert schedule.get_last_lr() == [RATE / 25]
    assert optimizer.param_groups[0]["betas"][0] == 0.95


def test_resume(tmp_path: Path) -> None:
    """Through timm's own checkpoint reader."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer_v2(model, "piste.ranger", lr=RATE, weight_decay=0.1)

    whole, _ = train(make, 8)
    half, optimizer = train(make, 4)
    saved = {
        "epoch": 3,
        "arch": "net",
        "state_dict": half.state_dict(),
        "optimizer": optimizer.state_dict(),
        "version": 2,
    }
    torch.save(saved, tmp_path / "last.pth.tar")

    def resumed(model: nn.Module) -> torch.optim.Optimizer:
        other = make(model)
        resume_checkpoint(model, str(tmp_path / "last.pth.tar"), other, log_info=False)
        return other

    rest, _ = train(resumed, 4, model=net(seed=5), start=4)
    assert same(rest, whole)


def scaled(name: str, scaler: NativeScaler, clip: float | None = None, parts: int = 1) -> nn.Module:
    model = net()
    optimizer = create_optimizer_v2(model, name, lr=RATE, weight_decay=0.1)
    for t in range(4):
        optimizer.zero_grad()
        x, y = batch(t)
        pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        for i, piece in enumerate(pieces, 1):
            scaler(
                loss_of(model, piece) / parts,
                optimizer,
                clip_grad=clip,
                parameters=model.parameters(),
                need_update=i == parts,
            )
    return model


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("parts", [1, 4])
def test_native_scaler_clipping_and_accumulation(clip: float | None, parts: int) -> None:
    model = scaled("piste.ranger", NativeScaler("cpu"), clip, parts)
    expected = net()
    optimizer = piste.Ranger(
        [
            {"params": [p for p in expected.parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in expected.parameters() if p.ndim > 1], "weight_decay": 0.1},
        ],
        lr=RATE,
    )
    for t in range(4):
        optimizer.zero_grad()
        loss_of(expected, batch(t)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.step()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_passes_refuse_timms_step_and_take_ours() -> None:
    with pytest.raises(RuntimeError, match=r"SAM.step\(\) without a closure.*piste.sharpness_step"):
        scaled("piste.sam+adamw", NativeScaler("cpu"))
    models = []
    for make in (
        lambda m: create_optimizer_v2(m, "piste.sam+adamw", lr=RATE, weight_decay=0.1, rho=0.1),
        lambda m: piste.SAM(piste.AdamW(piste.param_groups(m, 0.1), lr=RATE), rho=0.1),
    ):
        model = net()
        optimizer = make(model)
        scaler = NativeScaler("cpu")
        for t in range(4):
            piste.sharpness_step(optimizer, model, loss_of, batch(t), scaler=scaler._scaler, clip=1.0)
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_timms_lookahead_goes_round_ours() -> None:
    """It begins its average with the first synchronisation: our late start."""
    model, optimizer = train(lambda m: create_optimizer_v2(m, "lookahead_piste.adam", lr=RATE), 13)
    expected, _ = train(lambda m: piste.LookaheadAdam(m.parameters(), lr=RATE, late_start=True), 13)
    assert type(optimizer).__name__ == "Lookahead"
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
