"""Paired differences with intervals: a bootstrap over clips and seeds at once.

Arms of one seed saw the same clips, crops and noise, and all are measured on the same test clips. So a contrast is a matrix
of values `(seeds, clips)`; what would come out with other seeds and other clips is told by drawing rows and columns of it
again, independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean, its interval of 95 %, and what the spread comes from.

    Attributes:
        between_seeds, between_clips: standard deviations of the means of rows and of columns; nan for one row.
    """

    mean: float
    low: float
    high: float
    seeds: int
    clips: int
    between_seeds: float
    between_clips: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of `(seeds, clips)` with its percentile interval.

    With one seed the interval is over clips only and says so by `seeds=1`. With few seeds a percentile interval is too
    narrow by about sqrt((n - 1) / n) in the seeds' part; rows are therefore widened about their mean by the inverse.

    Raises:
        ValueError: for values that are not a finite matrix.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"values have shape {values.shape}, they must be a finite matrix (seeds, clips)")
    rows, columns = values.shape
    rng = np.random.default_rng(seed)
    spread = values
    if rows > 1:
        of_rows = values.mean(axis=1, keepdims=True)
        spread = values + (of_rows - of_rows.mean()) * (np.sqrt(rows / (rows - 1)) - 1)
    row_weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=draws) / rows
    column_weights = rng.multinomial(columns, np.full(columns, 1 / columns), size=draws) / columns
    means = np.einsum("dr,rc,dc->d", row_weights, spread, column_weights, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    between_seeds = values.mean(axis=1).std(ddof=1) if rows > 1 else float("nan")
    between_clips = values.mean(axis=0).std(ddof=1) if columns > 1 else float("nan")
    return Interval(float(values.mean()), float(low), float(high), rows, columns, float(between_seeds), float(between_clips))


def steps_to_reach(steps: np.ndarray, curve: np.ndarray, target: float) -> float:
    """The step at which a rising curve first reaches `target`, interpolated; infinite if it never does.

    Args:
        steps: (points,) rising.
        curve: (points,) values.
    """
    above = np.flatnonzero(curve >= target)
    if above.size == 0:
        return float("inf")
    first = int(above[0])
    if first == 0:
        return float(steps[0])
    part = (target - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float(steps[first - 1] + part * (steps[first] - steps[first - 1]))


def ratio_of_steps(
    steps: np.ndarray, fast: np.ndarray, slow: np.ndarray, draws: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    """Steps that `fast` needs to reach the last value of `slow`, over the steps of `slow`, with an interval of 95 %.

    Args:
        steps: (points,).
        fast, slow: (seeds, points, clips), paired.

    Returns:
        The ratio and its interval; below 1 `fast` is faster, infinite where it does not get there.
    """
    rng = np.random.default_rng(seed)
    rows, _, columns = fast.shape

    def ratio(row_weights: np.ndarray, column_weights: np.ndarray) -> float:
        first, second = (np.einsum("r,rpc,c->p", row_weights, part, column_weights) for part in (fast, slow))
        return steps_to_reach(steps, first, second[-1]) / steps[-1]

    drawn = [
        ratio(
            rng.multinomial(rows, np.full(rows, 1 / rows)) / rows,
            rng.multinomial(columns, np.full(columns, 1 / columns)) / columns,
        )
        for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return ratio(np.full(rows, 1 / rows), np.full(columns, 1 / columns)), float(low), float(high)
