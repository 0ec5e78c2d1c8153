"""The report as a file: what it says, that nothing in it can run or reach out, and what its pictures hold."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_studies import HOSTILE, USUAL, diverged, empty_study, large_study, plain_study, standing, troubled_study

import piste
from piste.race import words
from piste.race.canonical import canonical_json
from piste.race.record import Cost, Curve, RunRecord
from piste.race.report import recipe, render, write
from piste.race.report.basin import basin
from piste.race.report.curves import curves
from piste.race.report.differences import differences
from piste.race.report.page import Section, make_page
from piste.race.report.palette import COLOURS, looks
from piste.race.result import StudyResult, TaskResult


class Document(HTMLParser):
    """Elements with their attributes and text, in the order of the file."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "wbr", "input", "path", "rect", "br"):
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if any(self.elements[index][0] == tag for index in self._open):  # else an empty element that was never open
            while self.elements[self._open.pop()][0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index] = self.texts.get(index, "") + data

    def all(self, tag: str, **attributes: str) -> list[int]:
        return [
            index
            for index, (name, found) in enumerate(self.elements)
            if name == tag and all(found.get(key.replace("_", "-")) == value for key, value in attributes.items())
        ]

    def text(self, index: int) -> str:
        return " ".join(self.texts.get(index, "").split())

    def json(self, identifier: str) -> Any:
        return json.loads(self.texts[self.all("script", id=identifier)[0]])


@pytest.fixture(scope="module")
def plain() -> Document:
    return Document(render(plain_study()))


@pytest.fixture(scope="module")
def troubled() -> Document:
    return Document(render(troubled_study()))


# The file ------------------------------------------------------------------------------------------------------------


def test_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "report.html"
    assert write(plain_study(), target) == target
    first = target.read_text(encoding="utf-8")
    write(empty_study(), str(target))
    assert target.read_text(encoding="utf-8") != first
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_write_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must name a file"):
        write(empty_study(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(empty_study(), target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_the_same_study_gives_the_same_file() -> None:
    assert render(troubled_study()) == render(troubled_study())


@pytest.mark.parametrize("name", ["two\nlines", "nul\x00byte", "lone \udc80 surrogate", "\u202emirrored", "", "'\"`\\"])
def test_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    target = write(troubled_study(name), tmp_path / "report.html")
    document = Document(target.read_text(encoding="utf-8"))
    assert document.json("study")["notes"][0] == f"note {name}"


def test_a_long_race_stays_small() -> None:
    assert len(render(large_study(runs=200, points=100)).encode()) < 8_000_000


def test_everything_is_in_the_file_once(plain: Document) -> None:
    text = render(plain_study())
    assert text.count("* plotly.js v") == 1
    for tag, attributes in plain.elements:
        assert "src" not in attributes, (tag, attributes)
        address = attributes.get("href")
        assert address is None or address.startswith(("#", "data:")), (tag, address)
    style = plain.texts[plain.all("style")[0]]
    assert "@import" not in style
    assert "url(" not in style


def test_only_our_two_scripts_may_run(troubled: Document) -> None:
    running = [index for index in troubled.all("script") if troubled.elements[index][1].get("type") is None]
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(troubled.texts[index].encode()).digest()).decode()}'"
        for index in running
    }
    policy = troubled.elements[troubled.all("meta", http_equiv="Content-Security-Policy")[0]][1]["content"] or ""
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert len(running) == 2
    assert set(rules["script-src"].split()) == hashes
    assert rules["default-src"] == "'none'"  # connections, frames, fonts, workers


# Hostile and broken input --------------------------------------------------------------------------------------------


def test_hostile_names_stay_text(plain: Document, troubled: Document) -> None:
    assert troubled.all("img") == []
    assert len(troubled.all("script")) == len(plain.all("script"))
    handlers = [name for _, attributes in troubled.elements for name in attributes if name.startswith("on")]
    assert handlers == []
    assert HOSTILE in troubled.text(troubled.all("h1")[0])
    headings = [troubled.text(index) for index in troubled.all("h3")]
    assert any(f"Take adamw+{HOSTILE}" in heading for heading in headings)


def test_pictures_get_hostile_names_as_entities(troubled: Document) -> None:
    figures = troubled.json("figures")
    drawn = json.dumps(figures)
    assert "<img" not in drawn
    assert "<script" not in drawn
    assert "&lt;/script&gt;" in drawn
    names = {trace.get("name") for figure in figures for trace in figure["data"]}
    assert words.label(f"adamw+{HOSTILE}") in names


def test_labels_show_what_was_typed() -> None:
    assert words.label("<b>a</b> & b\n c") == "&lt;b&gt;a&lt;/b&gt; &amp; b c"
    assert len(words.label("x" * 99, 40)) == 40


def test_the_raw_data_travel_whole(troubled: Document) -> None:
    study = troubled_study()
    expected = json.loads(canonical_json(dataclasses.asdict(study)))
    assert troubled.json("study") == expected
    assert expected["records"][5]["curve"]["valid_loss"][-1] == "nan" or "nan" in json.dumps(expected)


def test_no_number_in_a_picture_is_infinite(troubled: Document) -> None:
    def refuse(token: str) -> float:
        raise AssertionError(token)

    json.loads(troubled.texts[troubled.all("script", id="figures")[0]], parse_constant=refuse)


def test_a_contender_without_any_result_is_in_the_table(troubled: Document) -> None:
    rows = [troubled.text(index) for index in troubled.all("tr")]
    [dead] = [row for row in rows if row.startswith("=1+1;dead")]
    assert "no result" in dead
    assert "4 of 4" in dead
    assert "out of memory" in dead
    assert "nan" not in dead.replace("nan ", "")  # numbers that are not known are dashes


def test_tasks_without_a_winner_say_so(troubled: Document) -> None:
    cards = [troubled.text(index) for index in troubled.all("article")]
    assert len(cards) == 3
    assert "Nothing to take" in cards[1]
    assert "No contender finished a run." in cards[1]
    assert "Nothing to take" in cards[2]
    empty = [troubled.text(index) for index in troubled.all("p", **{"class": "empty"})]
    assert "No confirmation run left a curve." in empty


def test_an_empty_study_is_a_page() -> None:
    document = Document(render(empty_study()))
    assert "No task was raced." in [document.text(index) for index in document.all("p")]
    assert document.json("figures") == []


# Words ---------------------------------------------------------------------------------------------------------------


def test_the_answer_stands_first(plain: Document) -> None:
    headings = [plain.text(index) for tag in ("h1", "h2", "h3") for index in plain.all(tag)]
    order = [plain.text(index) for index, (tag, _) in enumerate(plain.elements) if tag in ("h1", "h2", "h3")]
    assert set(order) == set(headings)
    assert order[1] == "The answer"
    assert order[2].startswith("Take ")
    assert re.search(r"at lr [\d.]+$", order[2])


def test_of_a_tie_the_cheapest_is_taken() -> None:
    study = plain_study()
    for task, section in zip(study.results, make_page(study).sections, strict=True):
        group = [each for each in task.standings if each.tied]
        cheapest = min(group, key=lambda each: each.cost.state_bytes)
        assert len(group) > 1
        assert section.mood == "tie"
        assert section.taken == cheapest.contender
        assert section.facts[1].value == "no difference found"
        assert [place.taken for place in section.ranking].count(True) == 1


def _single_task(standings: list[Any], *, higher_is_better: bool = False) -> Section:
    result = TaskResult("task", "accuracy" if higher_is_better else "loss", higher_is_better, standings, "verdict")
    return make_page(StudyResult("t", "", [result], [], [], {}, "")).sections[0]


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_clear_winner_is_ahead_by_a_positive_amount(higher_is_better: bool) -> None:
    sign = -1 if higher_is_better else 1
    lead = [0.500, 0.502, 0.501]
    behind = [score + sign * (0.1 + 0.01 * index) for index, score in enumerate(lead)]
    cost = Cost(0.01, 0.001, 800, 0, 10, 100)
    section = _single_task(
        [standing("a+constant", lead, lead, cost), standing("b+constant", behind, lead, cost, tied=False)],
        higher_is_better=higher_is_better,
    )
    assert section.mood == "clear"
    assert section.taken == "a+constant"
    assert (section.facts[1].name, section.facts[1].value) == ("ahead of the next", "0.110")
    assert section.facts[1].remark == "[0.098, 0.122] b+constant"
    assert section.rows[1].difference == ("\N{MINUS SIGN}0.110" if higher_is_better else "+0.110")
    strip = section.ranking[1].strip
    assert strip is not None
    assert strip.leader < strip.low < strip.middle < strip.high  # worse is to the right


def test_one_seed_gives_no_verdict() -> None:
    cost = Cost(0.01, 0.001, 800, 0, 10, 100)
    cheap = dataclasses.replace(cost, step_seconds=0.001, state_bytes=0)
    nan = {"low": math.nan, "high": math.nan, "difference_low": math.nan, "difference_high": math.nan, "tied": True}
    standings = [standing("a+constant", [0.5], [0.5], cost, **nan), standing("b+constant", [0.6], [0.5], cheap, **nan)]
    section = _single_task(standings)
    assert (section.mood, section.advice, section.taken) == ("unsure", "Best so far:", "a+constant")
    assert section.rows[1].tied == "unknown"


def test_the_method_names_the_numbers_of_this_race() -> None:
    text = " ".join(make_page(plain_study()).method)
    assert "8 of 250 steps" in text
    assert "5 fresh seeds" in text
    assert "95 % bootstrap" in text
    assert "third split" in text


def test_notes_machine_command_and_versions_are_shown(plain: Document) -> None:
    study = plain_study()
    body = plain.text(plain.all("main")[0])
    for text in (*study.notes, *study.machine.values(), study.command, "2.13.0+cpu", "96 finished, 8 diverged"):
        assert text in body


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (words.number(0.0031623), "0.00316"),
        (words.number(1234.5), "1234"),
        (words.number(1.5e-7), "1.50e\N{MINUS SIGN}7".replace("e\N{MINUS SIGN}7", "e\N{MINUS SIGN}07")),
        (words.number(math.nan), "\N{EN DASH}"),
        (words.number(None), "\N{EN DASH}"),
        (words.number(-math.inf), "\N{MINUS SIGN}∞"),
        (words.number(0.0), "0"),
        (words.short(0.0021), "0.0021"),
        (words.short(100.0), "100"),
        (words.short(2.5e-7), "2.5e\N{MINUS SIGN}07"),
        (words.fixed(-0.0004, 3, signed=True), "0.000"),
        (words.fixed(0.25, 2, signed=True), "+0.25"),
        (words.duration(0.0131), "13.1 ms"),
        (words.duration(8.5e-5), "85.0 µs"),
        (words.duration(0.9999), "1.00 s"),
        (words.duration(600), "10 min"),
        (words.duration(7200), "2.00 h"),
        (words.duration(math.nan), "\N{EN DASH}"),
        (words.size(0), "0 B"),
        (words.size(1_260_000), "1.20 MiB"),
        (words.size(3 * 2**41), "6.00 TiB"),
        (words.percent(0.122), "12 %"),
        (words.percent(0.0122), "1.2 %"),
        (words.listing(["a"]), "a"),
        (words.listing(["a", "b", "c"]), "a, b and c"),
        (words.listing(["a", "b", "c", "d"]), "a, b, c and 1 more"),
        (words.listing(list("abcdef")), "a, b, c and 3 more"),
        (words.moment("2026-11-23T10:05:00Z"), "2026-11-23 10:05 UTC"),
        (words.moment("yesterday"), "yesterday"),
        (words.count(1, "run"), "1 run"),
        (words.count(1200, "run"), "1,200 runs"),
        (words.places_for([0.012, 0.034, 0.0]), 3),
        (words.places_for([]), 3),
        (words.interval(math.nan, 1.0, 2), ""),
    ],
)
def test_numbers_read_well(made: object, expected: object) -> None:
    assert made == expected


# Readers of all kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [plain_study, troubled_study, empty_study])
def test_structure_for_screen_readers(study: Any) -> None:
    document = Document(render(study()))
    assert document.elements[0] == ("html", {"lang": "en"})
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(document.all(landmark)) == 1, landmark
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in document.elements:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in identifiers, (tag, reference)
        if tag == "a":
            assert (attributes["href"] or "")[1:] in identifiers
        if attributes.get("role") == "img":
            assert len(attributes["aria-label"] or "") > 20
        if tag == "svg":
            assert attributes["aria-hidden"] == "true"
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "colgroup")
    assert len(document.all("caption")) == len(document.all("table"))
    assert len(document.all("legend")) == len(document.all("fieldset"))
    for index in document.all("button"):
        assert document.text(index)


def test_pictures_are_told_in_words(plain: Document) -> None:
    alternatives = [
        attributes["aria-label"] or "" for _, attributes in plain.elements if attributes.get("role") == "img"
    ]
    assert len(alternatives) == 15  # seven a task and one over both
    for alternative in alternatives:
        for contender in USUAL:
            assert contender in alternative


# Brettel-like matrices for linear RGB, severity 1 (Machado, Oliveira and Fernandes 2009).
_SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("sight", _SIGHT)
def test_colours_stay_apart(theme: int, sight: str) -> None:
    seen = [_lab(np.clip(np.array(_SIGHT[sight]) @ _linear(pair[theme]), 0, 1)) for pair in COLOURS]
    nearest = min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2))
    assert nearest > 14  # a just noticeable difference is about 2


@pytest.mark.parametrize(("theme", "background"), [(0, "#ffffff"), (1, "#171d24")])
def test_colours_stand_out(theme: int, background: str) -> None:
    def luminance(colour: str) -> float:
        return float(_linear(colour) @ [0.2126, 0.7152, 0.0722])

    for pair in COLOURS:
        darker, lighter = sorted((luminance(pair[theme]), luminance(background)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3  # WCAG 2.2, 1.4.11


def test_looks_differ_in_more_than_colour() -> None:
    result = TaskResult("t", "loss", False, [standing(f"c{k}", [1.0], [1.0], Cost.unknown()) for k in range(24)], "")
    found = list(looks(StudyResult("", "", [result], [], [], {}, "")).values())
    assert len({(look.colour, look.dash, look.marker) for look in found}) == 24
    assert len({(look.dash, look.marker) for look in found}) == 24
    assert "x" not in {look.marker for look in found}


def test_a_contender_looks_the_same_everywhere() -> None:
    study = plain_study()
    expected = looks(study)
    for section in make_page(study).sections:
        for picture in section.pictures:
            for trace in picture.figure.data:
                if trace.name == "front":
                    continue
                look = expected[trace.name]
                used = trace.marker.color or (trace.line.color if trace.type == "scatter" else None) or trace.fillcolor
                assert used == look.colour
                if trace.type == "scatter" and trace.mode == "lines+markers":
                    assert (trace.line.dash, trace.marker.symbol) == (look.dash, look.marker)


# Pictures ------------------------------------------------------------------------------------------------------------


def _curve(values: list[float], seconds: float = 1.0) -> Curve:
    steps = list(range(0, 10 * len(values), 10))
    return Curve(steps, [step * seconds for step in steps], list(values), list(values), list(values))


def _runs(records: list[tuple[str, float, int, str, str, Curve]]) -> list[RunRecord]:
    from report_studies import run

    return [
        run("t", contender, lr, seed, phase, made, Cost.unknown(), status=status)
        for contender, lr, seed, phase, status, made in records
    ]


def _result(*names: str, **changes: Any) -> TaskResult:
    standings = [standing(name, [1.0, 1.1], [1.0, 1.1], Cost.unknown(), **changes) for name in names]
    return TaskResult("t", "loss", False, standings, "")


def _looks(task: TaskResult) -> Any:
    return looks(StudyResult("", "", [task], [], [], {}, ""))


def test_a_run_that_ended_counts_as_worst_in_the_median() -> None:
    task = _result("a")
    runs = _runs(
        [
            ("a", 0.1, 1, "confirm", "finished", _curve([4.0, 3.0, 2.0])),
            ("a", 0.1, 2, "confirm", "finished", _curve([4.0, 2.0, 1.0])),
            ("a", 0.1, 3, "confirm", "diverged", _curve([4.0, 5.0])),
        ]
    )
    picture = curves(task, runs, _looks(task), "id")
    band, seeds, median, ended = picture.figure.data
    # the band ends with the shortest run
    assert (list(band.x), list(band.y)) == ([0, 10, 10, 0], [4.0, 2.0, 5.0, 4.0])
    assert list(median.y) == [4.0, 3.0, 2.0]  # of (2, 1, worst) the middle one is 2
    assert list(median.x) == [0, 10, 20]
    assert list(seeds.y) == [4.0, 3.0, 2.0, None, 4.0, 2.0, 1.0, None, 4.0, 5.0, None]
    assert (list(ended.x), list(ended.y)) == ([10], [5.0])
    assert ended.marker.symbol == "x"


def test_of_many_seeds_some_are_drawn_and_all_are_counted() -> None:
    """Every third of fifty, however they went; median and band are of all of them, and the caption says so."""
    task = _result("a")
    made = [("a", 0.1, seed, "confirm", "finished", _curve([4.0, float(seed)])) for seed in range(1, 51)]
    picture = curves(task, _runs(made), _looks(task), "id")
    band, seeds, median = picture.figure.data
    assert list(seeds.y)[1::3] == [float(seed) for seed in range(1, 51, 3)]
    assert (min(band.y[1:3]), max(band.y[1:3])) == (1.0, 50.0)
    assert list(median.y) == [4.0, 25.5]
    assert "Thin: 17 seeds of 50, at even distances. Shaded: from the best of all seeds" in picture.caption
    assert "Thin: every seed." in curves(task, _runs(made[:20]), _looks(task), "id").caption


def test_a_median_beyond_all_bounds_is_a_gap() -> None:
    task = _result("a")
    runs = _runs([("a", 0.1, seed, "confirm", "diverged", _curve([4.0, math.nan])) for seed in (1, 2)])
    runs += _runs([("a", 0.1, 3, "confirm", "finished", _curve([4.0, 1.0]))])
    median = curves(task, runs, _looks(task), "id").figure.data[2]
    assert list(median.y) == [4.0, None]


def test_time_replaces_steps() -> None:
    task = _result("a", "b")
    runs = _runs(
        [
            ("a", 0.1, 1, "confirm", "finished", _curve([4.0, 3.0], seconds=0.5)),
            ("b", 0.1, 1, "confirm", "finished", _curve([4.0, 3.0], seconds=2.0)),
        ]
    )
    picture = curves(task, runs, _looks(task), "id")
    steps, seconds = picture.switches[0].options  # gradient evaluations were not counted
    assert steps.x == [[0, 10], [0, 10]]
    assert seconds.x == [[0.0, 5.0], [0.0, 20.0]]
    assert "seconds" in seconds.layout["xaxis"]["title"]["text"]


def test_every_switch_serves_every_trace() -> None:
    for study in (plain_study(), troubled_study(), large_study(runs=124, points=5)):
        for section in make_page(study).sections:
            for picture in section.pictures:
                for switch in picture.switches:
                    for option in switch.options:
                        for values in (option.x, option.y):
                            assert values is None or len(values) == len(picture.figure.data)


def test_the_metric_has_its_own_curve_where_there_is_one() -> None:
    text, digits = make_page(plain_study()).sections
    names = [[option.label for option in section.pictures[0].switches[1].options] for section in (text, digits)]
    assert names[0] == ["Validation loss", "Training loss"]
    assert names[1] == ["Validation loss", "Training loss", "Validation accuracy"]
    assert digits.pictures[0].switches[1].options[2].layout["yaxis"]["type"] == "linear"
    assert digits.pictures[1].switches[1].options[0].label == "Validation accuracy at the end"  # what chose the rates


def test_blow_ups_do_not_squeeze_the_rest() -> None:
    task = _result("a")
    good = _curve([4.0, 2.0, 1.0])
    blown = diverged(good, 1.0)
    runs = _runs([("a", 0.1, 1, "confirm", "finished", good), ("a", 0.1, 2, "confirm", "diverged", blown)])
    layout = curves(task, runs, _looks(task), "id").figure.layout
    assert layout.yaxis.range[1] == pytest.approx(math.log10(8.0))
    assert "cut off" in layout.title.text


def test_a_loss_that_is_not_positive_gets_a_plain_axis() -> None:
    task = _result("a")
    runs = _runs([("a", 0.1, 1, "confirm", "finished", _curve([1.0, -2.0]))])
    assert curves(task, runs, _looks(task), "id").figure.layout.yaxis.type == "linear"


def test_basin_marks_the_best_the_edge_and_the_lost() -> None:
    task = _result("a", best_hyperparameters={"lr": 0.01}, edge="low", trials=3, diverged_trials=1)
    runs = _runs(
        [
            ("a", 0.1, 0, "tune", "finished", _curve([4.0, 2.0])),
            ("a", 1.0, 0, "tune", "diverged", _curve([4.0, math.nan])),
            ("a", 0.01, 0, "tune", "finished", _curve([4.0, 1.5])),
        ]
    )
    picture = basin(task, runs, _looks(task), "id")
    line, ring, crosses = picture.figure.data
    assert (list(line.x), list(line.y)) == ([0.01, 0.1], [1.5, 2.0])
    assert (list(ring.x), list(ring.y)) == ([0.01], [1.5])
    assert "edge" in ring.text[0]
    assert (list(crosses.x), crosses.marker.symbol, crosses.yaxis) == ([1.0], "x", "y2")
    assert picture.figure.layout.yaxis2.domain[0] > picture.figure.layout.yaxis.domain[1]  # above the rest
    relative = picture.switches[0].options[1]
    assert relative.x == [[1.0, 10.0], [1.0], [100.0]]
    assert "a did best at the lowest rate tried: a better one may lie beyond." in picture.caption
    assert "1 of 3 did not finish" in picture.alt


def test_basin_counts_edges_beyond_three() -> None:
    cost = Cost.unknown()
    edges = {"a": "high", "b": "low", "c": "high", "d": "high", "e": "high", "f": ""}
    standings = [standing(name, [1.0, 1.1], [1.0, 1.1], cost, edge=edge) for name, edge in edges.items()]
    task = TaskResult("t", "loss", False, standings, "")
    runs = _runs([(name, 0.1, 0, "tune", "finished", _curve([4.0, 2.0])) for name in edges])
    caption = basin(task, runs, _looks(task), "id").caption
    assert "a, c, d and 1 more did best at the highest rate tried: a better one may lie beyond." in caption
    assert "b did best at the lowest rate tried: a better one may lie beyond." in caption


def test_forest_plot_shows_intervals_and_ties() -> None:
    cost = Cost.unknown()
    lead = [1.0, 1.2]
    standings = [
        standing("a", lead, lead, cost),
        standing("b", [1.1, 1.15], lead, cost, difference_low=-0.1, difference_high=0.2, tied=True),
        standing("c", [1.5, 1.8], lead, cost, difference_low=0.3, difference_high=0.9, tied=False),
    ]
    task = TaskResult("t", "loss", False, standings, "")
    figure = differences(task, _looks(task), "id").figure
    leader, tied, worse = figure.data
    assert (list(leader.x), leader.error_x.visible) == ([0.0], False)
    assert tied.marker.symbol == "square-open"
    assert worse.marker.symbol == "diamond"
    assert worse.x[0] == pytest.approx(0.55)
    assert worse.x[0] - worse.error_x.arrayminus[0] == pytest.approx(0.3)
    assert worse.x[0] + worse.error_x.array[0] == pytest.approx(0.9)
    labels = [annotation.text for annotation in figure.layout.annotations]
    assert labels == ["<b>a</b> · leader", "b · tied", "c"]
    first, last = figure.layout.xaxis.range
    assert first < last
    upside_down = dataclasses.replace(task, higher_is_better=True)
    first, last = differences(upside_down, _looks(task), "id").figure.layout.xaxis.range
    assert first > last  # worse is to the right here too


# Code to copy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", [*USUAL, "torch.AdamW+constant"])
def test_the_code_runs_as_it_stands(contender: str) -> None:
    lead = [1.0, 1.1]
    code = recipe.recipe(standing(contender, lead, lead, Cost.unknown(), best_hyperparameters={"lr": 3.162e-3}), 20)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names: dict[str, Any] = {"model": model}
    setup, step = code.split("# total_steps")
    exec(compile(setup, "recipe", "exec"), names)
    optimizer = names["optimizer"]
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(3.162e-3) or contender.endswith("one_cycle")
    assert names["schedule"].optimizer is optimizer
    for _ in range(20):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        exec(compile("# total_steps" + step, "recipe", "exec"), names)
        optimizer.zero_grad()
    assert not torch.equal(model.weight, before)


def test_the_code_names_what_was_raced() -> None:
    lead = [1.0, 1.1]
    made = standing("ranger+flat_cosine", lead, lead, Cost.unknown(), best_hyperparameters={"lr": 0.1 + 0.2})
    code = recipe.recipe(made, 600)
    assert 'optimizer = piste.create("ranger", model, lr=0.3)\n' in code
    assert "piste.schedules.flat_cosine(optimizer, total_steps=600)" in code
    assert "ranger" in piste.presets


def test_hostile_code_stays_a_string() -> None:
    name = 'x"); import os; os.system("true")\n#'
    lead = [1.0, 1.1]
    best = {"lr": 0.1, 'k"ey': 1.0, "class": 2.0}
    made = standing("a", lead, lead, Cost.unknown(), optimizer=name, schedule=name, best_hyperparameters=best)
    tree = ast.parse(recipe.recipe(made, 10))
    imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imports == ["piste"]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert texts.count(name) == 2


def test_no_code_without_a_setting() -> None:
    assert recipe.recipe(standing("a", [1.0], [1.0], Cost.unknown(), best_hyperparameters={}), 10) == ""


@pytest.mark.parametrize("module", ["standings", "study", "report", "words"])
def test_each_module_can_be_imported_first(module: str) -> None:
    """The report reads standings, and standings share the report's words: that must not become a circle."""
    subprocess.run([sys.executable, "-c", f"import piste.race.{module}"], check=True)
