"""One run: what contenders have in common, what it may look at, and what it writes down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piste.race import Splits, Task
from piste.race import record as record_module
from piste.race.attempt import evaluation_steps
from piste.race.contenders import Contender, make_contenders
from piste.race.record import CONFIRM, FINISHED, TIME, TUNE, RecordError, RunKey, RunRecord
from piste.race.training import run

STEPS = 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        dropped = self.drop(torch.ones_like(hidden))
        if self.training:
            self.masks.append(dropped.detach().clone())
        out: Tensor = self.last(hidden * dropped)
        return out


def splits() -> Splits:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=draw)
    y = x.sum(1, keepdim=True)
    return Splits(train=(x[:50], y[:50]), valid=(x[50:70], y[50:70]), report=(x[70:], y[70:]))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


TASK = Task(name="net", model=Net, data=splits, loss=loss_of, steps=STEPS, batch_size=10)


def key_of(contender: Contender, phase: str = TUNE, seed: int = 3, **hyperparameters: float) -> RunKey:
    settings = {"lr": 0.01, **hyperparameters}
    optimizer, schedule = contender.optimizer, contender.schedule
    return RunKey("net", "f00d", contender.name, optimizer, schedule, settings, STEPS, seed, phase, "cpu", {})


def run_of(name: str, task: Task = TASK, phase: str = TUNE, **hyperparameters: float) -> RunRecord:
    (contender,) = make_contenders([name], ["constant"])
    return run(task, task.data(), contender, key_of(contender, phase, **hyperparameters), lambda step: None)


def test_contenders_share_initial_weights_batches_and_dropout() -> None:
    """All of step 1, and batches and dropout of every later one, whatever the optimizer is."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    starts: dict[str, list[Tensor]] = {}
    models: list[Net] = []

    def model() -> Net:
        models.append(Net())
        return models[-1]

    # SAM draws dropout twice in a step: without a seed for each step, its second step would see other masks.
    for name in ("adamw", "sgd_momentum", "lion", "sam+adamw"):

        def loss(net: nn.Module, batch: Any, name: str = name) -> Tensor:
            value = loss_of(net, batch)
            if net.training:
                starts.setdefault(name, [weight.detach().clone() for weight in net.parameters()])
                seen.setdefault(name, []).append((batch[0].clone(), models[-1].masks[-1]))
            return value

        assert run_of(name, replace(TASK, model=model, loss=loss)).status == FINISHED
    seen["sam+adamw"] = seen["sam+adamw"][::2]  # the first pass of each step
    first, *others = seen.values()
    assert len(first) == STEPS
    assert len({tuple(mask.flatten().tolist()) for _, mask in first}) == STEPS  # and they differ from step to step
    for other in others:
        for (batch, mask), (its_batch, its_mask) in zip(first, other, strict=True):
            assert torch.equal(batch, its_batch)
            assert torch.equal(mask, its_mask)
    weights, *other_weights = starts.values()
    for own in other_weights:
        assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))


def test_trials_never_see_the_report_split() -> None:
    poisoned = splits()
    report = tuple(torch.full_like(tensor, math.nan) for tensor in poisoned.report)  # type: ignore[union-attr]
    task = replace(TASK, data=lambda: Splits(poisoned.train, poisoned.valid, report))
    tried = run_of("adamw", task)
    assert (tried.status, tried.test_loss) == (FINISHED, None)
    assert run_of("adamw", task, CONFIRM).status == "diverged"
    assert run_of("adamw", TASK, CONFIRM).test_loss is not None


def test_a_record_has_traces_and_totals() -> None:
    made = run_of("adamw", phase=CONFIRM)
    curve, cost = made.curve, made.cost
    assert curve.step == [0, *sorted(evaluation_steps(STEPS))]
    assert all(len(values) == len(curve.step) for values in vars(curve).values())
    assert curve.lr == len(curve.step) * [0.01]
    assert (cost.steps, cost.examples, cost.gradient_evaluations) == (STEPS, 10 * STEPS, STEPS)
    assert cost.train_seconds > 0
    assert cost.evaluation_seconds > 0
    assert cost.optimizer_total_seconds > 0
    assert cost.compile_seconds >= 0
    assert made.fingerprint == made.machine["fingerprint"]


def test_the_gradient_norm_is_that_of_the_whole_gradient() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        last: Any = net.last
        return 0 * loss_of(net, batch) + 3.0 * last.bias.sum()

    made = run_of("sgd", replace(TASK, loss=loss))
    norms = made.curve.gradient_norm
    assert norms == pytest.approx(len(made.curve.step) * [3.0])


def test_a_timing_pass_evaluates_nothing() -> None:
    def metric(net: nn.Module, batch: Any) -> float:
        raise AssertionError("it was evaluated")

    made = run_of("adamw", replace(TASK, metric=metric, metric_name="m"), TIME)
    assert made.status == FINISHED
    assert made.curve.step == []
    assert made.cost.step_seconds > 0
    assert made.cost.train_seconds > 0


def test_hyperparameters_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from piste.race import training

    made: list[Any] = []
    make = training.make_optimizer

    def spy(*arguments: Any, **others: Any) -> Any:
        found = make(*arguments, **others)
        made.append(found[0])
        return found

    monkeypatch.setattr(training, "make_optimizer", spy)
    assert run_of("adamw", eps=0.5, beta1=0.7, weight_decay=0.3).status == FINISHED
    group = made[0].param_groups[0]
    assert (group["eps"], group["betas"], group["weight_decay"]) == (0.5, (0.7, 0.999), 0.3)
    assert run_of("sam+sgd_momentum", rho=0.2, momentum=0.5).status == FINISHED
    assert made[1].param_groups[0]["momentum"] == 0.5
    assert made[1].rho == 0.2


def test_a_field_gives_way_to_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eps of the field would be refused beside the one that is being tried."""
    assert run_of("adabelief", replace(TASK, domain="nlp"), eps=1e-8).status == FINISHED


def test_a_run_that_starts_at_infinity_takes_no_step() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return loss_of(net, batch) * (1 if net.training else math.inf)

    made = run_of("adamw", replace(TASK, loss=loss))
    assert (made.status, made.message) == ("diverged", f"the validation loss became inf at step 0 of {STEPS}")
    assert (made.cost.steps, made.cost.gradient_evaluations) == (0, 0)


# Records of older versions


def old_text() -> str:
    """A record as schema 1 wrote it."""
    content = json.loads(run_of("adamw").to_json())
    content["schema"] = 1
    for name in ("lr", "gradient_norm"):
        del content["curve"][name]
    for name in ("steps", "examples", "train_seconds", "optimizer_total_seconds", "compile_seconds"):
        del content["cost"][name]
    del content["cost"]["evaluation_seconds"]
    return text_of(content)


def text_of(content: dict[str, Any]) -> str:
    content["checksum"] = record_module._checksum(content)
    return json.dumps(content)


def test_records_of_the_schema_before_are_read() -> None:
    made = RunRecord.from_json(old_text())
    assert made.finished
    assert made.curve.lr == []
    assert math.isnan(made.cost.train_seconds)
    assert RunRecord.from_json(made.to_json()).key.id == made.key.id


def test_the_id_of_a_run_is_what_it_always_was() -> None:
    """So that whatever was run stays known: this one was computed before schema 2."""
    key = RunKey(
        "t", "f00d", "adamw+one_cycle", "adamw", "one_cycle", {"lr": 0.01}, 10, 0, "tune", "cpu", {"torch": "2"}
    )
    assert key.id == "3a960997d58e08d8277c"


def test_records_of_a_later_schema_are_refused_by_name() -> None:
    content = json.loads(old_text())
    content["schema"] = 4
    with pytest.raises(RecordError, match="its schema is 4, this version reads 1 to 3"):
        RunRecord.from_json(text_of(content))
