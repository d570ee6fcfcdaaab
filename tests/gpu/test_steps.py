"""A training step of every method on a GPU against the same step on the CPU in float64.

Bounds are relative to the largest number of a tensor. In less than float64, ReLU decides: a number that rounding takes over zero
changes single gradients by percents (on a CPU, float32 against float64: up to 1.5 % after one step, 40 % after three). So there
gradients are compared by their direction, and after one step.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu import steps

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

FLOAT64_BOUND = {1: 1e-9, 3: 1e-7}
"""Only the order of sums differs; the second is the bound that the method keeps to its oracle (test_obow_parity.py)."""

FLOAT32_BOUND, FLOAT32_TURN = 1e-4, 1e-3
"""Losses, words, mu_MSD and teacher; 1 - cosine of the gradients. On a CPU 3e-7 and 3e-6; cuDNN may choose Winograd's
convolution, whose numbers grow before they cancel, which costs one to two decimals."""

LOW_BOUNDS = {"tf32": (2**-8, 0.02), "bfloat16": (2**-6, 0.1), "float16": (2**-8, 0.02)}
"""Loss, 1 - cosine of the gradients. bfloat16 has 8 bits, so 2^-8 is its rounding and four times that the bound; TF32 and float16
have 11 bits and are given eight times theirs."""

TURNS_MORE = {"byol": 3.0}
"""Factors of the second bound. On a CPU, BYOL's gradients of 64 images turn by 0.087 to 0.128 in bfloat16 and 0.008 to 0.018 in
float16, over five batches."""


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", steps.NAMES)
def test_float64_equals_the_cpu(name: str, count: int) -> None:
    if name == "masks":
        pytest.importorskip("pycocotools")
    expected = steps.record(name, device=steps.CPU, dtype=torch.float64, steps=count)
    found = steps.record(name, device=CUDA, dtype=torch.float64, steps=count)
    errors = steps.differences(found, expected)
    key, error = steps.worst(errors, "")
    print(f"{len(errors)} tensors; the worst, {key}: {error:.1e}")
    assert error < FLOAT64_BOUND[count], key
    if name == "obow":  # it compares what it says it does
        assert {"state vocabularies.conv4.words", "state vocabularies.conv5.msd", "state teacher.conv1.weight"} <= errors.keys()


@pytest.mark.parametrize("name", steps.ROUNDED)
def test_float32_equals_the_cpu_in_float64(name: str) -> None:
    expected = steps.record(name, device=steps.CPU, dtype=torch.float64, steps=1)
    found = steps.record(name, device=CUDA, steps=1)
    errors = steps.differences({key: found[key] for key in expected}, expected)
    for kind in ("metric loss", "state vocabularies", "state teacher", "state queue", "state words"):
        if any(key.startswith(kind) for key in errors):
            key, error = steps.worst(errors, kind)
            assert error < FLOAT32_BOUND, key
    assert 1 - steps.gradient_angle(found, expected) < FLOAT32_TURN


@pytest.mark.parametrize("number", sorted(LOW_BOUNDS))
@pytest.mark.parametrize("name", steps.ROUNDED)
def test_lower_precision_stays_within_its_bounds(name: str, number: str) -> None:
    if number != "float16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no {number}")
    expected = steps.record(name, device=steps.CPU, dtype=torch.float64, steps=1)
    found = steps.record(name, device=CUDA, number=number, steps=1)
    losses = [float(each["metric loss 0"]) for each in (found, expected)]
    error = abs(losses[0] - losses[1]) / max(abs(losses[1]), 1.0)  # SimSiam's is a cosine, which may be near 0
    turn = 1 - steps.gradient_angle(found, expected)
    print(f"loss {error:.1e} (2^{math.log2(max(error, 1e-12)):.1f}), gradients turned by {turn:.1e}")
    bound, turn_bound = LOW_BOUNDS[number]
    assert error < bound
    assert turn < turn_bound * TURNS_MORE.get(name, 1.0)
    for key, value in found.items():
        assert torch.isfinite(value).all(), key
