"""Which runs the suites need, in which order, and how far they are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from arms import ARMS, SUITES
from training_runs import Place, Task

_MOST_RATES = 7


@dataclass
class Plan:
    """Runs in the order in which they are wanted.

    Attributes:
        tasks: those that are known; later ones appear when a sweep is decided.
        unknown: (arm, steps) that arms without a decided rate have still to come, beyond their sweeps.
    """

    tasks: list[Task]
    unknown: list[tuple[str, int]]


def sweep(place: Place, arm: str) -> tuple[list[Task], float | None, dict[float, float]]:
    """The sweep of an arm's rate, at one seed.

    The grid grows by a neighbour while the best rate lies at its edge: "its own best rate" then means one that is worse on
    both sides. Validation clips decide.

    Returns:
        The runs that the sweep has or needs, the best rate if it is decided, and the score of each rate so far (mean PSNR
        of the validation clips; minus infinity for a run that diverged).
    """
    training, seed = place.settings.training, place.settings.sweep_seed
    rates = sorted(rate * ARMS[arm].rate_scale for rate in training.rates)
    factor = rates[1] / rates[0]
    while True:
        tasks = [Task(arm, seed, rate, training.sweep_steps) for rate in rates]
        scores = {task.rate: _score(place, task) for task in tasks}
        known = {rate: score for rate, score in scores.items() if score is not None}
        if len(known) < len(tasks):
            return tasks, None, known
        best = max(known, key=known.__getitem__)
        if rates[0] < best < rates[-1] or len(rates) >= _MOST_RATES:
            return tasks, best, known
        rates = [rates[0] / factor, *rates] if best == rates[0] else [*rates, rates[-1] * factor]


def _score(place: Place, task: Task) -> float | None:
    result = place.result(task.run)
    if result is None:
        return None
    for row in result["curve"]:
        if row["step"] == task.steps:
            return statistics.fmean(row["validation"])
    return float("-inf") if result["diverged"] else None


def is_done(place: Place, task: Task) -> bool:
    if task.arm == "image":
        return all(place.result(f"image_{which}-s{task.seed}") is not None for which in ("weak", "strong"))
    result = place.result(task.run)
    return result is not None and (result["diverged"] or result["steps"] >= task.steps)


def is_ready(place: Place, task: Task) -> bool:
    """Whether the image VAE that the run starts from is there."""
    if task.arm == "image":
        return True
    needed = ARMS[task.arm].image_vae
    if needed is None or getattr(place.settings.image, needed) is not None:
        return True
    return place.result(f"image_{needed}-s{task.seed}") is not None


def plan(place: Place, suites: list[str], only: list[str] | None = None) -> Plan:
    """All runs of the suites, or of some of their arms: seeds outermost, so that an early stop leaves whole pairs."""
    settings = place.settings
    by_suite = [[arm for arm in SUITES[suite].arms if only is None or arm in only] for suite in suites]
    arms = list(dict.fromkeys(arm for of_suite in by_suite for arm in of_suite))
    given = settings.image.strong is not None
    tasks: list[Task] = []
    sweeps = {arm: sweep(place, arm) for arm in arms}
    for number, seed in enumerate(settings.seeds):
        if not given and any(ARMS[arm].image_vae for arm in arms):
            tasks.append(Task("image", seed, settings.image.learning_rate, settings.image.steps))
        for of_suite in by_suite:
            if number == 0:
                tasks += [task for arm in of_suite for task in sweeps[arm][0]]
            tasks += [Task(arm, seed, sweeps[arm][1], settings.training.steps) for arm in of_suite if sweeps[arm][1]]
    steps = settings.training.steps * len(settings.seeds) - settings.training.sweep_steps
    return Plan(list(dict.fromkeys(tasks)), [(arm, steps) for arm in arms if sweeps[arm][1] is None])


def time_left(place: Place, suites: list[str], only: list[str] | None = None) -> tuple[int, int, float | None]:
    """Steps done, steps in all, and seconds of work left if a step takes what it took so far (None before any)."""
    the_plan = plan(place, suites, only)
    furthest: dict[str, Task] = {}
    for task in the_plan.tasks:
        if task.run not in furthest or furthest[task.run].steps < task.steps:
            furthest[task.run] = task
    per_step: dict[str, list[float]] = {}
    done, left = 0, [(arm, steps) for arm, steps in the_plan.unknown]
    for task in furthest.values():
        progress = place.progress(task.run)
        step = task.steps if is_done(place, task) else progress["step"]
        done += min(step, task.steps)
        left.append((task.arm, max(0, task.steps - step)))
        if progress["step"] and progress["seconds"]:
            per_step.setdefault(task.arm, []).append(progress["seconds"] / progress["step"])
    total = done + sum(steps for _, steps in left)
    if not per_step:
        return done, total, None
    mean = {arm: statistics.fmean(values) for arm, values in per_step.items()}
    usual = statistics.fmean([value for arm, value in mean.items() if arm != "image"] or mean.values())
    return done, total, sum(steps * mean.get(arm, usual) for arm, steps in left)
