"""Values as people read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obowlab import text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "–"), (40, "40 s"), (600, "10 min"), (5400, "90 min"), (9000, "2 h 30 min"), (400_000, "4.6 days")],
)
def test_durations(seconds: float | None, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, "0 B"), (999, "999 B"), (3_400_000, "3.4 MB"), (2.5e15, "2500.0 TB")])
def test_sizes(num_bytes: float, expected: str) -> None:
    assert text.size(num_bytes) == expected


def test_timestamps() -> None:
    assert text.timestamp(0, utc=True) == "1970-01-01 00:00 UTC"
    assert text.timestamp(1_700_000_000, utc=True) == "2023-11-14 22:13 UTC"


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.05, "0.05"), (-3.25, "−3.25"), (12345.6, "12350"), (1.2e-5, "1.2e−5"), (3e6, "3e6")]
)
def test_numbers(value: float, expected: str) -> None:
    assert text.number(value) == expected


def test_estimates() -> None:
    assert text.estimate(None) == "–"
    assert text.estimate(8.823) == "8.82"
    assert text.estimate(8.823, 0.5) == "8.82 ± 0.50"
    assert text.estimate(8.823, 0.5, signed=True) == "+8.82 ± 0.50"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, "97.25 ± 0.94"),
        ({"low": 96.31, "high": 98.19}, "97.25 ± 0.94"),
        ({"low": 96.1666, "high": 98.0333}, "97.25 [96.17, 98.03]"),
    ],
)
def test_measurements(ends: dict[str, float], expected: str) -> None:
    assert text.measurement({"value": 97.25, "interval": 0.94, **ends}) == expected
    assert text.measurement(None) == "–"


@pytest.mark.parametrize(
    ("value", "expected", "given"),
    [
        (None, '"all"', "all"),
        ("soft", '"soft"', "soft"),
        ("true", '"true"', '"true"'),
        ("nan", '"nan"', '"nan"'),
        ("two words", '"two words"', '"two words"'),
        (0.1, "0.1", "0.1"),
        (True, "true", "true"),
        (["conv4", "conv5"], '["conv4", "conv5"]', '["conv4", "conv5"]'),
    ],
)
def test_settings(value: Any, expected: str, given: str) -> None:
    assert text.toml(value) == expected
    assert text.override(value) == given


def test_arguments_of_another_command() -> None:
    given = text.arguments("eval", "a run", protocol=("knn", "linear"), set=(), dataset=None, random=False, json=Path("x"))
    assert given == ("eval", "a run", "--protocol", "knn", "--protocol", "linear", "--no-random", "--json", "x")
    assert text.arguments(data_root="d", workers=0, wait=True) == ("--data-root", "d", "--workers", "0", "--wait")
