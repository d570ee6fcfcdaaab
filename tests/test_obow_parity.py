"""The method against `oracles.ObowOracle`: loss, gradients, vocabulary, mu_MSD and teacher, after 1 and after 12 steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from obowlab.config import Backbone, Obow
from obowlab.methods import Batch, OBoW, OneProcess
from tests.oracles import ObowOracle

STEM = "small"
TOTAL_STEPS = 20
NUM_IMAGES = 4
LEVELS = {1: ("conv5",), 2: ("conv4", "conv5")}
CASES = list(itertools.product(["soft", "hard"], ["local", "global_average", "local_average"], [1, 2]))


def relative_error(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-8)


def build(method: Obow, dtype: torch.dtype) -> tuple[OBoW, torch.optim.SGD, ObowOracle]:
    model = OBoW(
        method, backbone=Backbone(stem=STEM, width=4), total_steps=TOTAL_STEPS, seed=3, num_classes=None, comm=OneProcess()
    )
    model.to(dtype)
    optimizer = torch.optim.SGD(model.param_groups(weight_decay=5e-4), lr=0.05, momentum=0.9)
    state = {name: value.double() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    oracle = ObowOracle(method, state, stem=STEM, total_steps=TOTAL_STEPS, lr=0.05, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, oracle


def draw_batch(step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    original = torch.randn(NUM_IMAGES, 3, 40, 40, generator=generator, dtype=torch.float64)
    crops = torch.randn(NUM_IMAGES * 2, 3, 24, 24, generator=generator, dtype=torch.float64)
    patches = torch.randn(NUM_IMAGES * 3, 3, 16, 16, generator=generator, dtype=torch.float64)
    return original, {"crops": crops, "patches": patches}, torch.rand(NUM_IMAGES, 2, generator=generator, dtype=torch.float64)


def disagreement(method: Obow, *, dtype: torch.dtype, num_steps: int) -> float:
    """Train ours and the oracle side by side; return the largest relative error of any loss, gradient, weight or vocabulary."""
    model, optimizer, oracle = build(method, dtype)
    errors: dict[str, float] = {}
    for step in range(num_steps):
        original, views, uniforms = draw_batch(step)
        cast = {kind: images.to(dtype) for kind, images in views.items()}
        output = model(Batch(original=original.to(dtype), views=cast, uniforms=uniforms, step=step))
        optimizer.zero_grad()
        output.loss.backward()
        expected_loss, expected_grads = oracle.step(original, views, step=step, uniforms=uniforms)
        errors[f"loss {step}"] = relative_error(output.loss.detach(), torch.tensor(expected_loss, dtype=torch.float64))
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == expected_grads.keys()
        if step in (0, num_steps - 1):
            errors |= {f"gradient {step} {name}": relative_error(grads[name], grad) for name, grad in expected_grads.items()}
        optimizer.step()
    state = model.state_dict()
    learnt = oracle.learnt() | {f"teacher.{name}": value for name, value in oracle.teacher.items()}
    errors |= {name: relative_error(state[name], expected) for name, expected in learnt.items()}
    for level in method.levels:
        vocabulary = model.vocabularies[level]
        errors[f"words {level}"] = relative_error(vocabulary.words, torch.stack(oracle.words[level]))
        errors[f"msd {level}"] = relative_error(vocabulary.msd, torch.tensor(oracle.msd[level], dtype=torch.float64))
        assert int(vocabulary.pointer) == oracle.pointer[level]
    value, index = torch.tensor(list(errors.values())).max(dim=0)  # nan, where there is one
    print(f"{len(errors)} tensors compared; the worst, {list(errors)[int(index)]}: {float(value):.1e}")
    return float(value)


@pytest.mark.parametrize(("codes", "queue_vector", "num_levels"), CASES)
def test_twelve_steps_equal_the_oracle(codes: str, queue_vector: str, num_levels: int) -> None:
    # 26 words and 4 images a step: the ring wraps around within a step, twice.
    # delta_base is high enough for codes that are soft in earnest while mu_MSD is on its way from 0.5.
    method = Obow(codes=codes, queue_vector=queue_vector, levels=LEVELS[num_levels], num_words=26, delta_base=2.0)
    assert disagreement(method, dtype=torch.float64, num_steps=12) < 1e-7


@pytest.mark.parametrize("codes", ["soft", "hard"])
def test_one_step_in_float32_equals_the_oracle(codes: str) -> None:
    method = Obow(codes=codes, levels=LEVELS[2], num_words=26, delta_base=2.0)
    assert disagreement(method, dtype=torch.float32, num_steps=1) < 1e-5


def test_the_options_equal_the_oracle() -> None:
    method = Obow(
        levels=LEVELS[2],
        num_words=26,
        border=0,
        pooling="mean",
        learn_kappa=True,
        msd_start="first_batch",
        teacher_momentum_schedule="constant",
    )
    assert disagreement(method, dtype=torch.float64, num_steps=3) < 1e-7
