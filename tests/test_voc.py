"""VOC07 classification: the folder's layout and its traps, the view, and the SVMs, by the hand checks of their specification."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score
from torchvision.transforms import functional

from obowlab.config import Backbone, Data, Evaluation, Machine, Recipe, Views, Voc07Svm, load_recipe
from obowlab.data.datasets import open_split, prepare
from obowlab.data.drawn_voc import CLASS_NAMES, NUM_IMAGES, draw, draw_voc
from obowlab.data.opening import open_source
from obowlab.data.protocol_needs import several_classes_need
from obowlab.errors import UserError
from obowlab.evaluation import evaluate, svm
from obowlab.evaluation.result import Measurement
from obowlab.evaluation.svm import (
    ClassFit,
    fit_class,
    fit_classes,
    mean_average_precision,
    normalised,
)
from obowlab.files.records import read_checked, with_checksum
from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.runs.results import unpack
from obowlab.views.pil_views import decode
from obowlab.views.stretched import stretched, stretched_batches
from obowlab.weights.encoder_file import save_encoder
from tests.command_line import Obowlab
from tests.oracles import average_precision

VIEWS = Views(original_size=24, original_resize=28, num_crops=1, crop_size=16)
QUICK = Voc07Svm(costs=(0.1, 1.0), max_iterations=200)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn folder of VOC, and a prepared data set `drawn-voc` beside it."""
    folder = tmp_path_factory.mktemp("voc")
    prepare("drawn-voc", source=draw_voc(folder), data_root=folder / "data")
    return folder


@pytest.fixture
def encoder() -> ResNet:
    return build_backbone(Backbone(arch="resnet10", stem="small", width=4), seed=0)


def small_voc(folder: Path, *, marks: dict[str, str] | None = None) -> Path:
    """A VOC2007 of four images: marks of cat and dog for trainval and test."""
    main = folder / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (folder / "VOC2007" / "JPEGImages").mkdir()
    for image_id in ("000005", "000007", "000001", "000002"):
        Image.new("RGB", (30, 20), (int(image_id), 90, 30)).save(folder / "VOC2007" / "JPEGImages" / f"{image_id}.jpg")
    files = {
        "trainval": "000005\n000007\n",
        "test": "000001\n000002\n",
        "cat_trainval": "000005  1\n000007 -1\n",
        "cat_test": "000001  0\n000002 -1\n",
        "dog_trainval": "000005  0\n000007  1\n",
        "dog_test": "000001  1\n000002 -1\n",
        **(marks or {}),
    }
    for name, text in files.items():
        (main / f"{name}.txt").write_text(text)
    return folder / "VOC2007"


def rewrite(manifest: Path, **changes: object) -> None:
    manifest.write_text(with_checksum(json.dumps({**read_checked(manifest), **changes})))


# ---------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("inside", [".", "VOCdevkit"])
def test_a_folder_of_voc_is_read_from_wherever_it_lies(tmp_path: Path, inside: str) -> None:
    small_voc(tmp_path / inside)
    for given in {tmp_path, tmp_path / inside, tmp_path / inside / "VOC2007"}:
        source = open_source(given)
        assert [split.name for split in source.splits] == ["train", "val"]
        assert [split.targets for split in source.splits] == [("+?", "-+"), ("?+", "--")]
        assert [[image.name for image in split.images] for split in source.splits] == [
            ["000005.jpg", "000007.jpg"],
            ["000001.jpg", "000002.jpg"],
        ]
        assert source.splits[1].class_names == ("cat", "dog")
        assert [image.label for split in source.splits for image in split.images] == [0, 1, 1, 0]


def test_lists_with_two_underscores_are_no_classes(tmp_path: Path) -> None:
    place = small_voc(tmp_path, marks={"head_left_trainval": "000005 1\n", "cat_train": "000005 1\n"})
    assert open_source(place).splits[0].class_names == ("cat", "dog")


def test_a_year_without_a_public_test_set_is_read_as_train_and_val(tmp_path: Path) -> None:
    place = small_voc(tmp_path)
    main = place / "ImageSets" / "Main"
    for file in list(main.iterdir()):
        file.rename(main / file.name.replace("trainval", "train").replace("test", "val"))
    assert [split.targets for split in open_source(place).splits] == [("+?", "-+"), ("?+", "--")]


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({"cat_trainval": "000005 1\n"}, "do not name the same images: 1 are in one only, such as 000007"),
        ({"cat_trainval": "000005 1\n000007 2\n"}, "'000007 2' is not an image and 1, 0 or -1"),
        ({"cat_trainval": "000005 1\n000007\n"}, "'000007' is not an image and 1, 0 or -1"),
        ({"trainval": "000005\n000005\n"}, "names an image twice"),
        ({"trainval": ""}, "names no image"),
        ({"test": "000001\n000002\n000009\n"}, "cat_test.txt and test.txt do not name the same images"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, marks: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        open_source(small_voc(tmp_path, marks=marks))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    place = small_voc(tmp_path)
    (place / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 2 images of test.txt, such as 000002.jpg"):
        open_source(place)
    (place / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(UserError, match="the test images of VOC2007 come in an archive of their own"):
        open_source(place)
    small_voc(tmp_path / "VOCdevkit")
    with pytest.raises(UserError, match="holds 2 years of VOC"):
        open_source(tmp_path)


def test_marks_follow_their_images_when_one_cannot_be_read(tmp_path: Path) -> None:
    place = small_voc(tmp_path)
    (place / "JPEGImages" / "000005.jpg").write_bytes(b"no picture")
    prepare("voc", source=place, data_root=tmp_path / "data")
    train = open_split("voc", "train", data_root=tmp_path / "data")
    assert train.targets is not None
    assert train.targets.tolist() == [[0, 1]]
    val = open_split("voc", "val", data_root=tmp_path / "data")
    assert val.targets is not None
    assert val.targets.tolist() == [[-1, 1], [0, 0]]


def test_other_marks_are_another_source(tmp_path: Path) -> None:
    prepare("voc", source=small_voc(tmp_path / "one"), data_root=tmp_path / "data")
    other = small_voc(tmp_path / "other", marks={"dog_test": "000001 -1\n000002 1\n"})
    with pytest.raises(UserError, match="whose files, labels or validation images differ"):
        prepare("voc", source=other, data_root=tmp_path / "data")


def test_a_manifest_whose_marks_do_not_fit_is_refused(tmp_path: Path) -> None:
    prepare("voc", source=small_voc(tmp_path), data_root=tmp_path / "data")
    rewrite(tmp_path / "data" / "voc" / "train.json", targets=["+"])
    with pytest.raises(UserError, match="does not mark every class of every image"):
        open_split("voc", "train", data_root=tmp_path / "data")


def test_the_drawn_folder_is_what_it_says(voc: Path) -> None:
    for split, listed in (("train", "trainval"), ("val", "test")):
        opened = open_split("drawn-voc", split, data_root=voc / "data")
        assert opened.num_images == NUM_IMAGES[listed]
        assert opened.class_names == tuple(sorted(CLASS_NAMES))
        assert opened.targets is not None
        assert {*np.unique(opened.targets)} == {-1, 0, 1}
        assert len({*opened.heights}) == 2
        for index in (0, 17, 101):
            _, objects = draw(listed, index=index)
            shown = {each.class_name for each in objects}
            marked = {name for name, mark in zip(opened.class_names, opened.targets[index], strict=True) if mark}
            assert marked == shown
            image = decode(opened, index)
            assert all(1 <= each.box[0] < each.box[2] <= image.width for each in objects)
            assert all(1 <= each.box[1] < each.box[3] <= image.height for each in objects)
    with pytest.raises(UserError, match="is there already"):
        draw_voc(voc)


def test_drawn_boxes_surround_what_is_drawn() -> None:
    """A part is lighter than its ground; its box, with both ends included, begins and ends where the light pixels do."""
    apart = []
    for index in range(200):
        image, objects = draw("trainval", index=index)
        if len(objects) != 1 or objects[0].is_difficult:
            continue
        light = image.astype(float).mean(axis=2) > 125
        rows, columns = (np.flatnonzero(light.sum(axis=axis) >= 2) + 1 for axis in (1, 0))
        seen = (columns[0], rows[0], columns[-1], rows[-1])
        apart.append(np.subtract(objects[0].box, seen))
    assert len(apart) > 20
    # Smooth edges, and textures that begin with a gap: the outermost pixel is not that light.
    assert np.median(apart, axis=0).tolist() == [-1, -1, 1, 1]


# ------------------------------------------------------------------------------------------------------------------ view


def test_the_view_is_two_resizes_of_pil(voc: Path) -> None:
    split = open_split("drawn-voc", "val", data_root=voc / "data")
    indices = np.array([3, 0, 399, 12, 7], dtype=np.int64)
    seen = list(stretched_batches(split, indices=indices, views=VIEWS, batch_size=2, workers=3))
    assert [batch.tolist() for batch, _ in seen] == [[3, 0], [399, 12], [7]]
    pixels = torch.cat([views for _, views in seen])
    assert pixels.dtype == torch.uint8
    for index, got in zip(indices.tolist(), pixels, strict=True):
        image = functional.resize(functional.resize(decode(split, index), [28]), [24, 24])
        np.testing.assert_allclose(got.numpy().astype(int), np.asarray(image).astype(int), atol=1)
        assert np.array_equal(got.numpy(), stretched(decode(split, index), VIEWS))


def test_the_view_shows_the_whole_image(voc: Path) -> None:
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 0, 0), (0, 0, 10, 30))
    wide.paste((0, 0, 255), (80, 0, 90, 30))
    view = stretched(wide, VIEWS)
    assert view.shape == (24, 24, 3)
    assert view[:, 0, 0].min() > 200
    assert view[:, -1, 2].min() > 200


# ------------------------------------------------------------------------------------------------------------------ SVMs


def measured_precisions(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """Return the average precision of every column, in [0, 1], as the protocol measures it."""
    columns = [scores[:, column] for column in range(scores.shape[1])]
    _, each = mean_average_precision([a_fit(str(place), each) for place, each in enumerate(columns)], targets=labels)
    return [value / 100 for value in each.values()]


def test_average_precision_by_hand() -> None:
    def one(labels: list[int], scores: list[float]) -> float:
        (value,) = measured_precisions(np.array(labels)[:, None], np.array(scores)[:, None])
        assert average_precision(labels, scores) == pytest.approx(value), "the slow version agrees"
        return value

    labels, scores = [0, 1, 1, 0, 1], [5.0, 4, 3, 2, 1]
    assert one(labels, scores) == pytest.approx(0.644444, abs=1e-6)
    assert average_precision_score(labels, scores) == pytest.approx(0.588889, abs=1e-6)  # what chooses the cost
    assert one([1, 1, 0], [3.0, 2, 1]) == 1.0
    assert one([0, 0], [2.0, 1]) == 0.0
    assert one([1, 0], [1.0, 1.0]) == 1.0  # equal scores keep their order
    assert one([0, 1], [1.0, 1.0]) == 0.5


def test_average_precision_equals_the_obvious_one() -> None:
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, (30, 50)), random.integers(0, 12, (30, 50)).astype(float)
    expected = [average_precision(labels[:, column].tolist(), scores[:, column].tolist()) for column in range(50)]
    assert measured_precisions(labels, scores) == pytest.approx(expected)


ROWS = np.array([[1, 0], [0, 1], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.3, 0.7], [0.9, 0.3]])
SIGNS = np.array([1, -1, 1, -1, 1, 1, -1, -1])


def objective(theta: np.ndarray) -> float:
    """Half the squared norm of weights and bias, and the weighted squared hinges."""
    margins = np.maximum(0.0, 1.0 - SIGNS * (normalised(ROWS) @ theta[:2] + theta[2]))
    return 0.5 * float(theta @ theta) + float((np.where(SIGNS == 1, 2.0, 1.0) * margins**2).sum())


def test_the_classifier_minimises_what_the_specification_says() -> None:
    best = minimize(objective, np.zeros(3), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    np.testing.assert_allclose(best.x, (1.093655, -0.545310, -0.161663), atol=2e-6)
    assert best.fun == pytest.approx(6.597060, abs=1e-6)
    # Scores of the unit vectors and of the origin give back weights and bias.
    asked = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    fit = fit_class("one", SIGNS, features=normalised(ROWS), test_features=asked, config=Voc07Svm(costs=(1.0,)))
    bias = fit.scores[2]
    assert (fit.scores[0] - bias, fit.scores[1] - bias) == pytest.approx((1.093660, -0.545314), abs=2e-6)
    assert objective(np.array([fit.scores[0] - bias, fit.scores[1] - bias, bias])) == pytest.approx(6.597060, abs=1e-5)


def test_the_grid_is_the_papers() -> None:
    costs = Voc07Svm().costs
    assert costs[:7] == (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0)
    assert costs[7:] == tuple(2.0**-power for power in range(4, 20))
    assert len(costs) == 23


def test_the_first_of_equally_good_costs_is_taken() -> None:
    rows = normalised(np.array([[1.0, 0.1 * i] for i in range(6)] + [[-1.0, 0.1 * i] for i in range(6)]))
    signs = np.array([1] * 6 + [-1] * 6)
    fit = fit_class("easy", signs, features=rows, test_features=rows, config=Voc07Svm(costs=(3.0, 0.5, 1.0)))
    assert fit.cost == 3.0


def test_fits_at_the_limit_of_iterations_are_counted() -> None:
    random = np.random.default_rng(1)
    rows, signs = normalised(random.normal(size=(60, 5))), np.where(random.random(60) < 0.5, 1, -1)
    fit = fit_class("hard", signs, features=rows, test_features=rows, config=Voc07Svm(costs=(1000.0,), max_iterations=1))
    assert fit.unconverged == 4  # three folds and the whole


def a_fit(name: str, scores: np.ndarray) -> ClassFit:
    return ClassFit(name, 1.0, tuple(scores.tolist()), 0)


def some_fits(num_images: int, num_classes: int) -> tuple[list[ClassFit], np.ndarray]:
    random = np.random.default_rng(2)
    targets = random.integers(-1, 2, (num_images, num_classes)).astype(np.int8)
    scores = random.normal(size=(num_classes, num_images)) + targets.T
    return [a_fit(f"class {i}", row) for i, row in enumerate(scores)], targets


def test_difficult_images_are_left_out_of_their_class_alone() -> None:
    fits, targets = some_fits(80, 3)
    measured, each = mean_average_precision(fits, targets=targets)
    expected = []
    for column, fit in enumerate(fits):
        kept = [row for row in range(80) if targets[row, column] >= 0]
        labels = [int(targets[row, column]) for row in kept]
        expected.append(100 * average_precision(labels, [fit.scores[row] for row in kept]))
    assert list(each.values()) == pytest.approx(expected)
    assert measured.value == pytest.approx(np.mean(expected))
    assert measured.low < measured.value < measured.high
    assert measured.high - measured.value == pytest.approx(measured.value - measured.low)
    assert measured.count == 80


def test_the_shares_of_images_have_the_value_as_mean_and_its_spread() -> None:
    fits, targets = some_fits(150, 3)
    measured, _ = mean_average_precision(fits, targets=targets)
    shares = unpack(measured.samples)
    assert shares.mean() == pytest.approx(measured.value, abs=1e-3)
    assert measured.interval == pytest.approx(1.96 * shares.std(ddof=1) / np.sqrt(len(shares)), rel=1e-3)
    drawn, random = [], np.random.default_rng(8)
    for _ in range(200):
        rows = random.integers(0, 150, 150)
        again, _ = mean_average_precision([a_fit(fit.name, np.array(fit.scores)[rows]) for fit in fits], targets=targets[rows])
        drawn.append(again.value)
    assert 1.96 * np.std(drawn) == pytest.approx(measured.interval, rel=0.25)  # a bootstrap has the same spread
    one = targets.copy()
    rows = [row for row in range(150) if row != 17]
    without, _ = mean_average_precision([a_fit(fit.name, np.array(fit.scores)[rows]) for fit in fits], targets=one[rows])
    others = [row for row in range(150) if row != 18]
    without_next, _ = mean_average_precision([a_fit(fit.name, np.array(fit.scores)[others]) for fit in fits], targets=one[others])
    assert shares[17] - shares[18] == pytest.approx(149 * (without_next.value - without.value), abs=2e-3)


def test_resamples_count_an_image_as_often_as_it_was_drawn() -> None:
    """The average precision of weights equals that of images written out as often as they were drawn."""
    random = np.random.default_rng(6)
    hits, weights = random.random(40) < 0.4, random.integers(0, 4, (5, 40)).astype(float)
    for row, got in zip(weights, svm.average_precision(hits, weights=weights), strict=True):
        drawn = np.repeat(np.arange(40), row.astype(int))
        assert got == pytest.approx(average_precision(hits[drawn].astype(int).tolist(), (-drawn.astype(float)).tolist()))


def test_the_interval_covers_other_test_sets() -> None:
    """Of test sets drawn from a world whose value is known, about 95 in 100 intervals hold it."""
    random, covered = np.random.default_rng(3), 0
    world_targets = random.integers(0, 2, (20_000, 2)).astype(np.int8)
    world_scores = random.normal(size=(2, 20_000)) + world_targets.T
    truth = np.mean(
        [100 * average_precision(world_targets[:, column].tolist(), world_scores[column].tolist()) for column in range(2)]
    )
    for _ in range(60):
        rows = random.choice(20_000, 150, replace=False)
        fits = [a_fit(str(column), world_scores[column, rows]) for column in range(2)]
        measured, _ = mean_average_precision(fits, targets=world_targets[rows])
        covered += measured.low <= truth <= measured.high
    assert 51 <= covered <= 60


def test_the_interval_covers_what_such_test_sets_have_where_positives_are_rare() -> None:
    """An average precision of few positives is too high on average: the interval is of the value on test sets of this size."""
    random = np.random.default_rng(9)

    def drawn() -> Measurement:
        targets = (random.random((200, 8)) < 0.06).astype(np.int8)
        fits = [a_fit(str(column), random.normal(size=200) + targets[:, column]) for column in range(8)]
        return mean_average_precision(fits, targets=targets)[0]

    found = [drawn() for _ in range(150)]
    truth = np.mean([each.value for each in found])
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.88 <= covered <= 1.0
    spread = np.std([each.value for each in found])
    assert np.mean([each.interval for each in found]) == pytest.approx(1.96 * spread, rel=0.4)


def test_a_class_that_all_but_one_image_lack_is_left_out_without_that_image() -> None:
    targets = np.zeros((40, 2), dtype=np.int8)
    targets[::2, 0], targets[0, 1] = 1, 1
    fits = [a_fit("often", targets[:, 0].astype(float)), a_fit("once", targets[:, 1].astype(float))]
    measured, _ = mean_average_precision(fits, targets=targets)
    assert (measured.value, measured.interval) == (100.0, 0.0)


def test_standardised_features_are_those_of_the_training_images() -> None:
    rows = np.random.default_rng(4).normal(3.0, 2.0, (50, 4))
    mean, variance = rows.mean(axis=0), rows.var(axis=0)
    expected = (rows - mean) / np.sqrt(variance + 1e-5)
    expected /= np.sqrt((expected**2).sum(axis=1, keepdims=True)) + 1e-5
    np.testing.assert_allclose(normalised(rows, mean=mean, variance=variance), expected, rtol=1e-12)


def data_of_classes(num_classes: int) -> dict[str, object]:
    random = np.random.default_rng(5)
    targets = np.where(random.random((90, num_classes)) < 0.4, 1, 0).astype(np.int8)
    features = normalised(random.normal(size=(90, 6)) + targets @ random.normal(size=(num_classes, 6)))
    names = [f"class {column}" for column in range(num_classes)]
    return {"features": features, "targets": targets, "test_features": features[:30], "class_names": names, "config": QUICK}


def test_processes_change_nothing_and_what_is_done_is_kept(tmp_path: Path) -> None:
    said: list[str] = []
    data = data_of_classes(5)
    alone = fit_classes(**data, processes=1, kept=tmp_path / "a", report=said.append)  # type: ignore[arg-type]
    assert [" left" in line for line in said] == [True, True, True, True, False]
    assert fit_classes(**data, processes=2, kept=tmp_path / "b", report=said.append) == alone  # type: ignore[arg-type]
    one, *others = sorted((tmp_path / "a").iterdir())
    one.write_text(one.read_text()[:-20])  # damaged: fitted again
    for other in others[:2]:
        other.unlink()
    said.clear()
    assert fit_classes(**data, processes=1, kept=tmp_path / "a", report=said.append) == alone  # type: ignore[arg-type]
    assert len(said) == 3


# ----------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture
def measure(voc: Path, encoder: ResNet, tmp_path: Path) -> Callable[..., object]:
    def call(settings: Voc07Svm = QUICK, *, dataset: str = "drawn-voc", **machine: object) -> object:
        recipe = Recipe(data=Data(dataset="small"), views=VIEWS, evaluation=Evaluation(voc07_svm=settings))
        (result,) = evaluate(
            encoder,
            recipe=recipe,
            machine=Machine(data_root=voc / "data", **{"workers": 1, **machine}),
            subject="student",
            cache_dir=tmp_path / "features",
            protocols=("voc07-svm",),
            dataset=dataset,
            device=torch.device("cpu"),
            report=lambda line: None,
        )
        return result

    return call


def test_the_protocol_from_folder_to_result(measure: Callable[..., object], tmp_path: Path) -> None:
    result = measure()
    (measurement,) = result.measurements
    assert measurement.name == "svm_map"
    assert 0 < measurement.low < measurement.value < measurement.high < 100
    details = result.details
    assert np.mean([*details["precision_of_classes"].values()]) == pytest.approx(measurement.value)
    assert len(details["cost_of_classes"]) == 24
    assert set(details["cost_of_classes"].values()) <= {0.1, 1.0}
    assert details["fits_at_the_limit"] >= 0
    for backend in ("torch", "auto"):
        shutil.rmtree(tmp_path / "features")
        again = measure(loader=backend, workers=2)
        assert (again.measurements, again.protocol_hash) == (result.measurements, result.protocol_hash)
    hashes = {
        measure(QUICK.model_copy(update=change)).protocol_hash
        for change in ({"view": "centre"}, {"features": "pool5_bn"}, {"costs": (1.0,)}, {"num_folds": 2})
    }
    assert len({*hashes, result.protocol_hash}) == 5


def test_a_data_set_of_one_class_an_image_is_refused(measure: Callable[..., object], voc: Path, image_folder: Path) -> None:
    prepare("small", source=image_folder, data_root=voc / "data")
    with pytest.raises(UserError, match="voc07-svm needs images that show several classes, and those of 'small' have one each"):
        measure(dataset="small")


def test_classes_with_too_few_images_are_named(tmp_path: Path) -> None:
    prepare("voc", source=small_voc(tmp_path), data_root=tmp_path / "data")
    train, val = (open_split("voc", split, data_root=tmp_path / "data") for split in ("train", "val"))
    reason = several_classes_need(train, val, config=Voc07Svm())
    assert reason == "1 images of voc/train show 'cat', and voc07-svm needs 3"


@pytest.fixture
def file(workplace: Path, voc: Path) -> str:
    """A weights file in the working folder, which has the drawn images prepared."""
    recipe = load_recipe("demo", overrides=["backbone.width=4"]).recipe
    shutil.copytree(voc / "data" / "drawn-voc", workplace / "data" / "drawn-voc")
    path = workplace / "encoder.safetensors"
    save_encoder(build_backbone(recipe.backbone, seed=0), path=path, recipe=recipe, fingerprint=None, source="test")
    return str(path)


def test_other_protocols_say_what_measures_on_such_images(file: str, obowlab: Obowlab) -> None:
    for protocol in ("linear", "knn", "fewshot"):
        code, _, err = obowlab("eval", file, "--protocol", protocol, "--dataset", "drawn-voc")
        assert code == 2
        assert "show several classes each; `obowlab eval RUN --protocol voc07-svm --dataset drawn-voc` measures on them" in err
    code, _, err = obowlab("run", "demo-supervised", "--set", "data.dataset=drawn-voc")
    assert code == 2
    assert "learns from one label an image" in err


def test_the_protocol_has_a_data_set_of_its_own(file: str, obowlab: Obowlab, workplace: Path) -> None:
    code, _, err = obowlab("eval", file, "--protocol", "voc07-svm")
    assert code == 2
    assert "'voc07' is not prepared in" in err
    code, _, err = obowlab("eval", file, "--protocol", "voc07-svm", "--protocol", "knn")
    assert code == 2
    assert "give it a command of its own" in err
    code, out, _ = obowlab("data", "list")
    assert code == 0
    assert "voc07" in out
    shutil.copytree(workplace / "data" / "drawn-voc", workplace / "data" / "voc07")
    for manifest in (workplace / "data" / "voc07").glob("*.json"):
        rewrite(manifest, dataset="voc07")
    code, out, _ = obowlab("eval", file, "--protocol", "voc07-svm", "--dry-run")
    assert code == 0
    assert "encoder.safetensors on voc07" in out


COSTS = "evaluation.voc07_svm.costs=[0.5, 1.0]"


def test_a_command_that_is_killed_continues(file: str, obowlab: Obowlab, workplace: Path) -> None:
    words = ("eval", file, "--protocol", "voc07-svm", "--dataset", "drawn-voc", "--set", COSTS, "--json", "result.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "obowlab.cli", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    kept = workplace / "runs" / ".features"
    deadline = time.monotonic() + 300
    while not (done := list(kept.glob("voc07-svm-*/*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done, "no class was fitted within five minutes"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in kept.glob("voc07-svm-*/*.json")}
    code, out, _ = obowlab(*words)
    assert code == 0
    assert "svm_map" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (first,) = json.loads(Path("result.json").read_text())
    shutil.rmtree(kept)
    assert obowlab(*words)[0] == 0
    (whole,) = json.loads(Path("result.json").read_text())
    assert {**first, "elapsed_s": 0} == {**whole, "elapsed_s": 0}


LAYOUTS = [("voc", "VOC2007", 1000), ("coco", "coco", 1000), ("places", "places205", 1080)]


@pytest.mark.parametrize(("layout", "name", "count"), LAYOUTS)
@pytest.mark.usefixtures("workplace")
def test_draw_says_what_it_would_do_and_what_to_do_next(obowlab: Obowlab, layout: str, name: str, count: int) -> None:
    code, out, _ = obowlab("data", "draw", layout, "here", "--dry-run")
    assert code == 0
    assert f"draw {count} images into here/{name}" in out
    assert not Path("here").exists()
    code, out, _ = obowlab("data", "draw", layout, "here")
    assert code == 0
    assert f"obowlab data prepare drawn-{layout} --source here/{name}" in out
    code, _, err = obowlab("data", "draw", layout, "here")
    assert code == 2
    assert "is there already" in err
