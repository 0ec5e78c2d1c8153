"""The report in a real browser: it asks the network for nothing, says nothing to the console, and draws its plots."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_studies import plain_study, troubled_study

from piste.race.report import write

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the dev extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.slow

# Chromium looks up its maker's hosts at every start; none of that is the page's doing.
QUIET = "--no-sandbox --disable-background-networking --disable-component-update --disable-sync --no-first-run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI has to bring a Chromium: .ci/run installs Debian's")
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


class Visit:
    """An open report, with everything it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.goto(path.as_uri())
        for index in range(self.page.locator(".plot").count()):  # pictures are drawn when they come into sight
            self.page.locator(".plot").nth(index).scroll_into_view_if_needed()
            self.page.locator(".plot").nth(index).locator("svg.main-svg").first.wait_for()

    @property
    def outside(self) -> list[str]:
        return [url for url in self.requests[1:] if not url.startswith(("data:", "blob:"))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    return {
        "plain": write(plain_study(), folder / "plain.html"),
        "troubled": write(troubled_study(), folder / "troubled.html"),
    }


@pytest.mark.parametrize("which", ["plain", "troubled"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_network_and_complaints(
    browser: Any, reports: dict[str, Path], which: str, scheme: str
) -> None:
    visit = Visit(browser, reports[which], color_scheme=scheme, viewport={"width": 1200, "height": 900})
    assert visit.requests[0].startswith("file:")
    assert visit.outside == []
    assert visit.complaints == []
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].replace("a(", "").split(",")[:3]) / 3
    assert (brightness < 100) == (scheme == "dark"), background


def test_every_plot_is_drawn_and_its_switches_change_it(browser: Any, reports: dict[str, Path]) -> None:
    visit = Visit(browser, reports["plain"], viewport={"width": 1200, "height": 900})
    plots = visit.page.locator(".plot")
    assert plots.count() >= 3
    for index in range(plots.count()):
        assert plots.nth(index).locator("svg .trace, svg .scatterlayer path").count() > 0
    switch = visit.page.locator("fieldset[data-plot]").first
    drawn = visit.page.locator(f"#{switch.get_attribute('data-plot')}")
    before = drawn.inner_html()
    switch.locator("label").nth(1).click()
    visit.page.wait_for_function(
        "([id, before]) => document.getElementById(id).innerHTML !== before", arg=[drawn.get_attribute("id"), before]
    )
    key = visit.page.locator("[role=group] button").first
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert visit.complaints == []


def test_the_code_is_copied(browser: Any, reports: dict[str, Path]) -> None:
    visit = Visit(browser, reports["plain"])
    visit.page.evaluate("document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.locator("button.copy").first.click()
    visit.page.wait_for_function("() => document.getElementById('said').textContent !== ''")
    text = visit.page.evaluate("navigator.clipboard.readText().catch(() => window.copied)")
    assert "piste.create(" in text
    assert visit.complaints == []


def test_downloads_hold_the_data(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    visit = Visit(browser, reports["plain"])
    for kind, start in (("json", "{"), ("standings", "task,"), ("runs", ""), ("curves", "")):
        with visit.page.expect_download() as download:
            visit.page.locator(f"button.download[data-kind={kind}]").click()
        target = tmp_path / kind
        download.value.save_as(target)
        text = target.read_text(encoding="utf-8-sig")
        assert len(text) > 100
        assert text.startswith(start)


def test_hostile_names_are_words(browser: Any, reports: dict[str, Path]) -> None:
    visit = Visit(browser, reports["troubled"])
    assert visit.page.locator("img").count() == 0
    assert "alert(1)" in visit.page.locator("main").inner_text()
    assert visit.complaints == []


@pytest.mark.parametrize("which", ["plain", "troubled"])
def test_a_phone_scrolls_in_one_direction(browser: Any, reports: dict[str, Path], which: str) -> None:
    visit = Visit(browser, reports[which], viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
