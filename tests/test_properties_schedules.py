"""Laws of the schedules, on drawn settings; the same examples every time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obowlab.config import Optimizer
from obowlab.methods.schedules import half_cosine, learning_rate, teacher_momentum

drawn = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@drawn
@given(
    peak=st.floats(1e-3, 10.0),
    end=st.floats(0.0, 1.0),
    warmup=st.floats(0.0, 3.0),
    cosine_per=st.sampled_from(["step", "epoch"]),
    epochs=st.integers(1, 6),
    steps_per_epoch=st.integers(1, 8),
)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(
    peak: float, end: float, warmup: float, cosine_per: str, epochs: int, steps_per_epoch: int
) -> None:
    optimizer = Optimizer.model_validate(
        {"learning_rate": peak, "end_learning_rate": end * peak, "warmup_epochs": min(warmup, epochs), "cosine_per": cosine_per}
    )
    rates = [
        learning_rate(step, optimizer=optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
        for step in range(epochs * steps_per_epoch + 1)
    ]
    warmup_steps = optimizer.warmup_epochs * steps_per_epoch
    rising = [rate for step, rate in enumerate(rates) if step < warmup_steps]
    falling = rates[len(rising) :]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b - 1e-12 * peak for a, b in itertools.pairwise(falling))
    assert all(0.0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate >= end * peak - 1e-12 for rate in falling)
    assert rates[-1] == pytest.approx(end * peak, abs=1e-12 * peak)
    if not rising:
        assert rates[0] == pytest.approx(peak)
    if cosine_per == "epoch":
        whole = [rate for step, rate in enumerate(rates[:-1]) if step // steps_per_epoch * steps_per_epoch >= warmup_steps]
        assert len(set(whole)) <= epochs, "one value an epoch"


@drawn
@given(start=st.floats(0.0, 1.0), total_steps=st.integers(1, 50))
def test_the_teacher_slows_down_to_a_stop(start: float, total_steps: int) -> None:
    momenta = [teacher_momentum(step, start=start, schedule="cosine", total_steps=total_steps) for step in range(total_steps + 3)]
    assert momenta[0] == pytest.approx(start)
    assert all(a <= b for a, b in itertools.pairwise(momenta))
    assert momenta[total_steps:] == [1.0] * 3, "and stays there"
    assert teacher_momentum(total_steps, start=start, schedule="constant", total_steps=total_steps) == start


@drawn
@given(progress=st.floats(0.0, 1.0))
def test_half_a_cosine_is_symmetric(progress: float) -> None:
    assert half_cosine(progress) + half_cosine(1.0 - progress) == pytest.approx(1.0)
    assert 0.0 <= half_cosine(progress) <= 1.0
