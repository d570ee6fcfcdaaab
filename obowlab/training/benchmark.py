"""Seconds of one training step of recipes, on random images: `python -m obowlab.training.benchmark`, started by the lab.

Reads {"device": ..., "recipes": {key: recipe}} from standard input and prints a line {"key": ..., "step_s": ...} for every recipe
that could be timed. Loading and colours are not counted; a small batch is timed and scaled up, so it is an estimate.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from obowlab.config import Recipe
from obowlab.methods import METHODS, OneProcess

BATCH = 16
"""At most so many images are timed; a multiple of what methods split a batch into."""

STEPS = 3
"""Steps timed, after one that warms up; the fastest counts."""


def step_seconds(recipe: Recipe, *, device: torch.device) -> float:
    """Return the seconds of one step of the recipe's batch size on one device, forward, backward and update.

    Args:
        recipe: what to time; its data set is not needed.
        device: where.
    """
    batch = min(BATCH, recipe.training.batch_size)
    method = METHODS[recipe.method.name](
        recipe.method, backbone=recipe.backbone, total_steps=STEPS + 1, seed=0, num_classes=None, comm=OneProcess()
    )
    method.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=0.0), lr=0.0, momentum=0.9)
    views = recipe.views
    kinds = {"crops": (views.num_crops, views.cut_size), "patches": (views.num_patches, views.patch_size)}
    student = {kind: _images(batch * count, size, device=device) for kind, (count, size) in kinds.items() if count}
    original = _images(batch, views.original_size, device=device)
    times = []
    for step in range(STEPS + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bfloat16"):
            draws = torch.rand(batch, method.num_draws, dtype=torch.float64, device=device)
            loss = method(original, student, step=step, draws=draws).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:]) * recipe.training.batch_size / batch


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
        print(json.dumps({"key": key, "step_s": step_seconds(recipe, device=torch.device(wanted))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
