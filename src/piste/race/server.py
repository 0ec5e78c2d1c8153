"""The web server of a race: for this machine alone, and there for those alone who know the address that it printed.

Whoever does not know the token in that address gets nothing, and a wish must come from the page itself.
"""

from __future__ import annotations

import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Final, Protocol

from piste.race import report

__all__ = ["Pages", "Server"]

ADDRESS: Final = "127.0.0.1"
_LONGEST_WISH: Final = 4096  # bytes


class Pages(Protocol):
    """What a server has to show; called from threads of its own."""

    def page(self) -> str:
        """The whole page."""

    def state(self) -> str:
        """How far the race is, as JSON."""

    def content(self) -> str:
        """What the page is made from, as JSON."""

    def ask(self, wish: object) -> None:
        """Take a wish; ``ValueError`` if it is none."""

    def log(self) -> None:
        """Keep the error that is being handled."""


class Server(ThreadingHTTPServer):
    """Listens on the loopback address, whatever the machine's others are.

    Args:
        port: where; 0 for any that is free.
        pages: what there is to see and to ask for.

    Raises:
        OSError: the port is in use, or not to be had.
    """

    daemon_threads = True

    def __init__(self, port: int, pages: Pages) -> None:
        self.pages = pages
        self.root = f"/{secrets.token_urlsafe(16)}/"
        super().__init__((ADDRESS, port), _Handler)

    @property
    def link(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}{self.root}"

    def server_bind(self) -> None:
        """As the base class, which would also ask the network for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Browsers close connections when they like: no matter for a terminal."""
        self.pages.log()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "piste", ""
    timeout = 60.0  # for a whole answer, which a busy browser takes its time to read

    def do_GET(self) -> None:
        place = self._place()
        if place == "":
            self._answer(self.server.pages.page(), "text/html; charset=utf-8")
        elif place == "state":
            self._answer(self.server.pages.state(), "application/json")
        elif place == "content":
            self._answer(self.server.pages.content(), "application/json")
        elif place is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        place = self._place()
        if place is None:
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin") not in [f"http://{host}" for host in self._hosts()]:
            self._refuse(HTTPStatus.FORBIDDEN, "another page may not ask for anything")
        elif place != "wish" or self.headers.get("Content-Type") != "application/json":
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here that takes this")
        elif not length.isascii() or not length.isdigit() or int(length) > _LONGEST_WISH:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a wish has at most {_LONGEST_WISH} bytes")
        else:
            try:
                self.server.pages.ask(json.loads(self.rfile.read(int(length))))
            except (ValueError, RecursionError) as error:  # the latter of brackets, a thousand deep
                self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self._answer("{}", "application/json")

    def _hosts(self) -> list[str]:
        return [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]

    def _place(self) -> str | None:
        """What is asked for below the root; None where that was refused.

        A name of another host that leads here (DNS rebinding) would make this page one of its own.
        """
        root = self.server.root
        if self.headers.get("Host") not in self._hosts():
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this is another host")
        elif not secrets.compare_digest(self.path[: len(root)].encode(), root.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here; the race has printed its link")
        else:
            return self.path[len(root) :]
        return None

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self._answer(words, "text/plain; charset=utf-8", status)

    def _answer(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = text.encode(errors="replace")
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", f"{report.policy(live=True)}; frame-ancestors 'none'"),
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """The terminal belongs to the race."""
