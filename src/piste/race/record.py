"""What the race writes down: one record a run, and the study made from many of them.

The records are plain data. They travel as JSON (``to_json``/``from_json``); numbers that JSON cannot hold
(nan, inf) travel as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, so the files stay readable by any JSON reader.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

# 2 added traces and totals; what 1 wrote is read, with those left empty. 3 has the checksum in front, over the bytes
# that follow it: not one of them changes unnoticed, and nothing has to be written again to be verified.
SCHEMA: Final = 3
READABLE: Final = (1, 2, 3)
_SEAL: Final = re.compile(r'\{"checksum":"([0-9a-f]{64})",\n')

FINISHED: Final = "finished"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
OUT_OF_MEMORY: Final = "out_of_memory"
STATUSES: Final = (FINISHED, DIVERGED, FAILED, OUT_OF_MEMORY)

SCREEN: Final = "screen"
TUNE: Final = "tune"
CONFIRM: Final = "confirm"
TIME: Final = "time"
PHASES: Final = (SCREEN, TUNE, CONFIRM, TIME)


class RecordError(ValueError):
    """A stored record cannot be trusted: it is cut off, altered, or of a schema this version does not know."""


@dataclass(frozen=True)
class RunKey:
    """Everything that decides how a run goes; two runs with equal keys are the same run.

    Args:
        task: the task's name.
        task_hash: hash of the task's source and a fingerprint of its data.
        contender: optimizer and schedule, such as ``"ranger+flat_cosine"``.
        optimizer: the preset's name.
        schedule: name of a function in ``piste.schedules``.
        hyperparameters: what was chosen for this run, ``lr`` first of all.
        steps: number of optimizer steps; 0 where a script decides it.
        seed: decides initial weights, batch order and dropout, the same for every contender.
        phase: ``"tune"`` (its validation score may choose the setting), ``"confirm"`` (fresh seeds, report split),
            ``"screen"`` (a trial on a shorter schedule) or ``"time"`` (short, alone, for its wall times; nothing is
            evaluated and ``seed`` counts rounds).
        device: ``"cpu"``, ``"cuda:0"``, …
        versions: of python, torch and piste.
        machine: fingerprint of the machine, of timing passes alone: elsewhere they are other runs.
        packed: a trial for ``--pack``, made together with others where that works: equal to rounding, without times.
    """

    task: str
    task_hash: str
    contender: str
    optimizer: str
    schedule: str
    hyperparameters: dict[str, float]
    steps: int
    seed: int
    phase: str
    device: str
    versions: dict[str, str]
    machine: str = ""
    packed: bool = False

    @cached_property
    def id(self) -> str:
        """The content address of the run: 20 hex digits."""
        content = self.fields()
        if not self.machine:
            del content["machine"]  # as in schema 1, whose ids stay what they are
        return _digest(canonical_json(content))[:20]

    def fields(self) -> dict[str, Any]:
        """By name; without ``packed`` where that is false, as before there were packs: ids and files stay the same."""
        return {name: value for name, value in _fields(self).items() if value or name != "packed"}

    @property
    def lr(self) -> float:
        """The learning rate of this run."""
        return self.hyperparameters["lr"]


@dataclass
class Curve:
    """The course of a run: parallel lists, one entry an evaluation, the first at step 0 (the untrained model).

    Args:
        step: optimizer steps taken.
        train_seconds: wall time of training alone, without evaluation.
        train_loss: mean training loss since the evaluation before (at step 0: of the first batch, before any step).
        valid_loss: loss on the validation split.
        valid_metric: the task's metric on the validation split (equal to the loss where the task has none).
        lr: learning rate of the first group in the last step (at step 0: in the first one).
        gradient_norm: Euclidean norm of the whole gradient in that step, before the optimizer does anything to it.
    """

    step: list[int] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_metric: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)


@dataclass
class Cost:
    """What a run needed.

    Args:
        step_seconds: median wall time of a whole step (forward, backward, optimizer); nan if no step was timed.
        optimizer_seconds: median wall time of what a step does beyond one gradient evaluation: ``optimizer.step()``,
            and the second pass of optimizers that make one; nan if no step was timed.
        state_bytes: bytes of all tensors that the optimizer keeps from step to step.
        peak_bytes: on CUDA the peak of allocated device memory; on CPU the peak resident memory of the whole
            process during the run, Python and torch included. 0 where it could not be measured.
        gradient_evaluations: forward-backward passes made in the whole run.
        parameters: number of trained weights.
        refresh_seconds: median of ``optimizer_seconds`` over the steps that worked inverse roots or eigenbases out anew
            (Shampoo, SOAP), which are then not among those above; nan if there was none.
        refresh_share: how many of the timed steps did.
        worst_optimizer_seconds: the longest of all timed steps; nan if no step was timed.
        steps: optimizer steps made; 0 in records of schema 1.
        examples: training examples seen, each forward-backward pass counted once for its batch.
        train_seconds: wall time of training, evaluation left out; nan where unknown, as below.
        optimizer_total_seconds: of these, what lies beyond one gradient evaluation a step.
        compile_seconds: by how much the first five steps took longer than the median step (tracing, compiling).
        evaluation_seconds: wall time of all evaluations.
    """

    step_seconds: float
    optimizer_seconds: float
    state_bytes: int
    peak_bytes: int
    gradient_evaluations: int
    parameters: int
    refresh_seconds: float = math.nan
    refresh_share: float = 0.0
    worst_optimizer_seconds: float = math.nan

    steps: int = 0
    examples: int = 0
    train_seconds: float = math.nan
    optimizer_total_seconds: float = math.nan
    compile_seconds: float = math.nan
    evaluation_seconds: float = math.nan

    @property
    def mean_optimizer_seconds(self) -> float:
        """Of a step, with the refreshes shared out."""
        own = self.optimizer_seconds
        return own + self.refresh_share * (self.refresh_seconds - own) if self.refresh_share else own

    @property
    def mean_step_seconds(self) -> float:
        """Of a whole step, with the refreshes shared out."""
        return self.step_seconds - self.optimizer_seconds + self.mean_optimizer_seconds

    @classmethod
    def unknown(cls) -> Cost:
        """The cost of a run that ended before anything was measured."""
        return cls(math.nan, math.nan, 0, 0, 0, 0)


@dataclass
class RunRecord:
    """One run, as stored. ``checksum`` stands first and covers every byte after it; it is verified on reading.

    Args:
        schema: version of this format.
        id: ``key.id``.
        key: what identifies the run.
        status: ``"finished"``, ``"diverged"``, ``"failed"`` or ``"out_of_memory"``.
        message: one line why, or ``""``.
        curve: losses along the way.
        test_loss: loss on the report split at the end, or None (a tune run, or one that did not finish).
        test_metric: the metric there, or None.
        cost: time and memory.
        machine: what ran it.
        created: UTC time, ISO 8601.
        checksum: SHA-256 over the rest of the text (up to schema 2: of the content).
    """

    schema: int
    id: str
    key: RunKey
    status: str
    message: str
    curve: Curve
    test_loss: float | None
    test_metric: float | None
    cost: Cost
    machine: dict[str, str]
    created: str
    checksum: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run went to its last step."""
        return self.status == FINISHED

    @property
    def fingerprint(self) -> str:
        """Of the machine; wall times are comparable only where it is the same."""
        return fingerprint(self.machine)

    def to_json(self) -> str:
        """The record as JSON text, a field a line, its checksum computed anew."""
        content = _fields(self) | {"schema": SCHEMA}
        parts = {"key": self.key.fields(), "curve": _fields(self.curve), "cost": _fields(self.cost)}
        content.pop("checksum")
        lines = [f'"{name}":{canonical_json(parts.get(name, value))}' for name, value in content.items()]
        body = ",\n".join(lines) + "}\n"
        return f'{{"checksum":"{_digest(body)}",\n{body}'

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Read a record back.

        Raises:
            RecordError: the text is no record, its checksum or its id does not match, or the schema is unknown.
        """
        seal = _SEAL.match(text)
        if seal and seal[1] != _digest(text[seal.end() :]):
            raise RecordError("its checksum does not match its content")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise RecordError(f"not valid JSON ({error})") from error
        if not isinstance(content, dict) or "checksum" not in content:
            raise RecordError("not a run record")
        if not seal and content["checksum"] != _checksum(content):
            raise RecordError("its checksum does not match its content")
        if content.get("schema") not in READABLE:
            readable = f"{READABLE[0]} to {READABLE[-1]}"
            raise RecordError(f"its schema is {content.get('schema')!r}, this version reads {readable}")
        try:
            record = cls(**_revive(content))
        except (TypeError, KeyError, ValueError) as error:
            raise RecordError(f"its fields are not those of a run record ({error})") from error
        if record.id != record.key.id:
            raise RecordError("its id does not match its key")
        return record


@dataclass(frozen=True)
class Standing:
    """Where one contender ended on one task.

    Args:
        contender: such as ``"ranger+flat_cosine"``.
        optimizer: the preset's name.
        schedule: the schedule's name.
        best_hyperparameters: chosen by the validation split of the tune runs; empty if no trial survived.
        edge: ``"low"`` or ``"high"`` if the best lr is the lowest or highest that was tried, else ``""``.
        trials: settings tried.
        diverged_trials: how many of them did not finish (diverged, failed or out of memory).
        seeds: number of confirmation runs.
        scores: one a confirmation seed, in seed order, on the report split; a run that did not finish counts as the
            worst score seen on the task. Empty if no trial survived.
        mean: mean of the scores; nan if there are none.
        low: lower end of its bootstrap interval.
        high: upper end.
        difference: mean of (this contender's score minus the leader's) over common seeds; 0 for the leader itself.
        difference_low: lower end of its paired bootstrap interval.
        difference_high: upper end.
        tied: in the leader's group: no difference from the leader was found. True for the leader itself.
        cost: times of the run with the shortest steps; the rest are maxima over its runs.
        failures: one line for each run that did not finish, tune and confirm.
    """

    contender: str
    optimizer: str
    schedule: str
    best_hyperparameters: dict[str, float]
    edge: str
    trials: int
    diverged_trials: int
    seeds: int
    scores: list[float]
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    tied: bool
    cost: Cost
    failures: list[str]

    @property
    def is_open(self) -> bool:
        """Whether there is no score and one may still come: not all of its trials were lost."""
        return not self.scores and not 0 < self.trials <= self.diverged_trials


@dataclass(frozen=True)
class TaskResult:
    """All contenders on one task, best first, the verdict in one or two sentences, and what limits it (``caveats``).

    ``target`` is the validation score that was asked for, whose first passing is timed; None where none was.
    """

    task: str
    metric_name: str
    higher_is_better: bool
    standings: list[Standing]
    verdict: str
    target: float | None = None
    caveats: list[str] = field(default_factory=list)


COMMITTED: Final = "committed"
CLEAR: Final = "clear"
EXCLUDED: Final = "ruled out by construction"


@dataclass(frozen=True)
class Finding:
    """What a race has to say of one sin of comparisons.

    Args:
        sin: its name.
        state: ``"committed"``, ``"clear"`` (looked for and not found) or ``"ruled out by construction"``.
        words: what was found, or why it cannot happen; empty where clear.
    """

    sin: str
    state: str
    words: str


@dataclass(frozen=True)
class StudyResult:
    """A whole race, ready to be reported.

    Args:
        title: one line.
        created: UTC time, ISO 8601.
        results: one a task.
        records: every run the results rest on.
        notes: what the race holds against itself (few seeds, best lr at an edge, timings taken side by side, …).
        machine: what ran it.
        command: the command that repeats it.
        findings: one for each sin of comparisons, committed or not.
    """

    title: str
    created: str
    results: list[TaskResult]
    records: list[RunRecord]
    notes: list[str]
    machine: dict[str, str]
    command: str
    findings: list[Finding] = field(default_factory=list)


def fingerprint(machine: dict[str, str]) -> str:
    """Twelve hex digits for all that decides wall times on a machine, of those things that ``machine`` names."""
    return _fingerprint(*((name, machine[name]) for name in _DECISIVE if name in machine))


_DECISIVE: Final = ("system", "processor", "cores", "accelerator")


@lru_cache(maxsize=64)
def _fingerprint(*decisive: tuple[str, str]) -> str:
    return _digest(canonical_json(dict(decisive)))[:12]


def plain(value: Any) -> Any:
    """A record or a study as JSON data, where ``asdict`` would copy all it holds; non-finite numbers by name."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return value if _all_finite(value) else [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if is_dataclass(value):
        return {name: plain(item) for name, item in _fields(value).items()}
    return value


def canonical_json(content: Any) -> str:
    """One text for one content: sorted keys, no spaces, non-finite numbers as strings."""
    try:
        return _compact(content)
    except ValueError:
        return _compact(plain(content))


def _compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _fields(of: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are, where ``asdict`` would copy all they hold."""
    return {name: vars(of)[name] for name in of.__dataclass_fields__}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    """Of a record up to schema 2: over its content, in whatever layout it stands."""
    return _digest(canonical_json({name: value for name, value in content.items() if name != "checksum"}))


def _all_finite(values: Sequence[Any]) -> bool:
    """Whether these are numbers, and small enough to be added up."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def _revive(content: dict[str, Any]) -> dict[str, Any]:
    """Turn the JSON form into constructor arguments of ``RunRecord``."""
    numbers = {name: [float(x) for x in values] for name, values in content["curve"].items() if name != "step"}
    cost: dict[str, Any] = {
        name: float(value) if name.endswith("_seconds") else value for name, value in content["cost"].items()
    }
    return {
        **content,
        "key": RunKey(**content["key"]),
        "curve": Curve(step=content["curve"]["step"], **numbers),
        "cost": Cost(**cost),
        "test_loss": _number(content["test_loss"]),
        "test_metric": _number(content["test_metric"]),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
