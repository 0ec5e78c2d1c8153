"""The page that a race serves while it goes: to this machine alone, to those who know its address, and in a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import chromium
from click.testing import CliRunner
from report_studies import HOSTILE
from test_race_dashboard import state_of
from test_race_end_to_end import command, write
from test_report_exports import stored

from piste.race.command import command as piste_command
from piste.race.record import TIME
from piste.race.serve import PageView, ServeError, Together
from piste.race.store import Store
from piste.race.wishes import Add, Stop, Wish
from piste.race.worker import Run


@pytest.fixture
def page(tmp_path: Path) -> Iterator[PageView]:
    stored(tmp_path)
    view = PageView(Store(tmp_path))
    yield view
    view.close()


def asked(page: PageView, place: str = "", method: str = "GET", body: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer; headers have ``_`` for ``-``."""
    link = urlsplit(page.link)
    own = {"Host": link.netloc, **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection = http.client.HTTPConnection(link.netloc, timeout=60)
    with closing(connection):
        path = place if place.startswith("/") else link.path + place
        content = body if isinstance(body, (str, type(None))) else json.dumps(body)
        connection.request(method, path, content, {name: value for name, value in own.items() if value})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def wish(page: PageView, body: object, **headers: str) -> tuple[int, str]:
    origin = page.link.removesuffix(urlsplit(page.link).path)
    return asked(page, "wish", "POST", body, **{"Origin": origin, "Content_Type": "application/json", **headers})


# Who may ask


def test_it_listens_on_the_loopback_address_and_on_no_other(page: PageView) -> None:
    assert page.server.socket.getsockname()[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in others:
        if not str(address).startswith("127."):
            with (
                pytest.raises((ConnectionRefusedError, TimeoutError)),
                socket.create_connection((address, page.server.server_port), timeout=5),
            ):
                pass


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:PORT", "127.0.0.1:1", "[::1]:PORT"])
@pytest.mark.parametrize("place", ["", "state", "content"])
def test_a_name_of_another_host_that_leads_here_is_refused(page: PageView, host: str, place: str) -> None:
    status, text = asked(page, place, Host=host.replace("PORT", str(page.server.server_port)))
    assert (status, text) == (421, "this is another host")


def test_localhost_is_this_host(page: PageView) -> None:
    assert asked(page, "state", Host=f"localhost:{page.server.server_port}")[0] == 200


@pytest.mark.parametrize("place", ["/", "/state", "/wrong-token/", "/wrong-token/state", "state/", "../", "static.js"])
def test_without_the_token_there_is_nothing(page: PageView, place: str) -> None:
    status, text = asked(page, place)
    assert status == 404
    assert "there is nothing here" in text


@pytest.mark.parametrize("origin", ["", "null", "http://evil.example", "https://127.0.0.1:PORT", "http://127.0.0.1"])
def test_a_wish_of_another_page_is_refused(page: PageView, origin: str) -> None:
    status, _ = wish(page, {"add": "lion"}, Origin=origin.replace("PORT", str(page.server.server_port)))
    assert status == 403
    assert page.wishes() == []


def test_a_wish_needs_the_token_and_the_host_too(page: PageView) -> None:
    origin = page.link.removesuffix(urlsplit(page.link).path)
    assert asked(page, "/wish", "POST", {"add": "lion"}, Origin=origin, Content_Type="application/json")[0] == 404
    assert wish(page, {"add": "lion"}, Host="evil.example")[0] == 421
    assert page.wishes() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"add": "lion", "stop": "1"}, 400),
        ({"add": 1}, 400),
        ({"add": "two\nlines"}, 400),
        ({"add": "x" * 201}, 400),
        ([], 400),
        ("no JSON", 400),
        ("[" * 4000, 400),
        ("x" * 5000, 413),
    ],
)
def test_what_is_no_wish_is_refused(page: PageView, body: object, status: int) -> None:
    assert wish(page, body)[0] == status
    assert page.wishes() == []


def test_wishes_reach_the_race_in_order(page: PageView) -> None:
    assert wish(page, {"add": "lion"}) == (200, "{}")
    assert wish(page, {"stop": "0" * 20}) == (200, "{}")
    assert wish(page, {"add": "lion"}, Content_Type="text/plain")[0] == 404  # as a form of another page could send
    assert page.wishes() == [Add("lion"), Stop("0" * 20)]
    assert page.wishes() == []


def test_a_port_in_use_is_named(page: PageView, tmp_path: Path) -> None:
    port = page.server.server_port
    with pytest.raises(ServeError, match=f"--serve {port}: .*another port, or none"):
        PageView(Store(tmp_path), port)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--serve", "digits"], "'digits' is no port; legal: 0 to 65535, or none, and then --serve stands behind"),
        (["digits", "--serve", "65536"], "'65536' is no port"),
        (["digits", "--stay"], "--stay goes with --serve"),
    ],
)
def test_a_wrong_port_is_a_mistake_of_the_command_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(piste_command, ["race", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


# What is shown


def test_the_page_may_load_nothing_and_be_in_no_frame(page: PageView) -> None:
    link = urlsplit(page.link)
    connection = http.client.HTTPConnection(link.netloc, timeout=60)
    with closing(connection):
        connection.request("GET", link.path)
        answer = connection.getresponse()
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Python" not in answer.headers["Server"]


def test_content_is_what_the_store_holds_and_says_so_when_it_changes(page: PageView) -> None:
    assert json.loads(asked(page, "content")[1])["title"] == "A race begins"
    state = state_of()
    page.begin(state, ())
    told = json.loads(asked(page, "state")[1])
    assert told["words"] == "0 of 15 runs, about 1:15 left"
    assert told["runs"][0]["words"] == "adamw+one_cycle on task 0, lr 0.002, seed 0, 2%"
    page.end()
    told = json.loads(asked(page, "state")[1])
    assert (told["ended"], told["version"]) == (True, 2)
    assert re.fullmatch(r"stopped: 0 of 15 runs, after \d+:\d\d", told["words"])
    content = json.loads(asked(page, "content")[1])
    assert content["version"] == 2
    assert content["study"]["title"] == "a race"
    assert 'data-name="adamw+one_cycle"' in content["body"]


def test_nothing_is_drawn_beside_a_timing_pass(page: PageView) -> None:
    state = state_of()
    (job, _), *_ = state.running
    page.begin(state, ())
    page._pause_ends = 0.0
    card = state.plan.cards[0]
    key = state.plan.key(card, job.contender, {"lr": 1.0}, 0, TIME)
    state.running = [(Run(card.reference, job.contender, key), 1)]
    page.tick(state)
    page.said("something new")
    assert json.loads(asked(page, "state")[1])["version"] == 0
    state.running = []
    page.tick(state)
    assert json.loads(asked(page, "state")[1])["version"] == page._version == 2


def test_an_error_of_the_page_is_no_matter_for_the_race(page: PageView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "state", lambda: 1 / 0)
    with pytest.raises(http.client.HTTPException):
        asked(page, "state")
    assert "ZeroDivisionError" in (page.store.logs / "serve.log").read_text()
    monkeypatch.undo()
    assert asked(page, "state")[0] == 200


def test_views_together_are_all_told_and_all_asked() -> None:
    calls: list[str] = []

    class Told:
        def wishes(self) -> list[Wish]:
            return [Add("lion")]

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: calls.append(name)

    views = Together(Told(), Told())  # type: ignore[arg-type]
    views.looking([])
    views.measuring("")
    views.begin(None, ())  # type: ignore[arg-type]
    views.finished(None, None)  # type: ignore[arg-type]
    views.tick(None)  # type: ignore[arg-type]
    views.said("")
    views.end()
    names = ["looking", "measuring", "begin", "finished", "tick", "said", "end"]
    assert calls == [name for name in names for _ in range(2)]
    assert views.wishes() == 2 * [Add("lion")]


# In a browser

PATIENCE = 300.0  # seconds, for what takes a few; nothing waits for it but a failing test

# Runs stand still from the third one on, until there is a file called "go".
WAITING = """while len(os.listdir({runs!r})) >= 3 and not os.path.exists({go!r}): time.sleep(0.02)"""


class Race:
    """A real race that serves its page.

    One worker makes its runs, so that it stands still after three of them and not, now and then, after four. It waits
    long for a page to fetch the end, which on a busy machine is long in drawing.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.go = folder / "go"
        trouble = WAITING.format(runs=str(folder / "out" / "runs"), go=str(self.go))
        task = write(folder, trouble, steps=12)
        hostile = f'name="linear", metric=loss, metric_name={HOSTILE!r}'
        task.write_text(task.read_text().replace('name="linear"', hostile))
        small = ("--optimizers", "sgd,adamw", "--trials", "2", "--seeds", "2", "--timing", "1", "--workers", "1")
        asked = command(folder, str(task), *small, "--serve", *arguments)
        asked[2] = f"import piste.race.serve as serve; serve._WATCHED_SECONDS = {PATIENCE}; {asked[2]}"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.readline()
        self.link = self.output.split()[-1]

    def ended(self) -> str:
        try:
            self.output += self.process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # has it say where its threads are
            self.output += self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, self.output
        return self.output


@contextmanager
def racing(folder: Path, *arguments: str) -> Iterator[Race]:
    race = Race(folder, *arguments)
    try:
        yield race
    finally:
        race.process.kill()
        race.process.communicate()


@pytest.mark.slow
def test_a_race_is_watched_from_its_first_runs_to_its_end_without_a_reload(tmp_path: Path) -> None:
    with racing(tmp_path) as race, chromium() as browser:
        page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(race.link)
        page.evaluate("window.same = true")

        # The fourth run is waiting for us; what has been made is drawn, of which a version came with the plan and one
        # with each run. Nothing changes from here on but by what is done here.
        page.wait_for_selector("#live[data-shown='4']")
        page.wait_for_selector("#live-runs button")
        page.wait_for_selector('.key button[data-name="adamw+one_cycle"]')
        page.wait_for_selector(".plot .main-svg")
        page.wait_for_selector("#live-words:text-matches('^3 of ')")

        # What the reader changes.
        page.locator('.key button[data-name="adamw+one_cycle"]').first.click()
        label = page.locator("fieldset[data-plot] label").nth(1)
        picture = label.locator("input").get_attribute("name")  # others may come to stand before it
        label.click()
        numbers = page.locator("button.numbers").first.get_attribute("data-plot")
        page.locator("button.numbers").first.click()
        summary = page.locator("details summary").first.inner_text().split(" (")[0]  # how many may change
        page.locator("details summary").first.click()
        plot = page.locator(".plot .main-svg").first.element_handle()

        # What the reader asks for.
        page.locator("#live-name").fill(HOSTILE.replace("\n", " ")[:200])
        page.locator("#live-add button").click()
        page.wait_for_selector("#live-said:text-matches('^not added: ')")
        page.locator("#live-name").fill("lion")
        page.locator("#live-name").press("Enter")
        page.wait_for_selector("#live-said:text-matches('^added: lion\\\\+one_cycle')")
        stop = page.locator("#live-runs button").first
        stop.click()
        page.wait_for_selector("#live-runs button:text-is('Stop for good? It counts as lost')")
        stop.click()
        page.wait_for_selector("#live-said:text-matches('^stopped: ')")

        race.go.touch()
        page.wait_for_selector("#live[data-state=ended]")
        made = len(list((tmp_path / "out" / "runs").glob("*.json")))
        page.wait_for_selector(f"#live[data-shown='{1 + made + 3 + 1}']")  # a version for each answer, and for the end
        assert page.locator(":text('joined while the race was going on')").count()
        assert re.match(r"finished: (\d+) of \1 runs, after ", page.locator("#live-words").inner_text())
        assert page.locator("#live-runs li").count() == 0
        assert page.locator('.key button[data-name="lion+one_cycle"][aria-pressed=true]').count()

        # It is the same page, and what the reader changed is as it was.
        assert page.evaluate("window.same")
        key = page.locator('.key button[data-name="adamw+one_cycle"]').first
        assert key.get_attribute("aria-pressed") == "false"
        assert page.locator(f'input[name="{picture}"][value="1"]').is_checked()
        shown = page.locator(f'button.numbers[data-plot="{numbers}"]')
        assert shown.get_attribute("aria-expanded") == "true"
        assert page.locator(".numbers-table").count() == 1
        assert "adamw" not in page.locator(".numbers-table").inner_text()
        unfolded = page.locator("details", has=page.locator("summary", has_text=summary)).first
        assert unfolded.get_attribute("open") is not None
        assert plot.evaluate("node => node.isConnected")
        assert "stopped by hand" in page.locator("main").inner_text()
        assert HOSTILE.split()[0] in page.locator("main").inner_text()
        assert page.locator("img").count() == 0
        assert complaints == []
        assert {url.removeprefix(race.link) for url in requests if not url.startswith("data:")} <= {
            *("", "state", "content", "wish")
        }
        output = race.ended()
    assert "report: " in output
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_the_page_stays_until_ctrl_c_where_that_is_asked_for(tmp_path: Path) -> None:
    with racing(tmp_path, "--stay") as race:
        race.go.touch()
        assert race.process.stdout is not None
        while "served until Ctrl-C" not in race.output:
            line = race.process.stdout.readline()
            assert line, race.output
            race.output += line
        link = urlsplit(race.link)
        connection = http.client.HTTPConnection(link.netloc, timeout=60)
        with closing(connection):
            connection.request("GET", link.path + "state")
            assert json.loads(connection.getresponse().read())["words"].startswith("finished: 10 of 10 runs")
        race.process.send_signal(2)
        race.ended()
