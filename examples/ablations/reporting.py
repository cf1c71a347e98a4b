"""A suite's table, figure and sentences, from the results that are there."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from arms import ARMS, SUITES, Claim
from bootstrap import Interval, interval, ratio_of_steps
from schedule import sweep
from training_runs import Place

matplotlib.use("Agg")

Results = dict[int, dict]  # of an arm, by seed
NONE = "-"  # in a cell of a table that has no number

_SHOWN = (("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4), ("motion_psnr", "motion PSNR", 2),
          ("first_psnr", "first frame", 2), ("image_psnr", "image", 2))  # fmt: skip


def arm_results(place: Place, arm: str) -> Results:
    """The measured runs of an arm at its best rate; of an image VAE for `image_strong` and `image_weak`."""
    if arm.startswith("image_"):
        runs = {seed: place.result(f"{arm}-s{seed}") for seed in place.settings.seeds}
    else:
        best = sweep(place, arm)[1]
        if best is None:
            return {}
        runs = {seed: place.result(f"{arm}-s{seed}-r{best:.3g}") for seed in place.settings.seeds}
    return {seed: run for seed, run in runs.items() if run and "final" in run}


def matrix(results: Results, metric: str, seeds: list[int]) -> np.ndarray:
    """Values of a metric `(seeds, clips)`, the mean of a clip's windows."""
    rows = [np.asarray(results[seed]["final"][metric], dtype=np.float64) for seed in seeds]
    return np.stack([row.mean(axis=1) if row.ndim == 2 else row for row in rows])


def judge(place: Place, claim: Claim) -> Interval | None:
    """The sum of a claim over the seeds that all its arms have; None before there is one."""
    of_arm = {arm: arm_results(place, arm) for _, arm, _ in claim.terms}
    seeds = sorted(set.intersection(*(set(results) for results in of_arm.values())))
    if not seeds:
        return None
    return interval(sum(weight * matrix(of_arm[arm], metric, seeds) for weight, arm, metric in claim.terms))


def runs_there(place: Place, claim: Claim) -> tuple[int, int]:
    """How many of the runs that a claim needs have a result, and how many it needs as far as is known."""
    arms = {arm for _, arm, _ in claim.terms if arm in ARMS}
    wanted = {task.run for arm in arms for task in sweep(place, arm)[0]}
    others = [seed for seed in place.settings.seeds if seed != place.settings.sweep_seed]
    there = sum(place.result(run) is not None for run in wanted)
    there += sum(seed in others for arm in arms for seed in arm_results(place, arm))
    return there, len(wanted) + len(others) * len(arms)


def verdict(place: Place, claim: Claim, found: Interval | None) -> str:
    """What the interval says of the claim, in words."""
    seeds = len(place.settings.seeds)
    if found is None:
        there, wanted = runs_there(place, claim)
        return f"running: {there} of {wanted} runs" if there else "not run yet"
    sign = found.sign
    if claim.within is not None:  # whether all of the interval is near zero, or none of it
        near = [abs(end) <= claim.within for end in (found.low, found.high)]
        sign = 1 if all(near) else -1 if sign and not any(near) else 0
    words = {1: "shows", 0: "does not show", -1: "the opposite shows"}[sign]
    return words if found.seeds >= seeds else f"{words} so far ({found.seeds} of {seeds} seeds)"


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return NONE
    return f"{value:+.2f} dB" if unit == "dB" else f"{value:+.4f}"


def claims_table(place: Place, suites: list[str]) -> str:
    """Claim, the paper's value, ours with its interval, verdict."""
    lines = ["| claim | paper | here, 95 % interval | verdict |", "| --- | ---: | ---: | --- |"]
    for suite in suites:
        for claim in SUITES[suite].claims:
            found = judge(place, claim)
            ours = NONE
            if found is not None:
                low, high = (amount(value, claim.unit).removesuffix(" dB") for value in (found.low, found.high))
                ours = f"{amount(found.mean, claim.unit)} ({low} to {high})"
            row = (f"{suite}: {claim.says}", amount(claim.paper, claim.unit), ours)
            lines.append(f"| {' | '.join(row)} | {verdict(place, claim, found)} |")
        lines += speed_rows(place) if suite == "table2" else []
    return "\n".join(lines)


def arms_table(place: Place, suite: str) -> str:
    """Every arm with its rate, size, cost and means."""
    heads = ["arm", "rate", "seeds", "parameters", "training GFLOP", *(label for _, label, _ in _SHOWN)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for arm in SUITES[suite].arms:
        results = arm_results(place, arm)
        if not results:
            lines.append(f"| {arm} |" + f" {NONE} |" * (len(heads) - 1))
            continue
        one = next(iter(results.values()))
        cells = [
            arm,
            f"{one['rate']:.3g}",
            str(len(results)),
            f"{one['parameters'] / 1e6:.2f} M",
            f"{training_gflops(place, arm, one):.0f}",
        ]
        for metric, _, digits in _SHOWN:
            there = metric in one["final"]
            cells.append(f"{matrix(results, metric, sorted(results)).mean():.{digits}f}" if there else NONE)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def image_gflops(place: Place, arm: str, seed: int) -> float:
    """What the image VAE of an arm cost; 0 for an arm that has none, nan for one that was given."""
    which = ARMS[arm].image_vae
    if which is None:
        return 0.0
    image = place.result(f"image_{which}-s{seed}")
    return 3e-9 * image["forward_flops"] * image["steps"] if image else math.nan


def training_gflops(place: Place, arm: str, result: dict) -> float:
    """Of a run, its image VAE's included: a backward pass counts as two forward ones."""
    return 3e-9 * result["forward_flops"] * result["steps"] + image_gflops(place, arm, result["seed"])


def sweep_table(place: Place, suite: str) -> str:
    """Validation PSNR of every rate of every arm after the sweep's steps; the best one stands out."""
    columns = {arm: sweep(place, arm) for arm in SUITES[suite].arms}
    lines = ["| arm | rates: PSNR of the validation clips after the sweep's steps |", "| --- | --- |"]
    for arm, (tasks, best, scores) in columns.items():
        cells = []
        for task in tasks:
            score = scores.get(task.rate)
            text = f"{task.rate:.3g}: " + (NONE if score is None else "diverged" if score == -math.inf else f"{score:.2f}")
            cells.append(f"**{text}**" if task.rate == best else text)
        lines.append(f"| {arm} | {', '.join(cells)} |")
    return "\n".join(lines)


def _curves(place: Place, arm: str) -> tuple[np.ndarray, np.ndarray, list[int]] | None:
    results = arm_results(place, arm)
    if not results:
        return None
    seeds = sorted(results)
    steps = np.array([row["step"] for row in results[seeds[0]]["curve"]], dtype=np.float64)
    return steps, np.array([[row["test"] for row in results[seed]["curve"]] for seed in seeds]), seeds


def speed_rows(place: Place) -> list[str]:
    """Table 2 as a ratio of steps: the keyframe start against the others."""
    rows = []
    ours = _curves(place, "group_tdc")
    for arm, paper in (("random_temporal", None), ("scratch", 550 / 1200)):
        other = _curves(place, arm)
        if ours is None or other is None:
            continue
        seeds = [seed for seed in ours[2] if seed in other[2]]
        fast, slow = (part[1][[part[2].index(seed) for seed in seeds]] for part in (ours, other))
        ratio, low, high = ratio_of_steps(ours[0], fast, slow)
        shown = "shows" if high < 1 else "does not show"
        says = f"table2: steps of the keyframe start to reach {arm}'s last PSNR, over its steps"
        cell = NONE if paper is None else f"{paper:.2f}"
        rows.append(f"| {says} | {cell} | {ratio:.3f} ({low:.3f} to {high:.3f}) | {shown} |")
    return rows


def draw(place: Place, suite: str, target: Path) -> bool:
    """PSNR against steps, the mean over clips and seeds; bands are intervals of 95 % over both."""
    import matplotlib.pyplot as plt

    drawn = False
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for arm in SUITES[suite].arms:
        curve = _curves(place, arm)
        if curve is None:
            continue
        steps, values, seeds = curve
        bands = [interval(values[:, point], draws=2000) for point in range(len(steps))]
        means = [band.mean for band in bands]
        (line,) = axes.plot(steps, means, marker=".", label=f"{arm} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
        # Clips differ far more than arms do, so a band of levels would hide every difference: differences to the first arm.
        drawn = True
        first = _curves(place, SUITES[suite].arms[0])
        if first is not None and arm != SUITES[suite].arms[0]:
            common = [seed for seed in seeds if seed in first[2]]
            pair = [part[1][[part[2].index(seed) for seed in common]] for part in (first, curve)]
            bands = [interval(pair[1][:, p] - pair[0][:, p], draws=2000) for p in range(len(steps))]
            base = first[1][[first[2].index(seed) for seed in common]].mean(axis=(0, 2))
            low, high = (base + [getattr(band, end) for band in bands] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="steps", ylabel="PSNR of the test clips, dB", title=SUITES[suite].title)
    axes.set_xscale("symlog", linthresh=25)
    axes.legend(title="bands: paired difference to the first arm, 95 %")
    axes.grid(alpha=0.3)
    if drawn:
        figure.savefig(target, dpi=110)
    plt.close(figure)
    return drawn


def sentence(place: Place, suite: str) -> str:
    """What the suite says so far."""
    parts = []
    for claim in SUITES[suite].claims:
        found = judge(place, claim)
        if found is None:
            parts.append(f"“{claim.says}” has not been run")
            continue
        paper = "" if claim.paper is None else f", in the paper {amount(claim.paper, claim.unit)}"
        words = verdict(place, claim, found)
        parts.append(f"“{claim.says}” {words}: {amount(found.mean, claim.unit)} here{paper}")
    return f"{SUITES[suite].title}: " + "; ".join(parts) + "."


def cost(place: Place, suite: str) -> str:
    """Machine time of every run of the suite that is there."""
    runs = {task.run for arm in SUITES[suite].arms for task in sweep(place, arm)[0]}
    runs |= {
        f"{arm}-s{seed}-r{result['rate']:.3g}"
        for arm in SUITES[suite].arms
        for seed, result in arm_results(place, arm).items()
    }
    results = [result for result in map(place.result, sorted(runs)) if result is not None]
    hours, cpu_hours = (sum(result[key] for result in results) / 3600 for key in ("seconds", "cpu_seconds"))
    devices = ", ".join(sorted({result["device"] for result in results})) or "none"
    return f"{len(results)} runs, {cpu_hours:.2f} hours of CPU time, {hours:.2f} of wall time ({devices})."


def publish(place: Place, suites: list[str], folder: Path) -> None:
    """Copy results, pages and figures to `folder`, and put the claims into the table of the page beside it, `folder`.md.

    The page holds the table between two comment lines, `<!-- claims -->` and `<!-- /claims -->`. Suites that were published
    before stay in it.
    """
    report(place, suites)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for file in place.results.glob("*.json"):
        shutil.copyfile(file, folder / "results" / file.name)
    for suite in suites:
        for file in (place.out / "report").glob(f"{suite}.*"):
            shutil.copyfile(file, folder / file.name)
    there = [suite for suite in SUITES if (folder / f"{suite}.md").exists()]
    page = folder.with_suffix(".md")
    before, rest = page.read_text().split("<!-- claims -->")
    after = rest.split("<!-- /claims -->")[1]
    page.write_text(f"{before}<!-- claims -->\n{claims_table(place, there)}\n<!-- /claims -->{after}")


def report(place: Place, suites: list[str]) -> str:
    """Write OUT/report: claims.md over all suites, and for each its page and figure. Returns the claims and sentences."""
    folder = place.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.md").write_text(claims_table(place, suites) + "\n")
    for suite in suites:
        page = [f"# {SUITES[suite].title}", sentence(place, suite), claims_table(place, [suite]), arms_table(place, suite)]
        page += ["## The sweep of rates", sweep_table(place, suite), "## Cost", cost(place, suite)]
        if draw(place, suite, folder / f"{suite}.png"):
            page.insert(3, f"![PSNR against steps]({suite}.png)")
        (folder / f"{suite}.md").write_text("\n\n".join(page) + "\n")
    return "\n\n".join([claims_table(place, suites), *(sentence(place, suite) for suite in suites)])
