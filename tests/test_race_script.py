"""Racing a script of one's own: the two calls outside and inside of a race, and what its runs leave behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from test_race_faults import is_alive, until

import piste
from piste import scripting
from piste.race import script as script_module
from piste.race.attempt import new_record
from piste.race.contenders import Contender, make_contenders
from piste.race.record import CONFIRM, DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, TIME, TUNE, Curve, RunKey, RunRecord
from piste.race.script import Script, _Reports, notes, run, seed_of
from piste.race.task import TaskError

# Outside of a race


def test_outside_of_a_race_both_calls_are_ordinary_code() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model, default="sgd_momentum", lr=0.3)
    assert type(optimizer) is type(piste.create("sgd_momentum", model))
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert piste.race_report(step=1, loss=1.0, accuracy=2.0) is None
    with pytest.raises(ValueError, match="adamv"):
        piste.race_optimizer(model, default="adamv")


def test_both_sides_mean_the_same_variable() -> None:
    assert script_module.RUN_VARIABLE == scripting.RUN_VARIABLE


# Inside of one


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is a run of a race; where its reports go."""
    reports = tmp_path / "reports.jsonl"
    arguments = {"lr": 0.25, "betas": [0.5, 0.9], "eps": 1e-3}
    content = {"optimizer": "adam", "arguments": arguments, "report": str(reports)}
    (tmp_path / "run.json").write_text(json.dumps(content))
    monkeypatch.setenv(scripting.RUN_VARIABLE, str(tmp_path / "run.json"))
    scripting._run.cache_clear()
    yield reports  # type: ignore[misc]
    scripting._run.cache_clear()


def train(optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().mean().backward()
        optimizer.step()


def test_inside_of_a_race_the_contender_is_made_and_watched(inside: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model, default="sgd", lr=99.0)
    assert isinstance(optimizer, piste.Adam)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.9), 1e-3)
    train(optimizer, model, 12)
    piste.race_report(step=12, loss=torch.tensor(0.5), accuracy=0.75)
    started, report = (json.loads(line) for line in inside.read_text().splitlines())
    assert started["parameters"] == 3
    assert report["metrics"] == {"loss": 0.5, "accuracy": 0.75}
    assert (report["step"], report["steps"], report["lr"], report["state_bytes"]) == (12, 12, 0.25, 24)
    assert report["step_seconds"] >= report["optimizer_seconds"] > 0
    expected = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()  # type: ignore[union-attr]
    assert report["gradient_norm"] == pytest.approx(float(expected))


def test_what_a_script_does_for_a_report_is_not_training(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(scripting.time, "perf_counter", lambda: float(next(clock)))
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model)
    for _ in range(3):
        train(optimizer, model, 8)
        for _ in range(1000):
            next(clock)
        piste.race_report(step=1, loss=1.0)
    assert json.loads(inside.read_text().splitlines()[-1])["step_seconds"] == 2.0


def test_only_the_first_process_reports(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    piste.race_optimizer(torch.nn.Linear(2, 1))
    piste.race_report(step=1, loss=1.0)
    assert not inside.exists()


# Timing passes


@pytest.fixture
def timed(inside: Path) -> Path:
    """This process is a timing pass of nine steps; where its reports go."""
    run = inside.with_name("run.json")
    run.write_text(json.dumps({**json.loads(run.read_text()), "timed_steps": 9}))
    return inside


def times_in(path: Path) -> list[list[float]]:
    (found,) = [line["times"] for line in map(json.loads, path.read_text().splitlines()) if "times" in line]
    return found


def test_a_timing_pass_ends_the_script_from_inside_of_a_step(timed: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model)
    cleaned = False
    try:
        with pytest.raises(scripting.TimingOver) as ended:
            train(optimizer, model, 1000)
    finally:
        cleaned = True
    assert cleaned
    assert isinstance(ended.value, SystemExit)
    assert ended.value.code == 0
    assert [number for number, *_ in times_in(timed)] == [6, 7, 8, 9]
    assert all(whole >= own > 0 for _, whole, own, _ in times_in(timed))


def test_a_script_that_goes_on_is_ended_again_at_every_step(timed: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model)
    for _ in range(3):
        with pytest.raises(scripting.TimingOver):
            train(optimizer, model, 9)
    assert len(times_in(timed)) == 4


def test_a_runs_steps_are_not_ended(inside: Path) -> None:
    model = torch.nn.Linear(2, 1)
    train(piste.race_optimizer(model), model, 200)


def test_a_timing_pass_leaves_out_what_is_done_for_a_report(timed: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model)
    train(optimizer, model, 7)
    piste.race_report(step=7, loss=1.0)
    with pytest.raises(scripting.TimingOver):
        train(optimizer, model, 7)
    assert [number for number, *_ in times_in(timed)] == [6, 7, 9]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_gradient_made_in_a_closure_is_not_the_optimizers_time(
    timed: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    """As Lightning calls every optimizer. Nothing here takes time but the closure, which looks at the clock once."""
    now = 0.0
    monkeypatch.setattr(scripting.time, "perf_counter", lambda: now)
    model = torch.nn.Linear(2, 1)
    optimizer = piste.race_optimizer(model)

    def closure() -> torch.Tensor:
        nonlocal now
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        now += 2.0
        return loss

    def step() -> None:
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)

    for _ in range(8):
        step()
    with pytest.raises(scripting.TimingOver):
        step()
    assert {(whole, own) for _, whole, own, _ in times_in(timed)} == {(2.0, 0.0)}


def test_steps_that_make_roots_anew_are_told_apart(timed: Path) -> None:
    run = timed.with_name("run.json")
    soap = {"optimizer": "soap", "arguments": {"lr": 0.1, "every": 4}, "timed_steps": 13}
    run.write_text(json.dumps({**json.loads(run.read_text()), **soap}))
    model = torch.nn.Linear(2, 2)
    optimizer = piste.race_optimizer(model)
    with pytest.raises(scripting.TimingOver):
        train(optimizer, model, 13)
    renewed = [bool(new) for *_, new in times_in(timed)]
    assert 0 < sum(renewed) < len(renewed)


# What reports become


def reports(tmp_path: Path, *lines: dict[str, object], metric: str = "loss") -> _Reports:
    path = tmp_path / "reports.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "half a li')
    found = _Reports(path, metric)
    found.read()
    return found


STARTED = {"started": "adamw", "parameters": 3}


def test_reports_become_a_curve_and_the_test_split_its_score(tmp_path: Path) -> None:
    found = reports(
        tmp_path,
        STARTED,
        {"step": 5, "metrics": {"loss": 2.0, "accuracy": 0.5, "train_loss": 3.0}, "steps": 5, "step_seconds": 0.5},
        {"step": 9, "metrics": {"loss": 1.0, "accuracy": 0.75, "test_accuracy": 0.7, "test_loss": 1.5}, "steps": 9},
        {"peak_bytes": 77},
        metric="accuracy",
    )
    assert (found.curve.step, found.curve.valid_loss, found.curve.valid_metric) == ([5, 9], [2.0, 1.0], [0.5, 0.75])
    assert found.curve.train_loss[0] == 3.0
    assert found.test == (1.5, 0.7)
    assert found.outcome(0) == (FINISHED, "")
    cost = found.cost(2)
    assert (cost.steps, cost.gradient_evaluations, cost.parameters, cost.peak_bytes) == (9, 18, 3, 77)


@pytest.mark.parametrize(
    ("lines", "code", "status", "words"),
    [
        ([STARTED], 0, FAILED, "without a piste.race_report"),
        ([], 0, FAILED, "without asking piste.race_optimizer"),
        ([STARTED], 3, FAILED, "exit code 3"),
        ([STARTED], -11, FAILED, "SIGSEGV"),
        ([STARTED, {"error": "RuntimeError: no"}], 1, FAILED, "RuntimeError: no"),
        ([STARTED, {"error": "OutOfMemoryError: full"}], 1, OUT_OF_MEMORY, "full"),
        ([STARTED, {"step": 1, "metrics": {"loss": float("nan")}}], -9, DIVERGED, "nan at step 1"),
    ],
)
def test_ends_of_a_script_are_outcomes(
    tmp_path: Path, lines: list[dict[str, object]], code: int, status: str, words: str
) -> None:
    found, message = reports(tmp_path, *lines).outcome(code)
    assert found == status
    assert words in message


def test_times_of_a_pass_become_those_of_a_stopwatch(tmp_path: Path) -> None:
    """As for tasks: medians, and steps with a refresh apart."""
    times = [[6, 3.0, 1.0, False], [7, 9.0, 7.0, True], [8, 5.0, 2.0, False], [9, 4.0, 1.5, False]]
    found = reports(tmp_path, STARTED, {"times": times, "steps": 9})
    assert found.timed_outcome(-9) == (FINISHED, "")  # it had to be killed, which says nothing of the times
    cost = found.timed_cost(2)
    assert (cost.step_seconds, cost.optimizer_seconds, cost.refresh_seconds, cost.refresh_share) == (
        4.0,
        1.5,
        7.0,
        0.25,
    )
    assert (cost.steps, cost.gradient_evaluations) == (9, 18)
    assert math.isnan(cost.compile_seconds)


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ([STARTED, {"times": [], "steps": 4}], 0, "of the 4 steps none came after the warm-up"),
        ([STARTED, {"times": [], "steps": 4}], 3, "exit code 3"),
        ([STARTED, {"error": "RuntimeError: no"}], 1, "RuntimeError: no"),
        ([STARTED, {"step": 9, "steps": 9, "metrics": {"loss": 1.0}}], 0, "of the 9 steps none"),
    ],
)
def test_a_pass_without_times_says_why(tmp_path: Path, lines: list[dict[str, object]], code: int, words: str) -> None:
    status, message = reports(tmp_path, *lines).timed_outcome(code)
    assert status == FAILED
    assert words in message


def test_whoever_could_not_be_timed_is_named() -> None:
    sgd, adam = make_contenders(["sgd", "adam"], (), script=True)
    lost = [new_record(key_of(who, seed, TIME), FAILED, "no step") for who in (sgd, adam) for seed in (0, 1)]
    there = new_record(key_of(adam, 2, TIME), FINISHED, "")
    (note,) = notes([*lost, there])
    assert note.startswith(f"No timing pass of {sgd.name} came to anything (no step)")
    assert notes([there]) == []


def test_a_metric_that_is_not_reported_is_named(tmp_path: Path) -> None:
    found = reports(tmp_path, STARTED, {"step": 1, "metrics": {"loss": 1.0, "f1": 0.5}}, metric="accuracy")
    assert found.outcome(-9) == (FAILED, "a report has no 'accuracy'; it has f1, loss")


def test_scripts_that_ask_for_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    with pytest.raises(TaskError, match="there is no script"):
        Script(str(path), (), "loss", False).card()
    path.write_text("print(1)")
    with pytest.raises(TaskError, match=r"never calls piste\.race_optimizer"):
        Script(str(path), (), "loss", False).card()


def test_other_arguments_are_another_task(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("race_optimizer race_report")
    cards = [Script(str(path), arguments, "loss", False).card() for arguments in ((), ("--deep",))]
    assert cards[0].task_hash != cards[1].task_hash
    assert {card.name for card in cards} == {"train"}


def test_a_script_that_seeds_itself_is_found_out() -> None:
    """By the runs it has made: all seeds of a contender came to the same losses, one by one."""
    (contender,) = make_contenders(["sgd"], (), script=True)
    keys = [key_of(contender, seed) for seed in (1, 2)]
    losses = Curve([5, 9], [0.0] * 2, [1.0] * 2, [2.0, 1.0], [2.0, 1.0])
    other = replace(losses, valid_loss=[2.0, 1.5])
    stubborn, obedient = ([new_record(*each) for each in zip(keys, 2 * [FINISHED], 2 * [""], curves, strict=True)]
                          for curves in ([losses, losses], [losses, other]))  # fmt: skip
    assert any("do not depend on the seed" in note for note in notes(stubborn))
    assert notes(obedient) == []


# Real processes


SCRIPT = """
import sys, torch, piste
torch.manual_seed(int(sys.argv[1])) if len(sys.argv) > 1 else None
model = torch.nn.Linear(4, 1)
optimizer = piste.race_optimizer(model, default="adamw")
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True)
for step in range(1, 21):
    optimizer.zero_grad()
    loss = (model(x[:48]) - y[:48]).square().mean()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        with torch.no_grad():
            piste.race_report(step=step, loss=(model(x[48:]) - y[48:]).square().mean(), train_loss=loss)
"""


def key_of(
    contender: Contender, seed: int = 1, phase: str = CONFIRM, steps: int = 0, **hyperparameters: float
) -> RunKey:
    settings = {"lr": contender.lr_center, **hyperparameters}
    optimizer, schedule = contender.optimizer, contender.schedule
    return RunKey("train", "f00d", contender.name, optimizer, schedule, settings, steps, seed, phase, "cpu", {})


def run_of(
    path: Path, *arguments: str, optimizer: str = "sgd_momentum", seed: int = 1, metric: str = "loss",
    phase: str = CONFIRM, steps: int = 0,
) -> RunRecord:  # fmt: skip
    (contender,) = make_contenders([optimizer], (), script=True)
    key = key_of(contender, seed, phase, steps)
    return run(Script(str(path), arguments, metric, False), contender, key, lambda step: None)


def write(tmp_path: Path, text: str = SCRIPT) -> Path:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.slow
def test_a_run_is_seeded_and_can_be_repeated(tmp_path: Path) -> None:
    path = write(tmp_path)
    first, again, other = run_of(path), run_of(path), run_of(path, seed=2)
    assert (first.status, first.message) == (FINISHED, "")
    assert first.curve.step == [10, 20]
    assert first.curve.valid_loss == again.curve.valid_loss
    assert first.curve.valid_loss != other.curve.valid_loss
    assert first.test_loss == first.curve.valid_loss[-1]
    assert (first.cost.steps, first.cost.parameters, first.cost.state_bytes) == (20, 5, 20)
    assert first.cost.peak_bytes > 10**7


@pytest.mark.slow
def test_a_script_that_raises_is_an_outcome(tmp_path: Path) -> None:
    made = run_of(
        write(tmp_path, SCRIPT.replace("if step % 10 == 0:", "if step == 5: raise RuntimeError('no more')\n    if 0:"))
    )
    assert (made.status, made.message) == (FAILED, "RuntimeError: no more")
    assert made.test_loss is None


@pytest.mark.slow
def test_a_script_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """However that ends: the lifeline is a pipe, and pipes close."""
    child = tmp_path / "pid"
    path = write(tmp_path, f"""
        import os, pathlib, time
        pathlib.Path({str(child)!r}).write_text(str(os.getpid()))
        time.sleep(600)  # race_optimizer race_report
    """)  # fmt: skip
    program = "from test_race_script import run_of; from pathlib import Path; import sys; run_of(Path(sys.argv[1]))"
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment)
    deadline = time.monotonic() + 300
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pid = int(child.read_text())
    until(lambda: not is_alive(pid), "the script goes on")


@pytest.mark.slow
def test_a_whole_race_of_a_script(tmp_path: Path) -> None:
    """Planned for a budget by its first runs, which are the race's own; nothing is run twice."""
    path = write(tmp_path)
    asked = ["race", "--script", str(path), "--optimizers", "sgd,torch.SGD"]
    few = ["--trials", "1", "--seeds", "1", "--timing", "1"]

    def race(folder: str, *arguments: str, status: int = 0) -> str:
        done = commands.run([*asked, *few, "--out", folder, *arguments, "--", "{seed}"], tmp_path)
        assert done.returncode == status, done.stdout
        return " ".join(done.stdout.split())

    said = race("out", "--budget", "1h")
    assert "as long as the script says" in said
    assert "The script's own schedule was used for all contenders" in said
    assert "measuring a first run of 2 contenders" in said
    assert "2 of them are there already" in said
    assert "Budget 60 min: nothing had to be given up for it." in said
    made = [json.loads(each.read_text()) for each in (tmp_path / "out" / "runs").glob("*.json")]
    assert sorted((m["key"]["optimizer"], m["key"]["phase"]) for m in made) == sorted(
        (name, phase) for name in ("sgd", "torch.SGD") for phase in (TUNE, CONFIRM, TIME)
    )
    timed = [m for m in made if m["key"]["phase"] == TIME]
    assert [(m["status"], m["cost"]["steps"]) for m in timed] == 2 * [("finished", 20)]  # all that the script has
    assert all(m["key"]["machine"] == m["machine"]["fingerprint"] for m in timed)
    again = race("out", "--budget", "1h")
    assert "6 of them are there already" in again
    assert "measuring" not in again
    short = race("short", "--budget", "1s", status=2)
    assert "the first runs of train did not end within the budget (0 of 2 did)" in short


# Frameworks

STUB = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    + """
from torchvision_stub import declare_operators
declare_operators()
import os, torch, piste
from torch import nn
draw = torch.Generator().manual_seed(0)
x = torch.randn(48, 4, generator=draw)
y = x.sum(1, keepdim=True)
"""
)

TRANSFORMERS = """
from transformers import Trainer, TrainerCallback, TrainingArguments

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def forward(self, x, labels):
        out = self.layer(x)
        return {"loss": (out - labels).square().mean(), "out": out}

class Report(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **others):
        piste.race_report(step=state.global_step, loss=metrics["eval_loss"])

rows = [{"x": a, "labels": b} for a, b in zip(x, y)]
model = Net()
args = TrainingArguments(
    "out", per_device_train_batch_size=8, max_steps=8, eval_steps=4, eval_strategy="steps", use_cpu=True,
    report_to="none", save_strategy="no", disable_tqdm=True, seed=int(os.environ.get("PISTE_RACE_SEED", 42)),
)
trainer = Trainer(
    model=model, args=args, train_dataset=rows[:32], eval_dataset=rows[32:],
    optimizers=(piste.race_optimizer(model), None), callbacks=[Report()],
)
trainer.train()
"""

LIGHTNING = """
import lightning
from torch.utils.data import DataLoader, TensorDataset

class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def training_step(self, batch, index):
        return (self.layer(batch[0]) - batch[1]).square().mean()
    def validation_step(self, batch, index):
        self.log("val", (self.layer(batch[0]) - batch[1]).square().mean())
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            piste.race_report(step=self.trainer.global_step, loss=self.trainer.callback_metrics["val"])
    def configure_optimizers(self):
        return piste.race_optimizer(self)

trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
loaders = [DataLoader(TensorDataset(x[part], y[part]), batch_size=8) for part in (slice(0, 32), slice(32, 48))]
trainer.fit(Net(), *loaders)
"""

FASTAI = """
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper

class Report(Callback):
    order = 60  # after the Recorder, which has the values
    def after_epoch(self):
        piste.race_report(step=(self.epoch + 1) * len(self.dls.train), loss=self.recorder.values[-1][1])

rows = list(zip(x, y))
loaders = DataLoaders(DataLoader(rows[:32], bs=8, num_workers=0), DataLoader(rows[32:], bs=16, num_workers=0))
model = nn.Linear(4, 1)
optimizer = piste.race_optimizer(model)
learn = Learner(loaders, model, loss_func=MSELossFlat(), opt_func=lambda parameters, **_: OptimWrapper(opt=optimizer))
learn.fit(2, optimizer.param_groups[0]["lr"], cbs=Report())
"""


WHOLE = [("transformers", TRANSFORMERS), ("lightning", LIGHTNING), ("fastai", FASTAI)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), WHOLE)
def test_scripts_of_frameworks_are_timed_and_end_in_the_middle(tmp_path: Path, name: str, text: str) -> None:
    """All three let the end of a timing pass through, and the script's own clearing up is done."""
    pytest.importorskip(name)
    marks = tmp_path / "marks"
    body = textwrap.indent(text, "    ")
    path = write(tmp_path, f"{STUB}try:\n{body}\n    print('whole', file=open({str(marks)!r}, 'a'))\n"
                           f"finally:\n    print('cleaned', file=open({str(marks)!r}, 'a'))\n")  # fmt: skip
    made = run_of(path, phase=TIME, steps=7)
    assert (made.status, made.message) == (FINISHED, "")
    assert made.cost.steps == 7
    assert made.cost.step_seconds > made.cost.optimizer_seconds > 0
    assert made.curve == Curve()
    assert marks.read_text().split() == ["cleaned"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), WHOLE)
def test_scripts_of_frameworks_race_as_they_are(tmp_path: Path, name: str, text: str) -> None:
    pytest.importorskip(name)
    made = run_of(write(tmp_path, STUB + text), optimizer="sgd_momentum")
    assert (made.status, made.message) == (FINISHED, "")
    assert made.curve.step == [4, 8]
    assert made.curve.valid_loss[-1] < 3.0  # about 4 untrained; with momentum it need not fall at every report
    assert made.cost.steps == 8
    assert made.cost.state_bytes == 20
    assert made.cost.optimizer_seconds < made.cost.step_seconds
    assert seed_of(made.key) != seed_of(key_of(make_contenders(["sgd"], (), script=True)[0], 2))
