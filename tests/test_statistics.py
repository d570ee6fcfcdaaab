"""Means, intervals and paired comparisons against scipy, a slow analysis of variance, and simulated tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from obowlab.tables.model import Estimate
from obowlab.tables.statistics import Matrix, estimate, holm, mean_variance, stacked, verdict


def table(seeds: int, episodes: int, *, of_seeds: float = 1.0, of_episodes: float = 3.0, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    rest = 6 * rng.normal(size=(seeds, episodes))
    return 40 + of_seeds * rng.normal(size=(seeds, 1)) + of_episodes * rng.normal(size=(1, episodes)) + rest


def test_one_seed_is_the_paired_t_test_over_episodes() -> None:
    ours, base = table(1, 200, seed=1), table(1, 200, seed=2)
    found = estimate(ours - base)
    expected = stats.ttest_rel(ours[0], base[0])
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.value - found.interval, found.value + found.interval) == (pytest.approx(low), pytest.approx(high))
    assert found.seeds == 1


def test_identical_answers_in_every_episode_leave_the_t_test_over_seeds() -> None:
    means = np.array([41.0, 43.5, 40.25])
    found = estimate(np.repeat(means[:, None], 50, axis=1))
    expected = stats.ttest_1samp(means, 0.0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval == pytest.approx(expected.confidence_interval(0.95).high - means.mean(), rel=1e-9)


def slow_variance(x: Matrix) -> tuple[float, float]:
    """The two-way analysis of variance, sum by sum."""
    seeds, episodes = x.shape
    mean = sum(x[s, e] for s in range(seeds) for e in range(episodes)) / (seeds * episodes)
    of_seeds = [sum(x[s, e] for e in range(episodes)) / episodes for s in range(seeds)]
    of_episodes = [sum(x[s, e] for s in range(seeds)) / seeds for e in range(episodes)]
    ms_seeds = episodes * sum((m - mean) ** 2 for m in of_seeds) / (seeds - 1)
    ms_episodes = seeds * sum((m - mean) ** 2 for m in of_episodes) / (episodes - 1)
    pairs = itertools.product(range(seeds), range(episodes))
    ms_rest = sum((x[s, e] - of_seeds[s] - of_episodes[e] + mean) ** 2 for s, e in pairs) / ((seeds - 1) * (episodes - 1))
    var_seeds = max(0.0, (ms_seeds - ms_rest) / episodes)
    var_episodes = max(0.0, (ms_episodes - ms_rest) / seeds)
    variance = var_seeds / seeds + var_episodes / episodes + ms_rest / (seeds * episodes)
    # Satterthwaite, of the sum of mean squares that the variance is.
    parts = [
        (max(ms_seeds, ms_rest), seeds - 1),
        (max(ms_episodes, ms_rest), episodes - 1),
        (ms_rest, (seeds - 1) * (episodes - 1)),
    ]
    spread = sum((square / (seeds * episodes)) ** 2 / freedom for square, freedom in parts)
    return variance, min(variance**2 / spread, seeds - 1)


@pytest.mark.parametrize(("seeds", "episodes", "of_seeds"), [(2, 5, 1.0), (3, 40, 4.0), (5, 12, 0.0)])
def test_several_seeds_equal_the_slow_analysis(seeds: int, episodes: int, of_seeds: float) -> None:
    x = table(seeds, episodes, of_seeds=of_seeds)
    assert mean_variance(x) == pytest.approx(slow_variance(x), rel=1e-9)
    found, (variance, freedom) = estimate(x), slow_variance(x)
    assert found.interval == pytest.approx(stats.t.ppf(0.975, freedom) * variance**0.5, rel=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(x.mean()) / variance**0.5, freedom), rel=1e-6)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_episodes"),
    [(2, 2.0, 3.0), (2, 3.4, 5.2), (3, 0.0, 3.0), (3, 1.0, 3.0), (3, 3.4, 4.2), (5, 1.0, 3.0)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, of_seeds: float, of_episodes: float) -> None:
    trials = 1000
    missed = 0
    for trial in range(trials):
        found = estimate(table(seeds, 200, of_seeds=of_seeds, of_episodes=of_episodes, seed=trial))
        missed += abs(found.value - 40) > found.interval
    assert missed / trials < 0.065  # 5 % is meant; 1000 trials are allowed for


def test_an_interval_over_seeds_alone_would_be_wrong() -> None:
    """Why episodes count as drawn at random: the seeds share them, so their agreement says too much."""
    missed = 0
    for trial in range(1000):
        x = table(5, 200, of_seeds=0.0, seed=trial).mean(axis=1)
        missed += not (stats.ttest_1samp(x, 40.0).pvalue > 0.05)
    assert missed / 1000 > 0.09


@pytest.mark.parametrize("x", [np.full((1, 4), 2.0), np.full((3, 4), 2.0)])
def test_constant_observations_have_no_interval(x: Matrix) -> None:
    assert estimate(x) == Estimate(value=2.0, interval=0.0, seeds=len(x), p=0.0)
    assert estimate(0 * x).p == 1.0


@pytest.mark.parametrize(
    ("value", "p", "paper", "expected"),
    [
        (1.0, 0.01, 2.0, "agrees"),
        (-1.0, 0.01, -2.0, "agrees"),
        (1.0, 0.01, -2.0, "disagrees"),
        (1.0, 0.05, 2.0, "indistinguishable"),
        (-1.0, 0.9, 2.0, "indistinguishable"),
    ],
)
def test_verdicts(value: float, p: float, paper: float, expected: str) -> None:
    assert verdict(Estimate(value, 0.5, 3, 0.001), p=p, paper=paper) == expected, "the corrected p decides"
    assert verdict(Estimate(value, 0.5, 1, p), p=p, paper=paper) == "one seed"
    assert verdict(Estimate(value, 0.5, 1), p=None, paper=None) == "one seed"


def slow_holm(p: list[float]) -> list[float]:
    """For each value the smallest level at which the step-down procedure rejects it, found by trying many."""

    def rejected(level: float) -> set[int]:
        found: set[int] = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] > level / (len(p) - step):
                break
            found.add(i)
        return found

    levels = sorted({min(1.0, value * count) for value in p for count in range(1, len(p) + 1)})
    return [next((level for level in levels if i in rejected(level * (1 + 1e-12))), 1.0) for i in range(len(p))]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the usual example: at 5 % the first and the last are rejected
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.02], [0.02]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], expected: list[float]) -> None:
    assert holm(p) == pytest.approx(expected)


def test_holm_is_the_step_down_procedure() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 7, 12):
        p = list(rng.random(count) ** 4)
        p[0] = p[-1]  # a tie
        assert holm(p) == pytest.approx(slow_holm(p))


@pytest.mark.parametrize(("seeds", "of_seeds"), [(2, 3.4), (3, 1.0), (3, 3.4), (5, 3.4)])
def test_of_rows_that_differ_in_nothing_rarely_one_is_marked(seeds: int, of_seeds: float) -> None:
    """Seven rows against one base row: without the correction, or by the episodes' degrees of freedom, many have a mark."""
    plain, corrected = 0, 0
    for trial in range(400):
        made = [table(seeds, 100, of_seeds=of_seeds, of_episodes=5.0, seed=8 * trial + row) for row in range(8)]
        p = [estimate(row - made[-1]).p or 0.0 for row in made[:-1]]
        plain += min(p) < 0.05
        corrected += min(holm(p)) < 0.05
    assert corrected < 0.08 * 400
    if seeds == 5:
        assert plain > 0.12 * 400


def test_seeds_are_stacked_only_when_all_of_them_are_known_and_equally_long() -> None:
    one, two = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    both = stacked([one, two])
    assert both is not None
    assert both.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert stacked([]) is None
    assert stacked([None]) is None
    assert stacked([one, None]) is None
    assert stacked([None, two]) is None
    assert stacked([one, two[:2]]) is None
