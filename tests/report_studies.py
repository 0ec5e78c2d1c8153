"""Made-up studies for the report's tests: a plain one, a troubled one, a large one. All numbers come from formulas."""

from __future__ import annotations

import math
import random
import statistics

from piste.race.record import Cost, Curve, RunKey, RunRecord
from piste.race.result import CLEAR, COMMITTED, EXCLUDED, Finding, Standing, StudyResult, TaskResult

HOSTILE = "</script><img src=x onerror=alert(1)>"
VERSIONS = {"python": "3.12.4", "torch": "2.13.0+cpu", "piste": "0.1.0+0a1b2c3d"}
MACHINE = {"system": "Linux 6.1.0", "processor": "Example CPU @ 2.50GHz", "cores": "2"}

# contender -> (optimizer, schedule, best lr, final loss, seconds a step, of these in the optimizer, bytes a weight)
USUAL = {
    "ranger+flat_cosine": ("ranger", "flat_cosine", 3.162e-3, 1.62, 0.0131, 0.0016, 12),
    "adamw+one_cycle": ("adamw", "one_cycle", 2.1e-3, 1.634, 0.0122, 0.0011, 8),
    "rangeradabelief+flat_cosine": ("rangeradabelief", "flat_cosine", 1.8e-3, 1.69, 0.0134, 0.0018, 12),
    "sgd_momentum+one_cycle": ("sgd_momentum", "one_cycle", 0.21, 1.93, 0.0114, 0.0005, 4),
}
WEIGHTS = 105_000


def curve(
    final: float, *, points: int, steps: int, step_seconds: float, noise: random.Random, start: float = 4.6
) -> Curve:
    """A loss that falls from ``start`` to about ``final``."""
    made = Curve()
    for index in range(points):
        done = index / (points - 1)
        loss = final + (start - final) * math.exp(-5 * done) * (1 - 0.5 * done)
        loss *= 1 + 0.01 * noise.gauss(0, 1) * (1 - 0.8 * done)
        made.step.append(round(done * steps))
        made.train_seconds.append(done * steps * step_seconds * (1 + 0.05 * noise.random()))
        made.train_loss.append(loss * 0.93)
        made.valid_loss.append(loss)
        made.valid_metric.append(loss)
    return made


def run(
    task: str,
    contender: str,
    lr: float,
    seed: int,
    phase: str,
    made: Curve,
    cost: Cost,
    *,
    status: str = "finished",
    message: str = "",
    optimizer: str = "adamw",
    schedule: str = "one_cycle",
    steps: int = 250,
) -> RunRecord:
    key = RunKey(task, "f00d", contender, optimizer, schedule, {"lr": lr}, steps, seed, phase, "cpu", VERSIONS)
    done = status == "finished" and phase == "confirm"
    test_loss = made.valid_loss[-1] * 1.01 if done else None
    return RunRecord(
        1, key.id, key, status, message, made, test_loss, test_loss, cost, MACHINE, "2026-11-23T10:00:00Z", "0" * 64
    )


def diverged(made: Curve, after: float = 0.3) -> Curve:
    """The first part of a curve, then a blow-up that ends at nan."""
    kept = max(2, int(len(made.step) * after))
    short = Curve(*(values[:kept] for values in vars(made).values()))
    short.valid_loss[-2:] = [1e9, math.nan]
    short.train_loss[-2:] = [1e8, math.inf]
    short.valid_metric[-2:] = [1e9, math.nan]
    return short


def standing(contender: str, scores: list[float], lead: list[float], cost: Cost, /, **changes: object) -> Standing:
    """A standing with plain, roughly right intervals."""
    optimizer, _, schedule = contender.partition("+")
    gaps = [score - best for score, best in zip(scores, lead, strict=True)]
    mean, gap = statistics.mean(scores), statistics.mean(gaps)
    half = 0.6 * (max(scores) - min(scores))
    gap_half = 0.6 * (max(gaps) - min(gaps))
    content: dict[str, object] = {
        "contender": contender,
        "optimizer": optimizer,
        "schedule": schedule,
        "best_hyperparameters": {"lr": 1e-3},
        "edge": "",
        "trials": 8,
        "diverged_trials": 0,
        "seeds": len(scores),
        "scores": scores,
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "difference": gap,
        "difference_low": gap - gap_half,
        "difference_high": gap + gap_half,
        "tied": gap - gap_half <= 0,
        "cost": cost,
        "failures": [],
    }
    return Standing(**{**content, **changes})  # type: ignore[arg-type]


def _task(
    name: str, scale: float, *, seeds: int = 5, trials: int = 8, points: int = 26, accuracy: bool = False
) -> tuple[TaskResult, list[RunRecord]]:
    noise = random.Random(name)
    records = []
    all_scores = {}
    costs = {}
    for contender, (optimizer, schedule, best, final, step_seconds, own_seconds, each) in USUAL.items():
        cost = Cost(step_seconds, own_seconds, each * WEIGHTS, 512_000_000, 250, WEIGHTS)
        costs[contender] = cost

        def record(lr: float, seed: int, phase: str, made: Curve, cost: Cost = cost, **more: str) -> RunRecord:
            if accuracy:
                made.valid_metric = [max(0.0, 1 - loss / 4) if math.isfinite(loss) else 0.1 for loss in made.valid_loss]
            return run(name, contender, lr, seed, phase, made, cost, optimizer=optimizer, schedule=schedule, **more)  # noqa: B023

        for trial in range(trials):
            lr = float(f"{best * 10 ** (-1.5 + 3 * trial / (trials - 1)):.4g}") if trial != trials // 2 else best
            worse = final * scale * (1 + 0.25 * math.log10(lr / best) ** 2)
            made = curve(worse, points=points, steps=250, step_seconds=step_seconds, noise=noise)
            if lr > best * 12:
                broken = {"status": "diverged", "message": "the training loss became nan at step 75"}
                records.append(record(lr, 0, "tune", diverged(made), **broken))
            else:
                records.append(record(lr, 0, "tune", made))
        scores = []
        for seed in range(1, seeds + 1):
            wobble = 0.012 * random.Random(f"{name}{seed}").gauss(0, 1) + 0.008 * noise.gauss(0, 1)
            made = curve(final * scale * (1 + wobble), points=points, steps=250, step_seconds=step_seconds, noise=noise)
            records.append(record(best, 100 + seed, "confirm", made))
            scores.append(made.valid_metric[-1] if accuracy else made.valid_loss[-1])
        all_scores[contender] = scores
    order = sorted(all_scores, key=lambda each: statistics.mean(all_scores[each]), reverse=accuracy)
    lead = all_scores[order[0]]
    standings = []
    for contender in order:
        lost = {"diverged_trials": 1, "failures": ["tune, lr 0.06, seed 0: diverged at step 75: the loss became nan"]}
        changes: dict[str, object] = {"best_hyperparameters": {"lr": USUAL[contender][2]}}
        changes |= lost if any(r.status == "diverged" and r.key.contender == contender for r in records) else {}
        made_standing = standing(contender, all_scores[contender], lead, costs[contender], **changes)
        if accuracy:
            tied = made_standing.difference_high >= 0
            made_standing = standing(contender, all_scores[contender], lead, costs[contender], **changes, tied=tied)
        standings.append(made_standing)
    group = [s for s in standings if s.tied]
    take = min(group, key=lambda each: each.cost.step_seconds)
    others = " and ".join(s.contender for s in group if s is not take)
    verdict = (
        f"No difference found between {take.contender} and {others}; {take.contender} has the cheapest step of them."
        if others
        else f"{take.contender} is ahead of all others."
    )
    metric = "accuracy" if accuracy else "loss"
    caveat = "No difference found is not equality: these 5 seeds find a true difference of 0.05 in four races of five."
    return TaskResult(name, metric, accuracy, standings, verdict, caveats=[caveat]), records


def plain_study() -> StudyResult:
    """Two tasks, four contenders, nothing odd but a few trials that diverged."""
    text, text_runs = _task("char_transformer", 1.0)
    digits, digits_runs = _task("digits", 0.1, accuracy=True)
    notes = ["Timings were taken while 2 runs shared the processor; differences in step time under 10 % mean little."]
    return StudyResult(
        "4 optimizers on char_transformer and digits",
        "2026-11-23T10:05:00Z",
        [text, digits],
        text_runs + digits_runs,
        notes,
        MACHINE,
        "piste race --optimizers ranger,adamw,rangeradabelief,sgd_momentum --seeds 5 --trials 8",
        [
            Finding("times from a busy machine", COMMITTED, notes[0]),
            Finding("too few seeds", CLEAR, ""),
            Finding("untuned contenders", CLEAR, ""),
            Finding("training losses compared", EXCLUDED, "Scores come from the report split, never from training."),
        ],
    )


def troubled_study(name: str = HOSTILE) -> StudyResult:
    """Hostile names, a contender whose every run failed, nan, inf, edges, a seed that diverged, costs unknown."""
    noise = random.Random(7)
    cost = Cost(0.011, 0.002, 8 * WEIGHTS, 0, 500, WEIGHTS)
    good, shaky, dead = f"adamw+{name}", f'"{name}&amp;<b>bold</b> %{{x}} $\\alpha$', "=1+1;dead"
    lead = [0.41, 0.42, 0.4]
    records = [
        run(
            "task " + name,
            good,
            lr,
            0,
            "tune",
            curve(0.4 + k / 50, points=9, steps=50, step_seconds=0.01, noise=noise),
            cost,
        )
        for k, lr in enumerate((1e-3, 3e-3, 1e-2))
    ]
    records += [
        run(
            "task " + name,
            good,
            1e-3,
            seed,
            "confirm",
            curve(end, points=9, steps=50, step_seconds=0.01, noise=noise),
            cost,
        )
        for seed, end in enumerate(lead)
    ]
    for seed in range(3):
        made = curve(0.5, points=9, steps=50, step_seconds=0.01, noise=noise)
        ended = {"status": "diverged", "message": f"nan {name}"} if seed == 1 else {}
        records.append(
            run("task " + name, shaky, 0.3, seed, "confirm", diverged(made, 0.5) if ended else made, cost, **ended)
        )
    for status in ("failed", "out_of_memory", "diverged"):
        made = Curve([0], [0.0], [math.nan], [math.inf], [math.nan])
        records.append(
            run(
                "task " + name,
                dead,
                0.1,
                0,
                "tune",
                made,
                Cost.unknown(),
                status=status,
                message=f"RuntimeError: {name}",
            )
        )
    records.append(run("task " + name, dead, 0.2, 0, "tune", Curve(), Cost.unknown(), status="failed", message="early"))
    nothing: dict[str, object] = dict.fromkeys(
        ("mean", "low", "high", "difference", "difference_low", "difference_high"), math.nan
    )
    standings = [
        standing(good, lead, lead, cost, edge="low", difference_low=0.0, difference_high=0.0),
        standing(
            shaky,
            [0.5, 4.6, 0.51],
            lead,
            cost,
            edge="high",
            best_hyperparameters={"lr": 0.3, f"x{name}": 1.0},
            failures=[f"confirm, seed 1: diverged: nan {name}"],
            high=math.inf,
            difference_high=math.inf,
        ),
        standing(
            dead,
            [0.0],
            [0.0],
            Cost.unknown(),
            best_hyperparameters={},
            trials=4,
            diverged_trials=4,
            seeds=0,
            scores=[],
            tied=False,
            failures=[f"tune: {status} {name}" for status in ("failed", "out of memory", "diverged", "failed")],
            **nothing,
        ),
    ]
    result = TaskResult(
        "task " + name, f"loss {name}", False, standings, f"Take {good}. {name}", caveats=[f"caveat {name}"]
    )
    bad = standing(
        *("lone", [0.0], [0.0], Cost.unknown()),
        best_hyperparameters={},
        scores=[],
        tied=False,
        seeds=0,
        trials=3,
        diverged_trials=3,
        **nothing,
    )
    lost = TaskResult("all lost", "accuracy", True, [bad], "No contender finished a run.")
    none = TaskResult("nobody came", "loss", False, [], "No contender raced.")
    return StudyResult(
        f"Trouble {name}",
        "2026-11-23T10:05:00Z",
        [result, lost, none],
        records,
        [f"note {name}", "One seed only"],
        {"system": name},
        f"piste race {name}",
        [Finding(f"sin {name}", state, f"words {name}") for state in (COMMITTED, CLEAR, EXCLUDED)],
    )


def large_study(runs: int = 200, points: int = 100) -> StudyResult:
    """As many runs as a long race makes, each with as many evaluations."""
    trials, seeds = 30, runs // 4 - 30
    task, records = _task("large", 1.0, seeds=seeds, trials=trials, points=points)
    assert len(records) == runs
    return StudyResult("large", "2026-11-23T10:05:00Z", [task], records, [], MACHINE, "piste race")


def empty_study() -> StudyResult:
    """Nothing was raced at all."""
    return StudyResult("nothing", "", [], [], [], {}, "")
