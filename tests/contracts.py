"""What every entry of a registry must do. A module `test_*.py` subclasses a contract; entries are found, not listed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from obowlab.config import Recipe, recipe_from_values
from obowlab.config.methods import needs_classes, word_levels
from obowlab.methods import METHODS, Batch, Method, Objects, OneProcess, Preparation, StepOutput, build_backbone
from obowlab.runs.metrics import lookup

ONLINE = frozenset({"monitor_loss", "monitor_accuracy"})
NUM_IMAGES = 4
NUM_CLASSES = 3
VALUES: dict[str, dict[str, object]] = {
    "bownet": {"teacher.method.name": "rotnet", "method.num_words": 30, "method.kmeans_points": 4},
    "moco": {"method.batchnorm_splits": 2, "method.queue_size": 10},
    "byol": {"method.projection_size": 8, "method.hidden_size": 16},
    "simclr": {"method.projection_size": 8},
    "detector": {"method.anchors": [8.0, 16.0], "method.pooled": 4, "method.regions": 16, "method.precise_batches": 2},
    "masks": {
        "method.name": "detector",
        "method.architecture": "fpn",
        "method.anchors": [4.0, 8.0, 16.0, 32.0, 64.0],
        "method.standard_side": 24.0,
        "method.width": 8,
        "method.head_width": 16,
        "method.regions": 16,
        "method.precise_batches": 2,
    },
    "simsiam": {"method.projection_size": 16, "method.prediction_size": 8},
    "swav": {"method.hidden_size": 16, "method.projection_size": 8, "method.num_prototypes": 12, "method.queue_size": 8},
}
"""What the methods need that cannot train four small images with their default settings, and methods in another form."""


def small_preparation(recipe: Recipe, *, num_images: int = 13, size: int = 40, dtype: torch.dtype = torch.float32) -> Preparation:
    """Return random images and draws, and an untrained teacher."""
    generator = torch.Generator().manual_seed(100)
    images = torch.randn(num_images, 3, size, size, generator=generator, dtype=dtype)
    draws = torch.rand(2, num_images, 200, generator=generator, dtype=torch.float64)
    teacher = None if recipe.teacher is None else build_backbone(recipe.backbone, seed=7).to(dtype).eval()
    return Preparation(
        teacher=teacher,
        num_images=num_images,
        originals=lambda numbers: iter(images[numbers].split(5)),
        uniforms=lambda numbers, count, lane: draws[lane][numbers, :count],
        seed=0,
        report=lambda line: None,
    )


def objects_of(step: int, *, size: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Objects, ...]:
    """Return two objects, rectangles, in each of `NUM_IMAGES` square images."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = []
    for _ in range(NUM_IMAGES):
        corners = torch.rand(2, 2, generator=generator) * 0.5 * size
        boxes = torch.cat((corners, corners + size * (0.2 + 0.2 * torch.rand(2, 2, generator=generator))), dim=1)
        outlines = tuple((np.array([x0, y0, x1, y0, x1, y1, x0, y1]),) for x0, y0, x1, y1 in boxes.tolist())
        labels = torch.randint(NUM_CLASSES, (2,), generator=generator)
        found.append(Objects(boxes.to(dtype), labels, (size, size), outlines))
    return tuple(found)


class MethodContract:
    """One training step at a time: finite, deterministic, resumable, and deaf to everything but its arguments."""

    @pytest.fixture(params=sorted({*METHODS, *VALUES}))
    def recipe(self, request: pytest.FixtureRequest) -> Recipe:
        values = {"method.name": request.param, "backbone.stem": "small", "backbone.width": 4, **VALUES.get(request.param, {})}
        return recipe_from_values(values, sources=dict.fromkeys(values, "contracts.py"))

    def build(self, recipe: Recipe, *, seed: int = 0, prepared: bool = True) -> tuple[Method[Any], torch.optim.SGD]:
        method = METHODS[recipe.method.name](
            recipe.method, backbone=recipe.backbone, total_steps=10, seed=seed, num_classes=NUM_CLASSES, comm=OneProcess()
        )
        if prepared:
            method.prepare(small_preparation(recipe))
        return method.train(), torch.optim.SGD(method.param_groups(weight_decay=1e-4), lr=0.05, momentum=0.9)

    def batch(self, step: int, num_uniforms: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return Batch(
            original=torch.randn(NUM_IMAGES, 3, 40, 40, generator=generator),
            views={kind: torch.randn(2 * NUM_IMAGES, 3, 16, 16, generator=generator) for kind in ("crops", "patches")},
            uniforms=torch.rand(NUM_IMAGES, num_uniforms, generator=generator, dtype=torch.float64),
            labels=torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=generator),
            step=step,
            objects=objects_of(step),
        )

    def train(self, method: Method[Any], optimizer: torch.optim.SGD, steps: range) -> StepOutput:
        for step in steps:
            output = method(self.batch(step, method.num_uniforms))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        return output

    def test_a_step_has_a_finite_loss_and_plain_metrics(self, recipe: Recipe) -> None:
        method, optimizer = self.build(recipe)
        output = self.train(method, optimizer, range(2))
        assert output.loss.shape == ()
        assert output.metrics.keys() & {"loss", *ONLINE} == {"loss", *(ONLINE if method.monitor else ())}
        assert (method.monitor is None) == needs_classes(recipe.method)
        for name, value in output.metrics.items():
            lookup(name)  # fails for a metric that runs/metrics.py does not describe
            assert value.shape == (), name
            assert not value.requires_grad, name
            assert torch.isfinite(value), name

    def test_gradients_reach_what_is_learnt_and_nothing_else(self, recipe: Recipe) -> None:
        method, optimizer = self.build(recipe)
        method(self.batch(0, method.num_uniforms)).loss.backward()
        learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in method.named_parameters():
            if id(parameter) in learnt:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
            else:
                assert parameter.grad is None, name
                assert not parameter.requires_grad, name
        assert {id(p) for p in method.encoder.parameters()} <= learnt

    def test_metrics_that_cost_something_are_left_out_unless_wanted(self, recipe: Recipe) -> None:
        outputs = []
        for wants_metrics in (True, False):
            method, _ = self.build(recipe)
            outputs.append(method(dataclasses.replace(self.batch(0, method.num_uniforms), wants_metrics=wants_metrics)))
        wanted, unwanted = outputs
        assert torch.equal(wanted.loss, unwanted.loss)
        assert all(torch.equal(value, wanted.metrics[name]) for name, value in unwanted.metrics.items())
        parts = {"loss_crops", "loss_patches", "loss_classes"}
        kinds = parts & wanted.metrics.keys()  # a method may learn from crops alone, a detector learns from neither
        always = {"loss", *(ONLINE if method.monitor else ()), *kinds}
        assert kinds
        assert always <= unwanted.metrics.keys() <= wanted.metrics.keys()
        assert not [name for name in unwanted.metrics if name.endswith(("_conv4", "_conv5", "_age"))]

    def test_the_online_classifier_does_not_touch_the_method(self, recipe: Recipe) -> None:
        method, _ = self.build(recipe)
        if method.monitor is None:
            pytest.skip(f"{recipe.method.name} has no online classifier")
        batch = self.batch(0, method.num_uniforms)
        assert batch.labels is not None
        grads = []
        for shown in (batch.labels, (batch.labels + 1) % NUM_CLASSES):
            method, optimizer = self.build(recipe)
            method(dataclasses.replace(batch, labels=shown)).loss.backward()
            grads.append([p.grad for group in optimizer.param_groups[:-1] for p in group["params"]])
        names = [group["name"] for group in optimizer.param_groups]
        assert (names[0], names[-1]) == ("method", "monitor")
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_its_state_is_all_it_remembers(self, recipe: Recipe) -> None:
        method, optimizer = self.build(recipe)
        self.train(method, optimizer, range(3))
        resumed, resumed_optimizer = self.build(recipe, seed=1, prepared=False)
        resumed.load_state_dict(method.state_dict(), strict=True)
        # Copied: an optimiser shares the tensors it is given.
        resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.manual_seed(99)  # torch's generator plays no part
        expected, found = self.train(method, optimizer, range(3, 5)), self.train(resumed, resumed_optimizer, range(3, 5))
        assert torch.equal(expected.loss, found.loss)
        state = resumed.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())

    def test_its_visual_words_are_of_its_teachers_levels(self, recipe: Recipe) -> None:
        method, optimizer = self.build(recipe)
        self.train(method, optimizer, range(2))
        words = method.visual_words()
        assert word_levels(recipe.method) == (() if words is None else tuple(words.levels))
        if words is None:
            pytest.skip(f"{recipe.method.name} describes images without words")
        maps, _ = words.teacher.levels(self.batch(0, method.num_uniforms).original, tuple(words.levels))
        assert words.levels
        for level, each in words.levels.items():
            assert each.vectors.shape == (len(each.vectors), maps[level].shape[1]), level
            assert min(maps[level].shape[2:]) > 2 * each.border, level
            assert each.delta.shape == (), level
            assert float(each.delta) >= 0, level
            assert each.inserted_at.shape == (len(each.vectors),), level
            assert not each.inserted_at.is_floating_point(), level

    def test_a_seed_decides_the_start(self, recipe: Recipe) -> None:
        torch.manual_seed(1)
        first = self.build(recipe)[0].state_dict()
        torch.manual_seed(2)
        second, other = self.build(recipe)[0].state_dict(), self.build(recipe, seed=5)[0].state_dict()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert any(not torch.equal(value, other[name]) for name, value in first.items())

    def test_preparing_is_a_function_of_its_arguments(self, recipe: Recipe) -> None:
        first, second = self.build(recipe, prepared=False)[0], self.build(recipe, prepared=False)[0]
        before = copy.deepcopy(first.state_dict())
        anything = first.prepare(small_preparation(recipe))
        torch.manual_seed(3)
        assert second.prepare(small_preparation(recipe)) == anything
        after, again = first.state_dict(), second.state_dict()
        assert all(torch.equal(value, again[name]) for name, value in after.items())
        assert anything == any(not torch.equal(value, before[name]) for name, value in after.items())
        assert before.keys() == after.keys()

    def test_the_encoder_gives_one_vector_per_image(self, recipe: Recipe) -> None:
        encoder = self.build(recipe)[0].encoder
        features = encoder.eval()(torch.randn(3, 3, 20, 20))
        assert features.shape == (3, encoder.num_features)
        assert encoder.num_features == 8 * recipe.backbone.width
