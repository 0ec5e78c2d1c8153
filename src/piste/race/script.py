"""Runs of a training script that asks for its optimizer: each is a process of its own, told what to use by a file.

The process is started through ``piste.race.launch``, which seeds random numbers before the script's first line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from piste.race import record
from piste.race.attempt import new_record
from piste.race.canonical import canonical_json
from piste.race.contenders import Contender, preset_behind
from piste.race.costs import Stopwatch
from piste.race.inspection import TaskCard
from piste.race.record import Cost, Curve, RunKey, RunRecord
from piste.race.seeds import derived_seed
from piste.race.space import create_arguments
from piste.race.task import TaskError
from piste.race.words import count, listing

RUN_VARIABLE = "PISTE_RACE_RUN"  # of piste.race_optimizer
SEED_VARIABLE = "PISTE_RACE_SEED"  # for scripts that seed themselves
SEED_MARK = "{seed}"  # in arguments
_POLL_SECONDS = 0.1
_CLEAN_UP_SECONDS = 10.0  # for a script that was told to end after its timing pass
_CALLS = ("race_optimizer", "race_report")


@dataclass(frozen=True)
class Script:
    """A script with its arguments, and what of its reports is the score.

    Args:
        path: the file.
        arguments: of its command line; ``{seed}`` in them becomes the seed of the run.
        metric: name of the score in its reports.
        higher_is_better: its direction.
    """

    path: str
    arguments: tuple[str, ...]
    metric: str
    higher_is_better: bool

    def card(self) -> TaskCard:
        """What the driver of a race knows about it; how long a run is, only the script knows.

        Raises:
            TaskError: there is no such file, or it never asks for its optimizer.
        """
        path = Path(self.path)
        if not path.is_file():
            raise TaskError(f"there is no script {path}")
        source = path.read_bytes()
        for call in _CALLS:
            if call.encode() not in source:
                raise TaskError(
                    f"{path} never calls piste.{call}; a script to be raced asks for its optimizer with "
                    "piste.race_optimizer(model) and reports with piste.race_report(step=…, loss=…)"
                )
        parts = [hashlib.sha256(source).hexdigest(), self.arguments, self.metric, self.higher_is_better]
        return TaskCard(
            reference=self.path,
            name=path.stem,
            task_hash=hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:20],
            description=" ".join(["the script", path.name, *self.arguments]),
            metric_name=self.metric,
            higher_is_better=self.higher_is_better,
            steps=0,
            parameters=0,
            examples=(0, 0, 0),
            step_seconds=0.0,
            evaluation_seconds=0.0,
        )


def run(script: Script, contender: Contender, key: RunKey, progress: Callable[[int], None]) -> RunRecord:
    """Start the script with one contender and wait for its end. Whatever goes wrong inside is an outcome.

    In a timing pass the script is ended after so many steps as the key says, from inside of the optimizer's step.

    Args:
        script: what to run.
        contender: who runs.
        key: lr and other settings, seed, phase.
        progress: called with the number of steps, after each report.
    """
    with tempfile.TemporaryDirectory(prefix="piste-race-") as folder:
        reports = _Reports(Path(folder) / "reports.jsonl", script.metric)
        asked = Path(folder) / "run.json"
        arguments: dict[str, Any] = create_arguments(preset_behind(contender.optimizer), key.hyperparameters)
        content: dict[str, Any] = {
            "optimizer": contender.optimizer,
            "arguments": arguments,
            "report": str(reports.path),
        }
        if key.phase == record.TIME:
            content["timed_steps"] = key.steps
        asked.write_text(json.dumps(content), encoding="utf-8")
        process = _start(script, key, asked, reports.path)
        try:
            while process.poll() is None and not (reports.diverged or reports.message):
                time.sleep(_POLL_SECONDS)
                if reports.read():
                    progress(reports.step)
                if reports.times is not None:
                    _wait(process, _CLEAN_UP_SECONDS)
                    break
        finally:
            _end(process)
        reports.read()
        passes = preset_behind(contender.optimizer).gradient_evaluations
        if key.phase == record.TIME:
            return new_record(key, *reports.timed_outcome(process.returncode), cost=reports.timed_cost(passes))
        status, message = reports.outcome(process.returncode)
        test = reports.test if key.phase == record.CONFIRM and status == record.FINISHED else (None, None)
        return new_record(key, status, message, reports.curve, reports.cost(passes), *test)


@dataclass
class _Reports:
    """What a run has written so far."""

    path: Path
    metric: str
    curve: Curve = field(default_factory=Curve)
    lines: list[dict[str, Any]] = field(default_factory=list)
    times: list[tuple[int, float, float, bool]] | None = None
    place: int = 0
    message: str = ""

    def read(self) -> bool:
        """Take in whole new lines; whether there was a report among them."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.lines += new
        for line in new:
            self.times = line.get("times", self.times)
        found = [line for line in new if "step" in line]
        for line in found:
            self._add(line)
        return bool(found)

    @property
    def step(self) -> int:
        """The last one reported."""
        return self.curve.step[-1] if self.curve.step else 0

    @property
    def diverged(self) -> bool:
        """Whether a reported loss is not finite: nothing can be learnt from the rest of such a run."""
        return bool(self.curve.step) and not (
            math.isfinite(self.curve.valid_loss[-1]) and math.isfinite(self.curve.valid_metric[-1])
        )

    @property
    def test(self) -> tuple[float, float]:
        """Loss and score on data used for nothing else; those of validation where the script has no such data."""
        metrics = [line["metrics"] for line in self.lines if "step" in line]
        losses = [float(each["test_loss"]) for each in metrics if "test_loss" in each]
        scores = [float(each[f"test_{self.metric}"]) for each in metrics if f"test_{self.metric}" in each]
        return (losses or self.curve.valid_loss)[-1], (scores or self.curve.valid_metric)[-1]

    def outcome(self, code: int) -> tuple[str, str]:
        """Status and message of a run that has ended."""
        errors = [line["error"] for line in self.lines if "error" in line]
        if self.diverged:
            return record.DIVERGED, f"the script reported a loss of {self.curve.valid_loss[-1]} at step {self.step}"
        if errors:
            is_memory = errors[-1].startswith(("MemoryError", "OutOfMemoryError", "torch.OutOfMemoryError"))
            return (record.OUT_OF_MEMORY if is_memory else record.FAILED), errors[-1]
        if self.message or code < 0:
            return record.FAILED, self.message or f"the script was killed by {signal.Signals(-code).name}"
        if code:
            return record.FAILED, f"the script ended with exit code {code}"
        if not any("started" in line for line in self.lines):
            return record.FAILED, "the script ended without asking piste.race_optimizer for its optimizer"
        if not self.curve.step:
            return record.FAILED, "the script ended without a piste.race_report"
        return record.FINISHED, ""

    def timed_outcome(self, code: int) -> tuple[str, str]:
        """Status and message of a timing pass, which is whole once a step was timed, however the script ended."""
        if self.times:
            return record.FINISHED, ""
        if self.times is None or code:
            status, message = self.outcome(code)
            if status != record.FINISHED:
                return status, message
        made = count(max((int(line.get("steps", 0)) for line in self.lines), default=0), "step")
        return record.FAILED, f"of the {made} none came after the warm-up and without a report since the one before"

    def timed_cost(self, passes: float) -> Cost:
        """What a timing pass needed, its times step by step as those of tasks."""
        stopwatch = Stopwatch()
        for number, whole, own, renewed in self.times or ():
            stopwatch.add(number, whole, own, refreshed=renewed)
        timed = replace(self.cost(passes), **stopwatch.times())  # type: ignore[arg-type]
        # Nobody sees when a script's first step begins, and so nothing of what is compiled in it.
        return replace(timed, compile_seconds=math.nan)

    def cost(self, passes: float) -> Cost:
        """What the run needed, as far as its last report knows."""
        numbers: dict[str, Any] = {}
        for line in self.lines:
            numbers |= line
        steps = int(numbers.get("steps", 0))
        step, own = (float(numbers.get(name, math.nan)) for name in ("step_seconds", "optimizer_seconds"))
        return Cost(
            step_seconds=step,
            optimizer_seconds=own,
            state_bytes=int(numbers.get("state_bytes", 0)),
            peak_bytes=int(numbers.get("peak_bytes", 0)),
            gradient_evaluations=round(passes * steps),
            parameters=int(numbers.get("parameters", 0)),
            steps=steps,
            train_seconds=step * steps,
            optimizer_total_seconds=own * steps,
        )

    def _add(self, line: dict[str, Any]) -> None:
        metrics = line["metrics"]
        if self.metric not in metrics:
            self.message = f"a report has no {self.metric!r}; it has {', '.join(sorted(metrics))}"
            return
        self.curve.step.append(line["step"])
        self.curve.train_seconds.append(float(line.get("step_seconds", math.nan)) * line.get("steps", 0))
        self.curve.train_loss.append(float(metrics.get("train_loss", math.nan)))
        self.curve.valid_loss.append(float(metrics["loss"]))
        self.curve.valid_metric.append(float(metrics[self.metric]))
        self.curve.lr.append(float(line.get("lr", math.nan)))
        self.curve.gradient_norm.append(float(line.get("gradient_norm", math.nan)))


def seed_of(key: RunKey) -> int:
    """What a run's script is seeded with: 31 bits, which every library takes."""
    return derived_seed(key.seed, "script") % 2**31


def notes(records: Sequence[RunRecord]) -> list[str]:
    """What the runs of a script show about the script."""
    confirmed: dict[tuple[str, str], list[RunRecord]] = {}
    for made in records:
        if made.key.phase == record.CONFIRM and made.finished:
            confirmed.setdefault((made.key.task, made.key.contender), []).append(made)
    found = []
    if any(len(runs) > 1 and len({tuple(r.curve.valid_loss) for r in runs}) == 1 for runs in confirmed.values()):
        found.append(
            "The script's runs do not depend on the seed, as if it seeded itself: their intervals mean nothing. Hand "
            f"the seed on, with {SEED_MARK} among its arguments or from the environment variable {SEED_VARIABLE}."
        )
    passes = [made for made in records if made.key.phase == record.TIME]
    timed = {made.key.contender for made in passes if made.finished}
    untimed = {made.key.contender: made.message for made in passes if made.key.contender not in timed}
    if untimed:
        why = listing(sorted(set(untimed.values())), 1)
        found.append(
            f"No timing pass of {listing(sorted(untimed), 3)} came to anything ({why}): their times are those of "
            "whole runs, taken side by side, and hardly to be compared with the others'."
        )
    return found


def _start(script: Script, key: RunKey, asked: Path, reports: Path) -> subprocess.Popen[bytes]:
    seed = seed_of(key)
    arguments = [argument.replace(SEED_MARK, str(seed)) for argument in script.arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, RUN_VARIABLE: str(asked), SEED_VARIABLE: str(seed)}
    command = [sys.executable, "-m", "piste.race.launch", str(reports), str(seed), script.path, *arguments]
    # The pipe is a lifeline: when the worker dies, however it dies, its other end closes and the launcher ends.
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
