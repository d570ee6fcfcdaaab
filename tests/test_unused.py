"""Settings that change nothing are those, and only those, that `unused_settings` names: every one is changed, and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from obowlab.config import Recipe, recipe_from_values
from obowlab.config.unused import unused_settings
from obowlab.data.datasets import open_split
from obowlab.evaluation.linear import probe_learning_rate
from obowlab.methods.schedules import learning_rate
from obowlab.training.optimizers import build_optimizer, set_learning_rate
from obowlab.views.draws import draw
from obowlab.views.loaders import train_loader
from obowlab.views.photometric import render
from tests.command_line import Obowlab
from tests.contracts import MethodContract

SMALL: dict[str, Any] = {
    "views.original_size": 24,
    "views.original_resize": 27,
    "views.num_crops": 1,
    "views.crop_size": 16,
    "views.small_crop_size": 8,
    "views.num_patches": 2,
    "views.patch_source_size": 27,
    "views.patch_size": 8,
    "views.patch_jitter": 3,
    "backbone.stem": "small",
    "backbone.width": 4,
    "method.num_words": 12,
    "method.border": 0,
}
VIEWS = {
    "views.crop_extent": "whole",
    "views.crop_size": 12,
    "views.crop_scale": [0.3, 0.6],
    "views.whole_scale": [0.3, 1.0],
    "views.small_crop_size": 12,
    "views.small_crop_scale": [0.3, 0.6],
    "views.patch_size": 10,
    "views.patch_source_size": 30,
    "views.patch_scale": [0.3, 0.6],
    "views.patch_jitter": 1,
    "views.cutmix_alpha": 9.0,
}
OPTIMIZER = {
    "optimizer.trust": 0.1,
    "optimizer.end_learning_rate": 0.01,
    "optimizer.warmup_start": 0.01,
    "optimizer.decay_every": 1,
    "optimizer.decay_after": [2],
    "optimizer.decay_factor": 0.7,
    "optimizer.cosine_per": "epoch",
}
METHOD = {
    "method.queue_vector": "global_average",
    "method.kmeans_momentum": 0.3,
    "method.kmeans_patience": 1,
    "method.sinkhorn_epsilon": 0.5,
    "method.sinkhorn_iterations": 1,
    "method.delta_base": 0.4,
    "method.msd_start": "first_batch",
    "method.msd_momentum": 0.2,
    "method.kappa": 9.0,
    "method.learn_kappa": True,
    "method.head_batchnorm": False,
}
LINEAR = {"evaluation.linear.decay_every": 2, "evaluation.linear.cosine_per": "epoch"}

CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, VIEWS),
    ({"views.num_patches": 0}, VIEWS),
    ({"views.num_crops": 0}, VIEWS),
    ({"views.crop_extent": "whole"}, VIEWS | {"views.crop_extent": "part"}),
    ({"views.crop_extent": "resized"}, VIEWS),
    ({"views.num_small_crops": 2}, VIEWS),
    ({"views.cutmix_probability": 1.0}, VIEWS),
    ({}, OPTIMIZER),
    ({"optimizer.name": "larc"}, OPTIMIZER),
    ({"optimizer.warmup_epochs": 2.0}, OPTIMIZER),
    ({"optimizer.schedule": "steps"}, OPTIMIZER),
    ({"optimizer.schedule": "steps", "optimizer.decay_after": [1]}, OPTIMIZER),
    ({}, METHOD),
    ({"method.codes": "hard"}, METHOD),
    ({"method.head": "fixed"}, METHOD),
    ({"method.vocabulary": "kmeans_replace"}, METHOD),
    ({"method.vocabulary": "kmeans_sinkhorn"}, METHOD),
    ({}, LINEAR),
    ({"evaluation.linear.schedule": "cosine"}, LINEAR),
]


def recipe_with(values: dict[str, Any]) -> Recipe:
    return recipe_from_values(values, sources=dict.fromkeys(values, "test_unused.py"))


def rendered(recipe: Recipe, *, data_root: Path) -> list[torch.Tensor]:
    """Return all views of four images."""
    split = open_split("small", "train", data_root=data_root)
    subset = np.arange(4)
    batches = train_loader(split, subset=subset, views=recipe.views, batch_size=4, seed=3, backend="torch", workers=0)
    batch = next(batches.batches(epoch=0, num_uniforms=1))
    draws = draw(recipe.views, seed=3, epoch=0, indices=batch.indices, num_uniforms=1)
    views = render(batch, draws, device=torch.device("cpu"))
    return [views.original, *views.student.values(), *views.cutmix_lambda.values()]


def trained(recipe: Recipe) -> list[torch.Tensor]:
    """Return the encoder after four steps that are epochs of two, and the learning rates, of the linear classifier as well."""
    contract = MethodContract()
    method, _ = contract.build(recipe)
    optimizer = build_optimizer(recipe.optimizer, method=method)
    rates = [learning_rate(step, optimizer=recipe.optimizer, epochs=4, steps_per_epoch=2) for step in range(8)]
    probe = [probe_learning_rate(step, config=recipe.evaluation.linear, steps_per_epoch=2) for step in range(40)]
    for step in range(4):
        set_learning_rate(optimizer, rates[step], fixed=recipe.optimizer.learning_rate)
        contract.train(method, optimizer, range(step, step + 1))
    return [torch.tensor(rates), torch.tensor(probe), *(value.detach().clone() for value in method.encoder.state_dict().values())]


def are_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(("choice", "others"), CHOICES, ids=lambda found: ",".join(f"{k}={v}" for k, v in found.items())[:60])
def test_settings_that_change_nothing_are_named(choice: dict[str, Any], others: dict[str, Any], data_root: Path) -> None:
    base = SMALL | choice

    def trace(values: dict[str, Any]) -> list[torch.Tensor]:
        recipe = recipe_with(values)
        return rendered(recipe, data_root=data_root) if others.keys() <= VIEWS.keys() else trained(recipe)

    before, unused = trace(base), unused_settings(recipe_with(base))
    changing = {key for key, value in others.items() if not are_equal(before, trace(base | {key: value}))}
    assert changing == others.keys() - unused.keys()


def test_a_command_tells_what_changes_nothing(obowlab: Obowlab, workplace: Path) -> None:
    words = ("--set", "method.head=fixed", "--set", "method.kappa=8", "--set", "optimizer.momentum=0.8")
    code, _, err = obowlab("run", "demo", "--dry-run", *words)
    assert code == 0
    assert err.splitlines() == ['Warning: --set method.kappa=8 changes nothing, as method.head is "fixed".']
