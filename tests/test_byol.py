"""BYOL against a version with loops, how its teacher follows, its crops, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from obowlab.config import Backbone, Byol, Views, load_recipe
from obowlab.errors import UserError
from obowlab.methods import BYOL, Batch, OneProcess
from obowlab.methods.byol import squared_distance
from obowlab.methods.projection import GlobalBatchNorm1d
from obowlab.methods.schedules import teacher_momentum
from obowlab.views.views import colour
from tests.oracles import linear, normalised

SMALL = Backbone(stem="small", width=4)
NUM_IMAGES, SIZE, HIDDEN = 4, 6, 12


def build(*, total_steps: int = 10, **options: Any) -> BYOL:
    method = Byol(**{"projection_size": SIZE, "hidden_size": HIDDEN, **options})
    return BYOL(method, backbone=SMALL, total_steps=total_steps, seed=0, num_classes=3, comm=OneProcess()).double().train()


def draw_batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        original=torch.zeros(NUM_IMAGES, 3, 1, 1),
        views={"crops": torch.randn(NUM_IMAGES * 2, 3, 16, 16, generator=generator, dtype=torch.float64)},
        uniforms=torch.zeros(NUM_IMAGES, 0),
        step=step,
        labels=torch.arange(NUM_IMAGES) % 3,
    )


def head(rows: torch.Tensor, layers: nn.Sequential) -> torch.Tensor:
    first, norm, _, last = layers
    return linear(normalised(linear(rows, first), norm).clamp(min=0), last)  # type: ignore[arg-type]


def distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of two vectors made 1 long, a number at a time."""
    lengths = [sum(value * value for value in vector) ** 0.5 for vector in (predicted, target)]
    return sum((p / lengths[0] - z / lengths[1]) ** 2 for p, z in zip(predicted, target, strict=True))  # type: ignore[return-value]


def test_loss_and_gradient_are_those_of_loops() -> None:
    method, other = build(), build()
    batch = draw_batch()
    output = method(batch)
    output.loss.backward()
    predicted, targets = [], []
    for view in range(2):
        images = torch.stack([batch.views["crops"][2 * image + view] for image in range(NUM_IMAGES)])
        predicted.append(head(head(other.student(images), other.projection), other.prediction))
        with torch.no_grad():
            targets.append(head(other.teacher(images), other.teacher_projection))
    loss = torch.zeros((), dtype=torch.float64)
    for p_rows, z_rows in ((predicted[0], targets[1]), (predicted[1], targets[0])):
        for p, z in zip(p_rows, z_rows, strict=True):
            loss = loss + distance(p, z) / NUM_IMAGES
    loss.backward()
    assert float(output.metrics["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    names = {"loss", "loss_crops", "projection_std", "teacher_momentum", "monitor_loss", "monitor_accuracy"}
    assert output.metrics.keys() == names
    found = dict(method.named_parameters())
    for name, parameter in other.named_parameters():
        if not name.startswith("monitor."):
            assert (parameter.grad is None) == name.startswith("teacher"), name
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-6, atol=1e-10, msg=name)


def test_the_loss_is_the_sum_of_two_squared_distances() -> None:
    def loss(p: list[float], z: list[float]) -> float:
        return float(squared_distance(torch.tensor([p], dtype=torch.float64), torch.tensor([z], dtype=torch.float64)))

    assert loss([1.0, 0.0], [0.6, 0.8]) == pytest.approx(0.8)
    assert loss([0.0, 2.0], [0.0, -3.0]) == pytest.approx(4.0)
    assert loss([1.0, 0.0], [0.6, 0.8]) + loss([0.0, 2.0], [0.0, -3.0]) == pytest.approx(4.8)
    for sign, expected in ((1.0, 0.0), (0.0, 2.0), (-1.0, 4.0)):  # twice each is the loss: 0, 4, 8
        assert loss([3.0, 0.0], [sign * 0.1, 0.0 if sign else 5.0]) == pytest.approx(expected)
    assert loss([0.0, 0.0], [0.0, 0.0]) == 0.0
    two = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.6, 0.8], [0.0, -3.0]])
    assert float(squared_distance(*two)) == pytest.approx(2.4)


def test_the_loss_starts_at_about_four() -> None:
    method = build(projection_size=64, hidden_size=128)
    loss = float(method(draw_batch()).metrics["loss"])
    assert loss == pytest.approx(4.0, abs=1.0)


def test_the_momentum_rises_from_its_start_to_one() -> None:
    found = [teacher_momentum(step, start=0.99, schedule="cosine", total_steps=100) for step in (0, 25, 50, 100)]
    assert found == pytest.approx([0.99, 0.9914645, 0.995, 1.0], abs=1e-7)


def test_the_teacher_is_a_float64_replay() -> None:
    """The authors move it after the student: with the new parameters, and the momentum of the step that ends."""
    method = build(total_steps=5, teacher_momentum=0.6)
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=0.0), lr=0.1)
    student = {**dict(method.student.named_parameters()), **dict(method.projection.named_parameters())}
    teacher = {**dict(method.teacher.named_parameters()), **dict(method.teacher_projection.named_parameters())}
    replay = {name: value.detach().numpy().copy() for name, value in student.items()}
    logged = []
    for step in range(4):
        output = method(draw_batch(step))
        for name, value in replay.items():
            np.testing.assert_allclose(teacher[name].numpy(), value, rtol=1e-12, atol=1e-15, err_msg=f"{step} {name}")
        logged.append(float(output.metrics["teacher_momentum"]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        tau = 1.0 - 0.4 * (1.0 + np.cos(np.pi * step / 5)) / 2.0
        replay = {name: tau * value + (1.0 - tau) * student[name].detach().numpy() for name, value in replay.items()}
    assert logged == pytest.approx([1.0 - 0.4 * (1.0 + np.cos(np.pi * max(step - 1, 0) / 5)) / 2.0 for step in range(4)])


def test_the_teachers_statistics_are_its_own() -> None:
    """It looks at crops with those of the batch and never gets the student's; its own follow what it sees."""
    method = build(teacher_momentum=1.0)
    frozen = copy.deepcopy(method.teacher)
    for step in range(2):
        for statistics in (method.student.bn1, method.student.layer4[0].bn2):
            statistics.running_mean.fill_(7.0)  # type: ignore[union-attr]
        method(draw_batch(step))
        with torch.no_grad():
            for view in range(2):
                frozen(draw_batch(step).views["crops"][view::2])
    found = method.teacher.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in frozen.state_dict().items())
    assert int(found["bn1.num_batches_tracked"]) == 4
    assert not torch.equal(found["bn1.running_mean"], torch.zeros_like(found["bn1.running_mean"]))


def test_the_heads_are_the_authors() -> None:
    method = BYOL(Byol(), backbone=Backbone(arch="resnet50"), total_steps=1, seed=0, num_classes=None, comm=OneProcess())
    for layers, inputs, count in ((method.projection, 2048, 9_449_472), (method.prediction, 256, 2_109_440)):
        assert [type(layer) for layer in layers] == [nn.Linear, GlobalBatchNorm1d, nn.ReLU, nn.Linear]
        assert sum(parameter.numel() for parameter in layers.parameters()) == count
        first, norm, _, last = layers
        assert (first.in_features, first.out_features, last.out_features) == (inputs, 4096, 256)
        assert last.bias is None
        assert not first.bias.any()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        for layer in (first, last):
            scaled = layer.weight.detach() * layer.in_features**0.5
            assert float(scaled.abs().max()) <= 2.0
            assert float(scaled.std()) == pytest.approx(0.8796, abs=2e-3)  # of a normal that is cut at two deviations


class Mirrored(OneProcess):
    """A second process whose rows are those of this one, turned round."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, -x)).detach()


def test_the_spread_is_that_of_the_rows_of_all_processes() -> None:
    """A process with one image has none of its own."""
    method = build()
    alone = float(method(draw_batch()).metrics["projection_std"])
    method = build()
    method.comm = Mirrored()
    both = float(method(draw_batch()).metrics["projection_std"])
    assert both == pytest.approx(SIZE**-0.5, rel=0.15)
    assert both != pytest.approx(alone, rel=1e-3)


def test_only_what_the_student_has_is_learnt() -> None:
    method = build()
    (group, monitor) = method.param_groups(weight_decay=1e-6)
    names = {id(p): name for name, p in method.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in group["params"]} == {"student", "projection", "prediction"}
    assert (group["name"], monitor["name"]) == ("method", "monitor")


@pytest.mark.parametrize("name", ["full-byol", "imagenet20-byol", "tiny-byol", "demo-byol"])
def test_the_recipes_crops_differ_in_blur_and_solarisation(name: str) -> None:
    views = load_recipe(name).recipe.views
    drawn = colour(views, seed=0, epoch=0, indices=np.arange(2000))
    blurred, solarised = (drawn.sigma > 0).mean(axis=0), drawn.solarised.mean(axis=0)
    assert blurred[0] == 1.0
    assert blurred[1] == pytest.approx(0.1, abs=0.03)
    assert solarised[0] == 0.0
    assert solarised[1] == pytest.approx(0.2, abs=0.03)
    assert views.saturation == 0.2
    assert views.interpolation == ("bicubic" if views.original_size == 224 else "bilinear")


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"num_crops": 1}, r"BYOL compares two crops .* views\.num_crops is 1 and views\.num_patches 0"),
        ({"num_crops": 3}, r"views\.num_crops is 3 "),
        ({"num_crops": 2, "num_patches": 5}, r"views\.num_patches 5: .* views\.num_patches to 0"),
        ({"num_crops": 2, "num_small_crops": 2}, r"BYOL has no use for views\.num_small_crops \(2\): set it to 0"),
        ({"num_crops": 2, "cutmix_probability": 0.5}, r"BYOL has no targets .* views\.cutmix_probability to 0\.0"),
    ],
)
def test_views_that_make_no_pair_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BYOL.check_views(Byol(), backbone=SMALL, views=Views(**views))
    BYOL.check_views(Byol(), backbone=SMALL, views=Views(num_crops=2))
