"""The keys that are pressed on a terminal, read without waiting for them and without taking the terminal away."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Final

__all__ = ["Keys", "decoded"]

_NAMES: Final = {
    **{f"\x1b{start}{letter}": name for start in "[O" for letter, name in (("A", "up"), ("B", "down"))},
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\b": "backspace",
}
_KEY: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)
_LONGEST_READ: Final = 1024


def decoded(text: str) -> list[str]:
    """What was pressed: characters as they are, other keys by name; keys that mean nothing here are left out."""
    pressed = (_NAMES.get(found, found) for found in _KEY.findall(text))
    return [key for key in pressed if key.isprintable()]


class Keys:
    """The keys pressed on the terminal of this process.

    Keys come one by one and are not shown (termios calls this "cbreak"); Ctrl-C and Ctrl-Z mean what they always
    mean. A process in the background is stopped when it reads from its terminal or changes its modes, so that nothing
    is done there; one that was stopped finds the modes of the shell when it goes on, so that they are set anew.

    Args:
        file: number of an open file; where it is no terminal, or on Windows, no key is ever pressed.
    """

    def __init__(self, file: int = 0) -> None:
        self.file = file
        self.present = sys.platform != "win32" and _is_terminal(file)
        self._before: list[Any] | None = None

    def read(self) -> list[str]:
        """What was pressed since the last call."""
        if sys.platform == "win32" or not self.present:
            return []
        import select
        import termios
        import tty

        try:
            if not self._in_front():
                return []
            modes = termios.tcgetattr(self.file)
            if modes[3] & termios.ICANON:
                self._before = self._before or modes
                tty.setcbreak(self.file, termios.TCSANOW)
            waiting = select.select([self.file], [], [], 0)[0]
            found = os.read(self.file, _LONGEST_READ) if waiting else b""
        except (OSError, termios.error):  # the terminal has gone
            self.present = False
            return []
        return decoded(found.decode(errors="replace"))

    def close(self) -> None:
        """Give the terminal back as it was found, without the keys that nobody has read."""
        if sys.platform == "win32" or self._before is None:
            return
        import contextlib
        import termios

        with contextlib.suppress(OSError, termios.error):
            if self._in_front():
                termios.tcsetattr(self.file, termios.TCSAFLUSH, self._before)
        self._before = None

    def _in_front(self) -> bool:
        return sys.platform != "win32" and os.tcgetpgrp(self.file) == os.getpgrp()


def _is_terminal(file: int) -> bool:
    try:
        return os.isatty(file)
    except OSError:
        return False
