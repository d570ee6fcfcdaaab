"""Training steps of every method on a device, from the same weights on the same batches, and how far two recordings differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from obowlab.config import Recipe, recipe_from_values
from obowlab.methods import METHODS, Batch, Method, OneProcess, build_backbone
from tests.contracts import VALUES, objects_of
from tests.gpu.precision import HALVES, precision

NUM_IMAGES = 8
MORE_IMAGES = {"byol": 64}
"""Of methods whose gradients rounding turns most: two heads with batch norms, whose inputs are almost equal in the beginning."""

NUM_CLASSES = 3
TOTAL_STEPS = 10
MIXED = ("obow", "bownet", "supervised")
"""The methods that learn from mixed crops as well."""

NAMES = sorted({*METHODS, "masks"})
"""All methods; the detector with masks beside that without."""

ROUNDED = sorted(METHODS.keys() - {"detector"})
"""The methods whose steps are compared in lower precision too: rounding decides which regions a detector learns from."""

NOTHING = 1e-6
"""The share of the largest number of its kind below which a whole tensor is taken for rounding."""

CPU = torch.device("cpu")
LOSS_SCALE = {"float16": 1024.0}
"""Without it small gradients would be 0 in float16."""

MORE_VALUES: dict[str, dict[str, object]] = {
    # 26 words and 8 images a step: the ring wraps around. delta_base makes codes soft in earnest.
    "obow": {"method.levels": ["conv4", "conv5"], "method.num_words": 26, "method.delta_base": 2.0},
    # Scores are divided by these: rounding is to be compared, and not what they make of it.
    "swav": {"method.temperature": 0.5, "method.sinkhorn_epsilon": 0.5},
}


def recipe_of(name: str) -> Recipe:
    """Return a recipe with a small ResNet for one of NAMES."""
    values = {
        "method.name": name,
        "backbone.stem": "small",
        "backbone.width": 8,
        **VALUES.get(name, {}),
        **MORE_VALUES.get(name, {}),
    }
    return recipe_from_values(values, sources=dict.fromkeys(values, "steps.py"))


def build(name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Method[Any], torch.optim.SGD]:
    """Return a method, whose weights are made on the CPU, and SGD."""
    recipe = recipe_of(name)
    method = METHODS[recipe.method.name](
        recipe.method, backbone=recipe.backbone, total_steps=TOTAL_STEPS, seed=3, num_classes=NUM_CLASSES, comm=OneProcess()
    )
    if name == "bownet":  # the words without k-means, which is not compared here
        method.teacher.load_state_dict(build_backbone(recipe.backbone, seed=7).state_dict())
        with torch.no_grad():
            maps, _ = method.teacher.levels(draw_batch(100, method, device=CPU, dtype=torch.float32).original, ("conv5",))
        method.words.copy_(maps["conv5"].flatten(2).transpose(1, 2).flatten(0, 1)[: len(method.words)])
    method.train().to(device, dtype)
    method.to(memory_format=torch.channels_last)
    return method, torch.optim.SGD(method.param_groups(weight_decay=5e-4), lr=0.05, momentum=0.9)


def draw_batch(step: int, method: Method[Any], *, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return the batch of a step: the same numbers on every device."""
    generator = torch.Generator().manual_seed(step)

    def images(count: int, size: int) -> Tensor:
        drawn = torch.randn(count, 3, size, size, generator=generator)
        return drawn.to(device, dtype, memory_format=torch.channels_last)

    count = MORE_IMAGES.get(method.method.name, NUM_IMAGES)
    original, crops, patches = images(count, 40), images(count * 2, 24), images(count * 3, 16)
    uniforms = torch.rand(count, method.num_uniforms, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    share = torch.rand(count * 2, generator=generator)
    objects = [each for part in (step, step + 500) for each in objects_of(part, dtype=dtype)]
    return Batch(
        original=original,
        views={"crops": crops, "patches": patches},
        uniforms=uniforms.to(device),
        step=step,
        labels=labels.to(device),
        objects=tuple(replace(each, boxes=each.boxes.to(device), labels=each.labels.to(device)) for each in objects),
        cutmix_lambda={"crops": share.to(device, dtype)} if method.method.name in MIXED else {},
    )


def record(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, number: str = "float32", steps: int
) -> dict[str, Tensor]:
    """Train some steps; return, on the CPU, every loss, the gradients of the last step, and the state after it.

    Args:
        name: one of NAMES.
        device: where.
        dtype: of weights and images.
        number: one of PRECISIONS.
        steps: how many.
    """
    method, optimizer = build(name, device=device, dtype=dtype)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        batch = draw_batch(step, method, device=device, dtype=dtype)
        with precision(number, device=device):
            output = method(batch)
            optimizer.zero_grad()
        scale = LOSS_SCALE.get(number, 1.0)
        with precision("float32" if number in HALVES else number, device=device):  # backward follows forward's types by itself
            (output.loss * scale).backward()
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
        optimizer.step()
        found |= {f"metric {metric} {step}": value for metric, value in output.metrics.items() if metric.startswith("loss")}
    found |= {f"gradient {key}": p.grad for key, p in method.named_parameters() if p.grad is not None}
    found |= {f"state {key}": value for key, value in method.state_dict().items()}
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return for every recorded tensor the largest difference relative to its largest number; infinite for nan.

    Whole numbers (pointers, counts, steps) must be equal. A tensor that is nothing but rounding, as the gradient of a bias before
    a batch norm is, is held against the largest number of its kind.
    """
    assert found.keys() == expected.keys()
    errors = {}
    largest: dict[str, float] = {}
    for key, value in expected.items():
        if value.is_floating_point():
            kind = key.split()[0]
            largest[kind] = max(largest.get(kind, 0.0), float(value.abs().max()))
    for key, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(found[key], value), key
            continue
        scale = max(float(value.abs().max()), NOTHING * largest[key.split()[0]])
        error = float((found[key].double() - value.double()).abs().max()) / scale
        errors[key] = error if error == error else float("inf")
    return errors


def worst(errors: dict[str, float], kind: str) -> tuple[str, float]:
    """Return the name and error of the worst tensor whose name begins with `kind`."""
    key = max((key for key in errors if key.startswith(kind)), key=errors.__getitem__)
    return key, errors[key]


def gradient_angle(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the cosine between the gradients of all weights together."""
    keys = [key for key in expected if key.startswith("gradient ")]
    one, other = (torch.cat([each[key].double().flatten() for key in keys]) for each in (found, expected))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))
