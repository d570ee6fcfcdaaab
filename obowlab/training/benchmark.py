"""Time and memory of training steps of recipes, on random images: `python -m obowlab.training.benchmark`.

`obowlab.launch.cost` starts it. Reads {"device": ..., "recipes": {key: recipe}} from standard input and prints a line with the
key, seconds and sizes for every recipe that could be measured. Loading and colours are not counted, and small batches are scaled
up: an estimate.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from obowlab.config import Recipe
from obowlab.methods import METHODS, Batch, Method, OneProcess
from obowlab.precision import autocast, set_float32_mode
from obowlab.training.memory import forget_peak, peak_mib
from obowlab.training.optimizers import build_optimizer, set_learning_rate

BATCH = 16
"""At most so many images are timed; a multiple of what methods split a batch into."""

STEPS = 3
"""Steps timed, after one that warms up; the fastest counts."""


def measure(recipe: Recipe, *, device: torch.device) -> dict[str, float]:
    """Return what training a recipe takes on one device.

    Args:
        recipe: what to measure; its data set is not needed.
        device: where.

    Returns:
        `step_s`, seconds of a step of the recipe's batch: forward, backward and update; `memory_mib` and `memory_mib_per_image`,
        the peak as a line through two batches; `checkpoint_mib` and `encoder_mib`.
    """
    set_float32_mode(recipe.training.precision)
    batch = min(BATCH, recipe.training.batch_size)
    half = max(1, batch // 2)
    method, optimizer = _build(recipe, device=device)
    _, low_mib = _steps(recipe, method=method, optimizer=optimizer, batch=half, count=1)
    step_s, high_mib = _steps(recipe, method=method, optimizer=optimizer, batch=batch, count=STEPS)
    per_image = max(0.0, (high_mib - low_mib) / max(1, batch - half))
    weights = _mib(method.state_dict().values())
    momentum = _mib(method.parameters())
    return {
        "step_s": step_s * recipe.training.batch_size / batch,
        "memory_mib": round(max(0.0, high_mib - batch * per_image), 1),
        "memory_mib_per_image": round(per_image, 3),
        "checkpoint_mib": round(weights + momentum, 2),
        "encoder_mib": round(_mib(method.encoder.state_dict().values()), 2),
    }


def _build(recipe: Recipe, *, device: torch.device) -> tuple[Method[Any], torch.optim.Optimizer]:
    method = METHODS[recipe.method.name](
        recipe.method, backbone=recipe.backbone, total_steps=STEPS + 1, seed=0, num_classes=None, comm=OneProcess()
    )
    method.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, method=method)
    set_learning_rate(optimizer, 0.0)  # noise is not to be learnt
    return method, optimizer


def _steps(
    recipe: Recipe, *, method: Method[Any], optimizer: torch.optim.Optimizer, batch: int, count: int
) -> tuple[float, float]:
    """Return the seconds of the fastest of so many steps after one that warms up, and the peak memory in MiB."""
    device = next(method.parameters()).device
    forget_peak(device)
    views = recipe.views
    kinds = {"crops": (views.num_crops, views.cut_size), "patches": (views.num_patches, views.patch_size)}
    student = {kind: _images(batch * count, size, device=device) for kind, (count, size) in kinds.items() if count}
    original = _images(batch, views.original_size, device=device)
    times = []
    for step in range(count + 1):
        started = time.perf_counter()
        with autocast(recipe.training.precision, device=device):
            numbers = torch.rand(batch, method.num_uniforms, dtype=torch.float64, device=device)
            loss = method(Batch(original=original, views=student, uniforms=numbers, step=step, wants_metrics=False)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:]), peak_mib(device)


def _mib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _images(count: int, size: int, *, device: torch.device) -> torch.Tensor:
    return torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def main() -> int:
    """Time the recipes of standard input."""
    request = json.load(sys.stdin)
    wanted = request["device"]
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    for key, values in request["recipes"].items():
        recipe = Recipe.model_validate_json(json.dumps(values))
        print(json.dumps({"key": key, **measure(recipe, device=torch.device(wanted))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
