"""The numbers of a race as tables, and the files that other programs read."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from piste.race.analysis import Analysis
from piste.race.canonical import canonical_json, plain
from piste.race.result import StudyResult

_KEY = ("task", "contender", "optimizer", "schedule", "steps", "seed", "phase", "device")
_COSTS = (
    *("step_seconds", "optimizer_seconds", "state_bytes", "peak_bytes", "gradient_evaluations", "parameters"),
    *("steps", "examples", "train_seconds", "optimizer_total_seconds", "compile_seconds", "evaluation_seconds"),
)
_STANDING = (
    *("contender", "optimizer", "schedule", "best_hyperparameters", "edge", "trials", "diverged_trials", "seeds"),
    *("scores", "mean", "low", "high", "difference", "difference_low", "difference_high", "tied", "failures"),
)
_RUN = [("id", "id"), *((name, f"key.{name}") for name in _KEY), ("lr", "key.hyperparameters.lr")]

# Tables of raw data: the heading of each column, and its path into an item of the study. The page's script reads the
# same paths.
COLUMNS: Final[dict[str, list[tuple[str, str]]]] = {
    "standings": [
        ("task", "task.task"),
        ("metric", "task.metric_name"),
        *((name, f"standing.{name}") for name in _STANDING),
        ("lr", "standing.best_hyperparameters.lr"),
        *((name, f"standing.cost.{name}") for name in _COSTS if name != "steps"),
    ],
    "runs": [
        *_RUN,
        ("hyperparameters", "key.hyperparameters"),
        *((name, name) for name in ("status", "message", "test_loss", "test_metric")),
        *((name, f"cost.{name}") for name in _COSTS if name != "steps"),
        ("created", "created"),
    ],
    "curves": [
        *_RUN,
        *((name, f"curve.{name}") for name in ("step", "train_seconds", "train_loss", "valid_loss", "valid_metric")),
        ("scheduled_lr", "curve.lr"),
        ("gradient_norm", "curve.gradient_norm"),
    ],
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Named columns and rows of numbers, texts, or None."""

    columns: list[str]
    rows: list[list[Any]]


def tables(result: StudyResult, analyses: Mapping[str, Analysis]) -> dict[str, Table]:
    """Everything, by name: raw data, and what was worked out from them.

    Args:
        result: the study.
        analyses: of each task, by its name.
    """
    study = dataclasses.asdict(result)
    raw = {
        name: Table(
            [head for head, _ in columns], [[_at(item, path) for _, path in columns] for item in _ITEMS[name](study)]
        )
        for name, columns in COLUMNS.items()
    }
    return raw | derived_tables(result, analyses)


def derived_tables(result: StudyResult, analyses: Mapping[str, Analysis]) -> dict[str, Table]:
    """What was worked out: pairs, targets, budgets, sensitivities, findings."""
    made = {
        "pairs": Table(["task", "contender", "against", "chance_to_beat", "low", "high", "p_holm"], []),
        "targets": Table(["task", "contender", "count", "target", "needed"], []),
        "budgets": Table(["task", "contender", "trials", "expected_best", "low", "high"], []),
        "sensitivities": Table(["task", "contender", "excess", "decades"], []),
        "findings": Table(["sin", "state", "words"], [[f.sin, f.state, f.words] for f in result.findings]),
    }
    for task, found in analyses.items():
        made["pairs"].rows.extend(
            [task, first, second, pair.chance, pair.low, pair.high, pair.p]
            for (first, second), pair in found.pairs.items()
        )
        made["targets"].rows.extend(
            [task, name, what, target, needed]
            for what, by_name in found.needed.items()
            for name, all_needed in by_name.items()
            for target, needed in zip(found.targets, all_needed, strict=True)
        )
        made["budgets"].rows.extend(
            [task, name, place + 1, *values]
            for name, curve in found.budgets.items()
            for place, values in enumerate(zip(curve.expected, curve.low, curve.high, strict=True))
        )
        made["sensitivities"].rows.extend(
            [task, name, each.excess, each.decades] for name, each in found.sensitivities.items()
        )
    return {name: table for name, table in made.items() if table.rows}


def as_csv(table: Table) -> str:
    """Comma-separated text that a spreadsheet can open without running anything in it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.columns)
    writer.writerows([_cell(value) for value in row] for row in table.rows)
    return text.getvalue()


def as_json(result: StudyResult, analyses: Mapping[str, Analysis]) -> str:
    """The study as it is stored, with the tables that were worked out."""
    content = {**plain(result), "tables": plain(derived_tables(result, analyses))}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def write_parquet(table: Table, path: Path) -> None:
    """Write a table as Parquet.

    Raises:
        ImportError: pyarrow is not installed.
    """
    # by name, because type checkers see it in some environments and not in others
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    columns = {name: [_flat(row[place]) for row in table.rows] for place, name in enumerate(table.columns)}
    parquet.write_table(pyarrow.table(columns), path)


def _at(item: Any, path: str) -> Any:
    """What stands at the end of a dotted path; None where it leads nowhere."""
    for name in path.split("."):
        item = item.get(name) if isinstance(item, dict) else None
    return item


def _points(study: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every run once for each of its evaluations."""
    for run in study["records"]:
        for index in range(len(run["curve"]["step"])):
            yield {
                **run,
                "curve": {name: values[index] for name, values in run["curve"].items() if index < len(values)},
            }


_ITEMS: Final[dict[str, Callable[[dict[str, Any]], Iterable[dict[str, Any]]]]] = {
    "standings": lambda study: (
        {"task": task, "standing": standing} for task in study["results"] for standing in task["standings"]
    ),
    "runs": lambda study: study["records"],
    "curves": _points,
}


def _flat(value: Any) -> Any:
    """Lists and mappings as JSON text."""
    return canonical_json(value) if isinstance(value, (dict, list)) else value


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    text = " ".join(map(str, value)) if isinstance(value, list) else str(_flat(value))
    # a spreadsheet would run a text that begins like a formula
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
