"""What stands in the place of a job of Slurm."""

from __future__ import annotations

from typing import Any


class Call:
    """A job of Slurm; it has ended once ``over`` is set."""

    job_id = "7"

    def __init__(self, result: Any, state: str = "COMPLETED", over: bool = True) -> None:
        self.said, self.state, self.over, self.cancelled = result, state, over, False

    def done(self) -> bool:
        return self.over

    def cancel(self, check: bool) -> None:
        self.cancelled = True

    def result(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said
