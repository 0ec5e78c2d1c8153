"""Race a training script as it stands: two calls that are ordinary code outside of a race.

``piste race --script train.py`` starts the script again and again, each time with another optimizer. Where to find out
which, and where to write what the script reports, is said by the environment, so that processes which the script
starts know it, too.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piste.factory import create, schedule_for

__all__ = ["race_optimizer", "race_report"]

#: names a file with what this run is to use: JSON with "optimizer", "arguments" and "report"
RUN_VARIABLE = "PISTE_RACE_RUN"
_WARM_UP_STEPS = 5  # left out of medians, as in races of tasks


class TimingOver(SystemExit):
    """Raised by the optimizer's step once a timing pass has made its steps.

    The script ends as it would by ``sys.exit()``: what it has in ``finally`` is done, frameworks let it pass, and
    processes that it has started end with exit code 0.
    """

    def __init__(self) -> None:
        super().__init__(0)


def race_optimizer(
    model: nn.Module, default: str = "adamw", *, total_steps: int | None = None, **overrides: Any
) -> torch.optim.Optimizer:
    """The optimizer that a race wants to try in this run; outside of a race, the default.

    Args:
        model: whose weights are trained, one for the whole script.
        default: what the script uses when it is run by itself, a name as for :func:`piste.create`.
        total_steps: optimizer steps of the run, for optimizers with a schedule of their own (Ranger21).
        **overrides: as for :func:`piste.create`, for the default alone. In a race the contender's settings count.

    Returns:
        The optimizer. The script schedules it as it likes; its learning rate is in ``param_groups[0]["lr"]``.

    Raises:
        TypeError, ValueError: as :func:`piste.create`.

    Not for comparing schedules: each contender runs under the script's own. Nor for a script with several models.

    >>> import piste, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = piste.race_optimizer(model, default="adamw", lr=1e-3)
    >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
    ('AdamW', 0.001)

    Source: docs/race.md describes the race.
    """
    run = _run()
    name, arguments = (default, overrides) if run is None else (run.name, run.arguments)
    optimizer = _made(name, model, arguments)
    if total_steps is not None and not name.startswith(_TORCH):
        schedule_for(name, optimizer, total_steps, schedule="constant")
    if run is not None:
        run.watch(model, optimizer)
    return optimizer


def race_report(*, step: int, loss: float | torch.Tensor, **metrics: float | torch.Tensor) -> None:
    """Tell a race how far this run is; outside of a race, nothing happens.

    Args:
        step: optimizer steps taken, growing from report to report; the last report is the final score.
        loss: on validation data.
        **metrics: whatever else is worth a column: ``train_loss``, ``accuracy``, … What is called ``test_loss`` (or
            ``test_`` with the name of the race's ``--metric``) is the score on data used for nothing else.

    Raises:
        TypeError, ValueError: in a race, where something is no number.

    Not for every step: a handful of reports in a run draw its curve.

    >>> import piste
    >>> piste.race_report(step=100, loss=0.25, accuracy=0.9)

    Source: docs/race.md describes the race.
    """
    run = _run()
    if run is not None:
        run.report(int(step), {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}})


_TORCH = "torch."


def _made(name: str, model: nn.Module, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    if not name.startswith(_TORCH):
        return create(name, model, **arguments)
    optimizer: type[torch.optim.Optimizer] = getattr(torch.optim, name.removeprefix(_TORCH))
    return optimizer([weight for weight in model.parameters() if weight.requires_grad], **arguments)


# Of a step: its number, the seconds from the end of the one before to its end, those of the optimizer beyond one
# gradient evaluation, and whether it made roots or bases anew.
_Step = tuple[int, float, float, bool]


@cache
def _run() -> _Run | None:
    path = os.environ.get(RUN_VARIABLE)
    return _Run(json.loads(Path(path).read_text(encoding="utf-8"))) if path else None


class _Run:
    """One run of a race, seen from inside of the script: watches the optimizer's steps, writes a line a report."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.name = str(content["optimizer"])
        betas = {"betas": tuple(content["arguments"]["betas"])} if "betas" in content["arguments"] else {}
        self.arguments: dict[str, Any] = {**content["arguments"], **betas}
        self.path = Path(content["report"])
        self.enough: int | None = content.get("timed_steps")  # after so many the script ends; None to leave it alone
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0
        self.times: list[_Step] = []
        self.begun = 0.0
        self.gradient = 0.0  # seconds of this step inside of a closure, its first call
        self.ended: float | None = None  # None where something else than a step came in between

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From now on, count and time this optimizer's steps."""
        self.model, self.optimizer = model, optimizer
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._write({"started": self.name, "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)})
        if self.enough is not None:
            atexit.register(self._write_times)  # of a script that ends before

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line, and leave out of the times whatever the script does for it."""
        self._write({"step": step, "metrics": metrics, **self._numbers()})
        self.ended = None

    def _before(self, _: object, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        self.gradient = 0.0
        self.begun = self._clock()
        if callable(keywords.get("closure")):
            return arguments, {**keywords, "closure": self._timed(keywords["closure"])}
        if len(arguments) > 1 and callable(arguments[1]):  # behind the optimizer itself
            return (arguments[0], self._timed(arguments[1]), *arguments[2:]), keywords
        return None

    def _timed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure; what its first call takes is a gradient evaluation, which every optimizer needs."""

        def timed() -> Any:
            begun = self._clock()
            result = closure()
            self.gradient = self.gradient or self._clock() - begun
            return result

        return timed

    def _after(self, *_: Any) -> None:
        now = self._clock()
        self.steps += 1
        if self.ended is not None and self.steps > _WARM_UP_STEPS:
            renewed = bool(getattr(getattr(self.optimizer, "last_step", None), "renewed", False))
            self.times.append((self.steps, now - self.ended, now - self.begun - self.gradient, renewed))
        self.ended = now
        if self.enough is not None and self.steps >= self.enough:
            if self.steps == self.enough:
                self._write_times()
            raise TimingOver

    def _clock(self) -> float:
        """Seconds; in a timing pass once the GPU has done what was asked of it: only then do times mean anything."""
        if self.enough is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return time.perf_counter()

    def _write_times(self) -> None:
        """Those of a timing pass, step by step, once."""
        atexit.unregister(self._write_times)
        self._write({"times": self.times, **self._numbers()})

    def _numbers(self) -> dict[str, Any]:
        if self.model is None or self.optimizer is None:
            return {}
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norms = [gradient.detach().float().norm() for gradient in gradients]
        return {
            "steps": self.steps,
            "step_seconds": statistics.median(whole for _, whole, _, _ in self.times) if self.times else math.nan,
            "optimizer_seconds": statistics.median(own for _, _, own, _ in self.times) if self.times else math.nan,
            "state_bytes": _bytes_of(self.optimizer),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "gradient_norm": float(torch.stack(norms).norm()) if norms else math.nan,
        }

    def _write(self, content: dict[str, Any]) -> None:
        """Of several processes that train one model, the first one reports."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else int(os.environ.get("RANK", "0"))
        if rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")


def _bytes_of(optimizer: torch.optim.Optimizer) -> int:
    states = [value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values()]
    kept = {id(each): each for each in (*states, *getattr(optimizer, "buffers", lambda: ())())}
    return sum(each.numel() * each.element_size() for each in kept.values() if isinstance(each, torch.Tensor))
