import itertools
import math

import pytest

from obowlab.config import Optimizer
from obowlab.methods.schedules import learning_rate, teacher_momentum


def rates(optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> list[float]:
    return [
        learning_rate(step, optimizer=optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
        for step in range(epochs * steps_per_epoch + 1)
    ]


def test_the_papers_resnet18_schedule_is_half_a_cosine_to_zero() -> None:
    found = rates(Optimizer(learning_rate=0.05), epochs=8, steps_per_epoch=10)
    assert found[0] == 0.05
    assert found[40] == pytest.approx(0.025)
    assert found[20] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[80] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(found))


def test_the_papers_resnet50_schedule_warms_up_per_step_and_steps_its_cosine_per_epoch() -> None:
    optimizer = Optimizer(learning_rate=0.03, end_learning_rate=3e-5, warmup_epochs=10, cosine_per="epoch")
    found = rates(optimizer, epochs=200, steps_per_epoch=3)
    assert found[0] == 0
    assert found[15] == pytest.approx(0.015)
    assert found[30] == 0.03
    assert found[33] == found[34] == found[35] > found[36]
    assert found[36] == pytest.approx(3e-5 + (0.03 - 3e-5) * 0.5 * (1 + math.cos(math.pi * 2 / 190)))
    assert found[599] > 3e-5, "the last epoch does not reach the end"
    assert found[600] == pytest.approx(3e-5)


def test_swavs_warm_up_for_large_batches_begins_above_zero() -> None:
    optimizer = Optimizer(learning_rate=4.8, end_learning_rate=0.0048, warmup_epochs=10, warmup_start=0.3)
    found = rates(optimizer, epochs=800, steps_per_epoch=2)
    assert found[:20] == pytest.approx([0.3 + 4.5 * step / 20 for step in range(20)])
    assert found[20] == 4.8
    assert found[-1] == pytest.approx(0.0048, rel=1e-2)
    assert found[21:] == rates(optimizer.model_copy(update={"warmup_start": 0.0}), epochs=800, steps_per_epoch=2)[21:]


def test_a_warm_up_that_ends_within_an_epoch_does_not_start_the_cosine_early() -> None:
    found = rates(Optimizer(learning_rate=1.0, warmup_epochs=1.5, cosine_per="epoch"), epochs=4, steps_per_epoch=4)
    assert found[6] == found[7] == 1.0
    assert found[8] < 1.0


def test_steps_divide_the_rate_by_ten_after_every_so_many_epochs() -> None:
    optimizer = Optimizer(learning_rate=0.4, schedule="steps", decay_every=2, warmup_epochs=1, end_learning_rate=0.3)
    found = rates(optimizer, epochs=6, steps_per_epoch=2)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.4, *[0.04] * 4, *[0.004] * 4, 0.0004])


def test_after_the_last_step_the_rate_stays_at_its_end() -> None:
    optimizer = Optimizer(learning_rate=1.0, end_learning_rate=0.25)
    assert learning_rate(30, optimizer=optimizer, epochs=2, steps_per_epoch=10) == pytest.approx(0.25)


def test_a_run_that_is_all_warm_up_has_a_rate() -> None:
    found = rates(Optimizer(learning_rate=1.0, warmup_epochs=2), epochs=2, steps_per_epoch=5)
    assert found[9] == pytest.approx(0.9)


def test_teacher_momentum() -> None:
    def cosine(step: int) -> float:
        return teacher_momentum(step, start=0.99, schedule="cosine", total_steps=100)

    assert cosine(0) == pytest.approx(0.99)
    assert cosine(50) == pytest.approx(0.995)
    assert cosine(25) == pytest.approx(1 - 0.01 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine(100) == 1.0
    assert teacher_momentum(77, start=0.9, schedule="constant", total_steps=100) == 0.9
