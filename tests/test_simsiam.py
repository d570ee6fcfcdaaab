"""SimSiam against a version with loops, what it learns, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from obowlab.config import Backbone, Optimizer, Simsiam, Views
from obowlab.errors import UserError
from obowlab.methods import Batch, OneProcess, SimSiam, build_backbone, build_student
from obowlab.methods.projection import GlobalBatchNorm1d, channel_std
from obowlab.methods.schedules import learning_rate
from obowlab.methods.simsiam import negative_cosine
from obowlab.training.optimizers import build_optimizer, set_learning_rate
from tests.oracles import linear, normalised

SMALL = Backbone(stem="small", width=4)
NUM_IMAGES, SIZE, HIDDEN = 4, 12, 6


def build(**options: Any) -> SimSiam:
    method = Simsiam(**{"projection_size": SIZE, "prediction_size": HIDDEN, **options})
    return SimSiam(method, backbone=SMALL, total_steps=10, seed=0, num_classes=3, comm=OneProcess()).double()


def draw_batch(step: int = 0, *, num_images: int = NUM_IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        original=torch.zeros(num_images, 3, 1, 1),
        views={"crops": torch.randn(num_images * 2, 3, 16, 16, generator=generator, dtype=torch.float64)},
        uniforms=torch.zeros(num_images, 0),
        step=step,
        labels=torch.arange(num_images) % 3,
    )


@pytest.mark.parametrize("layers", [2, 3])
def test_loss_and_gradient_are_those_of_loops(layers: int) -> None:
    method = build(projection_layers=layers, zero_residual=False).train()
    other = build(projection_layers=layers, zero_residual=False).train()
    batch = draw_batch()
    output = method(batch)
    output.loss.backward()
    projected, predicted = [], []
    for view in range(2):
        images = torch.stack([batch.views["crops"][2 * image + view] for image in range(NUM_IMAGES)])
        rows = other.student(images)
        for layer in other.projection:
            rows = linear(rows, layer) if isinstance(layer, nn.Linear) else rows
            rows = normalised(rows, layer) if isinstance(layer, nn.BatchNorm1d) else rows
            rows = rows.clamp(min=0) if isinstance(layer, nn.ReLU) else rows
        projected.append(rows)
        first, norm, _, last = other.prediction
        predicted.append(linear(normalised(linear(rows, first), norm).clamp(min=0), last))  # type: ignore[arg-type]
    loss = torch.zeros((), dtype=torch.float64)
    for p_rows, z_rows in ((predicted[0], projected[1]), (predicted[1], projected[0])):
        for p, z in zip(p_rows, z_rows.detach(), strict=True):
            dot = sum(a * b for a, b in zip(p, z, strict=True))
            loss = loss - dot / (sum(a * a for a in p) ** 0.5 * sum(b * b for b in z) ** 0.5) / (2 * NUM_IMAGES)
    loss.backward()
    assert float(output.metrics["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    assert output.metrics.keys() == {"loss", "loss_crops", "projection_std", "monitor_loss", "monitor_accuracy"}
    found = dict(method.named_parameters())
    for name, parameter in other.named_parameters():
        if not name.startswith("monitor.") and parameter.requires_grad:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-6, atol=1e-10, msg=name)


def test_the_loss_is_minus_a_cosine_whatever_the_lengths() -> None:
    def loss(p: list[list[float]], z: list[list[float]]) -> float:
        return float(negative_cosine(torch.tensor(p, dtype=torch.float64), torch.tensor(z, dtype=torch.float64)))

    assert loss([[1.0, 0.0]], [[0.6, 0.8]]) == pytest.approx(-0.6)
    assert loss([[0.0, 2.0]], [[0.0, -3.0]]) == pytest.approx(1.0)
    assert loss([[1.0, 0.0], [0.0, 2.0]], [[0.6, 0.8], [0.0, -3.0]]) == pytest.approx(0.2)
    assert loss([[5.0, 0.0]], [[0.0, 0.1]]) == 0.0


def test_what_is_predicted_gets_no_gradient() -> None:
    projected = torch.randn(3, 4, requires_grad=True)
    predicted = torch.randn(3, 4, requires_grad=True)
    negative_cosine(predicted, projected).backward()
    assert projected.grad is None
    assert predicted.grad is not None


def test_the_loss_starts_near_zero_and_the_projections_spread_out() -> None:
    method = build(projection_size=64, prediction_size=16).train()
    output = method(draw_batch(num_images=64))
    assert abs(float(output.metrics["loss"])) < 0.3
    assert float(output.metrics["projection_std"]) == pytest.approx(64**-0.5, rel=0.1)
    collapsed = torch.randn(1, 64).expand(8, -1)
    assert float(channel_std(collapsed)) == 0.0
    assert float(channel_std(torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)))) == pytest.approx(
        0.0221, abs=2e-4
    )


def test_the_heads_are_the_authors() -> None:
    method = SimSiam(Simsiam(), backbone=Backbone(arch="resnet50"), total_steps=1, seed=0, num_classes=None, comm=OneProcess())
    projection, prediction = list(method.projection), list(method.prediction)
    assert [type(each) for each in projection] == [*[nn.Linear, GlobalBatchNorm1d, nn.ReLU] * 2, nn.Linear, GlobalBatchNorm1d]
    assert [type(each) for each in prediction] == [nn.Linear, GlobalBatchNorm1d, nn.ReLU, nn.Linear]
    shapes = [(each.in_features, each.out_features, each.bias is not None) for each in projection if isinstance(each, nn.Linear)]
    assert shapes == [(2048, 2048, False), (2048, 2048, False), (2048, 2048, True)]
    shapes = [(each.in_features, each.out_features, each.bias is not None) for each in prediction if isinstance(each, nn.Linear)]
    assert shapes == [(2048, 512, False), (512, 2048, True)]
    assert list(projection[-1].parameters()) == []
    assert not projection[-2].bias.requires_grad  # type: ignore[union-attr]
    zeros = {name for name, value in method.student.named_parameters() if not value.any() and name.endswith("weight")}
    assert zeros == {
        f"layer{stage}.{block}.bn3.weight" for stage, depth in zip("1234", (3, 4, 6, 3), strict=True) for block in range(depth)
    }


def test_a_random_baseline_is_the_student_as_it_starts() -> None:
    method = build(zero_residual=True)
    baseline = build_student(method.method, backbone=SMALL, seed=0).double().state_dict()
    assert all(torch.equal(value, baseline[name]) for name, value in method.student.state_dict().items())


def test_without_zeros_the_student_starts_as_every_other() -> None:
    alone = build_backbone(SMALL, seed=0).double().state_dict()
    plain, zeroed = (build(zero_residual=zero).student.state_dict() for zero in (False, True))
    assert all(torch.equal(value, plain[name]) for name, value in alone.items())
    differing = {name for name, value in alone.items() if not torch.equal(value, zeroed[name])}
    assert differing == {f"layer{stage}.{block}.bn2.weight" for stage in range(1, 5) for block in range(2)}


@pytest.mark.parametrize("fixed", [True, False])
def test_the_predictors_rate_stays_and_the_frozen_bias_does_not_move(fixed: bool) -> None:
    method = build(fixed_prediction_rate=fixed).train()
    settings = Optimizer(learning_rate=0.05)
    optimizer = build_optimizer(settings, method=method)
    frozen = method.projection[-2].bias
    before = frozen.detach().clone()
    rates = []
    for step in range(4):
        rate = learning_rate(step, optimizer=settings, epochs=1, steps_per_epoch=4)
        set_learning_rate(optimizer, rate, fixed=settings.learning_rate)
        optimizer.zero_grad()
        method(draw_batch(step)).loss.backward()
        optimizer.step()
        names = {id(p): name for name, p in method.named_parameters()}
        of = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append((of["student.conv1.weight"], of["prediction.0.weight"], of["monitor.fc.weight"]))
    assert frozen.grad is None
    assert torch.equal(frozen, before)
    schedule = [0.05 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [rate for rate, _, _ in rates] == pytest.approx(schedule)
    assert [rate for _, rate, _ in rates] == pytest.approx([0.05] * 4 if fixed else schedule)
    assert [rate for _, _, rate in rates] == pytest.approx(schedule)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"num_crops": 1}, r"views\.num_crops is 1 and views\.num_patches 0: set views\.num_crops to 2"),
        ({"num_crops": 3}, r"views\.num_crops is 3 "),
        ({"num_crops": 2, "num_patches": 5}, r"views\.num_patches 5: .* views\.num_patches to 0"),
        ({"num_crops": 2, "num_small_crops": 6}, r"SimSiam has no use for views\.num_small_crops \(6\): set it to 0"),
        ({"num_crops": 2, "cutmix_probability": 0.5}, r"SimSiam has no targets .* views\.cutmix_probability to 0\.0"),
    ],
)
def test_views_that_make_no_pair_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimSiam.check_views(Simsiam(), backbone=SMALL, views=Views(**views))
    SimSiam.check_views(Simsiam(), backbone=SMALL, views=Views(num_crops=2))
