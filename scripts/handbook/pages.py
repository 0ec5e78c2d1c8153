"""The pages of the documentation that are made from the library itself, and so cannot fall behind it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

import piste
from piste.advise import RULES, SEVERITIES
from piste.advise.rules import TOPICS
from piste.registry import OPTIMIZERS
from scripts.handbook.docstrings import links_of, papers, parse

__all__ = ["generated", "navigation"]

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = ("Lookahead", "SAM", "GSAM", "LookSAM", "ESAM", "SAF", "MESA", "Graft", "ModelEMA")
#: columns of the conformance table that wrappers have there
COLUMNS = {"Lookahead": "Lookahead(AdamW)", "Graft": "Graft(Adam, SGD)"}
CLASSES = tuple(info.name for info in OPTIMIZERS)
LINK = links_of({name: f"{name.lower()}.md" for name in (*CLASSES, *WRAPPERS)} | {"create": "index.md"})
#: what memory is compared on: a transformer of 12 layers of 768
LAYERS, WIDTH, TOKENS = 12, 768, 32_000
COMPARED = (
    *(("adamw", state) for state in piste.STATE_FORMATS),
    *((name, "fp32") for name in ("sgd_nesterov", "lion", "muon", "sm3", "adafactor", "ranger", "adan", "soap")),
)


def generated() -> Iterator[tuple[str, str]]:
    """Path and text of every page."""
    yield "index.md", of_the_root("README.md")
    yield "changelog.md", of_the_root("CHANGELOG.md")
    yield "choosing.md", choosing()
    yield "optimizers/index.md", every_name()
    for info in OPTIMIZERS:
        yield f"optimizers/{info.name.lower()}.md", optimizer_page(info.name)
    for name in WRAPPERS:
        yield f"optimizers/{name.lower()}.md", wrapper_page(name)


def navigation() -> list[dict[str, Any]]:
    """The part of the site's navigation that belongs to those pages."""
    return [
        {"All names": "optimizers/index.md"},
        *({name: f"optimizers/{name.lower()}.md"} for name in CLASSES),
        {"Wrappers": [{name: f"optimizers/{name.lower()}.md"} for name in WRAPPERS]},
    ]


@cache
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": cell, "papers": papers}
    return environment.get_template(name)


def cell(text: Any) -> str:
    """Text that can stand in a table."""
    return " ".join(str(text).replace("|", r"\|").split())


def of_the_root(name: str) -> str:
    """A page that stands beside ``docs``, with the site's paths."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text).replace("](CHANGELOG.md)", "](changelog.md)")


# -- one page an optimizer ------------------------------------------------------------------------------------------


def optimizer_page(name: str) -> str:
    info = piste.optimizer_info(name)
    doc = parse(info.optimizer, LINK)
    presets = [piste.presets[each] for each in piste.presets if piste.presets[each].optimizer is info.optimizer]
    return _template("optimizer.md.jinja").render(
        name=name,
        doc=doc,
        facts={
            "Class": f"`piste.{name}`",
            "Source": papers(info.source),
            "Compared with": info.oracle,
            "State it may keep": ", ".join(f"`{state}`" for state in info.state),
        },
        arguments=_arguments(info.optimizer, doc.arguments),
        sizes={state: _bytes(presets[0].name, state) for state in piste.STATE_FORMATS} if presets else {},
        presets=[_preset(preset) for preset in presets],
        conformance=_conformance(name),
        rules=[rule for rule in RULES if rule.name.startswith(f"{name.lower()}-")],
    )


def wrapper_page(name: str) -> str:
    cls = getattr(piste, name)
    doc = parse(cls, LINK)
    known = [each for each in piste.WRAPPINGS.values() if each.wrapper is cls]
    return _template("optimizer.md.jinja").render(
        name=name,
        doc=doc,
        facts={
            "Class": f"`piste.{name}`",
            **{f"`{each.name}+…`": f"{each.description} ({papers(each.source)})" for each in known},
        },
        arguments=_arguments(cls, doc.arguments),
        sizes={},
        presets=[],
        conformance=_conformance(COLUMNS.get(name, "")),
        rules=[
            rule for rule in RULES if rule.name.startswith((f"{name.lower()}-", "ema-" if name == "ModelEMA" else "-"))
        ],
    )


def _arguments(cls: type[Any], told: dict[str, str]) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each argument."""
    parameters = inspect.signature(cls).parameters
    empty = inspect.Parameter.empty
    rows = []
    for names, text in told.items():
        bare = names.lstrip("*").split(",")[0].strip()
        default = parameters[bare].default if bare in parameters else empty
        rows.append((names, "" if default is empty or names.startswith("*") else f"`{default!r}`", text))
    return rows


def _preset(preset: piste.Preset) -> dict[str, str]:
    prior, own = preset.lr_prior, preset.hyperparameters
    low, high = prior.center / 10**prior.decades_below, prior.center * 10**prior.decades_above
    decay = "decoupled" if preset.wd.true_wd else "L2"
    return {
        "name": preset.name,
        "settings": ", ".join(f"`{key}={value!r}`" for key, value in own.items()) or "the class's own",
        "decay": f"{decay}, {'all weights' if preset.wd.bn_wd else 'not norms and biases'}",
        "schedule": preset.schedule,
        "lr": f"{prior.center:g}, in {low:.2g} … {high:.2g}",
        "description": preset.description,
        "source": papers(preset.source),
        "domains": ", ".join(
            f"`domain={domain!r}`: `{key}={value!r}`"
            for domain, v in preset.domains.items()
            for key, value in v.items()
        ),
    }


@cache
def _bytes(name: str, state: str) -> str:
    try:
        return f"{piste.state_bytes(name, state=state):.3g}"
    except (ValueError, RuntimeError):  # a rule without such a state; a wrapper that needs more than weights
        return "—"


@cache
def _matrix() -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the published conformance table."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    table = text[text.index("| promise |") :].split("\n\n")[0].splitlines()
    cells = [[each.strip() for each in line.strip("|").split(" | ")] for line in table]
    return cells[0], cells[2:]


def _conformance(column: str) -> list[tuple[str, str]]:
    columns, rows = _matrix()
    columns = [each.strip() for each in columns]
    return [(row[0], row[columns.index(column)]) for row in rows] if column in columns else []


# -- all of them on one -----------------------------------------------------------------------------------------------


def every_name() -> str:
    rows = [
        {**_preset(preset), "cls": preset.optimizer.__name__, "sizes": [_bytes(name, s) for s in piste.STATE_FORMATS]}
        for name in piste.list_optimizers()
        for preset in [piste.presets[name]]
    ]
    wrappings = [piste.WRAPPINGS[name] for name in piste.list_wrappers()]
    return _template("names.md.jinja").render(rows=rows, states=piste.STATE_FORMATS, wrappings=wrappings)


# -- the decision page ------------------------------------------------------------------------------------------------


def choosing() -> str:
    topics = [
        ((inspect.getdoc(topic) or "").rstrip("."), topic.RULES)
        for topic in TOPICS
        if not topic.__name__.endswith("choice")
    ]
    suggestions = [rule for rule in RULES if rule.severity == "suggestion"]
    return _template("choosing.md.jinja").render(
        suggestions=suggestions, topics=topics, severities=SEVERITIES, costs=_costs(), count=len(RULES)
    )


def _costs() -> list[tuple[str, str, str, str, str, str]]:
    """What optimizers take on a transformer, per number and in all, against AdamW."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, batch_first=True)
        model = nn.Sequential(
            nn.Embedding(TOKENS, WIDTH),
            nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False),
            nn.Linear(WIDTH, TOKENS),
        )
    found = []
    for name, state in COMPARED:
        cost = piste.estimate_memory(model, name, state=state)
        found.append(
            (
                name,
                state,
                f"{cost.state / cost.parameters:.2f}",
                *(f"{x / 2**30:.2f}" for x in (cost.state, cost.peak, cost.moved)),
            )
        )
    return found
