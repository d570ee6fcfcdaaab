"""The detector's parts against hand-made values and slow versions, and a whole that learns a few images by heart."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou, nms, roi_align

from obowlab.config import Backbone, Detector, Loaded, Machine, Recipe, load_recipe
from obowlab.data import drawn_voc
from obowlab.data.datasets import open_split, prepare
from obowlab.data.objects import read_objects
from obowlab.data.opening import open_source
from obowlab.data.voc_boxes import read_annotation
from obowlab.errors import UserError
from obowlab.evaluation import evaluate
from obowlab.evaluation.detection.scoring import judge, measure, precisions
from obowlab.evaluation.detection.voc_metric import OVERLAPS, Found, Truth, as_written
from obowlab.methods import DetectorTraining, Objects, OneProcess, build_backbone
from obowlab.methods.detection.anchors import anchors_of, shapes
from obowlab.methods.detection.boxes import HEAD_WEIGHTS, RPN_WEIGHTS, clip, decode, encode
from obowlab.methods.detection.faster_rcnn import FasterRcnn
from obowlab.methods.detection.matching import IGNORED, NEGATIVE, POSITIVE, match, sample
from obowlab.methods.detection.precise import set_precise_statistics
from obowlab.methods.detection.rpn import Level, Proposing, RegionProposals
from obowlab.methods.detector import build_detector
from obowlab.methods.schedules import learning_rate
from obowlab.runs.detection_facts import read_detection
from obowlab.views.detection_loader import DetectionLoader, batch_order
from obowlab.views.detection_views import View, is_kept, moved, resized, show, train_view
from tests.oracles import voc_average_precision
from tests.runs import complete, points, start

# ------------------------------------------------------------------------------------------------------------- the metric


def truth(*boxes: tuple[float, float, float, float], difficult: tuple[int, ...] = ()) -> Truth:
    hard = np.zeros(len(boxes), dtype=np.bool_)
    hard[list(difficult)] = True
    return Truth(np.array(boxes, dtype=np.float64).reshape(-1, 4), hard)


def average_precision(found: list[Found], *, truths: dict[str, Truth], overlap: float) -> float:
    """Return the average precision of a class whose images are those that are named."""
    judged = judge(found, truths=truths, images=sorted({*truths, *(one.image for one in found)}))
    return float(precisions(judged, np.ones((1, len(judged.objects))))[OVERLAPS.index(overlap), 0])


DOGS = {"A": truth((11, 11, 50, 50), (61, 61, 90, 90), difficult=(1,)), "B": truth((21, 21, 60, 80))}
FOUND_DOGS = [
    Found("A", 0.9, (11, 11, 50, 50)),
    Found("A", 0.8, (61, 61, 90, 90)),
    Found("C", 0.7, (1, 1, 30, 30)),
    Found("B", 0.6, (21, 21, 60, 64)),
    Found("A", 0.5, (11, 11, 50, 49)),
]


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_hand_made_dogs(overlap: float) -> None:
    expected = 84.848 if overlap <= 0.70 else 54.545
    assert average_precision(FOUND_DOGS, truths=DOGS, overlap=overlap) == pytest.approx(expected, abs=5e-4)


def test_means_over_classes_and_overlaps() -> None:
    cats = {"C": truth((1, 1, 100, 100))}
    per_class = [
        [average_precision(found, truths=truths, overlap=overlap) for overlap in OVERLAPS]
        for found, truths in ((FOUND_DOGS, DOGS), ([], cats))
    ]
    assert np.mean(per_class[0]) == pytest.approx(69.697, abs=5e-4)
    assert np.mean(per_class[1]) == 0.0
    both = np.mean(per_class, axis=0)
    assert (both[0], both[5], both.mean()) == pytest.approx((42.424, 27.273, 34.848), abs=5e-4)


@pytest.mark.parametrize(("box", "expected"), [((11, 11, 20, 20), 100.0), ((10, 10, 20, 20), 70.0), ((11, 11, 20, 15), 0.0)])
def test_pixels_are_counted_from_one_with_both_ends_and_overlaps_must_be_greater(
    box: tuple[float, float, float, float], expected: float
) -> None:
    birds = {"A": truth((11, 11, 20, 20))}
    found = [Found("A", 0.9, box)]
    values = [average_precision(found, truths=birds, overlap=overlap) for overlap in OVERLAPS]
    assert np.mean(values) == pytest.approx(expected)


def test_detections_are_rounded_as_they_are_written() -> None:
    assert as_written("A", score=0.98765, box=(10.04, 20.26, 30.55001, 40.0)) == Found("A", 0.988, (11.0, 21.3, 30.6, 40.0))


def test_a_detection_on_an_image_without_the_class_is_wrong_and_nothing_found_is_nothing() -> None:
    assert average_precision([], truths=DOGS, overlap=0.5) == 0.0
    assert average_precision(FOUND_DOGS, truths={}, overlap=0.5) == 0.0


def random_class(seed: int) -> tuple[list[Found], dict[str, Truth], list[str]]:
    random = np.random.default_rng(seed)
    names = [f"{number:06d}" for number in range(12)]
    truths, found = {}, []
    for name in names:
        corners = random.integers(1, 60, size=(random.integers(0, 4), 2))
        boxes = np.concatenate((corners, corners + random.integers(5, 40, size=corners.shape)), axis=1).astype(np.float64)
        if len(boxes):
            truths[name] = Truth(boxes, random.random(len(boxes)) < 0.2)
        for box in boxes:
            for _ in range(random.integers(0, 3)):
                moved_box = box + random.integers(-6, 7, size=4)
                found.append(Found(name, round(float(random.random()), 1), tuple(moved_box.tolist())))
        if random.random() < 0.5:
            found.append(Found(name, round(float(random.random()), 1), (1.0, 1.0, 9.0, 9.0)))
    return found, truths, names


@pytest.mark.parametrize("seed", range(10))
def test_all_overlaps_at_once_are_those_one_by_one_and_images_may_count_several_times(seed: int) -> None:
    found, truths, names = random_class(seed)
    judged = judge(found, truths=truths, images=names)
    weights = np.stack((np.ones(12), np.random.default_rng(seed).integers(0, 3, size=12))).astype(np.float64)
    values = precisions(judged, weights)
    for level, overlap in enumerate(OVERLAPS):
        assert values[level, 0] == pytest.approx(voc_average_precision(found, truths=truths, overlap=overlap))
        copies = [(name, copy) for name, weight in zip(names, weights[1], strict=True) for copy in range(int(weight))]
        of_copy = {name: [copy for other, copy in copies if other == name] for name in names}
        again = [Found(f"{one.image}-{copy}", one.score, one.box) for one in found for copy in of_copy[one.image]]
        shown = {f"{name}-{copy}": truths[name] for name, copy in copies if name in truths}
        assert values[level, 1] == pytest.approx(voc_average_precision(again, truths=shown, overlap=overlap))


def test_the_means_have_intervals_and_shares_of_every_image() -> None:
    classes = {str(seed): random_class(seed) for seed in range(3)}
    judged = {name: judge(found, truths=truths, images=names) for name, (found, truths, names) in classes.items()}
    measurements, of_classes = measure(judged, num_images=12)
    assert [each.name for each in measurements] == ["voc_ap50", "voc_ap75", "voc_ap"]
    for each in measurements:
        assert each.low <= each.value <= each.high
        assert np.mean(each.samples["values"]) == pytest.approx(each.value, abs=1e-2)
    expected = [voc_average_precision(found, truths=truths, overlap=0.5) for found, truths, _ in classes.values()]
    assert list(of_classes.values()) == pytest.approx(expected)
    assert measurements[0].value == pytest.approx(np.mean(expected))


# -------------------------------------------------------------------------------------------------------------- the boxes


def test_what_moves_a_box_onto_another_is_as_computed_by_hand() -> None:
    anchor, target = torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([[4.0, 4.0, 20.0, 28.0]])
    plain, weighted = (encode(anchor, towards=target, weights=weights) for weights in (RPN_WEIGHTS, HEAD_WEIGHTS))
    assert plain[0].tolist() == pytest.approx([0.25, 0.5, 0.0, 0.405465], abs=1e-6)
    assert weighted[0].tolist() == pytest.approx([2.5, 5.0, 0.0, 2.027326], abs=1e-5)
    assert torch.allclose(decode(weighted, boxes=anchor, weights=HEAD_WEIGHTS), target)
    per_class = weighted[:, None].expand(1, 3, 4)
    assert decode(per_class, boxes=anchor, weights=HEAD_WEIGHTS).shape == (1, 3, 4)


def test_no_box_grows_without_end_and_none_leaves_the_image() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = decode(torch.tensor([[0.0, 0.0, 50.0, 0.0]]), boxes=anchor, weights=RPN_WEIGHTS)
    assert float(grown[0, 2] - grown[0, 0]) == pytest.approx(1000.0)
    assert clip(grown, size=(12, 20))[0].tolist() == [0.0, 0.0, 20.0, 12.0]


def test_anchors_are_not_rounded_and_lie_at_multiples_of_the_stride() -> None:
    found = shapes(Detector().anchors)
    assert found.shape == (15, 4)
    assert found[0].tolist() == pytest.approx([-22.6274, -11.3137, 22.6274, 11.3137], abs=1e-4)
    assert found[1].tolist() == [-16.0, -16.0, 16.0, 16.0]
    grid = anchors_of(2, 67, stride=16, at_origin=found)
    assert grid.shape == (2 * 67 * 15, 4)
    assert torch.equal(grid[(67 + 66) * 15 + 1], torch.tensor([66 * 16.0 - 16, 16.0 - 16, 66 * 16.0 + 16, 16.0 + 16]))


def test_regions_are_pooled_aligned_with_as_many_points_as_they_have_places() -> None:
    ramp = torch.arange(20.0).expand(1, 1, 20, 20).contiguous()
    region = torch.tensor([[0.0, 64.0, 64.0, 192.0, 192.0]])
    pooled = roi_align(ramp, region, output_size=14, spatial_scale=1 / 16, sampling_ratio=0, aligned=True)
    assert pooled[0, 0, 0, [0, -1]].tolist() == pytest.approx([3.785714, 11.214286], abs=1e-6)


# ------------------------------------------------------------------------------------------------------ matches and samples


def slow_match(overlaps: np.ndarray, *, below: float, above: float, best_too: bool) -> tuple[list[int], list[int]]:
    objects, labels = [], []
    for box in range(overlaps.shape[1]):
        column = overlaps[:, box]
        objects.append(int(column.argmax()))
        most = column.max()
        label = POSITIVE if most >= above else NEGATIVE if most < below else IGNORED
        if best_too and any(column[thing] == overlaps[thing].max() for thing in range(len(column))):
            label = POSITIVE
        labels.append(label)
    return objects, labels


@pytest.mark.parametrize("best_too", [True, False])
def test_boxes_are_matched_as_a_slow_version_does(best_too: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        overlaps = torch.rand(3, 40, generator=generator).mul(10).round().div(10)
        found = match(overlaps, below=0.3, above=0.7, best_too=best_too)
        objects, labels = slow_match(overlaps.numpy(), below=np.float32(0.3), above=np.float32(0.7), best_too=best_too)
        assert found.objects.tolist() == objects
        assert found.labels.tolist() == labels


def test_thresholds_belong_to_the_class_above_them() -> None:
    overlaps = torch.tensor([[0.3, 0.7, 0.2, 0.9]])
    assert match(overlaps, below=0.3, above=0.7, best_too=False).labels.tolist() == [IGNORED, POSITIVE, NEGATIVE, POSITIVE]
    assert match(torch.tensor([[0.5]]), below=0.5, above=0.5, best_too=False).labels.tolist() == [POSITIVE]
    assert match(torch.zeros(0, 5), below=0.3, above=0.7, best_too=True).labels.tolist() == [NEGATIVE] * 5


def test_a_sample_has_as_many_positive_boxes_as_it_may_and_fills_up_with_negative_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([POSITIVE] * 50 + [NEGATIVE] * 500 + [IGNORED] * 50, dtype=torch.int8)
    positive, negative = sample(labels, count=64, positives=0.25, keys=torch.rand(600, generator=generator))
    assert (len(positive), len(negative)) == (16, 48)
    assert set(labels[positive].tolist()) == {POSITIVE}
    assert set(labels[negative].tolist()) == {NEGATIVE}
    few, many = sample(labels, count=256, positives=0.5, keys=torch.rand(600, generator=generator))
    assert (len(few), len(many)) == (50, 206)


def slow_nms(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> list[int]:
    left, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    while left:
        first = left.pop(0)
        kept.append(first)
        left = [i for i in left if float(box_iou(torch.tensor(boxes[[first]]), torch.tensor(boxes[[i]]))) <= overlap]
    return kept


def random_boxes(count: int, *, seed: int, side: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * side * 0.7
    return torch.cat((corners, corners + 5 + torch.rand(count, 2, generator=generator) * side * 0.3), dim=1)


def test_overlapping_boxes_are_thinned_out_as_a_slow_version_does() -> None:
    boxes, scores = random_boxes(40, seed=2), torch.rand(40, generator=torch.Generator().manual_seed(3))
    assert nms(boxes, scores, 0.7).tolist() == slow_nms(boxes.numpy(), scores.numpy(), 0.7)


def test_the_losses_of_proposals_are_those_of_a_slow_version() -> None:
    rpn = RegionProposals(8, levels=(Level(16, (32.0, 64.0)),))
    generator = torch.Generator().manual_seed(4)
    predicted = rpn([torch.randn(2, 8, 6, 7, generator=generator)])
    anchors, scores, deltas = predicted.anchors, predicted.scores, predicted.deltas
    assert anchors.shape == (6 * 7 * 6, 4)
    assert rpn.deltas.weight.std() < 0.02
    objects = [random_boxes(3, seed=5), torch.zeros(0, 4)]
    keys = [torch.rand(len(anchors), generator=generator) for _ in range(2)]
    found = rpn.losses(predicted, objects=objects, keys=keys)
    of_scores, of_boxes = 0.0, 0.0
    for image in range(2):
        overlaps = box_iou(objects[image], anchors)
        if len(objects[image]):
            which, labels = slow_match(overlaps.numpy(), below=np.float32(0.3), above=np.float32(0.7), best_too=True)
        else:
            which, labels = [0] * len(anchors), [NEGATIVE] * len(anchors)
        by_key = sorted(range(len(anchors)), key=lambda i: float(keys[image][i]))
        positive = [i for i in by_key if labels[i] == POSITIVE][:128]
        negative = [i for i in by_key if labels[i] == NEGATIVE][: 256 - len(positive)]
        for i in positive:
            of_scores += math.log1p(math.exp(-float(scores[image, i].detach())))
            wanted = encode(anchors[[i]], towards=objects[image][[which[i]]], weights=RPN_WEIGHTS)[0]
            of_boxes += float((deltas[image, i].detach() - wanted).abs().sum())
        of_scores += sum(math.log1p(math.exp(float(scores[image, i].detach()))) for i in negative)
    assert float(found["rpn_objectness"].detach()) == pytest.approx(of_scores / 512, rel=1e-5)
    assert float(found["rpn_boxes"].detach()) == pytest.approx(of_boxes / 512, rel=1e-5)


def test_a_score_and_its_box_belong_to_the_same_anchor() -> None:
    rpn = RegionProposals(4, levels=(Level(16, (32.0,)),))
    maps = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(6))
    predicted = rpn([maps])
    scores, deltas = predicted.scores, predicted.deltas
    x = F.relu(rpn.conv(maps))
    raw_scores, raw_deltas = rpn.objectness(x), rpn.deltas(x)
    for row in range(2):
        for column in range(3):
            for anchor in range(3):
                place = (row * 3 + column) * 3 + anchor
                assert scores[0, place] == raw_scores[0, anchor, row, column]
                assert torch.equal(deltas[0, place], raw_deltas[0, 4 * anchor : 4 * anchor + 4, row, column])


# ------------------------------------------------------------------------------------------------------------- the batches


def test_batches_have_one_orientation_and_every_image_comes_as_often() -> None:
    is_wide = np.arange(30) % 3 > 0
    order = batch_order(is_wide, batch_size=4, seed=5)
    batches = [next(order) for _ in range(45)]
    assert all(len(set(is_wide[batch].tolist())) == 1 for batch in batches)
    counts = np.bincount(np.concatenate(batches), minlength=30)
    assert counts.sum() == 180
    assert counts.min() >= 5
    assert counts.max() <= 7
    again = batch_order(is_wide, batch_size=4, seed=5)
    assert all(np.array_equal(batch, next(again)) for batch in batches)
    other = batch_order(is_wide, batch_size=4, seed=6)
    assert any(not np.array_equal(batch, next(other)) for batch in batches)


def test_precise_statistics_are_those_of_all_that_the_layers_saw() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1), torch.nn.BatchNorm2d(2)
    )
    batches = [torch.randn(5, 3, 6, 6) for _ in range(7)]
    before = {name: value.clone() for name, value in network.named_parameters()}
    set_precise_statistics(network, forward=network, batches=batches, total=lambda sums: sums)
    first = torch.stack([network[0](batch).double() for batch in batches])
    mean = first.mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(network[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network[1].running_var.double(), first.var(dim=(0, 1, 3, 4), unbiased=False), rtol=1e-5, atol=1e-6)
    second = []
    for batch in batches:  # each batch is normalised by its own statistics on its way
        x = network[0](batch).double()
        x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.var(dim=(0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        second.append(torch.nn.functional.conv2d(x, network[2].weight.double(), network[2].bias.double()))
    torch.testing.assert_close(
        network[3].running_var.double(), torch.stack(second).var(dim=(0, 1, 3, 4), unbiased=False), rtol=1e-4, atol=1e-6
    )
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert int(network[1].num_batches_tracked) == 0


# --------------------------------------------------------------------------------------------------------------- the views


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((375, 500), 800, (800, 1067)),
        ((333, 1000), 800, (444, 1333)),
        ((500, 375), 480, (640, 480)),
        ((500, 500), 800, (800, 800)),
    ],
)
def test_sizes_are_detectron2s(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert resized(size, side=side, longest=1333) == expected


def test_a_view_is_a_function_of_its_numbers_and_boxes_move_with_the_pixels() -> None:
    config = Detector()
    assert len(config.sides) == 11
    first, last = (
        train_view((100, 200), uniforms=np.array(numbers), sides=config.sides, longest=config.longest)
        for numbers in ([0.0, 0.6], [0.999, 0.4])
    )
    assert first == View((480, 960), flipped=False)
    assert last == View((667, 1333), flipped=True)
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[4:10, 6:14] = 255
    view = View((40, 80), flipped=True)
    pixels = show(Image.fromarray(picture), view=view)
    ((x0, y0, x1, y1),) = moved(np.array([[6.0, 4.0, 14.0, 10.0]]), size=(20, 40), view=view)
    assert (x0, y0, x1, y1) == (52.0, 8.0, 68.0, 20.0)
    bright = pixels[..., 0] > 127
    assert np.argwhere(bright).min(axis=0).tolist() == [8, 52]
    assert (np.argwhere(bright).max(axis=0) + 1).tolist() == [20, 68]
    assert is_kept(np.array([[1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 2.0, 5.0]])).tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------- the annotations

XML = """<annotation><size><width>{width}</width><height>80</height><depth>3</depth></size>
<object><name>person</name><bndbox><ymin>2</ymin><xmax>30.5</xmax><xmin>1</xmin><ymax>40</ymax></bndbox>
<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>
<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>{right}</xmax><ymax>8</ymax></bndbox></object>
</annotation>"""
NUMBERS = {"dog": 0, "person": 1}


def annotated(folder: Path, **values: object) -> Path:
    path = folder / "000001.xml"
    path.write_text(XML.format(**{"width": 100, "name": "dog", "right": 7, **values}))
    return path


def test_boxes_lose_one_at_their_minima_and_parts_of_persons_are_no_objects(tmp_path: Path) -> None:
    found = read_annotation(annotated(tmp_path), class_numbers=NUMBERS, size=(80, 100))
    assert found.boxes.tolist() == [[0.0, 1.0, 30.5, 40.0], [4.0, 5.0, 7.0, 8.0]]
    assert found.as_counted.tolist() == [[1.0, 2.0, 30.5, 40.0], [5.0, 6.0, 7.0, 8.0]]
    assert found.labels.tolist() == [1, 0]
    assert found.difficult.tolist() == [False, True]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 90}, "is of an image of 90 x 80 pixels, but the image has 100 x 80"),
        ({"name": "cow"}, "shows the class 'cow'"),
        ({"right": 101}, "that is not within 100 x 80 pixels"),
        ({"right": "x"}, "has no number for 'xmax'"),
        ({"right": "inf"}, "has inf for 'xmax'"),
        ({"name": "<"}, "is damaged"),
        ({"name": "<!ENTITY a 'b'>"}, "is no annotation file of VOC"),
    ],
)
def test_a_damaged_annotation_is_refused_by_name(tmp_path: Path, values: dict[str, object], words: str) -> None:
    path = annotated(tmp_path, **values)
    with pytest.raises(UserError) as refused:
        read_annotation(path, class_numbers=NUMBERS, size=(80, 100))
    assert str(path) in str(refused.value)
    assert words in str(refused.value)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn images of VOC 2007, prepared as `drawn-voc` in `data`."""
    folder = tmp_path_factory.mktemp("detection")
    prepare("drawn-voc", source=drawn_voc.draw_voc(folder), data_root=folder / "data", workers=1)
    return folder


def test_a_prepared_set_has_the_boxes_of_its_images(voc: Path) -> None:
    for name, listed in (("train", "trainval"), ("val", "test")):
        split = open_split("drawn-voc", name, data_root=voc / "data")
        boxes = read_objects(split)
        assert len(boxes) == split.num_images
        for index in (0, 7, 399):
            _, objects = drawn_voc.draw(listed, index=index)
            found = boxes[index]
            assert found.as_counted.tolist() == [list(map(float, each.box)) for each in objects]
            assert [split.class_names[label] for label in found.labels] == [each.class_name for each in objects]
            assert found.difficult.tolist() == [each.is_difficult for each in objects]
            assert found.size == (split.heights[index], split.widths[index])


def test_both_years_are_trained_on_and_2007_is_tested_on(voc: Path, tmp_path: Path) -> None:
    kit = tmp_path / "VOCdevkit"
    (kit / "VOC2007").parent.mkdir()
    (kit / "VOC2007").symlink_to(voc / "VOC2007")
    with pytest.raises(UserError, match="has no folder VOC2012: unpack the archives of both years"):
        open_source(tmp_path, several_years=True)
    (kit / "VOC2012").symlink_to(voc / "VOC2007")
    source = open_source(tmp_path, several_years=True)
    train, val = source.split("train"), source.split("val")
    assert train is not None
    assert val is not None
    assert (len(train.images), len(train.annotations), len(val.images)) == (1200, 1200, 400)
    assert {image.name[:8] for image in train.images} == {"VOC2007/", "VOC2012/"}
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "other" / year / "ImageSets" / "Main").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 2 years of VOC: give one of them"):
        open_source(tmp_path / "other")


def test_some_missing_annotations_are_refused_and_none_at_all_are_no_boxes(voc: Path, tmp_path: Path) -> None:
    copy = tmp_path / "VOC2007"
    shutil.copytree(voc / "VOC2007", copy)
    (copy / "Annotations" / "000003.xml").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 600 files, such as 000003.xml"):
        open_source(copy)
    shutil.rmtree(copy / "Annotations")
    prepare("plain", source=copy, data_root=tmp_path / "data", workers=1)
    with pytest.raises(UserError, match="'plain' has no boxes: a detector is trained on a folder of PASCAL VOC"):
        read_objects(open_split("plain", "train", data_root=tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------------- the detector

SMALL = Backbone(arch="resnet10", stem="small", width=8)


def drawn(count: int) -> tuple[Tensor, list[tuple[int, int]], list[Objects]]:
    """Return drawn images, enlarged, normalised and padded [N, 3, 104, 104], their sizes and their objects."""
    images, sizes, objects = torch.zeros(count, 3, 104, 104), [], []
    for index in range(count):
        pixels, found = drawn_voc.draw("trainval", index=index)
        height, width = 2 * pixels.shape[0], 2 * pixels.shape[1]
        large = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        images[index, :, :height, :width] = (torch.from_numpy(large.copy()).permute(2, 0, 1) / 255 - 0.4) / 0.25
        sizes.append((height, width))
        boxes = torch.tensor([each.box for each in found], dtype=torch.float32) * 2 - torch.tensor([2.0, 2.0, 0.0, 0.0])
        labels = torch.tensor([drawn_voc.CLASS_NAMES.index(each.class_name) for each in found])
        objects.append(Objects(boxes, labels, (height, width)))
    return images, sizes, objects


def generators(count: int, *, step: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * step + image) for image in range(count)]


def test_a_step_has_four_losses_and_every_parameter_learns() -> None:
    detector = FasterRcnn(
        build_backbone(SMALL, seed=0), num_classes=24, seed=0, sizes=(12.0, 24.0), pooled=6, regions=512
    ).train()
    images, _, objects = drawn(2)
    losses = detector.losses(images, objects=objects, generators=generators(2, step=0))
    assert losses.keys() == {"rpn_objectness", "rpn_boxes", "classes", "boxes"}
    assert losses["classes"].item() == pytest.approx(math.log(25), rel=0.2)
    torch.stack(list(losses.values())).sum().backward()
    assert all(each.grad is not None and float(each.grad.abs().sum()) > 0 for each in detector.parameters())
    again = detector.losses(images, objects=objects, generators=generators(2, step=0))
    assert again["classes"].item() == losses["classes"].item(), "what is chosen is a function of the generators"


def test_an_image_without_objects_is_all_background() -> None:
    detector = FasterRcnn(
        build_backbone(SMALL, seed=0), num_classes=24, seed=0, sizes=(12.0, 24.0), pooled=6, regions=512
    ).train()
    images, sizes, _ = drawn(1)
    nothing = [Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), sizes[0])]
    losses = detector.losses(images, objects=nothing, generators=generators(1, step=0))
    assert losses["boxes"].item() == losses["rpn_boxes"].item() == 0.0
    assert math.isfinite(losses["classes"].item())


def test_a_few_images_are_learned_by_heart() -> None:
    encoder = build_backbone(SMALL, seed=0)
    detector = FasterRcnn(encoder, num_classes=24, seed=0, sizes=(20.0, 32.0), pooled=6, regions=64).train()
    images, sizes, objects = drawn(4)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.05, momentum=0.9)
    for step in range(300):
        losses = detector.losses(images, objects=objects, generators=generators(4, step=step))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    found = detector.detect(images, sizes=sizes)
    for name in range(24):
        truths = {
            str(image): truth(*(box.tolist() for box in each.boxes[each.labels == name] + torch.tensor([1.0, 1.0, 0.0, 0.0])))
            for image, each in enumerate(objects)
        }
        if any(len(each.boxes) for each in truths.values()):
            of_class = [
                as_written(str(image), score=float(score), box=box.tolist())
                for image, each in enumerate(found)
                for box, score in zip(each.boxes[each.labels == name], each.scores[each.labels == name], strict=True)
            ]
            assert average_precision(of_class, truths=truths, overlap=0.5) > 90, drawn_voc.CLASS_NAMES[name]


# ------------------------------------------------------------------------------------------------------------- a whole run

QUICK = (
    "training.epochs=2",
    "training.batch_size=4",
    "method.steps_per_epoch=4",
    "method.precise_batches=2",
    "optimizer.decay_after=[1]",
)


def run_of(voc: Path, runs_root: Path, *, changes: tuple[str, ...] = ()) -> tuple[Loaded, Machine]:
    machine = Machine(data_root=voc / "data", runs_root=runs_root, device="cpu", loader="torch", workers=0)
    return load_recipe("voc-detection-demo", overrides=(*QUICK, *changes)), machine


def test_a_detector_is_trained_and_tested(voc: Path, tmp_path: Path) -> None:
    loaded, machine = run_of(voc, tmp_path / "runs")
    folder = complete(loaded, machine=machine)
    assert folder.current_state().status == "finished"
    (result,) = folder.results()
    assert [each["name"] for each in result["measurements"]] == ["voc_ap50", "voc_ap75", "voc_ap"]
    assert {each["count"] for each in result["measurements"]} == {400}
    assert len(result["details"]["ap50_of_classes"]) == 24
    assert points(folder)[-1][1].keys() >= {"loss", "loss_rpn_objectness", "loss_rpn_boxes", "loss_classes", "loss_boxes"}
    assert folder.state.total_steps == 8
    facts, pictures = read_detection(folder.path / "detection" / folder.run_id)
    assert (facts.run_id, facts.num_images, len(facts.classes)) == (folder.run_id, 400, 24)
    assert len(facts.groups.best) == len(facts.groups.worst) == len(facts.groups.random) == 12
    assert pictures.keys() == {picture.file for picture in facts.pictures}
    of_classes = {each.name: each.curves[0].ap for each in facts.classes}
    assert of_classes == pytest.approx(result["details"]["ap50_of_classes"], abs=1e-4)
    before = (folder.path / "detector.safetensors").read_bytes()
    assert complete(loaded, machine=machine).results() == [result], "it is not measured again"
    assert (folder.path / "detector.safetensors").read_bytes() == before


def test_a_detector_that_is_killed_and_continued_ends_as_one_that_was_not(voc: Path, tmp_path: Path) -> None:
    changes = ("training.epochs=10", "evaluation.protocols=[]")
    loaded, machine = run_of(voc, tmp_path / "whole", changes=changes)
    whole = complete(loaded, machine=machine)
    machine = machine.model_copy(update={"runs_root": tmp_path / "killed", "checkpoint_every_s": 0.05})
    kills = 10 if os.environ.get("OBOWLAB_TEST_ALL") else 3
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


def digests(recipe: Recipe, *, data: Path, scratch: Path) -> list[str]:
    """Return the protocol hash of a recipe's detection, and those with another title, another rate and fewer training images."""
    assert isinstance(recipe.method, Detector)
    encoder = build_backbone(recipe.backbone, seed=0)
    detector = build_detector(recipe.method, encoder=encoder, num_classes=24, seed=0)
    detector.testing_proposals = Proposing(20, 5)
    with torch.no_grad():
        detector.classes.bias[-1] = 9.0  # it finds nothing, which is soon measured
    changes = (
        {},
        {"title": "another"},
        {"optimizer": recipe.optimizer.model_copy(update={"learning_rate": 0.001})},
        {"data": recipe.data.model_copy(update={"images_per_class": 4})},
    )
    return [
        evaluate(
            encoder,
            recipe=recipe.model_copy(update=change),
            machine=Machine(data_root=data, runs_root=scratch, device="cpu", loader="torch", workers=0),
            subject="student",
            cache_dir=scratch,
            detector=detector.eval(),
            device=torch.device("cpu"),
            report=lambda line: None,
        )[0].protocol_hash
        for change in changes
    ]


@pytest.mark.long
def test_the_protocol_hash_is_that_of_the_training(voc: Path, tmp_path: Path) -> None:
    usual, titled, slower, fewer = digests(load_recipe("voc-detection-demo").recipe, data=voc / "data", scratch=tmp_path)
    assert usual == titled
    assert len({usual, slower, fewer}) == 3


def loader(voc: Path, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> DetectionLoader:
    split = open_split("drawn-voc", "train", data_root=voc / "data")
    config = Detector(steps_per_epoch=5, sides=(40, 48), longest=70)
    return DetectionLoader(
        split,
        subset=np.arange(60),
        annotations=read_objects(split),
        config=config,
        batch_size=4,
        seed=9,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def test_batches_do_not_depend_on_workers_processes_or_where_an_epoch_begins(voc: Path) -> None:
    whole = list(loader(voc).batches(epoch=1))
    assert len(whole) == 5
    assert [batch.step for batch in whole] == list(range(5))
    begun = list(loader(voc, workers=2).batches(epoch=1, start_step=3))
    shares = [list(loader(voc, rank=rank, world_size=2).batches(epoch=1)) for rank in range(2)]
    for place, batch in enumerate(whole):
        halves = [share[place] for share in shares]
        assert [half.first for half in halves] == [0, 2]
        assert {half.size for half in halves} == {batch.size}, "all processes pad alike"
        for image, other in zip(batch.images, [image for half in halves for image in half.images], strict=True):
            assert torch.equal(image.pixels, other.pixels)
            assert torch.equal(image.boxes, other.boxes)
            assert image.pixels.shape[0] <= batch.size[0]
        if place >= 3:
            for image, other in zip(batch.images, begun[place - 3].images, strict=True):
                assert torch.equal(image.pixels, other.pixels)
    further = list(loader(voc).batches(epoch=2, num_steps=2))
    assert [int(batch.indices[0]) for batch in further] == [int(b.indices[0]) for b in list(loader(voc).batches(epoch=2))[:2]]


def test_too_few_images_for_a_batch_are_refused(voc: Path) -> None:
    split = open_split("drawn-voc", "train", data_root=voc / "data")
    with pytest.raises(UserError, match=r"training.batch_size \(8\) is larger than the training set \(3 images with objects\)"):
        DetectionLoader(split, subset=np.arange(3), annotations=read_objects(split), config=Detector(), batch_size=8, seed=0)


def test_all_batch_norms_and_nothing_else_are_without_weight_decay() -> None:
    method = DetectorTraining(
        Detector(anchors=(8.0,), pooled=4), backbone=SMALL, total_steps=1, seed=0, num_classes=3, comm=OneProcess()
    )
    groups = {group["name"]: group for group in method.param_groups(weight_decay=1e-4)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"method": 1e-4, "norms": 0.0}
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    in_norms = {names[id(parameter)] for parameter in groups["norms"]["params"]}
    assert in_norms == {name for name in names.values() if ".bn" in name or ".norm." in name or "downsample.1" in name}
    assert len(names) == sum(len(group["params"]) for group in groups.values())


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-5),
        (1, 1.099e-4),
        (50, 5.005e-3),
        (99, 9.9001e-3),
        (100, 0.01),
        (17_999, 0.01),
        (18_000, 1e-3),
        (21_999, 1e-3),
        (22_000, 1e-4),
    ],
)
def test_rates_are_the_papers(step: int, rate: float) -> None:
    recipe = load_recipe("voc-detection").recipe
    assert recipe.training.epochs * recipe.method.steps_per_epoch == 24_000
    assert learning_rate(step, optimizer=recipe.optimizer, epochs=24, steps_per_epoch=1000) == pytest.approx(rate, rel=1e-9)
