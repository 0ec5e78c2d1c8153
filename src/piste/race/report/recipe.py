"""The code to copy: a contender as lines of Python that run."""

from __future__ import annotations

import json
import keyword
from typing import Any

from piste.race.contenders import OWN, ContenderError, preset_behind
from piste.race.result import Standing
from piste.race.space import create_arguments

_TORCH = "torch."


def recipe(standing: Standing, steps: int) -> str:
    """Python that makes the standing's optimizer and schedule for a ``model``; empty if no trial of it survived."""
    if not standing.best_hyperparameters:
        return ""
    arguments = _keywords({name: _tidy(value) for name, value in _settings(standing).items()})
    if standing.optimizer.startswith(_TORCH) and _is_name(standing.optimizer.removeprefix(_TORCH)):
        imports = "import piste\nimport torch\n"
        made = f"torch.optim.{standing.optimizer.removeprefix(_TORCH)}(model.parameters(), {arguments})"
    else:
        imports = "import piste\n"
        made = f"piste.create({_text(standing.optimizer)}, model, {arguments})"
    return (f"{imports}\noptimizer = {made}\n") + _scheduling(standing, steps)


def _settings(standing: Standing) -> dict[str, Any]:
    """As classes take them: ``beta1`` within ``betas``."""
    try:
        return create_arguments(preset_behind(standing.optimizer), standing.best_hyperparameters)
    except (KeyError, ContenderError):  # a record of a name that this version does not have
        return dict(standing.best_hyperparameters)


def _scheduling(standing: Standing, steps: int) -> str:
    if standing.schedule == OWN:
        return "# the schedule: your script's own\n"
    return (
        f"schedule = {_schedule(standing.schedule)}(optimizer, total_steps={steps})\n"
        "# total_steps: as many as you train; after each optimizer.step():\n"
        "schedule.step()\n"
    )


def _schedule(name: str) -> str:
    return f"piste.schedules.{name}" if _is_name(name) else f"getattr(piste.schedules, {_text(name)})"


def _keywords(arguments: dict[str, Any]) -> str:
    if all(map(_is_name, arguments)):
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return "**{" + ", ".join(f"{_text(name)}: {value!r}" for name, value in arguments.items()) + "}"


def _text(value: str) -> str:
    """A Python string in double quotes; everything unusual as an escape, so that no name can end it."""
    return json.dumps(value)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _tidy(value: Any) -> Any:
    """As run, but without digits that are only noise of the arithmetic (0.1 + 0.2)."""
    if isinstance(value, tuple):
        return tuple(map(_tidy, value))
    return float(f"{value:.12g}") if isinstance(value, float) else value
