"""The report in a real browser, opened from disk: drawn, silent, offline, usable, and safe."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from report_studies import HOSTILE, USUAL, empty_study, large_study, plain_study, troubled_study

from piste.race.canonical import canonical_json
from piste.race.report import exports, write
from piste.race.report.page import make_page
from piste.race.result import StudyResult

pytestmark = pytest.mark.slow

PATIENCE = 300.0  # seconds, for what takes one or two; nothing waits for it but a failing test
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], StudyResult]], Path]:
    """Each study's report, written once."""
    folder = tmp_path_factory.mktemp("reports")

    def report(study: Callable[[], StudyResult]) -> Path:
        path = folder / f"{study.__name__} 100% ü.html"
        return path if path.exists() else write(study(), path)

    return report


def until(settled: Callable[[], bool], what: str) -> None:
    """Wait for what a page does of itself, in its own time."""
    deadline = time.monotonic() + PATIENCE
    while not settled():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Opened:
    """A page with all that was heard from it."""

    def __init__(self, context: Any, path: Path, before: str = "") -> None:
        self.address = path.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.set_offline(True)
        context.set_default_timeout(1000 * PATIENCE)
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        if before:
            self.page.add_init_script(before)
        self.page.goto(self.address)
        self.page.wait_for_selector("html[data-ready=yes]")

    def calm(self) -> None:
        """Nothing was asked of the network, nothing was complained about."""
        assert self.complaints == []
        assert self.requests == [self.address]

    def see(self, plot: str) -> None:
        """Scroll to a plot: it is drawn when a reader comes near."""
        self.page.locator(f"#{plot}").scroll_into_view_if_needed()
        self.page.locator(f"#{plot} svg.main-svg").first.wait_for()

    def see_all(self) -> None:
        """Scroll past all plots."""
        for plot in self.page.eval_on_selector_all(".plot", "nodes => nodes.map(node => node.id)"):
            self.see(plot)

    def path_of(self, plot: str) -> list[str]:
        """The shapes of the lines, or bars, of a plot."""
        self.see(plot)
        found: list[str] = self.page.eval_on_selector_all(
            f"#{plot} .trace path",
            "nodes => nodes.map(node => node.getAttribute('d') + node.getAttribute('transform'))",
        )
        return found

    def traces(self, plot: str) -> int:
        self.see(plot)
        return int(self.page.locator(f"#{plot} .trace").count())


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, reports: Callable[..., Path]) -> Iterator[Open]:
    contexts = []

    def open_report(study: Callable[[], StudyResult] = plain_study, before: str = "", **options: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        return Opened(context, reports(study), before)

    yield open_report
    for context in contexts:
        context.close()


def _number(text: str) -> object:
    """Python writes 1.0 and 1e-05 where JavaScript writes 1 and 0.00001, in mappings too."""
    if text.startswith("{"):
        return json.loads(text)
    try:
        return repr(float(text))
    except ValueError:
        return text


@pytest.mark.parametrize("study", [plain_study, troubled_study, large_study, empty_study])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_without_a_word(opened: Open, study: Callable[[], StudyResult], scheme: str) -> None:
    report = opened(study, color_scheme=scheme)
    report.see_all()
    report.page.mouse.move(600, 400)
    report.calm()


@pytest.mark.parametrize("study", [plain_study, troubled_study, large_study])
def test_every_plot_is_drawn(opened: Open, study: Callable[[], StudyResult]) -> None:
    report = opened(study)
    plots = json.loads(report.page.locator("#figures").text_content())
    assert len(plots) == report.page.locator(".plot").count() > 0
    for plot in plots:
        report.see(plot["id"])
        assert report.page.locator(f"#{plot['id']} svg.main-svg").first.is_visible()
        assert report.traces(plot["id"]) == len(plot["data"])
        shapes = [shape for shape in report.path_of(plot["id"]) if not shape.startswith(("null", "M0,0Z"))]
        assert shapes, plot["id"]


def test_switches_change_the_picture(opened: Open) -> None:
    report = opened()
    page = report.page
    plot = "task-2-curves"
    figure = page.locator("figure", has=page.locator(f"#{plot}"))
    title = page.locator(f"#{plot} .xtitle")
    report.see(plot)
    assert title.text_content() == "optimizer steps"
    by_steps = report.path_of(plot)
    figure.get_by_label("time", exact=True).check()
    assert "training time (seconds)" in title.text_content()
    by_time = report.path_of(plot)
    assert by_time != by_steps
    figure.get_by_role("radio", name="Validation accuracy").check()
    assert report.path_of(plot) != by_time
    assert "Validation accuracy" in page.locator(f"#{plot} .gtitle").text_content()
    assert "training time" in title.text_content()  # the other switch stays as it was
    figure.get_by_role("radio", name="Validation loss").check()
    figure.get_by_label("steps", exact=True).check()
    assert report.path_of(plot) == by_steps

    basin = "task-2-basin"
    before = report.path_of(basin)
    page.locator("figure", has=page.locator(f"#{basin}")).get_by_label("relative to own best").check()
    assert "own best" in page.locator(f"#{basin} .xtitle").text_content()
    assert report.path_of(basin) != before
    report.calm()


def test_switches_work_from_the_keyboard(opened: Open) -> None:
    report = opened()
    page = report.page
    report.see("task-1-curves")
    page.locator("fieldset[data-plot=task-1-curves] input").first.focus()
    page.keyboard.press("ArrowRight")
    assert "gradient evaluations" in page.locator("#task-1-curves .xtitle").text_content()
    page.keyboard.press("ArrowRight")
    assert "training time" in page.locator("#task-1-curves .xtitle").text_content()


def test_a_contender_can_be_hidden_in_all_pictures_of_a_task(opened: Open) -> None:
    report = opened()
    page = report.page
    curves, basin, other = (report.traces(f"task-{name}") for name in ("1-curves", "1-basin", "2-curves"))
    button = page.locator("[aria-labelledby=task-1] .key button").nth(0)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert report.traces("task-1-curves") == curves - 3
    assert report.traces("task-1-basin") == basin - 3
    assert report.traces("task-2-curves") == other
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert report.traces("task-1-curves") == curves


@pytest.mark.parametrize(
    "before",
    [
        "",
        "Object.defineProperty(navigator, 'clipboard', {value: undefined})",
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: () => Promise.reject(new Error('no'))}})",
    ],
    ids=["clipboard", "no clipboard", "clipboard refused"],
)
def test_copy_from_a_file_on_disk(opened: Open, before: str) -> None:
    report = opened(before=before)
    page = report.page
    expected = page.locator("article code").first.text_content()
    assert expected.startswith("import piste\n")
    button = page.locator("article button.copy").first
    button.click()
    until(lambda: page.get_by_role("status").text_content() == "Copied", "nothing was copied")
    page.evaluate(
        "document.querySelector('main').append(Object.assign(document.createElement('textarea'), {id: 'paste'}))"
    )
    page.locator("#paste").focus()
    page.keyboard.press("Control+V")
    until(lambda: page.locator("#paste").input_value() != "", "nothing was pasted")
    assert page.locator("#paste").input_value() == expected
    report.calm()


def test_hostile_names_do_nothing(opened: Open) -> None:
    report = opened(troubled_study)
    page = report.page
    assert page.locator("img").count() == 0
    assert page.locator("[onerror], [onload]").count() == 0
    assert page.locator("body script").count() == 6
    report.see_all()
    labels = page.locator("#task-1-differences .annotation-text").all_text_contents()
    assert any("</script><img src=x" in label for label in labels)  # shown as typed
    # labels of hovered points are made from names, too
    page.locator("#task-1-curves").scroll_into_view_if_needed()
    box = page.locator("#task-1-curves .nsewdrag").first.bounding_box()
    parts = itertools.cycle(range(1, 10))

    def is_labelled() -> bool:
        page.mouse.move(box["x"] + box["width"] * next(parts) / 10, box["y"] + box["height"] * 0.8)
        page.wait_for_timeout(150)
        return "</script>" in " ".join(page.locator("#task-1-curves .hoverlayer").all_text_contents())

    until(is_labelled, "no point has a label with its name")
    for button in page.locator("fieldset label").all():
        button.click()
    assert page.locator("img").count() == 0
    report.calm()
    assert HOSTILE in page.title()


def test_dark_and_light_are_followed_at_once(opened: Open) -> None:
    report = opened(color_scheme="dark")
    page = report.page

    report.see("task-1-curves")

    def colours() -> tuple[str, str, str]:
        return (
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
            page.locator("#task-1-curves .xtick text").first.evaluate("node => getComputedStyle(node).fill"),
            page.locator("#task-1-curves .js-line").nth(1).evaluate("node => getComputedStyle(node).stroke"),
        )

    dark = colours()
    page.emulate_media(color_scheme="light")
    assert dark == ("rgb(15, 20, 25)", "rgb(232, 237, 242)", "rgb(153, 175, 255)")
    light = ("rgb(244, 246, 248)", "rgb(23, 32, 42)", "rgb(1, 52, 171)")
    until(lambda: colours() == light, "it stays dark")
    report.calm()


@pytest.mark.parametrize("study", [plain_study, troubled_study, large_study, empty_study])
@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_does_not_scroll_sideways(opened: Open, study: Callable[[], StudyResult], width: int) -> None:
    report = opened(study, **{**PHONE, "viewport": {"width": width, "height": 844}})
    report.see_all()
    assert report.page.evaluate("document.documentElement.scrollWidth") <= width
    for box in [plot.bounding_box() for plot in report.page.locator(".plot svg.main-svg").all()]:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    report.calm()


def test_a_finger_scrolls_past_the_plots(opened: Open) -> None:
    report = opened(**PHONE)
    report.see("task-1-curves")
    assert report.page.evaluate("document.getElementById('task-1-curves')._fullLayout.dragmode") is False


def test_plots_follow_the_window(opened: Open) -> None:
    report = opened()
    report.see("task-1-curves")
    report.page.set_viewport_size({"width": 700, "height": 900})
    plot = report.page.locator("#task-1-curves svg.main-svg").first
    until(lambda: 500 < plot.bounding_box()["width"] < 700, "the plot stays as wide as it was")


def test_data_can_be_taken_out(opened: Open) -> None:
    report = opened(troubled_study, accept_downloads=True)
    study = troubled_study()
    saved = {}
    for button in report.page.locator("button.download").all():
        with report.page.expect_download() as waiting:
            button.click()
        saved[waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes().decode()
    raw, derived = {"curves", "runs", "standings"}, {"budgets", "findings", "pairs", "sensitivities", "targets"}
    assert set(saved) == {f"piste-{name}.csv" for name in raw | derived} | {"piste-race.json"}
    assert json.loads(saved["piste-race.json"]) == json.loads(canonical_json(dataclasses.asdict(study)))

    tables = {
        name: list(csv.DictReader(io.StringIO(text, newline=""))) for name, text in saved.items() if "csv" in name
    }
    runs = tables["piste-runs.csv"]
    assert [row["id"] for row in runs] == [run.id for run in study.records]
    assert [row["status"] for row in runs] == [run.status for run in study.records]
    assert float(runs[0]["lr"]) == study.records[0].key.lr
    assert runs[0]["task"] == f"task {HOSTILE}"
    # a spreadsheet must not run "=1+1;dead"
    assert {row["contender"] for row in runs if "dead" in row["contender"]} == {"'=1+1;dead"}
    curves = tables["piste-curves.csv"]
    assert len(curves) == sum(len(run.curve.step) for run in study.records)
    assert float(curves[8]["valid_loss"]) == study.records[0].curve.valid_loss[8]
    assert "nan" in {row["valid_loss"] for row in curves}
    standings = tables["piste-standings.csv"]
    assert len(standings) == sum(len(task.standings) for task in study.results)
    assert standings[1]["high"] == "inf"
    # the command writes the same tables
    analyses = make_page(study).analyses
    for name, table in exports.tables(study, analyses).items():
        written = list(csv.DictReader(io.StringIO(exports.as_csv(table), newline="")))
        taken = tables[f"piste-{name}.csv"]
        assert [*taken[0]] == [*written[0]], name
        one, other = ([[*map(_number, row.values())] for row in rows] for rows in (taken, written))
        assert one == other, name
    report.calm()


def test_a_picture_can_be_saved_with_its_key(opened: Open) -> None:
    report = opened(accept_downloads=True)
    with report.page.expect_download() as waiting:
        report.page.locator("button.save[data-plot=task-1-curves]").click()
    assert waiting.value.suggested_filename == "task-1-curves.svg"
    picture = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    for contender in USUAL:
        assert contender in picture
    assert report.complaints == []


def test_it_prints_and_comes_back(opened: Open) -> None:
    report = opened(color_scheme="dark")
    page = report.page
    # what the page looks like at the moment of printing; pictures that nobody has looked at are drawn for it
    page.evaluate(
        "addEventListener('beforeprint', () => {"
        "  window.printed = [document.getElementById('task-1-curves')._fullLayout.width,"
        "    document.getElementById('task-1-curves')._fullLayout.font.color]; })"
    )
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert page.evaluate("window.printed") == [680, "#17202a"]
    assert page.locator(".plot svg.main-svg").count() >= page.locator(".plot").count()
    layout = "document.getElementById('task-1-curves')._fullLayout"
    until(lambda: page.evaluate(f"{layout}.width") > 900, "it stays as wide as paper")
    until(lambda: page.evaluate(f"{layout}.font.color") == "#e8edf2", "it stays in the colours of paper")
    report.calm()


def test_what_a_screen_reader_finds(opened: Open) -> None:
    page = opened().page
    assert page.get_by_role("heading", level=1).text_content() == plain_study().title
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    assert page.get_by_role("table", name="All contenders on digits").is_visible()
    assert page.get_by_role("img", name="Line chart of the validation loss").count() == 2
    assert page.get_by_role("radio", name="time", exact=True).count() == 5
    assert page.get_by_role("table", name="Chance that the row scores better").count() == 2
    assert page.get_by_role("list", name="What limits this verdict").count() == 2
    assert page.get_by_role("columnheader", name="Against adamw+one_cycle").count() == 1
    assert page.get_by_role("button", name="Copy the code: use adamw+one_cycle as raced on digits").is_visible()
    assert page.get_by_role("rowheader", name="sgd_momentum+one_cycle").count() == 5


def test_the_numbers_of_a_picture_can_be_read_as_a_table(opened: Open) -> None:
    report = opened(troubled_study)
    page = report.page
    figure = page.locator("figure", has=page.locator("#task-1-curves"))
    button = figure.locator("button.numbers")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    rows = figure.get_by_role("row").all_text_contents()
    assert len(rows) > 9
    assert any(HOSTILE[:20] in row for row in rows)  # as typed
    assert page.locator("img").count() == 0
    button.click()
    assert figure.locator("table").count() == 0
    report.calm()


def test_what_the_race_looked_for_can_be_unfolded(opened: Open) -> None:
    page = opened().page
    reason = page.get_by_text("Scores come from the report split, never from training.")
    assert reason.is_hidden()
    page.get_by_text("Ruled out by construction (1)").click()
    assert reason.is_visible()


def test_pictures_far_away_wait_for_the_reader(opened: Open) -> None:
    report = opened(large_study)
    assert report.page.locator("#task-1-breakdown svg").count() == 0
    report.see("task-1-breakdown")
    assert report.traces("task-1-breakdown") == 8


def test_without_scripts_the_words_remain(opened: Open, browser: Any, reports: Callable[..., Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(reports(plain_study).as_uri())
    assert page.get_by_role("table").first.is_visible()
    assert page.locator("button.copy").first.is_hidden()
    context.close()
