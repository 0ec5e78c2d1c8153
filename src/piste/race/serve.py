"""The report of a race on a page that changes while it goes, for browsers on this machine and nobody else.

The page asks once a second how far the race is, and for its content when there is more.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console

from piste.race import report
from piste.race.dashboard import progress_words, run_words
from piste.race.driver import State, View, stop_signals
from piste.race.progress import duration
from piste.race.record import TIME, RunRecord
from piste.race.result import StudyResult
from piste.race.server import Server
from piste.race.store import Store, StoreError
from piste.race.study import stored_result
from piste.race.wishes import Add, Stop, Wish
from piste.race.words import listing

__all__ = ["PageView", "ServeError", "Together", "served"]

_LONGEST_NAME: Final = 200
# To make the page takes a share of the machine, at most one part in so many.
_SHARE: Final = 10
_LEAST_PAUSE: Final = 1.0
# A page asks once a second; one that has asked lately is waited for at the end, so that it sees the result.
_WATCHED_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.1


class ServeError(ValueError):
    """The page cannot be served at that port."""


class PageView:
    """Shows a race on a page in a browser.

    Args:
        store: where the runs of the race are kept.
        port: where to listen; 0 for any that is free.

    Raises:
        ServeError: the port is in use, or not to be had.
    """

    def __init__(self, store: Store, port: int = 0) -> None:
        self.store = store
        self._asked: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        self._state: dict[str, Any] = {"made": 0, "total": 0, "runs": [], "words": "the race begins", "going": False}
        self._said = ""
        self._ended = False
        self._timing = False
        self._version = 0  # of what there is to see
        self._offered = 0  # of what a page should have
        self._content = (-1, "")  # the last one made, and its version
        self._pause_ends = 0.0
        self._making = threading.Lock()
        self._watched = -_WATCHED_SECONDS
        self._complete = threading.Event()  # the last content has been fetched
        try:
            self.server = Server(port, self)
        except OSError as error:
            raise ServeError(
                f"--serve {port}: {error.strerror or error}; another port, or none, which takes a free one"
            ) from error
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    @property
    def link(self) -> str:
        """Where the page is. Whoever has this address may read it, and ask the race for something."""
        return self.server.link

    # What the race tells

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""
        self._state = {**self._state, "words": f"looking at {listing(list(tasks))}"}

    def measuring(self, words: str) -> None:
        """Something is measured for the budget."""
        self._state = {**self._state, "words": f"measuring {words}"}

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""
        self.tick(state)
        self._version += 1

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""
        self._version += 1

    def tick(self, state: State) -> None:
        """Time has passed."""
        self._timing = any(job.key.phase == TIME for job, _ in state.running)
        runs = [{"id": job.key.id, "words": run_words(job, step)} for job, step in state.running]
        self._started = state.started
        self._state = {
            "made": state.made,
            "total": state.total,
            "runs": runs,
            "words": progress_words(state),
            "going": True,
        }

    def wishes(self) -> Sequence[Wish]:
        """What was asked for on the page."""
        found = []
        while not self._asked.empty():
            found.append(self._asked.get())
        return found

    def said(self, words: str) -> None:
        """What became of a wish, made here or elsewhere."""
        self._said = words
        self._version += 1

    def end(self) -> None:
        """No more runs, for whatever reason."""
        state = self._state
        took = f", after {duration(time.monotonic() - self._started)}" if state["going"] else ""
        done = "finished" if state["made"] == state["total"] else "stopped"
        words = f"{done}: {state['made']} of {state['total']} runs{took}"
        self._state = {**state, "words": words, "runs": []}
        self._version += 1
        self._ended = True

    def close(self, patient: bool = True) -> None:
        """Serve no longer; pages that are open keep what they show.

        Args:
            patient: wait for the page that is open, if there is one, to fetch the result.
        """
        if patient and self._ended and time.monotonic() - self._watched < _WATCHED_SECONDS:
            self._complete.wait(_WATCHED_SECONDS)
        self.server.shutdown()
        self.server.server_close()

    # What the page asks for, in threads of the server

    def state(self) -> str:
        """How far the race is, as JSON."""
        self._watched = time.monotonic()
        ended = self._ended
        # Nothing is drawn beside a timing pass, which would measure that too.
        ready = not self._timing and time.monotonic() >= self._pause_ends
        if ready or ended:
            self._offered = self._version
        return json.dumps({**self._state, "said": self._said, "ended": ended, "version": self._offered})

    def content(self) -> str:
        """The report as it is now, as JSON."""
        with self._making:
            version = self._offered
            if self._content[0] != version:
                began = time.monotonic()
                body = report.update(self._result())
                self._content = version, f'{{"version":{version},{body[1:]}'
                now = time.monotonic()
                self._pause_ends = now + max(_LEAST_PAUSE, (_SHARE - 1) * (now - began))
            if self._ended and version == self._version:
                self._complete.set()
            return self._content[1]

    def page(self) -> str:
        """The whole page."""
        with self._making:
            version = self._offered
            return report.render(self._result(), live=self._state["words"], version=version)

    def ask(self, wish: object) -> None:
        """Take a wish.

        Raises:
            ValueError: it is none.
        """
        match wish:
            case {"stop": str(run), **rest} if not rest:
                self._asked.put(Stop(run))
            case {"add": str(name), **rest} if not rest and len(name) <= _LONGEST_NAME and name.isprintable():
                self._asked.put(Add(name))
            case _:
                raise ValueError("a wish is {'stop': id of a run} or {'add': name of an optimizer}")

    def log(self) -> None:
        """Keep the error that is being handled where it can be looked up, out of the terminal."""
        with (self.store.logs / "serve.log").open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)

    def _result(self) -> StudyResult:
        if self._state["going"]:
            try:
                return stored_result(Store(self.store.path))
            except StoreError:
                self.log()
        return StudyResult("A race begins", "", [], [], [], {}, "")


class Together:
    """Several views of one race: all are told everything, and each may ask for something."""

    def __init__(self, *views: View) -> None:
        self.views = views

    def looking(self, tasks: Sequence[str]) -> None:
        """The tasks are being inspected."""
        for view in self.views:
            view.looking(tasks)

    def measuring(self, words: str) -> None:
        """Something is measured for the budget."""
        for view in self.views:
            view.measuring(words)

    def begin(self, state: State, damaged: Sequence[str]) -> None:
        """The plan is made; the runs start."""
        for view in self.views:
            view.begin(state, damaged)

    def finished(self, state: State, made: RunRecord) -> None:
        """A run has ended."""
        for view in self.views:
            view.finished(state, made)

    def tick(self, state: State) -> None:
        """Time has passed."""
        for view in self.views:
            view.tick(state)

    def wishes(self) -> Sequence[Wish]:
        """What was asked for anywhere."""
        return [wish for view in self.views for wish in view.wishes()]

    def said(self, words: str) -> None:
        """What became of a wish."""
        for view in self.views:
            view.said(words)

    def end(self) -> None:
        """No more runs, for whatever reason."""
        for view in self.views:
            view.end()


@contextmanager
def served(console: Console, store: Store, view: View, port: int, stay: bool) -> Iterator[View]:
    """A view that shows what another one shows on a page too, for as long as the block takes.

    Args:
        console: where the page's address is printed.
        store: of the race.
        view: the other one.
        port: where to listen; 0 for any that is free.
        stay: serve on after the block, until Ctrl-C.

    Raises:
        ServeError: the port is in use, or not to be had.
    """
    page = PageView(store, port)
    console.print(f"watch it at {page.link}", markup=False, highlight=False, soft_wrap=True)
    patient = False
    try:
        yield Together(view, page)
        if stay:
            with stop_signals() as stopped:  # an exception raised by a signal gets lost where nobody can receive one
                console.print("the page is served until Ctrl-C", markup=False)
                while not stopped():
                    time.sleep(_POLL_SECONDS)
        patient = not stay
    finally:
        page.close(patient)
