"""The report in other formats: nothing lost, nothing that runs, and plain words where a package is missing."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from chromium import browser_path
from click.testing import CliRunner
from report_studies import HOSTILE, empty_study, plain_study, troubled_study
from test_race_standings import plan_for, raced, valley

from piste.race import command
from piste.race.canonical import canonical_json
from piste.race.report import FORMATS, ExportError, export, files, send
from piste.race.report.documents import latex, markdown
from piste.race.report.exports import COLUMNS, as_csv, tables
from piste.race.report.page import make_page
from piste.race.report.palette import COLOURS, light_colours
from piste.race.store import Store

# Tables


def test_every_number_is_in_a_table() -> None:
    study = plain_study()
    made = tables(study, make_page(study).analyses)
    assert set(made) == {*COLUMNS, "pairs", "targets", "budgets", "sensitivities", "findings"}
    assert len(made["standings"].rows) == 8
    assert len(made["runs"].rows) == len(study.records)
    assert len(made["curves"].rows) == sum(len(run.curve.step) for run in study.records)
    assert len(made["pairs"].rows) == 2 * 4 * 3
    assert len(made["budgets"].rows) == 2 * 4 * 8
    row = dict(zip(made["runs"].columns, made["runs"].rows[0], strict=True))
    first = study.records[0]
    assert (row["id"], row["lr"], row["step_seconds"]) == (first.id, first.key.lr, first.cost.step_seconds)


def test_every_column_leads_somewhere() -> None:
    """A path that no record has would be a column of nothing (those of newer records excepted)."""
    study = plain_study()
    later = {"examples", "train_seconds", "optimizer_total_seconds", "compile_seconds", "evaluation_seconds"}
    for name, table in tables(study, make_page(study).analyses).items():
        for place, column in enumerate(table.columns):
            if column in later | {"scheduled_lr", "gradient_norm"}:
                continue
            assert any(row[place] is not None for row in table.rows), (name, column)


def test_a_spreadsheet_runs_nothing() -> None:
    study = troubled_study("=HYPERLINK(1)")
    texts = [cell for table in tables(study, make_page(study).analyses).values() for cell in _cells(as_csv(table))]
    assert not [text for text in texts if re.match(r"[=+@]", text)]
    assert not [text for text in texts if text.startswith("-") and not re.fullmatch(r"-(inf|[\d.e+-]+)", text)]


def _cells(text: str) -> list[str]:
    return [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]


def test_json_is_the_study_and_what_was_worked_out(tmp_path: Path) -> None:
    study = troubled_study()
    [path] = export(study, "json", tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    worked_out = content.pop("tables")
    assert content == json.loads(canonical_json(dataclasses.asdict(study)))
    assert worked_out["findings"]["rows"][0] == [f"sin {HOSTILE}", "committed", f"words {HOSTILE}"]


def test_parquet_holds_the_same_numbers(tmp_path: Path) -> None:
    parquet = importlib.import_module("pyarrow.parquet")
    study = troubled_study()
    paths = export(study, "parquet", tmp_path)
    expected = tables(study, make_page(study).analyses)
    assert [path.stem for path in paths] == list(expected)
    for path in paths:
        read = parquet.read_table(path)
        table = expected[path.stem]
        assert read.column_names == table.columns
        assert read.num_rows == len(table.rows)
    runs = parquet.read_table(tmp_path / "parquet" / "runs.parquet").to_pydict()
    assert runs["test_metric"] == [run.test_metric for run in study.records]
    assert any(math.isnan(seconds) for seconds in runs["step_seconds"])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name.startswith(("pyarrow", "torch.utils.tensorboard", "mlflow", "wandb")):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ExportError, match="pip install pyarrow"):
        export(plain_study(), "parquet", tmp_path)
    for sink in ("tensorboard", "mlflow", "wandb"):
        with pytest.raises(ExportError, match=f"pip install {sink}"):
            send(plain_study(), f"{sink}:{tmp_path}")


# Documents


def test_markdown_says_what_the_page_says(tmp_path: Path) -> None:
    [path] = export(plain_study(), "md", tmp_path)
    text = path.read_text(encoding="utf-8")
    section = make_page(plain_study()).sections[0]
    assert "# 4 optimizers on char\\_transformer and digits" in text
    assert "**Take adamw\\+one\\_cycle at lr 0.0021.** No difference found" in text
    assert "- No difference found is not equality" in text
    assert text.count("| ranger\\+flat\\_cosine |") == 2
    assert section.rows[0].score in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}


def test_latex_is_a_table_for_each_task(tmp_path: Path) -> None:
    [path] = export(plain_study(), "latex", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert r"\textbf{ranger+flat\_cosine} & 0.003162 & 1.630 [1.595, 1.665]" in text
    assert r"\caption{char\_transformer: loss, lower is better;" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {5}
    assert "\N{MINUS SIGN}" not in text


@pytest.mark.parametrize("kind", ["md", "latex"])
@pytest.mark.parametrize("study", [troubled_study, empty_study])
def test_documents_survive_trouble(tmp_path: Path, kind: str, study: Any) -> None:
    [path] = export(study(), kind, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "<img" not in text.replace("\\<", "")
    assert "None" not in text


def test_names_mean_nothing_to_a_document() -> None:
    assert markdown("a|b *c* <d> [e](f)\ng") == r"a\|b \*c\* \<d\> \[e\]\(f\) g"
    assert latex(r"50%_\input{x}^~&#$") == r"50\%\_\textbackslash{}input\{x\}\textasciicircum{}\textasciitilde{}\&\#\$"


# Pictures


def test_pictures_leave_the_page_in_its_light_colours() -> None:
    colours = light_colours()
    assert [colours[f"--c{slot}"] for slot in range(len(COLOURS))] == [light for light, _ in COLOURS]
    assert colours["--ink"] == "#17202a"
    for picture in files.pictures_of(make_page(plain_study())):
        assert "var(" not in json.dumps(files._painted(picture.data()))


@pytest.mark.slow
def test_svg_is_written_for_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", browser_path())
    paths = export(plain_study(), "svg", tmp_path)
    assert len(paths) == 15
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("<svg")
        assert "#0134ab" in text or "rgb(1, 52, 171)" in text


# Sinks


@pytest.mark.parametrize("address", ["", "tensorboard", "tensorboard:", "carrier pigeon:home"])
def test_an_unknown_sink_is_refused(address: str) -> None:
    with pytest.raises(ExportError, match=r"is not legal; legal: tensorboard:FOLDER, mlflow:"):
        send(plain_study(), address)


@pytest.mark.slow
def test_tensorboard_receives_every_run(tmp_path: Path) -> None:
    study = troubled_study()
    assert send(study, f"tensorboard:{tmp_path}") == f"{len(study.records)} runs to tensorboard ({tmp_path})"
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    folders = sorted({path.parent for path in tmp_path.rglob("events*")})
    assert len(folders) == len({run.id for run in study.records})
    first = next(folder for folder in folders if folder.name.endswith(study.records[0].id[:6]))
    read = reader(str(first))
    read.Reload()
    assert [event.value for event in read.Scalars("valid_loss")] == pytest.approx(study.records[0].curve.valid_loss)
    assert all(path.is_relative_to(tmp_path) for path in folders)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between its own dependencies
def test_mlflow_receives_every_run(tmp_path: Path) -> None:
    mlflow = importlib.import_module("mlflow")
    study = plain_study()
    study = dataclasses.replace(study, records=study.records[:3])
    send(study, f"mlflow:sqlite:///{tmp_path / 'runs.db'}")
    found = mlflow.search_runs(search_all_experiments=True)
    assert set(found["tags.piste.id"]) == {run.id for run in study.records}
    assert "metrics.valid_loss" in found


class Wandb(ModuleType):
    """What piste calls of wandb, which keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def init(self, **settings: Any) -> Iterator[Any]:
        run: dict[str, Any] = {**settings, "points": [], "summary": {}}
        self.runs.append(run)
        yield SimpleNamespace(log=lambda values, step: run["points"].append((step, values)), **run)


def test_wandb_is_told_every_run_and_asks_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    study = troubled_study()
    send(study, "wandb:some project")
    assert len(wandb.runs) == len(study.records)
    for sent, run in zip(wandb.runs, study.records, strict=True):
        assert (sent["project"], sent["mode"], sent["group"]) == ("some project", "offline", run.key.contender)
        assert (sent["config"]["lr"], sent["config"]["status"]) == (run.key.lr, run.status)
        assert [step for step, _ in sent["points"]] == run.curve.step
        told = [values.get("valid_loss") for _, values in sent["points"]]
        assert told == [loss if math.isfinite(loss) else None for loss in run.curve.valid_loss]
        assert sent["summary"].get("test_loss") == run.test_loss


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="not in piste[dev]: wandb pins a pre-release (cwevals); see docs/decisions.md",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own
def test_wandb_receives_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    study = plain_study()
    study = dataclasses.replace(study, records=study.records[:2])
    send(study, "wandb:piste")
    assert len([*tmp_path.rglob("offline-run-*/*.wandb")]) == 2


# The command


def stored(folder: Path) -> None:
    """A finished race in a folder."""
    plan = plan_for("adamw,sgd")
    records = raced(plan, valley(plan, adamw=lambda s: 1.0 + s, sgd=lambda s: 2.0 + s))
    store = Store(folder)
    with store.writing():
        about = {"title": "a race", "created": "2026-01-01", "command": "piste race", "workers": 1, "machine": {}}
        store.write_study({"settings": {}, "plan": plan.to_json(), **about})
        for record in records.values():
            store.add(record)


def test_the_command_writes_what_is_asked_for(tmp_path: Path) -> None:
    stored(tmp_path)
    asked = ["report", str(tmp_path), "--format", "md", "--format", "csv"]
    result = CliRunner().invoke(command.command, asked)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "report.html").exists()
    assert "wrote" in result.output
    assert (tmp_path / "report.md").read_text().startswith("# a race")
    assert {path.stem for path in (tmp_path / "csv").iterdir()} >= {"standings", "runs", "curves", "pairs"}


def test_without_a_format_it_is_the_page(tmp_path: Path) -> None:
    stored(tmp_path)
    result = CliRunner().invoke(command.command, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").exists()


def test_the_command_explains_a_wrong_sink(tmp_path: Path) -> None:
    stored(tmp_path)
    result = CliRunner().invoke(command.command, ["report", str(tmp_path), "--format", "json", "--to", "nowhere"])
    assert result.exit_code == 2
    assert "piste: 'nowhere' is not legal; legal: tensorboard:FOLDER" in result.output


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='docx' is not legal; legal: md, latex, csv"):
        export(plain_study(), "docx", Path())
    assert "html" not in FORMATS
