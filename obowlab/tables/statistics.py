"""How sure a mean over seeds and episodes is, and whether two rows of a table differ.

Observations form a matrix x[s, e]: run s (a seed) on episode or image e. Every run answers the same episodes, so both count as
drawn at random and crossed: x[s, e] = mean + seed_s + episode_e + rest. The mean's variance has three parts, which the mean
squares of a two-way table estimate (Searle, Casella, McCulloch, "Variance Components", 1992); its degrees of freedom are
Satterthwaite's (1946), but no more than those of the seeds. An interval over seeds alone would forget that all seeds share their
episodes, one over episodes alone that another seed gives another network; on simulated tables the first misses the truth up to
13 % of the time, this one at most 5.1 %. Without the bound it would be 13 % with two seeds, as two that agree by chance pass for
hundreds of episodes that do. With a single seed only the episodes can be spoken for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from obowlab.tables.model import Estimate, Verdict

Matrix = npt.NDArray[np.float64]

LEVEL = 0.05
"""Two-sided error rate of intervals and verdicts."""


def estimate(x: Matrix) -> Estimate:
    """Return the mean of a table of observations with its 95 % interval and the p value of a mean of 0.

    Args:
        x: one row per seed, one column per episode or image, in percent; at least one row and two columns. Rows of differences
            make it the paired test of two runs on identical episodes.
    """
    mean = float(x.mean())
    variance, freedom = mean_variance(x)
    error = math.sqrt(variance)
    if error == 0.0:
        return Estimate(value=mean, interval=0.0, seeds=len(x), p=1.0 if mean == 0.0 else 0.0)
    quantile = float(stdtrit(freedom, 1 - LEVEL / 2))
    return Estimate(value=mean, interval=quantile * error, seeds=len(x), p=2 * float(stdtr(freedom, -abs(mean) / error)))


def stacked(rows: Sequence[Matrix | None]) -> Matrix | None:
    """Return the observations of all seeds, [S, E]; None when there are none, some are unknown, or their lengths differ."""
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows) or len({len(row) for row in known}) > 1:
        return None
    return np.stack(known)


def mean_variance(x: Matrix) -> tuple[float, float]:
    """Return the estimated variance of the mean of x [S, E] and its degrees of freedom, with several seeds at most S - 1.

    Variance components that come out negative count as 0, which errs towards wider intervals. So does the bound, where seeds
    differ little.
    """
    seeds, episodes = x.shape
    assert episodes >= 2, "an interval needs two episodes"
    if seeds == 1:
        return float(x.var(ddof=1)) / episodes, episodes - 1.0
    of_seeds, of_episodes, mean = x.mean(axis=1), x.mean(axis=0), x.mean()
    rest = x - of_seeds[:, None] - of_episodes[None, :] + mean
    rest_freedom = (seeds - 1) * (episodes - 1)
    rest_square = float((rest**2).sum()) / rest_freedom
    seed_square = max(episodes * float(of_seeds.var(ddof=1)), rest_square)
    episode_square = max(seeds * float(of_episodes.var(ddof=1)), rest_square)
    total = seed_square + episode_square - rest_square
    if total == 0.0:
        return 0.0, float(seeds - 1)
    spread = seed_square**2 / (seeds - 1) + episode_square**2 / (episodes - 1) + rest_square**2 / rest_freedom
    return total / (seeds * episodes), min(total**2 / spread, seeds - 1.0)


def holm(p: Sequence[float]) -> list[float]:
    """Return p values that hold for all of them together (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none becomes smaller than the one before it.
    Where no row differs from the base row, the chance that some value falls below 5 % is at most 5 %, however they depend.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return [float(value) for value in adjusted]


def verdict(difference: Estimate, *, p: float | None, paper: float | None) -> Verdict:
    """Say whether our difference to the base row has the direction of the paper's, or which direction it has.

    Args:
        difference: ours minus the base row's, paired.
        p: of the difference, corrected for the number of rows; None with one seed.
        paper: the same difference in the paper; None where it has none.
    """
    if p is None or difference.seeds < 2:
        return "one seed"
    if p >= LEVEL:
        return "indistinguishable"
    if paper is None:
        return "higher" if difference.value > 0 else "lower"
    return "agrees" if difference.value * paper > 0 else "disagrees"
