"""SimCLR against a version with loops, its loss, its head, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from obowlab.config import Backbone, Simclr, Views, load_recipe
from obowlab.errors import UserError
from obowlab.methods import Batch, OneProcess, SimCLR, build_backbone
from obowlab.methods.projection import GlobalBatchNorm1d
from obowlab.methods.simclr import contrast
from tests.oracles import linear, normalised

SMALL = Backbone(stem="small", width=4)
NUM_IMAGES, SIZE = 4, 6


def build(**options: Any) -> SimCLR:
    method = Simclr(**{"projection_size": SIZE, "zero_residual": False, **options})
    return SimCLR(method, backbone=SMALL, total_steps=10, seed=0, num_classes=3, comm=OneProcess()).double().train()


def draw_batch(step: int = 0, *, num_images: int = NUM_IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        original=torch.zeros(num_images, 3, 1, 1),
        views={"crops": torch.randn(num_images * 2, 3, 16, 16, generator=generator, dtype=torch.float64)},
        uniforms=torch.zeros(num_images, 0),
        step=step,
        labels=torch.arange(num_images) % 3,
    )


def row_losses(views: tuple[torch.Tensor, torch.Tensor], *, temperature: float) -> torch.Tensor:
    """Return NT-Xent of every row of view 1, then of view 2, [2N], for rows of any length: loops over rows and negatives."""
    rows = [row / sum(value * value for value in row) ** 0.5 for view in views for row in view]
    count = len(views[0])
    losses = []
    for own, row in enumerate(rows):
        similar = [sum(a * b for a, b in zip(row, other, strict=True)) / temperature for other in rows]
        total = sum(torch.exp(value) for index, value in enumerate(similar) if index != own)  # type: ignore[arg-type]
        losses.append(torch.log(total) - similar[(own + count) % (2 * count)])  # type: ignore[arg-type]
    return torch.stack(losses)


def nt_xent(views: tuple[torch.Tensor, torch.Tensor], *, temperature: float) -> torch.Tensor:
    """Return the method's loss of projections, [N, D] by view."""
    projected = F.normalize(torch.stack(views, dim=1).flatten(0, 1), dim=1)
    return F.cross_entropy(*contrast(projected, projected, rank=0, temperature=temperature))


@pytest.mark.parametrize("layers", [2, 3])
def test_loss_and_gradient_are_those_of_loops(layers: int) -> None:
    method, other = build(projection_layers=layers), build(projection_layers=layers)
    batch = draw_batch()
    output = method(batch)
    output.loss.backward()
    rows = other.student(batch.views["crops"])  # both crops in one pass: batch norm sees them together
    for layer in other.projection:
        rows = linear(rows, layer) if isinstance(layer, nn.Linear) else rows
        rows = normalised(rows, layer) if isinstance(layer, nn.BatchNorm1d) else rows
        rows = rows.clamp(min=0) if isinstance(layer, nn.ReLU) else rows
    loss = row_losses((rows[::2], rows[1::2]), temperature=0.1).mean()
    loss.backward()
    assert float(output.metrics["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    assert output.metrics.keys() == {"loss", "loss_crops", "contrast_accuracy", "monitor_loss", "monitor_accuracy"}
    found = dict(method.named_parameters())
    for name, parameter in other.named_parameters():
        if not name.startswith("monitor."):
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-6, atol=1e-10, msg=name)


def test_the_loss_is_that_of_the_specification() -> None:
    views = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[0.6, 0.8], [0.8, 0.6]]).double()
    rows = row_losses(views, temperature=0.5)
    assert rows.tolist() == pytest.approx([1.0271231, 1.0271231, 1.5143045, 1.5143045], abs=1e-7)
    assert float(nt_xent(views, temperature=0.5)) == pytest.approx(1.2707138, abs=1e-7)


def test_the_loss_is_a_cross_entropy_without_the_diagonal_and_does_not_know_first_from_second() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).unbind()
    rows = F.normalize(torch.cat((first, second)), dim=1)
    logits = rows @ rows.T / 0.3
    logits[range(10), range(10)] = -torch.inf
    expected = F.cross_entropy(logits, (torch.arange(10) + 5) % 10)
    assert float(nt_xent((first, second), temperature=0.3)) == pytest.approx(float(expected), rel=1e-12)
    assert float(nt_xent((second, first), temperature=0.3)) == pytest.approx(float(expected), rel=1e-12)


def test_each_process_finds_its_partners_among_the_rows_of_all() -> None:
    everyone = F.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    whole, partners = contrast(everyone, everyone, rank=0, temperature=0.5)
    assert partners.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    assert torch.equal(whole.isinf(), torch.eye(12, dtype=torch.bool))
    for rank in range(3):
        mine = slice(4 * rank, 4 * rank + 4)
        logits, columns = contrast(everyone[mine], everyone, rank=rank, temperature=0.5)
        torch.testing.assert_close(logits, whole[mine], rtol=1e-12, atol=1e-12)
        assert torch.equal(columns, partners[mine])


def test_the_loss_starts_near_that_of_chance() -> None:
    rows = F.normalize(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = F.cross_entropy(*contrast(rows, rows, rank=0, temperature=1.0))
    assert float(loss) == pytest.approx(math.log(511), abs=0.05)


def test_crops_that_are_found_are_counted() -> None:
    method = build()
    batch = draw_batch()
    same = batch.views["crops"][::2].repeat_interleave(2, dim=0)
    found = dataclasses.replace(batch, views={"crops": same})
    assert float(method(found).metrics["contrast_accuracy"]) == 100.0
    swapped = same.view(NUM_IMAGES // 2, 2, 2, 3, 16, 16).transpose(1, 2).flatten(0, 2)  # the partner is another image
    assert float(method(dataclasses.replace(batch, views={"crops": swapped})).metrics["contrast_accuracy"]) == 0.0


@pytest.mark.parametrize("layers", [2, 3])
def test_the_head_is_the_authors(layers: int) -> None:
    method = SimCLR(
        Simclr(projection_layers=layers),
        backbone=Backbone(arch="resnet50"),
        total_steps=1,
        seed=0,
        num_classes=None,
        comm=OneProcess(),
    )
    head = list(method.projection)
    assert [type(layer) for layer in head] == [
        *[nn.Linear, GlobalBatchNorm1d, nn.ReLU] * (layers - 1),
        nn.Linear,
        GlobalBatchNorm1d,
    ]
    lines = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(line.in_features, line.out_features) for line in lines] == [(2048, 2048)] * (layers - 1) + [(2048, 128)]
    assert all(line.bias is None for line in lines)
    assert [float(line.weight.detach().std()) for line in lines] == pytest.approx([0.01] * layers, rel=0.01)
    assert [name for name, _ in head[-1].named_parameters()] == ["weight"]
    assert [name for name, _ in head[1].named_parameters()] == ["weight", "bias"]
    zeros = {name for name, value in method.student.named_parameters() if not value.any() and name.endswith("weight")}
    assert zeros == {
        f"layer{stage}.{block}.bn3.weight" for stage, depth in zip("1234", (3, 4, 6, 3), strict=True) for block in range(depth)
    }
    plain = build_backbone(SMALL, seed=0).double().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in build().student.state_dict().items())


@pytest.mark.parametrize("name", ["full-simclr", "imagenet20-simclr"])
def test_the_large_recipes_have_the_authors_colours(name: str) -> None:
    views = load_recipe(name).recipe.views
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (views.jitter_probability, views.grayscale_probability, views.blur_probability) == (0.8, 0.2, 0.5)
    assert (views.cut_scale, views.cut_size, views.interpolation) == ((0.08, 1.0), 224, "bicubic")


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"num_crops": 1}, r"SimCLR compares two crops .* views\.num_crops is 1 and views\.num_patches 0"),
        ({"num_crops": 3}, r"views\.num_crops is 3 "),
        ({"num_crops": 2, "num_patches": 5}, r"views\.num_patches 5: .* views\.num_patches to 0"),
        ({"num_crops": 2, "num_small_crops": 2}, r"SimCLR has no use for views\.num_small_crops \(2\): set it to 0"),
        ({"num_crops": 2, "cutmix_probability": 0.5}, r"SimCLR has no targets .* views\.cutmix_probability to 0\.0"),
    ],
)
def test_views_that_make_no_pair_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimCLR.check_views(Simclr(), backbone=SMALL, views=Views(**views))
    SimCLR.check_views(Simclr(), backbone=SMALL, views=Views(num_crops=2))
