"""BoWNet against slow versions: words by Lloyd's algorithm, drawn locations, hard targets of a frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from obowlab.config import Backbone, Bownet, Recipe, Rotnet, Views
from obowlab.errors import UserError
from obowlab.methods import Batch, BoWNet, OneProcess
from obowlab.methods.kmeans import _pass_on_cpu, kmeans, lloyd_pass
from tests.contracts import small_preparation

SMALL = Backbone(stem="small", width=4)


def build(**options: Any) -> tuple[BoWNet, Recipe]:
    method = Bownet(**{"num_words": 30, "kmeans_points": 4, **options})
    recipe = Recipe(method=method, backbone=SMALL, teacher=Recipe(method=Rotnet(), backbone=SMALL))
    return BoWNet(method, backbone=SMALL, total_steps=10, seed=0, num_classes=3, comm=OneProcess()), recipe


def silent(line: str) -> None:
    pass


# --------------------------------------------------------------------------------------------------------------- k-means


def lloyd(points: Tensor, centres: Tensor) -> Tensor:
    """One pass of Lloyd's algorithm, where no centre loses all its points."""
    mine: list[list[Tensor]] = [[] for _ in centres]
    for point in points:
        mine[int(((centres - point) ** 2).sum(1).argmin())].append(point)
    return torch.stack([torch.stack(group).mean(0) for group in mine])


def test_a_pass_more_is_one_of_lloyds() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 2, generator=generator) + torch.randn(4, 2, generator=generator).repeat(15, 1) * 6
    for passes in (1, 2, 3):
        before = kmeans(points, num_words=4, iterations=passes, seed=2, report=silent)
        after = kmeans(points, num_words=4, iterations=passes + 1, seed=2, report=silent)
        torch.testing.assert_close(after, lloyd(points, before), rtol=1e-4, atol=1e-4)


def test_words_are_a_function_of_points_and_seed() -> None:
    points = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    first = kmeans(points, num_words=20, iterations=5, seed=1, report=silent)
    torch.manual_seed(9)
    assert torch.equal(kmeans(points, num_words=20, iterations=5, seed=1, report=silent), first)
    assert not torch.equal(kmeans(points, num_words=20, iterations=5, seed=2, report=silent), first)
    assert first.shape == (20, 8)
    assert first.dtype == torch.float32


def test_as_many_words_as_points_are_the_points() -> None:
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    words = kmeans(points, num_words=7, iterations=3, seed=0, report=silent)
    assert sorted(map(tuple, words.tolist())) == sorted(map(tuple, points.tolist()))


# A GPU's passes are torch's own; here they run on the CPU.


@pytest.mark.parametrize("elements", [1, 200, 1 << 20])
def test_a_pass_of_torch_is_lloyds_and_faisss(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.methods.kmeans.CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 6, generator=generator) + torch.randn(4, 6, generator=generator).repeat(15, 1) * 6
    centres = points[:4].clone()
    found, distance = lloyd_pass(points, centres, num_words=4, seed=0)
    torch.testing.assert_close(found, lloyd(points, centres), rtol=1e-4, atol=1e-4)
    faisss, expected = _pass_on_cpu(points, centres.clone(), num_words=4, seed=0)
    torch.testing.assert_close(found, faisss, rtol=1e-4, atol=1e-4)
    assert distance == pytest.approx(expected, rel=1e-4)
    assert distance == pytest.approx(
        float(torch.cdist(points.double(), centres.double()).min(1).values.square().mean()), rel=1e-5
    )


def test_an_empty_centre_is_put_beside_one_with_many_points() -> None:
    points = torch.ones(10, 2)
    points[:9, 0] += torch.linspace(-0.1, 0.1, 9)
    points[9] = -1.0
    centres = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [50.0, 50.0], [60.0, 60.0]])
    found, _ = lloyd_pass(points, centres, num_words=4, seed=0)
    assert torch.equal(found, lloyd_pass(points, centres, num_words=4, seed=0)[0])
    assert torch.equal(found[1], centres[1]), "a centre with one point is not split"
    assert len(found.unique(dim=0)) == 4
    assert float((found[[0, 2, 3]] - 1.0).abs().max()) < 0.01
    distances = [lloyd_pass(points, centres, num_words=4, seed=0)[1]]
    for _ in range(8):
        found, distance = lloyd_pass(points, found, num_words=4, seed=0)
        distances.append(distance)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


def test_progress_is_told() -> None:
    lines: list[str] = []
    kmeans(torch.randn(50, 3), num_words=5, iterations=25, seed=0, report=lines.append)
    assert [line.split(",")[0] for line in lines] == [f"k-means: pass {number} of 25" for number in (10, 20, 25)]
    distances = [float(line.rsplit(" ", 1)[1].rstrip(".")) for line in lines]
    assert distances == sorted(distances, reverse=True)


# ------------------------------------------------------------------------------------------------------------- preparing


def test_words_come_from_drawn_locations_of_drawn_images() -> None:
    method, recipe = build(num_words=30, kmeans_points=2, border=1)  # 60 points of 13 images: 5 of 9 locations, 12 images
    preparation = small_preparation(recipe)
    assert method.prepare(preparation)
    assert preparation.teacher is not None
    assert all(torch.equal(value, preparation.teacher.state_dict()[name]) for name, value in method.teacher.state_dict().items())
    order = sorted(range(13), key=lambda image: float(preparation.uniforms(torch.tensor([image]), 1, 0)))
    points = []
    for image in order[:12]:
        conv5 = preparation.teacher.levels(next(preparation.originals(torch.tensor([image]))), ("conv5",))[0]["conv5"][0].detach()
        local = [conv5[:, row, column] for row in range(1, 4) for column in range(1, 4)]
        draws = preparation.uniforms(torch.tensor([image]), 9, 1)[0].tolist()
        points += [local[place] for place in sorted(range(9), key=lambda place: draws[place])[:5]]
    expected = kmeans(torch.stack(points), num_words=30, iterations=25, seed=0, report=silent)
    torch.testing.assert_close(method.words, expected, rtol=1e-4, atol=1e-5)


def test_the_seed_reaches_k_means() -> None:
    words = []
    for seed in (0, 1):
        method, recipe = build()
        method.prepare(dataclasses.replace(small_preparation(recipe), seed=seed))
        words.append(method.words)
    assert not torch.equal(*words)


def test_fewer_features_than_words_are_refused_in_one_sentence() -> None:
    method, recipe = build(num_words=120)
    with pytest.raises(
        UserError, match=r"13 training images have 117 local features in all, too few for 120 words: lower method\."
    ):
        method.prepare(small_preparation(recipe))
    method, recipe = build(num_words=117)
    assert method.prepare(small_preparation(recipe))


@pytest.mark.parametrize(("size", "fits"), [(16, False), (24, True)])
def test_a_map_that_the_border_eats_is_refused(size: int, fits: bool) -> None:
    views = Views(original_size=size, original_resize=40, crop_size=16)
    if fits:
        BoWNet.check_views(Bownet(), backbone=SMALL, views=views)
        return
    with pytest.raises(UserError, match=r"conv5 map of the original view is 2x2.*method\.border.*views\.original_size"):
        BoWNet.check_views(Bownet(), backbone=SMALL, views=views)


# ----------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("level", "pooling", "mixed"), [("conv5", "max", False), ("conv4", "mean", False), ("conv5", "max", True)]
)
def test_loss_is_the_cross_entropy_with_the_frozen_teachers_words(level: str, pooling: str, mixed: bool) -> None:
    method, recipe = build(level=level, pooling=pooling)
    method.prepare(small_preparation(recipe))
    method.train()
    assert not method.teacher.training
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    original = torch.randn(4, 3, 40, 40, generator=generator)
    views = {"crops": torch.randn(8, 3, 16, 16, generator=generator), "patches": torch.randn(4, 3, 16, 16, generator=generator)}
    cutmix_lambda = {"crops": torch.rand(8, generator=generator)} if mixed else {}
    labels = torch.tensor([0, 1, 2, 0])
    student = {name: value.clone() for name, value in method.student.state_dict().items()}
    output = method(
        Batch(original=original, views=views, uniforms=torch.zeros(4, 0), step=0, labels=labels, cutmix_lambda=cutmix_lambda)
    )
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())

    targets = []
    maps = method.teacher.levels(original, (level,))[0][level]
    for image in maps:
        image = image[:, 1:-1, 1:-1]
        counts = [0.0] * 30
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                word = int(((method.words - image[:, row, column]) ** 2).sum(1).argmin())
                counts[word] = 1.0 if pooling == "max" else counts[word] + 1.0
        targets.append([count / sum(counts) for count in counts])
    method.student.load_state_dict(student)
    for kind, images in views.items():
        features = method.student(images)
        per_image = len(images) // 4
        terms = []
        for number, feature in enumerate(features):
            logits = (method.head.fc.weight @ feature).tolist()
            log_sum = math.log(sum(math.exp(value) for value in logits))
            image = number // per_image
            own = float(cutmix_lambda[kind][number]) if kind in cutmix_lambda else 1.0
            neighbour = image + 1 if image % 2 == 0 else image - 1
            target = [own * a + (1 - own) * b for a, b in zip(targets[image], targets[neighbour], strict=True)]
            terms.append(-sum(p * (value - log_sum) for p, value in zip(target, logits, strict=True)))
        assert float(output.metrics[f"loss_{kind}"]) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert float(output.metrics["loss"]) == pytest.approx(float(output.metrics["loss_crops"] + output.metrics["loss_patches"]))
    per_level = {"distance", "words_used", "target_entropy", "perplexity_image", "perplexity_batch", "prediction_entropy"}
    expected = {f"{name}_{level}" for name in per_level} | {"loss", "loss_kl", "loss_crops", "loss_patches"}
    assert output.metrics.keys() == expected | {"monitor_loss", "monitor_accuracy"}
    assert float(output.metrics["loss_kl"]) > 0


def test_the_online_classifier_is_given_the_class_that_most_of_a_view_shows() -> None:
    method, recipe = build()
    method.prepare(small_preparation(recipe))
    seen: list[Tensor] = []
    assert method.monitor is not None
    metrics = method.monitor.metrics

    def remember(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen.append(labels)
        return metrics(features, labels)

    method.monitor.metrics = remember  # type: ignore[method-assign]
    views = {"crops": torch.randn(8, 3, 16, 16), "patches": torch.randn(4, 3, 16, 16)}
    method(
        Batch(
            original=torch.randn(4, 3, 40, 40),
            views=views,
            uniforms=torch.zeros(4, 0),
            step=0,
            labels=torch.tensor([0, 1, 2, 0]),
            cutmix_lambda={"crops": torch.tensor([0.9, 0.1, 0.5, 0.4, 1.0, 0.0, 0.6, 0.3])},
        )
    )
    assert seen[0].tolist() == [0, 1, 0, 1, 0, 1, 2, 0, 2, 0, 2, 0]
