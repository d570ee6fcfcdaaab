"""Mask R-CNN against hand-made values and slow versions, COCO's metric against pycocotools, its folders, and a whole run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from obowlab.config import Backbone, Detector, Loaded, Machine, load_recipe
from obowlab.data import drawn_coco, drawn_voc
from obowlab.data.annotations import Annotation, Outline
from obowlab.data.coco import find_coco
from obowlab.data.datasets import open_split, prepare
from obowlab.data.drawn_voc import CLASS_NAMES
from obowlab.data.objects import read_objects
from obowlab.data.opening import open_source
from obowlab.data.protocol_needs import refuse_unlabelled, unmet_needs
from obowlab.errors import UserError
from obowlab.evaluation.detection.coco_metric import RECALLS, Sighting, evaluated, judge_coco, summary
from obowlab.evaluation.detection.coco_testing import judge_coco_images
from obowlab.evaluation.detection.scoring import measure, precisions
from obowlab.methods import DetectorTraining, Objects, OneProcess, build_backbone
from obowlab.methods.detection.mask_rcnn import MaskRcnn
from obowlab.methods.detection.masks import put_into_image, targets
from obowlab.methods.detection.pyramid import FeaturePyramid, level_of, pool
from obowlab.methods.detection.rpn import Level, Proposing, RegionProposals
from obowlab.methods.detection.two_stage import Detections
from obowlab.methods.schedules import learning_rate
from obowlab.runs.detection_facts import read_detection
from obowlab.runs.folder import RunFolder
from obowlab.views.detection_loader import DetectionLoader
from obowlab.views.detection_views import View, moved_points
from tests.command_line import Obowlab
from tests.runs import complete, points, small_recipe, start
from tests.test_detection import QUICK, digests

# ------------------------------------------------------------------------------------------------------------- the metric


def filled(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def shown(
    *objects: tuple[int, tuple[float, float, float, float], float], crowd: tuple[int, int, int, int] | None = None
) -> Annotation:
    """Return what an image of 100 x 100 shows: rectangles (class, xywh, area), and a crowd of the first class."""
    boxes, labels, outlines = [], [], []
    for label, (x, y, width, height), area in objects:
        boxes.append((x, y, x + width, y + height))
        labels.append(label)
        outlines.append(Outline((np.array(filled(x, y, width, height)),), None, area))
    if crowd is not None:
        x, y, width, height = crowd
        within = np.zeros((100, 100), dtype=np.bool_)
        within[y : y + height, x : x + width] = True
        boxes.append((x, y, x + width, y + height))
        labels.append(0)
        outlines.append(Outline((), np.array(drawn_coco.run_lengths(within)), float(width * height)))
    return Annotation(
        size=(100, 100),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        difficult=np.zeros(len(labels), dtype=np.bool_),
        outlines=tuple(outlines),
    )


def sighting(image: int, score: float, side: tuple[float, float, float, float], *, label: int = 0) -> Sighting:
    x, y, width, height = side
    (encoded,) = rle.frPyObjects([filled(x, y, width, height)], 100, 100)
    return Sighting(image, label, score, (x, y, x + width, y + height), encoded)


TRUTHS = (shown((0, (10, 10, 40, 40), 1600.0), crowd=(60, 60, 30, 30)), shown((0, (20, 20, 40, 60), 2400.0)), shown())
FOUND = [
    sighting(0, 0.9, (10, 10, 40, 40)),
    sighting(0, 0.8, (65, 65, 20, 20)),
    sighting(0, 0.7, (0, 0, 5, 5)),
    sighting(1, 0.6, (20, 20, 40, 44)),
]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_hand_made_set(kind: Any) -> None:
    evaluation = evaluated(FOUND, truths=TRUTHS, num_classes=2, kind=kind)
    judged = judge_coco(evaluation, truths=TRUTHS, num_classes=2)
    values = precisions(judged[0], np.ones((1, 3)), recalls=RECALLS)[:, 0] / 100
    assert values[0] == pytest.approx(0.834983, abs=5e-7)
    assert values[0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert values[5] == pytest.approx(51 / 101)
    assert values.mean() == pytest.approx(0.669967, abs=5e-7)
    measurements, of_classes = measure(dict(zip("ab", judged, strict=True)), num_images=3, name="coco_box", recalls=RECALLS)
    by_name = {each.name: each.value for each in measurements}
    assert by_name["coco_box_ap"] == pytest.approx(66.9967, abs=5e-5), "a class without objects counts for nothing"
    assert of_classes.keys() == {"a"}
    whole = summary(evaluation)
    assert whole["ar100"] == pytest.approx(75.0)
    assert whole["ap_medium"] == pytest.approx(75.2475, abs=5e-5)
    assert "ap_small" not in whole
    assert "ap_large" not in whole


def random_set(seed: int) -> tuple[list[Annotation], list[Sighting]]:
    random = np.random.default_rng(seed)
    digits = 9 if seed % 2 else 1
    truths, found = [], []
    for image in range(14):
        things = []
        for _ in range(random.integers(0, 4)):
            side = (*random.integers(0, 60, size=2).tolist(), *random.integers(4, 40, size=2).tolist())
            label = int(random.integers(0, 3))
            things.append((label, side, float(side[2] * side[3])))
            for _ in range(random.integers(0, 3)):
                near = np.maximum(np.array(side) + random.integers(-5, 6, size=4), (0, 0, 2, 2)).tolist()
                found.append(sighting(image, round(float(random.random()), digits), tuple(near), label=label))
        crowd = (50, 50, 30, 20) if random.random() < 0.3 else None
        truths.append(shown(*things, crowd=crowd))
        if random.random() < 0.5:
            found.append(
                sighting(image, round(float(random.random()), digits), (52, 52, 10, 10), label=int(random.integers(0, 3)))
            )
    return truths, found


def by_pycocotools(truths: Sequence[Annotation], found: Sequence[Sighting], *, kind: str) -> np.ndarray:
    """Return precision at every overlap of every class, [T, K], by the library alone; NaN where nothing is to be found."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": label} for label in range(3)]}
    for image, truth in enumerate(truths):
        content["images"].append({"id": image, "height": 100, "width": 100})
        for box, label, outline in zip(truth.boxes.tolist(), truth.labels.tolist(), truth.outlines, strict=True):
            segmentation: Any = [polygon.tolist() for polygon in outline.polygons]
            if outline.counts is not None:
                segmentation = {"counts": outline.counts.tolist(), "size": [100, 100]}
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            thing = {"id": len(content["annotations"]) + 1, "image_id": image, "category_id": label, "bbox": sides}
            content["annotations"].append(
                {**thing, "area": outline.area, "iscrowd": int(outline.is_crowd), "segmentation": segmentation}
            )
    results: list[dict[str, Any]] = []
    for each in found:
        x0, y0, x1, y1 = each.box
        place = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if kind == "bbox" else {"segmentation": each.mask}
        results.append({"image_id": each.image, "category_id": each.label, "score": each.score, **place})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return np.where((precision > -1).any(axis=1), precision.mean(axis=1), np.nan)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_values_are_pycocotools_own_to_nine_digits_and_images_may_count_several_times(seed: int, kind: Any) -> None:
    truths, found = random_set(seed)
    judged = judge_coco(evaluated(found, truths=truths, num_classes=3, kind=kind), truths=truths, num_classes=3)
    weights = np.stack((np.ones(14), np.random.default_rng(seed).integers(0, 3, size=14))).astype(np.float64)
    copies = [image for image, weight in enumerate(weights[1]) for _ in range(int(weight))]
    again = [
        Sighting(place, each.label, each.score, each.box, each.mask)
        for place, image in enumerate(copies)
        for each in found
        if each.image == image
    ]
    own = by_pycocotools(truths, found, kind=kind)
    several = by_pycocotools([truths[image] for image in copies], again, kind=kind)
    for label in range(3):
        values = precisions(judged[label], weights, recalls=RECALLS) / 100
        if not np.isnan(own[0, label]):
            assert values[:, 0] == pytest.approx(own[:, label], abs=1e-9)
        if not np.isnan(several[0, label]) and seed % 2:  # equal scores of two copies of an image have no order
            assert values[:, 1] == pytest.approx(several[:, label], abs=1e-9)


def test_nothing_found_is_nothing_right() -> None:
    judged = judge_coco(evaluated([], truths=TRUTHS, num_classes=2, kind="bbox"), truths=TRUTHS, num_classes=2)
    assert precisions(judged[0], np.ones((1, 3)), recalls=RECALLS).tolist() == [[0.0]] * 10
    assert judged[0].objects.tolist() == [1, 1, 0], "a crowd is not to be found"
    assert summary(None) == {}


@pytest.mark.parametrize("seed", [1, 2])
def test_pictures_show_of_every_detection_what_the_metric_says(seed: int) -> None:
    truths, sightings = random_set(seed)
    found = []
    for image in range(len(truths)):
        own = [each for each in sightings if each.image == image]
        boxes = torch.tensor([each.box for each in own]).reshape(-1, 4)
        labels = torch.tensor([each.label for each in own], dtype=torch.int64)
        scores = torch.tensor([each.score for each in own], dtype=torch.float64)
        found.append(Detections(boxes, labels, scores, torch.ones(len(own), 28, 28)))
    test = judge_coco_images(found, truths=truths, class_names=("a", "b", "c"))
    judged = test.judged["coco_box"].values()
    assert sum(int(each.right[0].sum()) for each in judged) == sum(int(each.right.sum()) for each in test.detections) > 5
    assert sum(int(each.wrong[0].sum()) for each in judged) == sum(int(each.wrong.sum()) for each in test.detections) > 5
    for truth, shown_, given in zip(truths, test.detections, found, strict=True):
        assert sorted(shown_.boxes.tolist()) == sorted(given.boxes.double().tolist())
        real = np.array([not outline.is_crowd for outline in truth.outlines], dtype=np.bool_)
        for box, label, is_right in zip(shown_.boxes, shown_.labels, shown_.right, strict=True):
            of_class = torch.from_numpy(truth.boxes[real & (truth.labels == label)])
            best = box_iou(torch.from_numpy(box)[None], of_class).max() if len(of_class) else 0.0
            assert not is_right or best >= 0.5 - 1e-9


# --------------------------------------------------------------------------------------------------------------- the masks


def test_outlines_are_rastered_at_the_places_of_a_box_as_pycocotools_does() -> None:
    rectangle, triangle = np.array(filled(12.0, 20.0, 16.0, 10.0)), np.array([10.0, 10.0, 30.0, 10.0, 10.0, 40.0])
    boxes = torch.tensor([[10.0, 10.0, 38.0, 38.0], [8.0, 5.0, 40.0, 45.0]])
    found = targets([(rectangle,), (triangle, rectangle)], boxes=boxes)
    assert found.shape == (2, 28, 28)
    expected = np.zeros((28, 28))
    expected[10:20, 2:18] = 1.0
    assert found[0].numpy().tolist() == expected.tolist()
    scale = np.array([28 / 32, 28 / 40])
    moved = [((each.reshape(-1, 2) - [8.0, 5.0]) * scale).reshape(-1).tolist() for each in (triangle, rectangle)]
    together = rle.decode(rle.merge(rle.frPyObjects(moved, 28, 28)))
    assert found[1].numpy().tolist() == together.astype(np.float32).tolist()
    assert set(found.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("box", "pixels"), [((10, 10, 20, 20), 100), ((10.6, 10.6, 19.4, 19.4), 64)])
def test_a_full_mask_fills_its_box(box: tuple[float, float, float, float], pixels: int) -> None:
    found = put_into_image(torch.ones(1, 28, 28), boxes=torch.tensor([box]), size=(40, 40))
    assert found.shape == (1, 40, 40)
    assert int(found.sum()) == pixels


def slow_paste(mask: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    (height, width), side = size, len(mask)
    found = np.zeros(size, dtype=bool)
    x0, y0, x1, y1 = box
    for row in range(height):
        for column in range(width):
            u = (column + 0.5 - x0) / (x1 - x0) * side - 0.5
            v = (row + 0.5 - y0) / (y1 - y0) * side - 0.5
            value, left, top = 0.0, math.floor(u), math.floor(v)
            for y in (top, top + 1):
                for x in (left, left + 1):
                    if 0 <= x < side and 0 <= y < side:
                        value += mask[y, x] * (1 - abs(u - x)) * (1 - abs(v - y))
            found[row, column] = value >= 0.5
    return found


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_put_into_an_image_as_a_slow_loop_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    corner = random.uniform(-3, 20, size=2)
    box = np.clip(np.concatenate((corner, corner + random.uniform(3, 30, size=2))), 0, 36).tolist()
    mask = random.random((28, 28)).astype(np.float32)
    found = put_into_image(torch.from_numpy(mask)[None], boxes=torch.tensor([box]), size=(36, 40))[0].numpy()
    assert (found != slow_paste(mask, box, (36, 40))).sum() <= 1, "one pixel may lie on the edge, by a last digit"


# ------------------------------------------------------------------------------------------------------------- the pyramid


def test_regions_are_pooled_from_the_map_that_fits_them() -> None:
    sides = torch.tensor([10.0, 111.9, 112.1, 223.9, 224.1, 447.0, 449.0, 2000.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sides, sides), dim=1)
    assert level_of(boxes, standard=224.0, num_levels=4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    maps = [
        torch.randn(2, 3, 128 // 2**level, 128 // 2**level, generator=torch.Generator().manual_seed(level)) for level in range(4)
    ]
    regions = [torch.tensor([[0.0, 0.0, 500.0, 500.0], [8.0, 8.0, 40.0, 60.0]]), torch.tensor([[0.0, 0.0, 230.0, 230.0]])]
    found = pool(maps, strides=(4, 8, 16, 32), regions=regions, side=7, standard=224.0)
    for place, (image, box, level) in enumerate(((0, regions[0][0], 3), (0, regions[0][1], 0), (1, regions[1][0], 2))):
        region = torch.cat((torch.tensor([float(image)]), box))[None]
        own = roi_align(maps[level], region, output_size=7, spatial_scale=1 / (4 * 2**level), sampling_ratio=0, aligned=True)
        assert torch.equal(found[place], own[0])


def test_each_map_is_its_stages_own_and_what_lies_above() -> None:
    pyramid = FeaturePyramid((4, 6, 8, 10), width=5).eval()
    stages = [torch.randn(1, channels, 32 // 2**level, 16 // 2**level) for level, channels in enumerate((4, 6, 8, 10))]
    maps = pyramid(stages)
    assert [tuple(each.shape[2:]) for each in maps] == [(32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    lateral = [layer(stage) for layer, stage in zip(pyramid.lateral, stages, strict=True)]
    above = lateral[3]
    for level in (2, 1, 0):
        above = lateral[level] + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        torch.testing.assert_close(maps[level], pyramid.output[level](above))
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    assert all(each.bias is None for each in pyramid.modules() if isinstance(each, nn.Conv2d))


def test_every_map_has_three_anchors_a_place_and_its_own_best_ones() -> None:
    levels = [Level(stride, (size,)) for stride, size in ((4, 32.0), (8, 64.0))]
    rpn = RegionProposals(6, levels=levels)
    maps = [torch.randn(1, 6, 8, 9), torch.randn(1, 6, 4, 5)]
    predicted = rpn(maps)
    assert predicted.of_levels == (3 * 8 * 9, 3 * 4 * 5)
    assert predicted.anchors[1].tolist() == [-16.0, -16.0, 16.0, 16.0]
    assert predicted.anchors[3 * 72 + 1].tolist() == [-32.0, -32.0, 32.0, 32.0]
    alone = [RegionProposals(6, levels=(level,)) for level in levels]
    found = []
    for one, map_ in zip(alone, maps, strict=True):
        one.load_state_dict(rpn.state_dict())
        found.append(one.propose(one(map_[None] if map_.dim() == 3 else [map_]), sizes=[(32, 36)], how=Proposing(20, 1000))[0])
    both = rpn.propose(predicted, sizes=[(32, 36)], how=Proposing(20, 1000))[0]
    assert sorted(both.tolist()) == sorted(torch.cat(found).tolist()), "boxes of two maps do not thin each other out"
    assert len(rpn.propose(predicted, sizes=[(32, 36)], how=Proposing(20, 7))[0]) == 7


# ------------------------------------------------------------------------------------------------------------- the network

SMALL = Backbone(arch="resnet10", stem="small", width=8)
SIZES = (8.0, 16.0, 32.0, 64.0, 128.0)


def network(**changes: Any) -> MaskRcnn:
    usual = {"head": "moco", "sizes": SIZES, "standard": 56.0, "width": 16, "head_width": 32, "regions": 32}
    return MaskRcnn(build_backbone(SMALL, seed=0), num_classes=24, seed=0, **usual | changes).train()


def drawn(count: int) -> tuple[Tensor, list[tuple[int, int]], list[Objects]]:
    """Return drawn images, normalised and padded [N, 3, 52, 52], their sizes and their objects."""
    images, sizes, objects = torch.zeros(count, 3, 52, 52), [], []
    for place in range(count):
        pixels, found = drawn_coco.draw("train", index=place)
        height, width = pixels.shape[:2]
        images[place, :, :height, :width] = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.4) / 0.25
        sizes.append((height, width))
        kept = [each for each in found if not each["iscrowd"]]
        sides = torch.tensor([each["bbox"] for each in kept], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([drawn_coco.CATEGORIES.index(each["category_id"]) for each in kept], dtype=torch.int64)
        outlines = tuple(tuple(np.array(polygon) for polygon in each["segmentation"]) for each in kept)
        objects.append(Objects(torch.cat((sides[:, :2], sides[:, :2] + sides[:, 2:]), dim=1), labels, sizes[-1], outlines))
    return images, sizes, objects


def generators(count: int, *, step: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * step + image) for image in range(count)]


@pytest.mark.parametrize("head", ["moco", "infomin"])
def test_a_step_has_five_losses_and_every_parameter_learns(head: str) -> None:
    detector = network(head=head)
    images, _, objects = drawn(3)
    losses = detector.losses(images, objects=objects, generators=generators(3))
    assert losses.keys() == {"rpn_objectness", "rpn_boxes", "classes", "boxes", "masks"}
    assert losses["classes"].item() == pytest.approx(math.log(25), rel=0.2)
    assert losses["masks"].item() == pytest.approx(math.log(2), rel=0.1)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    norms = {name for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d) and "encoder" not in name}
    in_heads = {name for name in norms if not name.startswith("pyramid.")}
    assert len(norms) - len(in_heads) == 8
    assert len(in_heads) == (8 if head == "infomin" else 0)


def test_an_image_without_objects_leaves_the_mask_head_in_step() -> None:
    detector = network()
    images, sizes, _ = drawn(1)
    nothing = [Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), sizes[0], ())]
    losses = detector.losses(images, objects=nothing, generators=generators(1))
    assert losses["masks"].item() == losses["boxes"].item() == 0.0
    losses["masks"].backward()
    assert all(each.grad is not None and not each.grad.any() for each in detector.mask_head.parameters())


def test_the_loss_of_masks_is_that_of_a_slow_version() -> None:
    detector = network()
    images, _, objects = drawn(2)
    seen: dict[str, Any] = {}
    whole: Callable[..., Any] = detector.further_losses

    def watched(maps: Sequence[Tensor], **arguments: Any) -> dict[str, Tensor]:
        seen.update(arguments, maps=maps)
        found: dict[str, Tensor] = whole(maps, **arguments)
        return found

    detector.further_losses = watched  # type: ignore[method-assign]
    losses = detector.losses(images, objects=objects, generators=generators(2))
    regions, total, number = seen["regions"], 0.0, 0
    for image in range(2):
        things = iter(regions.objects[image].tolist())
        for place in range(detector.regions):
            label = int(regions.labels[image * detector.regions + place])
            if not 0 <= label < 24:
                continue
            box, thing = regions.boxes[image][place], next(things)
            assert int(objects[image].labels[thing]) == label
            one = [box[None] if each == image else box.new_zeros(0, 4) for each in range(2)]
            pooled = pool(seen["maps"][:4], strides=detector.strides, regions=one, side=14, standard=56.0)
            wanted = targets([objects[image].outlines[thing]], boxes=box[None])[0]
            total += F.binary_cross_entropy_with_logits(detector.mask_head(pooled)[0, label], wanted).item()
            number += 1
    assert number > 5
    assert losses["masks"].item() == pytest.approx(total / number, rel=1e-5)


def test_a_few_images_are_learned_by_heart() -> None:
    detector = network()
    images, sizes, objects = drawn(4)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.05, momentum=0.9)
    for step in range(300):
        losses = detector.losses(images, objects=objects, generators=generators(4, step=step))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    truths, found = [], []
    for each, (height, width) in zip(objects, sizes, strict=True):
        encoded = [rle.merge(rle.frPyObjects([p.tolist() for p in outline], height, width)) for outline in each.outlines]
        areas = [float(rle.area(one)) for one in encoded]
        outlines = tuple(Outline(outline, None, area) for outline, area in zip(each.outlines, areas, strict=True))
        hard = np.zeros(len(areas), dtype=np.bool_)
        truths.append(Annotation((height, width), each.boxes.double().numpy(), each.labels.numpy(), hard, outlines))
    for image, each in enumerate(detector.detect(images, sizes=sizes)):
        assert each.masks is not None
        masks = put_into_image(each.masks, boxes=each.boxes, size=sizes[image])
        for box, label, score, mask in zip(each.boxes.tolist(), each.labels.tolist(), each.scores.tolist(), masks, strict=True):
            pixels = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            found.append(Sighting(image, label, score, tuple(box), pixels))
    for kind in ("bbox", "segm"):
        judged = judge_coco(evaluated(found, truths=truths, num_classes=24, kind=kind), truths=truths, num_classes=24)
        values = [precisions(one, np.ones((1, 4)), recalls=RECALLS)[0, 0] for one in judged if one.objects.any()]
        assert np.mean(values) > 90, kind


# ---------------------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn images of COCO, prepared as `drawn-coco` in `data`."""
    folder = tmp_path_factory.mktemp("masks")
    prepare("drawn-coco", source=drawn_coco.draw_coco(folder), data_root=folder / "data", workers=1)
    return folder


def test_a_prepared_set_has_boxes_and_outlines_in_the_order_of_categories(coco: Path) -> None:
    for name in ("train", "val"):
        split = open_split("drawn-coco", name, data_root=coco / "data")
        assert split.class_names == CLASS_NAMES
        content = json.loads((coco / "coco" / "annotations" / f"instances_{name}2017.json").read_text())
        assert [each["id"] for each in content["categories"]][7:9] == [8, 10], "numbers have gaps"
        annotations = read_objects(split)
        assert annotations.has_outlines
        for index in (0, 5, 19, 399):
            of_file = [each for each in content["annotations"] if each["image_id"] == content["images"][index]["id"]]
            found = annotations[index]
            assert found.size == (split.heights[index], split.widths[index])
            assert len(found.labels) == len(of_file) == len(found.outlines)
            for box, label, outline, each in zip(found.boxes, found.labels, found.outlines, of_file, strict=True):
                x, y, width, height = each["bbox"]
                assert box.tolist() == [x, y, x + width, y + height]
                assert drawn_coco.CATEGORIES[label] == each["category_id"]
                assert outline.area == each["area"]
                assert outline.is_crowd == bool(each["iscrowd"])
                if outline.counts is None:
                    assert [polygon.tolist() for polygon in outline.polygons] == each["segmentation"]
                else:
                    assert outline.counts.tolist() == each["segmentation"]["counts"]
        assert [len(annotations[index].labels) for index in (19, 39)] == [0, 0], "an image may show nothing"


def test_drawn_outlines_surround_what_is_drawn() -> None:
    pixels, objects = drawn_coco.draw("train", index=3)
    height, width = pixels.shape[:2]
    for each in objects:
        segmentation = each["segmentation"]
        encoded = (
            rle.frPyObjects(segmentation, height, width)
            if each["iscrowd"]
            else rle.merge(rle.frPyObjects(segmentation, height, width))
        )
        assert float(rle.area(encoded)) == pytest.approx(each["area"], rel=0.15)
        assert rle.toBbox(encoded) == pytest.approx(each["bbox"], abs=1.5)


def changed(coco: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of the drawn folder whose file of train is changed."""
    shutil.copytree(coco / "coco", to)
    file = to / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return to


def first_of_train(content: dict[str, Any], **values: Any) -> None:
    plain = next(each for each in content["annotations"] if not each["iscrowd"])
    plain.update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("categories"), "is no annotation file of COCO"),
        (lambda content: content["images"].append(content["images"][0]), "has no image, an image twice"),
        (lambda content: content["annotations"][0].update(image_id=99_999), "has objects of the image 99999"),
        (lambda content: content["categories"].pop(), "name other categories"),
        (lambda content: content["images"][0].update(height=41), "but it has"),
        (lambda content: content["images"][0].update(file_name="none.jpg"), "lacks 1 of the 600 images"),
        (lambda content: first_of_train(content, category_id=9), "without a box, a known category or an outline"),
        (lambda content: first_of_train(content, bbox=[1.0]), "without a box, a known category or an outline"),
        (lambda content: first_of_train(content, segmentation={"counts": [3], "size": [1, 1]}, iscrowd=1), "or an outline"),
        (lambda content: first_of_train(content, bbox=[math.inf, 0, 1, 1]), "that is not finite"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    coco: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    folder = changed(coco, tmp_path / "coco", change)
    with pytest.raises(UserError, match=words) as refused:
        prepare("damaged", source=folder, data_root=tmp_path / "data", workers=1)
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "data" / "damaged").exists()


def test_a_folder_is_found_where_archives_unpack_it(coco: Path, tmp_path: Path) -> None:
    assert find_coco(coco) == find_coco(coco / "coco") == coco / "coco" / "annotations"
    assert find_coco(tmp_path) is None
    source = open_source(coco)
    assert [len(split.images) for split in source.splits] == [600, 400]
    shutil.copytree(coco / "coco" / "annotations", tmp_path / "annotations")
    with pytest.raises(UserError, match="but no folder train2017: unpack its images beside it"):
        open_source(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"has no instances_val2017.json"):
        open_source(tmp_path)
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(UserError, match="leave the files of one year there"):
        open_source(tmp_path)


def test_crowds_and_outlines_without_an_inside_are_not_learned(coco: Path, tmp_path: Path) -> None:
    folder = changed(coco, tmp_path / "coco", lambda content: first_of_train(content, segmentation=[[1.0, 1.0, 5.0, 5.0]]))
    prepare("odd", source=folder, data_root=tmp_path / "data", workers=1)
    split = open_split("odd", "train", data_root=tmp_path / "data")
    annotations = read_objects(split)
    place = next(index for index, each in enumerate(annotations) if any(not o.is_crowd and not o.drawn for o in each.outlines))
    assert not annotations[place].is_trained_on.all()
    crowds = [index for index, each in enumerate(annotations) if any(outline.is_crowd for outline in each.outlines)]
    empty = [index for index, each in enumerate(annotations) if not each.is_trained_on.any()]
    assert len(crowds) > 20
    assert len(empty) >= 30
    config = Detector(architecture="fpn", steps_per_epoch=300, sides=(40,), longest=70)
    loader = DetectionLoader(split, subset=np.arange(600), annotations=annotations, config=config, batch_size=2, seed=0)
    seen = set()
    for batch in loader.batches(epoch=0):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            seen.add(index)
            own = annotations[index].is_trained_on
            assert image.labels.tolist() == annotations[index].labels[own].tolist()
            assert len(image.outlines) == len(image.labels)
            for outline, box in zip(image.outlines, image.boxes, strict=True):
                x, y = np.concatenate(outline).reshape(-1, 2).T
                assert [x.min(), y.min(), x.max(), y.max()] == pytest.approx(box.tolist(), abs=0.1)
    assert not seen & set(empty)


def test_outlines_are_scaled_and_flipped_as_boxes_are() -> None:
    corners = np.array([10.0, 20.0, 30.0, 20.0, 30.0, 44.0])
    assert moved_points(corners, size=(50, 100), view=View((100, 50), flipped=False)).tolist() == [5, 40, 15, 40, 15, 88]
    assert moved_points(corners, size=(50, 100), view=View((100, 50), flipped=True)).tolist() == [45, 40, 35, 40, 35, 88]


def test_boxes_alone_are_refused_where_masks_are_learned(tmp_path: Path) -> None:
    prepare("drawn-voc", source=drawn_voc.draw_voc(tmp_path), data_root=tmp_path / "data", workers=1)
    recipe = load_recipe("coco-detection-demo", overrides=("data.dataset=drawn-voc",)).recipe
    with pytest.raises(UserError, match="'drawn-voc' has boxes but no outlines"):
        refuse_unlabelled(recipe, train=open_split("drawn-voc", "train", data_root=tmp_path / "data"))
    unmet = unmet_needs(recipe, data_root=tmp_path / "data", runs_root=tmp_path / "runs")
    assert "'drawn-voc' has boxes but no outlines" in unmet["coco-detection"]
    boxes = load_recipe("voc-detection-demo", overrides=("evaluation.protocols=['coco-detection']",)).recipe
    unmet = unmet_needs(boxes, data_root=tmp_path / "data", runs_root=tmp_path / "runs")
    assert "method.architecture c4 learns no masks; recipe coco-detection does" in unmet["coco-detection"]


# ------------------------------------------------------------------------------------------------------------- a whole run


def run_of(coco: Path, runs_root: Path, *, changes: tuple[str, ...] = ()) -> tuple[Loaded, Machine]:
    machine = Machine(data_root=coco / "data", runs_root=runs_root, device="cpu", loader="torch", workers=0)
    return load_recipe("coco-detection-demo", overrides=(*QUICK, *changes)), machine


def test_masks_are_trained_and_tested(coco: Path, tmp_path: Path) -> None:
    loaded, machine = run_of(coco, tmp_path / "runs")
    folder = complete(loaded, machine=machine)
    assert folder.current_state().status == "finished"
    (result,) = folder.results()
    names = [f"coco_{kind}_{value}" for kind in ("box", "mask") for value in ("ap50", "ap75", "ap")]
    assert [each["name"] for each in result["measurements"]] == names
    assert {each["count"] for each in result["measurements"]} == {400}
    assert "loss_masks" in points(folder)[-1][1]
    assert complete(loaded, machine=machine).results() == [result], "it is not measured again"


@pytest.mark.long
def test_the_protocol_hash_is_that_of_the_training(coco: Path, tmp_path: Path) -> None:
    usual, titled, slower, fewer = digests(load_recipe("coco-detection-demo").recipe, data=coco / "data", scratch=tmp_path)
    assert usual == titled
    assert len({usual, slower, fewer}) == 3


def test_eval_adds_what_it_measures_to_the_run(workplace: Path, data_root: Path, coco: Path, obowlab: Obowlab) -> None:
    (workplace / "data").mkdir()
    for folder in (data_root / "small", coco / "data" / "drawn-coco"):
        (workplace / "data" / folder.name).symlink_to(folder)
    small_recipe(workplace, dataset="small", epochs=1)
    quiet = ("--device", "cpu", "--loader", "torch", "--workers", "0")
    own = ("--set", "evaluation.protocols=[]")  # four channels: see channels_last in training/loop.py
    assert obowlab("run", "small", *own, *quiet)[0] == 0
    words = ["eval", "small", "--protocol", "coco-detection", "--preset", "demo", *quiet]
    words += [word for change in QUICK for word in ("--set", change)]
    code, out, err = obowlab(*words, "--dry-run")
    assert code == 0, err
    assert not (workplace / "runs" / ".weights").exists()
    code, out, err = obowlab(*words)
    assert code == 0, err
    assert "coco_mask_ap75" in out
    assert "Not comparable with the paper's value: 400 test images instead of 5000" in out
    (run,) = (RunFolder.open(path.parent) for path in (workplace / "runs").glob("small-s0-*/run.json"))
    (result,) = (each for each in run.results() if each["protocol"] == "coco-detection")
    trained = result["details"]["trained_in"]
    assert result["details"]["metric"].startswith("COCO by pycocotools 2.")
    assert trained.startswith("coco-detection-demo-s0-")
    for folder in (run.path, workplace / "runs" / trained):
        facts, pictures = read_detection(folder / "detection" / trained)
        assert facts.num_images == 400
        assert len(pictures) >= 12
    again = obowlab(*words)
    assert again[0] == 0
    assert "is finished" in again[1]


def test_a_training_that_is_killed_and_continued_ends_as_one_that_was_not(coco: Path, tmp_path: Path) -> None:
    changes = ("training.epochs=10", "evaluation.protocols=[]")
    loaded, machine = run_of(coco, tmp_path / "whole", changes=changes)
    whole = complete(loaded, machine=machine)
    machine = machine.model_copy(update={"runs_root": tmp_path / "killed", "checkpoint_every_s": 0.05})
    kills = 10 if os.environ.get("OBOWLAB_TEST_ALL") else 2
    for kill in range(kills):
        folder, process = start(loaded, machine=machine)
        while process.poll() is None and len(folder.metrics()) < (kill + 1) * 40 // (kills + 1):
            time.sleep(0.005)
        process.kill()
        process.communicate()
    folder = complete(loaded, machine=machine)
    assert points(folder) == points(whole)
    for name in ("detector.safetensors", "encoder.safetensors"):
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_norms_of_trunk_and_pyramid_are_without_weight_decay() -> None:
    method = DetectorTraining(
        Detector(architecture="fpn", width=8, head_width=8),
        backbone=SMALL,
        total_steps=1,
        seed=0,
        num_classes=3,
        comm=OneProcess(),
    )
    groups = {group["name"]: group for group in method.param_groups(weight_decay=1e-4)}
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    without = {names[id(parameter)] for parameter in groups["norms"]["params"]}
    assert groups["norms"]["weight_decay"] == 0.0
    assert {name for name in names.values() if "pyramid" in name and name.endswith((".1.weight", ".1.bias"))} <= without
    assert not any("head" in name for name in without)
    assert len(names) == sum(len(group["params"]) for group in groups.values())


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 2e-5), (500, 0.01001), (1000, 0.02), (59_999, 0.02), (60_000, 2e-3), (79_999, 2e-3), (80_000, 2e-4), (89_999, 2e-4)],
)
def test_rates_are_those_of_the_1x_schedule(step: int, rate: float) -> None:
    recipe = load_recipe("coco-detection").recipe
    assert recipe.training.epochs * recipe.method.steps_per_epoch == 90_000
    assert learning_rate(step, optimizer=recipe.optimizer, epochs=90, steps_per_epoch=1000) == pytest.approx(rate, rel=1e-9)


def test_a_pyramid_wants_a_size_for_each_of_its_maps() -> None:
    with pytest.raises(UserError, match="a feature pyramid has five maps"):
        load_recipe("coco-detection", overrides=("method.anchors=[32.0]",))
