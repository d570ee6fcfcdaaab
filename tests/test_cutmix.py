"""Cutmix against slow versions: boxes drawn one by one, pixels pasted one by one, targets mixed view by view."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from obowlab.config import Backbone, Obow, Views
from obowlab.data.datasets import open_split
from obowlab.errors import UserError
from obowlab.methods import Batch, OBoW, OneProcess, bow
from obowlab.randomness import Stream, uniforms
from obowlab.views.loaders import train_loader
from obowlab.views.photometric import RenderedViews, cutmix, render
from obowlab.views.views import cutmix_boxes

VIEWS = Views(
    original_size=24,
    original_resize=27,
    num_crops=2,
    crop_size=16,
    num_patches=2,
    patch_source_size=27,
    patch_size=8,
    patch_jitter=3,
    cutmix_probability=0.7,
)
CPU = torch.device("cpu")


def slow_box(views: Views, *, seed: int, epoch: int, index: int, crop: int) -> tuple[int, int, int, int]:
    """The released code of CutMix, on one crop."""
    u = uniforms(seed=seed, epoch=epoch, indices=np.array([index]), stream=Stream.CUTMIX, count=4, lane=crop)[0]
    if not u[0] < views.cutmix_probability:
        return 0, 0, 0, 0
    side = views.crop_size if views.crop_extent == "part" else views.original_size
    share = float(stats.beta(views.cutmix_alpha, views.cutmix_alpha).ppf(u[1]))
    cut = int(side * math.sqrt(1.0 - share))
    row, column = int(u[2] * side), int(u[3] * side)
    top, bottom = max(0, row - cut // 2), min(side, row + cut // 2)
    left, right = max(0, column - cut // 2), min(side, column + cut // 2)
    return top, left, bottom, right


@pytest.mark.parametrize("changes", [{}, {"crop_extent": "whole"}, {"cutmix_probability": 1.0}, {"cutmix_alpha": 0.4}])
def test_boxes_are_those_of_the_released_code(changes: dict[str, object]) -> None:
    views = VIEWS.model_copy(update=changes)
    indices = np.arange(100, 160)
    boxes = cutmix_boxes(views, seed=5, epoch=3, indices=indices)
    expected = [[slow_box(views, seed=5, epoch=3, index=i, crop=crop) for crop in range(2)] for i in indices.tolist()]
    assert boxes.tolist() == [[list(box) for box in image] for image in expected]
    mixed = (boxes[..., 2] > boxes[..., 0]).mean()
    assert abs(mixed - views.cutmix_probability) < 0.2
    assert not np.array_equal(boxes[:, 0], boxes[:, 1]), "every crop has draws of its own"


def test_boxes_depend_on_seed_epoch_and_image_alone() -> None:
    all_boxes = cutmix_boxes(VIEWS, seed=5, epoch=3, indices=np.arange(20))
    assert np.array_equal(cutmix_boxes(VIEWS, seed=5, epoch=3, indices=np.array([7, 3])), all_boxes[[7, 3]])
    for other in ({"seed": 6, "epoch": 3}, {"seed": 5, "epoch": 4}):
        assert not np.array_equal(cutmix_boxes(VIEWS, indices=np.arange(20), **other), all_boxes)


def test_pixels_are_pasted_from_the_neighbours_same_crop() -> None:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randn(6 * 2, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    boxes = torch.from_numpy(cutmix_boxes(VIEWS, seed=1, epoch=0, indices=np.arange(6)))
    before = crops.clone()
    mixed, kept_shares = cutmix(crops, boxes)
    assert torch.equal(crops, before)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for image in range(6):
        neighbour = image + 1 if image % 2 == 0 else image - 1
        for crop in range(2):
            expected = before[image * 2 + crop].clone()
            top, left, bottom, right = boxes[image, crop].tolist()
            kept = 0
            for row in range(16):
                for column in range(16):
                    if top <= row < bottom and left <= column < right:
                        expected[:, row, column] = before[neighbour * 2 + crop][:, row, column]
                    else:
                        kept += 1
            assert torch.equal(mixed[image * 2 + crop], expected)
            assert float(kept_shares[image * 2 + crop]) == kept / 256, "the share is exact"
    assert (kept_shares < 1).any()
    assert (kept_shares == 1).any()


def rendered(data_root: Path, *, views: Views, rank: int = 0, world_size: int = 1) -> RenderedViews:
    split = open_split("small", "train", data_root=data_root)
    loader = train_loader(
        split,
        subset=np.arange(40),
        views=views,
        batch_size=8,
        seed=3,
        rank=rank,
        world_size=world_size,
        backend="torch",
    )
    batch = next(iter(loader.batches(epoch=1)))
    return render(batch, batch.numbers.on(CPU)[0], device=CPU)


def test_only_crops_are_mixed_and_two_processes_mix_alike(data_root: Path) -> None:
    plain = rendered(data_root, views=VIEWS.model_copy(update={"cutmix_probability": 0.0}))
    mixed = rendered(data_root, views=VIEWS)
    assert plain.cutmix_lambda == {}
    assert mixed.cutmix_lambda.keys() == {"crops"}
    assert torch.equal(mixed.original, plain.original)
    assert torch.equal(mixed.student["patches"], plain.student["patches"])
    changed = (mixed.student["crops"] != plain.student["crops"]).any(dim=1).double().mean(dim=(1, 2))
    assert bool((changed <= 1.0 - mixed.cutmix_lambda["crops"] + 1e-6).all())
    assert changed.max() > 0.1
    halves = [rendered(data_root, views=VIEWS, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.student["crops"] for half in halves]), mixed.student["crops"])
    assert torch.equal(torch.cat([half.cutmix_lambda["crops"] for half in halves]), mixed.cutmix_lambda["crops"])


@pytest.mark.parametrize(("batch_size", "world_size", "multiple"), [(5, 1, 2), (6, 2, 4)])
def test_a_share_without_pairs_is_refused(batch_size: int, world_size: int, multiple: int, data_root: Path) -> None:
    split = open_split("small", "train", data_root=data_root)
    arguments = {"subset": np.arange(40), "batch_size": batch_size, "seed": 0, "world_size": world_size, "backend": "torch"}
    with pytest.raises(UserError, match=rf"training\.batch_size a multiple of {multiple}, or change --procs"):
        train_loader(split, views=VIEWS, **arguments)
    train_loader(split, views=VIEWS.model_copy(update={"cutmix_probability": 0.0}), **arguments)


def test_loss_of_mixed_views_view_by_view() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    target /= target.sum(1, keepdim=True)
    log_prediction = torch.log_softmax(torch.randn(4, 3, 7, generator=generator, dtype=torch.float64), dim=-1)
    share = torch.rand(4, 3, generator=generator, dtype=torch.float64)

    def loss_and_entropy(cutmix_lambda: dict[str, torch.Tensor]) -> tuple[float, float]:
        found = bow.prediction_losses({"crops": log_prediction.flatten(0, 1)}, target, cutmix_lambda=cutmix_lambda)
        loss, target_entropy = (float(values["crops"]) for values in found)
        return loss, target_entropy

    losses, entropies = [], []
    for image in range(4):
        neighbour = [1, 0, 3, 2][image]
        for view in range(3):
            own = float(share[image, view])
            mixed = [own * float(target[image, k]) + (1 - own) * float(target[neighbour, k]) for k in range(7)]
            losses.append(-sum(mixed[k] * float(log_prediction[image, view, k]) for k in range(7)))
            entropies.append(-sum(p * math.log(p) for p in mixed))
    assert loss_and_entropy({"crops": share.flatten()}) == pytest.approx((sum(losses) / 12, sum(entropies) / 12))
    assert loss_and_entropy({"crops": torch.ones(12, dtype=torch.float64)}) == pytest.approx(loss_and_entropy({}))


def test_obow_mixes_the_targets_of_the_kinds_that_were_mixed() -> None:
    def step(cutmix_lambda: dict[str, torch.Tensor]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        method = OBoW(
            Obow(num_words=20),
            backbone=Backbone(stem="small", width=4),
            total_steps=10,
            seed=0,
            num_classes=None,
            comm=OneProcess(),
        )
        original = torch.randn(4, 3, 40, 40, generator=generator)
        views = {kind: torch.randn(8, 3, 16, 16, generator=generator) for kind in ("crops", "patches")}
        uniforms = torch.rand(4, 1, generator=generator, dtype=torch.float64)
        output = method(Batch(original=original, views=views, uniforms=uniforms, step=0, cutmix_lambda=cutmix_lambda))
        assert float(output.loss.detach()) - float(output.metrics["loss_kl"]) > 0
        return {name: float(value) for name, value in output.metrics.items()}

    plain, mixed = step({}), step({"crops": torch.full((8,), 0.5)})
    assert mixed["loss_patches"] == plain["loss_patches"]
    assert mixed["loss_crops"] != plain["loss_crops"]
    assert step({"crops": torch.ones(8)})["loss_crops"] == pytest.approx(plain["loss_crops"])
