"""How the race went, in plain words, and what it ran on."""

from __future__ import annotations

from piste.race import words
from piste.race.record import CONFIRM, TUNE, RunRecord
from piste.race.result import StudyResult
from piste.race.statistics import LEVEL


def summary(result: StudyResult) -> str:
    """How many contenders, tasks and runs."""
    contenders = {standing.contender for task in result.results for standing in task.standings}
    return ", ".join(
        [
            words.count(len(contenders), "contender"),
            words.count(len(result.results), "task"),
            words.count(len(result.records), "run"),
        ]
    )


def method(result: StudyResult) -> list[str]:
    """How the race went, in plain words, with the numbers of this race."""
    tune = [run for run in result.records if run.key.phase == TUNE]
    confirm = [run for run in result.records if run.key.phase == CONFIRM]
    trials = _span([s.trials for task in result.results for s in task.standings])
    seeds = _span([s.seeds for task in result.results for s in task.standings if s.seeds])
    tune_steps = _span([run.key.steps for run in tune])
    confirm_steps = _span([run.key.steps for run in confirm])
    return [
        f"Each contender is an optimizer with a schedule. All get the same number of trials, {trials} of {tune_steps} "
        "steps, at learning rates drawn evenly (quasi-randomly, on a log scale) from a range around each optimizer's "
        "own usual value: nobody runs at a rate that was found for another. Where the best rate is the lowest or "
        "highest tried, a trial or two are added beyond it, which is why some contenders may count more.",
        "The data are split in three. The model learns on the training split. The score on the validation split at "
        "the end of a trial, nothing else, chooses each contender's learning rate.",
        f"At that rate the contender runs again, from scratch, on {seeds} fresh seeds that tuning never used, "
        f"{confirm_steps} steps each. A seed fixes the initial weights and the order of the batches, and is the same "
        "for every contender, so that contenders can be compared pair by pair.",
        "The score shown is computed at the end of these runs on the third split, used for neither learning nor "
        "choosing. No run is stopped for looking bad, and none is left out: one that diverged or crashed counts as "
        "the worst score seen on the task.",
        f"Intervals are {100 * LEVEL:.0f} % bootstrap intervals of the mean over seeds, widened because seeds are few. "
        "Differences are taken seed by seed first. A difference from the leader is claimed only where its interval "
        "leaves out zero and a paired t test, corrected for the number of comparisons (Holm), agrees; otherwise the "
        "contender is tied with the leader, and of the tied group the cheapest is the one to take. All this is about "
        "chance between seeds on this task; it does not speak of other data or other models.",
        "What a target takes is counted at the evaluations of the confirmation runs. A run that ends before it meets "
        "the target is not left out: a miss at the last step or after a crash is censored there, one that diverged "
        "never arrives (Kaplan and Meier). The best of fewer trials is the mean over all ways to choose them (Tang et "
        "al. 2020); the cost of a wrong learning rate is the mean loss above the best, over the rates tried on a log "
        "scale, nothing counted as worse than the untrained model (Wortsman et al. 2023). The chance to beat another "
        "contender is the share of common seeds, with Wilson's interval.",
        "Step time is the median of the measured steps of the contender's fastest run (other work on the machine only "
        "adds to it), forward and backward pass included, evaluation left out. "
        "Peak memory on a processor is that of the whole process, Python and torch included; on CUDA it is what was "
        "allocated on the device.",
    ]


def _span(values: list[int]) -> str:
    if not values:
        return "no"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def versions(records: list[RunRecord]) -> dict[str, str]:
    """Every version that took part; more than one where records of several were reused."""
    found: dict[str, list[str]] = {}
    for run in records:
        for name, version in {**run.key.versions, "device": run.key.device}.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(each) for name, each in found.items()}


def run_counts(records: list[RunRecord]) -> list[str]:
    """How many runs ended in which way."""
    counts: dict[str, int] = {}
    for run in records:
        counts[run.status] = counts.get(run.status, 0) + 1
    return [f"{amount:,} {status.replace('_', ' ')}" for status, amount in counts.items()]
