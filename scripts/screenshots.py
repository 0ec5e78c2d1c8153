"""``python -m scripts.screenshots``: takes the pictures of a race that is going on, for ``docs/images``.

A small race is really made, and looked at when four fifths of its runs are there: the live table of the terminal, and
the page that ``--serve`` shows. A few minutes on one core. Needs Chromium through Playwright.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from piste.race.dashboard import Dashboard
from piste.race.driver import State
from piste.race.serve import PageView, Together
from piste.race.settings import Settings
from piste.race.store import Store
from piste.race.study import race
from piste.race.terminal import PlainView

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
OPTIMIZERS = ("adamw", "lion", "ranger", "sgd_momentum")
TASK, STEPS, TRIALS, SEEDS, WORKERS = "digits", 60, 4, 5, 2
COMMAND = f"piste race {TASK} --steps {STEPS} --trials {TRIALS} --timing 0 --optimizers {','.join(OPTIMIZERS)}"
COLUMNS = 100
WINDOW = {"width": 1100, "height": 900}


class Camera(PlainView):
    """A view that takes both pictures once, late in the race."""

    def __init__(self, page: PageView) -> None:
        super().__init__(Console())
        self.page = page
        self.taken = False

    def tick(self, state: State) -> None:
        """Time has passed."""
        if not self.taken and 5 * state.made >= 4 * state.total and len(state.running) == WORKERS:
            self.taken = True
            terminal(state)
            browser(self.page.link)


def terminal(state: State) -> None:
    """The live table as an SVG."""
    console = Console(record=True, width=COLUMNS, height=24, file=io.StringIO(), force_terminal=True)
    dashboard = Dashboard()
    dashboard.press("down", state)
    console.print(dashboard.picture(state, console, keys=True))
    drawn = console.export_svg(title=COMMAND, theme=MONOKAI)
    # Rich would have a font loaded from elsewhere.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    (IMAGES / "race-terminal.svg").write_text(drawn.replace("Fira Code,", "").rstrip() + "\n", encoding="utf-8")


def browser(link: str) -> None:
    """The served page as a PNG."""
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = found.new_page(viewport=WINDOW)  # type: ignore[arg-type]
        page.set_default_timeout(120_000)
        page.goto(link)
        page.wait_for_selector("#live-runs button")
        page.wait_for_selector(".key button[data-name]")
        page.wait_for_selector(".plot .main-svg")
        page.screenshot(path=IMAGES / "race-served.png")
        found.close()


def main() -> None:
    """Make the race."""
    settings = Settings((TASK,), OPTIMIZERS, (), STEPS, TRIALS, SEEDS, "cpu", workers=WORKERS)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        page = PageView(store, 0)
        camera = Camera(page)
        race(settings, store, Together(page, camera), COMMAND)
        page.close(False)


if __name__ == "__main__":
    main()
