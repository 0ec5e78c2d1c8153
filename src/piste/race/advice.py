"""``piste advise``: what is wrong, or could be better, in how the model of a task is trained."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule as Line
from rich.syntax import Syntax
from rich.text import Text

import piste
from piste.race.data import length
from piste.race.inspection import load_data
from piste.race.options import bytes_of
from piste.race.task import BUILT_IN, Task, TaskError, import_file, load_task, split_reference
from piste.race.training import fresh_model
from piste.race.words import single_line

__all__ = ["advise", "read", "show"]

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan", "suggestion": "bold green"}
_MARKS = {"error": "✗", "warning": "!", "note": "·", "suggestion": "→"}
_OWN = "training"  # the function of a task file that makes its optimizer


@dataclasses.dataclass(frozen=True)
class Case:
    """What is judged: arguments of :func:`piste.advise`, and words for what they are."""

    name: str
    arguments: Mapping[str, Any]
    where: str = ""


@click.command(name="advise", short_help="Say what is wrong in how a model is trained.")
@click.argument("task", metavar="TASK.py[:name]")
@click.option("--optimizer", metavar="NAME", help="A preset, instead of what the file's training(model) makes.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Its learning rate. [default: the preset's]")
@click.option("--schedule", metavar="NAME", help="Its schedule. [default: its companion]")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Autocast. [default: fp32]")
@click.option("--steps", type=click.IntRange(min=1), help="Of the optimizer, in the whole run. [default: the task's]")
@click.option("--memory", metavar="GiB", help="What weights, gradients and state may take, such as 24GiB.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def advise(
    task: str,
    optimizer: str | None,
    lr: float | None,
    schedule: str | None,
    precision: str | None,
    steps: int | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Say what is wrong, or could be better, in how the model of TASK is trained, and the code that mends it.

    TASK is a built-in task or a file. What trains its model is --optimizer, or what a function training(model) in the
    file returns: an optimizer, a pair of optimizer and schedule, or a dictionary of the arguments of piste.advise.

    \b
    Exit status: 0  nothing serious: no finding, or warnings, notes and suggestions
                 1  at least one error
                 2  the task cannot be read, or an option is wrong
    """
    try:
        told = {"precision": precision, "total_steps": steps, "memory": None if memory is None else bytes_of(memory)}
        case = read(task, optimizer, lr, schedule, {key: value for key, value in told.items() if value is not None})
        findings = [_for_here(finding, task) for finding in piste.advise(**case.arguments)]
    except (TaskError, ValueError, TypeError) as error:
        click.echo(f"piste: {single_line(str(error))}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(as_record(case, findings), indent=2, ensure_ascii=False))
    else:
        show(Console(), case, findings)
    sys.exit(int(any(finding.severity == "error" for finding in findings)))


def _for_here(finding: piste.Finding, task: str) -> piste.Finding:
    """The same, with this task in the commands that it proposes."""
    return dataclasses.replace(finding, fix=finding.fix.replace("TASK.py", shlex.quote(task)))


def read(
    reference: str, optimizer: str | None, lr: float | None, schedule: str | None, told: Mapping[str, Any]
) -> Case:
    """A task with what trains its model.

    Raises:
        TaskError: it cannot be loaded, or does not say what trains its model.
        ValueError: an optimizer or schedule has no such name, or options contradict each other.
    """
    task = load_task(reference).task
    own = None if optimizer else _training(reference, task)
    if own is None and optimizer is None:
        raise TaskError(
            f"{reference} does not say what trains its model: name a preset with --optimizer, or add a function "
            f"{_OWN}(model) that returns an optimizer, alone or with its schedule"
        )
    if own is not None and (lr is not None or schedule is not None):
        raise ValueError(f"--lr and --schedule belong to --optimizer; {_OWN}(model) in {reference} makes its own")
    model = fresh_model(task, 0, torch.device("cpu"))
    arguments = {"model": model, **_size(task), **told}
    if own is not None:
        return Case(task.name, arguments | _made(own, model, reference), _place(own))
    settings = {} if lr is None else {"lr": lr}
    if task.domain and piste.preset_of(optimizer or "").domains:
        settings["domain"] = task.domain  # type: ignore[assignment]
    made, scheduler = piste.create_with_schedule(
        optimizer or "", model, arguments["total_steps"], schedule=schedule, **settings
    )
    return Case(task.name, arguments | {"optimizer": made, "scheduler": scheduler}, str(optimizer))


def _training(reference: str, task: Task) -> Any:
    """The function of a task file that makes its optimizer, if there is one."""
    if reference in BUILT_IN:
        return None
    module: ModuleType = import_file(split_reference(reference)[0])
    found = getattr(module, _OWN, None)
    return found if callable(found) else None


def _size(task: Task) -> dict[str, Any]:
    examples = length(load_data(task).train)
    batch = min(task.batch_size, examples)
    seen = task.steps * batch / examples
    return {"total_steps": task.steps, "batch_size": batch, "epochs": seen, "domain": task.domain}


def _made(training: Any, model: torch.nn.Module, reference: str) -> dict[str, Any]:
    """What a function made, as arguments of :func:`piste.advise`."""
    try:
        made = training(model)
    except Exception as error:
        raise TaskError(f"{reference}: {_OWN}(model) raises {type(error).__name__}: {error}") from error
    if isinstance(made, torch.optim.Optimizer):
        return {"optimizer": made}
    if isinstance(made, Sequence) and len(made) == 2:
        return {"optimizer": made[0], "scheduler": made[1]}
    known = inspect.signature(piste.advise).parameters
    if isinstance(made, Mapping) and "optimizer" in made and set(made) <= set(known):
        return dict(made)
    raise TaskError(
        f"{reference}: {_OWN}(model) returns {type(made).__name__}; legal: an optimizer, (optimizer, schedule), or a "
        f"dictionary with 'optimizer' and any of {', '.join(name for name in known if name != 'optimizer')}"
    )


def _place(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} {_OWN}(model)" if code else ""


def as_record(case: Case, findings: Sequence[piste.Finding]) -> dict[str, Any]:
    """Findings as plain data."""
    counts = Counter(finding.severity for finding in findings)
    return {
        "task": case.name,
        "where": case.where,
        "counts": {severity: counts[severity] for severity in _STYLES},
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def show(console: Console, case: Case, findings: Sequence[piste.Finding]) -> None:
    """What was judged, each finding with its cure, and how many there were."""
    console.print(_heading(case))
    for finding in findings:
        console.print()
        console.print(_block(finding))
    console.print()
    console.print(Line(style="dim"))
    console.print(_summary(findings))


def _heading(case: Case) -> RenderableType:
    told = case.arguments
    size = sum(weight.numel() for weight in told["model"].parameters() if weight.requires_grad)
    epochs = told.get("epochs")
    facts = [
        f"{size:,} numbers are trained",
        told.get("domain") or "",
        f"{told['total_steps']:,} steps of {told['batch_size']}" if told.get("total_steps") else "",
        f"{epochs:.3g} epochs" if epochs else "",
        told.get("precision", "fp32"),
    ]
    names = [type(told["optimizer"]).__name__]
    if told.get("scheduler") is not None:
        curve = getattr(told["scheduler"], "curve", told["scheduler"])
        names.append(f"under {type(curve).__name__.lstrip('_')}")
    first = Text.assemble((case.name, "bold"), "  ", " · ".join(filter(None, facts)))
    return Group(first, Text.assemble(" ".join(names), (f"  {case.where}" if case.where else "", "dim")))


def _block(finding: piste.Finding) -> RenderableType:
    style = _STYLES[finding.severity]
    title = Text.assemble((f"{_MARKS[finding.severity]} {finding.severity}  ", style), (finding.title, "bold"))
    is_command = finding.fix.startswith("piste ")
    cure = Syntax(
        finding.fix, "sh" if is_command else "python", background_color="default", theme="ansi_dark", word_wrap=True
    )
    body = Group(
        Text(finding.detail, style="default"),
        Text(finding.reason, style="dim"),
        Padding(cure, (1, 0, 1, 2)),
        Text(f"{finding.rule}: {finding.source}", style="dim italic"),
    )
    return Group(title, Padding(body, (0, 0, 0, 4)))


def _summary(findings: Sequence[piste.Finding]) -> Text:
    counts = Counter(finding.severity for finding in findings)
    parts = [
        Text(f"{count} {severity}{'s' if count > 1 else ''}", style=style)
        for severity, style in _STYLES.items()
        for count in [counts[severity]]
        if count
    ]
    mended = any(counts[severity] for severity in _STYLES if severity != "suggestion")
    return Text(", ").join(([] if mended else [Text("nothing to mend", style="bold green")]) + parts)
