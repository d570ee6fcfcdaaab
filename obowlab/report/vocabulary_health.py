"""Health of a vocabulary: rules of thumb on its curves, and the numbers that they compare.

They are ours, not the paper's: they detect the known failures of online vocabularies (all images alike, few visual words in use,
collapsed features, a queue that is not refilled) and say nothing about accuracy. Each looks at the last tenth of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from obowlab.report.curves import Curve

ALIKE = 0.5
"""An image's bag as wide as half of the whole batch's: images hardly differ."""

FEW_WORDS = 0.05
"""Share of the vocabulary below which a batch uses few visual words."""

ONE_WORD = 1.5
"""Perplexity of an image's bag, in words, below which it is hardly a bag."""

COLLAPSED = 0.01
"""Distance to the nearest visual word, as a share of its highest, below which features have collapsed."""

STALE = 2.0
"""Age of a queue's words, in turnovers of the queue, above which it is not refilled."""


@dataclass(frozen=True)
class Finding:
    """One rule applied to one level of one run.

    Attributes:
        rule: key of `RULES`.
        level: `conv4`, `conv5`; empty when there is one vocabulary without a level.
        healthy: whether the rule is kept.
        detail: the numbers in one sentence.
    """

    rule: str
    level: str
    healthy: bool
    detail: str


@dataclass(frozen=True)
class Rule:
    """A rule for the reader of a report: what it checks, what is healthy and what is not."""

    label: str
    trouble: str
    healthy: str
    warning: str


RULES = {
    "distinct": Rule(
        "Images differ",
        "images look alike",
        "One image's bag holds far fewer words than the whole batch's: bags distinguish images.",
        f"An image's perplexity above {100 * ALIKE:.0f} % of the batch's: all bags look alike and there is nothing to predict. "
        "Soft codes start so when delta_base is large; it should pass within the first epochs.",
    ),
    "bag": Rule(
        "A bag of several words",
        "a bag is one word",
        "An image is described by several words; between ten and a few dozen is usual.",
        f"Perplexity per image below {ONE_WORD} words: the bag has become a single label.",
    ),
    "breadth": Rule(
        "Many words in use",
        "few words in use",
        "The batch as a whole uses a large part of the vocabulary, and that part does not shrink.",
        f"Perplexity of the batch, or words used, below {100 * FEW_WORDS:.0f} % of the vocabulary: few words for everything.",
    ),
    "spread": Rule(
        "Features keep apart",
        "features collapse",
        "The distance to the nearest word follows the scale of the features: it may rise and fall, and stays well above 0.",
        f"Below {100 * COLLAPSED:.0f} % of its highest value: the teacher gives nearly the same feature everywhere.",
    ),
    "fresh": Rule(
        "Words are renewed",
        "words are stale",
        "A queue of K words that takes B images a step is turned over every K / B steps; its words are half as old on average. "
        "Words of k-means are replaced only when unused, and may grow old.",
        f"Words of a queue older than {STALE:g} turnovers: it is not being refilled.",
    ),
    "finite": Rule(
        "Numbers are finite",
        "numbers are not finite",
        "Every logged value is a number.",
        "Values that are not finite: the run has diverged, or is about to.",
    ),
}
"""Key -> what the rule means, in the order of a report."""


def judge(curves: Mapping[str, Curve], *, recipe: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Apply every rule to every level that was logged.

    Args:
        curves: metric name to curve, of one run.
        recipe: its resolved values, nested.
    """
    method = recipe.get("method", {})
    num_words, batch = method.get("num_words"), recipe.get("training", {}).get("batch_size")
    findings: list[Finding] = []
    for suffix in ("", "_conv4", "_conv5"):
        level = suffix.removeprefix("_")

        def tail(name: str, suffix: str = suffix) -> float | None:
            curve = curves.get(f"{name}{suffix}")
            return None if curve is None else fmean(curve.mean[-max(1, len(curve.mean) // 10) :])

        def add(rule: str, healthy: bool, detail: str, level: str = level) -> None:
            findings.append(Finding(rule=rule, level=level, healthy=healthy, detail=detail))

        image, whole, used = tail("perplexity_image"), tail("perplexity_batch"), tail("words_used")
        if image is not None and whole is not None:
            add("distinct", image <= ALIKE * whole, f"{image:.1f} words per image, {whole:.1f} per batch")
        if image is not None:
            add("bag", image >= ONE_WORD, f"{image:.1f} words per image")
        if whole is not None and num_words:
            share = whole / num_words
            breadth = f"{whole:.0f} of {num_words} words per batch ({100 * share:.0f} %)"
            breadth += f", {used:.0f} % nearest to some location" if used is not None else ""
            add("breadth", share >= FEW_WORDS and (used is None or used >= 100 * FEW_WORDS), breadth)
        if (distance := curves.get(f"distance{suffix}")) is not None:
            now, highest = tail("distance"), max(distance.high)
            assert now is not None
            add("spread", now > COLLAPSED * highest, f"squared distance {now:.3g}, at most {highest:.3g} during training")
        age = tail("word_age")
        if age is not None and num_words and batch and method.get("vocabulary") == "queue":
            turnover = num_words / batch
            add("fresh", age <= STALE * turnover, f"{age:.1f} steps old on average; the queue turns over in {turnover:.1f}")
    odd = sum(curve.omitted for curve in curves.values())
    if findings or odd:
        findings.append(Finding("finite", "", odd == 0, f"{odd} values are not finite" if odd else "all values are finite"))
    return tuple(findings)
