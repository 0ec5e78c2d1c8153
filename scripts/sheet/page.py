"""docs/sheet.md, written from the runs that were kept and a template."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from scripts.sheet.claims import CLAIMS, SOONER, Claim, Entry
from scripts.sheet.judgement import AHEAD, BEHIND, EDGE, NEITHER, Judgement, Outcome
from scripts.sheet.races import MAIN, RACES, TASKS, Made

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sheet.md"


def page(head: Mapping[str, Any], runs: Sequence[Made]) -> str:
    """The text of the page."""
    edges = {(race["task"], Entry(name, race["arm"])) for race in head["races"] for name in race["edges"]}
    judgement = Judgement(runs, head["higher_is_better"], edges)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, from our own words and numbers
    )
    tasks = [task for task in head["metric"] if any(r.arm == MAIN and r.task == task for r in RACES)]
    table = {task: judgement.standings(task) for task in tasks}
    return environment.get_template("page.md.jinja").render(
        head=head,
        date=max(race["created"] for race in head["races"])[:10],
        runs=len(runs),
        everywhere=[task for task in tasks if task in TASKS],
        tasks=tasks,
        rows=_rows(table),
        claims=[_claim(judgement, claim) for claim in CLAIMS],
        comparisons=len(judgement.outcomes),
        edges=_edges(head),
        lost=_lost(runs),
        ratio=_ratio(runs),
    )


def _rows(table: Mapping[str, Mapping[str, tuple[float, bool]]]) -> list[dict[str, Any]]:
    """One for each optimizer, with its scores; those nearest the top over the common tasks first."""
    names = list(dict.fromkeys(name for standings in table.values() for name in standings))
    rows = [
        {
            "name": name,
            "scores": [_score(standings.get(name)) for standings in table.values()],
            "ties": sum(standings[name][1] for standings in table.values() if name in standings),
            "raced": sum(name in standings for standings in table.values()),
            "place": sorted(list(table[task]).index(name) + 1 for task in TASKS)[len(TASKS) // 2],
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: (row["place"], -row["ties"]))


def _score(found: tuple[float, bool] | None) -> str:
    if found is None:
        return ""
    if math.isnan(found[0]):
        return "lost"
    return f"**{found[0]:.4g}**" if found[1] else f"{found[0]:.4g}"


def _claim(judgement: Judgement, claim: Claim) -> dict[str, Any]:
    return {
        "words": claim.words,
        "mark": judgement.mark(claim),
        "found": _found(judgement.of(claim)),
        "beside": claim.beside,
    }


def _found(outcomes: Sequence[Outcome]) -> list[str]:
    """For each pair where it is ahead, behind or neither."""
    pairs: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        pairs.setdefault((str(outcome.duel.first), str(outcome.duel.second)), []).append(outcome)
    return [_sentence(*names, own) for names, own in pairs.items()]


def _sentence(first: str, second: str, outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcome.found for outcome in outcomes)
    places = [
        f"{word} on {', '.join(_place(o) for o in outcomes if o.found == found)}"
        for found, word in ((AHEAD, "ahead"), (BEHIND, "behind"))
        if counts[found]
    ]
    if counts[NEITHER]:
        places.append(f"no difference found on {counts[NEITHER]} of {len(outcomes)}")
    if counts[EDGE]:
        places.append(f"cut short on {', '.join(o.task for o in outcomes if o.found == EDGE)}")
    return f"`{first}` against `{second}`: {'; '.join(places)}"


def _place(outcome: Outcome) -> str:
    sooner = outcome.duel.expected == SOONER
    size = f"{outcome.difference:+.0f} steps" if sooner else f"{outcome.difference:+.2g}"
    return f"{outcome.task} ({size})"


def _edges(head: Mapping[str, Any]) -> str:
    """Whose best learning rate was the highest or lowest tried, in the main races."""
    told = [
        f"{race['task']}: {', '.join(f'`{name}`' for name in race['edges'])}"
        for race in head["races"]
        if race["arm"] == MAIN and race["edges"]
    ]
    return "; ".join(told)


def _lost(runs: Sequence[Made]) -> str:
    """How many runs of whom did not finish, in the main races."""
    counts = Counter(run.optimizer for run in runs if run.arm == MAIN and run.status != "finished")
    return ", ".join(f"`{name}` {count}" for name, count in counts.most_common())


def _ratio(runs: Sequence[Made]) -> str:
    """Adan's best learning rate over AdamW's, task by task."""
    best: dict[tuple[str, str], float] = {}
    for run in runs:
        if run.arm == MAIN and run.phase == "confirm" and run.optimizer in ("adan", "adamw"):
            best[run.task, run.optimizer] = run.settings["lr"]
    ratios = sorted(best[task, "adan"] / best[task, "adamw"] for task, name in best if name == "adan")
    return f"{ratios[0]:.2g} to {ratios[-1]:.2g}, median {ratios[len(ratios) // 2]:.2g}"
