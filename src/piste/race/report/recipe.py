"""The code to copy: a contender as lines of Python that run."""

from __future__ import annotations

import json
import keyword

from piste.race.record import Standing

_TORCH = "torch."


def recipe(standing: Standing, steps: int) -> str:
    """Python that makes the standing's optimizer and schedule for a ``model``; empty if no trial of it survived."""
    if not standing.best_hyperparameters:
        return ""
    arguments = _keywords({name: _tidy(value) for name, value in standing.best_hyperparameters.items()})
    if standing.optimizer.startswith(_TORCH) and _is_name(standing.optimizer.removeprefix(_TORCH)):
        imports = "import piste\nimport torch\n"
        made = f"torch.optim.{standing.optimizer.removeprefix(_TORCH)}(model.parameters(), {arguments})"
    else:
        imports = "import piste\n"
        made = f"piste.create({_text(standing.optimizer)}, model, {arguments})"
    return (
        f"{imports}\n"
        f"optimizer = {made}\n"
        f"schedule = {_schedule(standing.schedule)}(optimizer, total_steps={steps})\n"
        "# total_steps: as many as you train; after each optimizer.step():\n"
        "schedule.step()\n"
    )


def _schedule(name: str) -> str:
    return f"piste.schedules.{name}" if _is_name(name) else f"getattr(piste.schedules, {_text(name)})"


def _keywords(arguments: dict[str, float]) -> str:
    if all(map(_is_name, arguments)):
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return "**{" + ", ".join(f"{_text(name)}: {value!r}" for name, value in arguments.items()) + "}"


def _text(value: str) -> str:
    """A Python string in double quotes; everything unusual as an escape, so that no name can end it."""
    return json.dumps(value)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _tidy(value: float) -> float:
    """As run, but without digits that are only noise of the arithmetic (0.1 + 0.2)."""
    return float(f"{value:.12g}")
