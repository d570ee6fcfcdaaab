"""The synthetic data set: repeatable, balanced, told apart by parts and by nothing cheaper."""

from __future__ import annotations

import hashlib
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from obowlab.data import synthetic
from obowlab.data.datasets import list_datasets, open_split, prepare, verify
from obowlab.errors import UserError

Features = NDArray[np.float64]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two images per class and split, so that a test takes no time."""
    monkeypatch.setattr(synthetic, "IMAGES_PER_CLASS", {"train": 2, "val": 2})


@pytest.fixture(scope="module")
def val_images() -> NDArray[np.uint8]:
    """All val images, [1200, 40, 40, 3]."""
    return np.stack([synthetic.draw("val", index=index) for index in range(synthetic.num_images("val"))])


@pytest.fixture(scope="module")
def val_labels() -> NDArray[np.int64]:
    return np.repeat(np.arange(synthetic.NUM_CLASSES), synthetic.IMAGES_PER_CLASS["val"])


def centroid_accuracy(features: Features, labels: NDArray[np.int64]) -> float:
    """Return the accuracy in percent, on the second half of every class, of the nearest mean of its first half."""
    features = features - features.mean(axis=0)
    first = np.arange(len(labels)) % synthetic.IMAGES_PER_CLASS["val"] < synthetic.IMAGES_PER_CLASS["val"] // 2
    centroids = np.stack([features[first & (labels == label)].mean(axis=0) for label in range(synthetic.NUM_CLASSES)])
    distances = (centroids**2).sum(axis=1) - 2 * features[~first] @ centroids.T
    return float(100 * (distances.argmin(axis=1) == labels[~first]).mean())


def part_scores(images: NDArray[np.uint8]) -> Features:
    """Return how well each part matches somewhere in each image: the largest normalised correlation, [N, parts]."""
    gray = images.mean(axis=3)
    side = synthetic.IMAGE_SIZE
    spectrum, square = np.fft.rfft2(gray), np.fft.rfft2(gray**2)
    v, u = np.mgrid[-9:10, -9:10] / 8.5
    scores = []
    for shape in synthetic.PARTS.values():
        template = (0.5 - shape(u, v) * 8.5).clip(0, 1)
        template -= template.mean()
        kernel = np.conj(np.fft.rfft2(template / np.linalg.norm(template), s=(side, side)))
        window = np.conj(np.fft.rfft2(np.ones_like(template), s=(side, side)))
        mean = np.fft.irfft2(spectrum * window, s=(side, side)) / template.size
        energy = np.fft.irfft2(square * window, s=(side, side)) - template.size * mean**2
        scores.append((np.fft.irfft2(spectrum * kernel, s=(side, side)) / np.sqrt(energy.clip(1))).max(axis=(1, 2)))
    return np.stack(scores, axis=1)


def test_pixels_are_those_of_this_version() -> None:
    images = [synthetic.draw(split, index=index) for split in ("train", "val") for index in (0, 17, 1199)]
    digest = hashlib.sha256(np.stack(images).tobytes()).hexdigest()
    assert synthetic.SYNTHETIC_VERSION == 2
    assert digest == "d5ddcb82b279b686c1aeed7bce930871b2ffcfa0a7706333a97e5af2e7a23039", (
        "pixels changed: raise SYNTHETIC_VERSION and say so in the change log"
    )


def test_images_differ_between_splits_and_indices() -> None:
    images = {synthetic.draw(split, index=index).tobytes() for split in ("train", "val") for index in range(20)}
    assert len(images) == 40


@pytest.mark.usefixtures("few")
def test_same_bytes_again_and_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from obowlab.data import synthetic; from obowlab.data.datasets import open_split\n"
        "synthetic.IMAGES_PER_CLASS = {'train': 2, 'val': 2}\n"
        "print(open_split('synthetic', 'train', data_root=Path(sys.argv[1])).content_hash)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    other = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert open_split("synthetic", "train", data_root=tmp_path / "own").content_hash == other
    own = [(tmp_path / root / "synthetic/val.beton").read_bytes() for root in ("own", "other")]
    assert own[0] == own[1]


@pytest.mark.usefixtures("few")
def test_drawn_once_on_first_use(tmp_path: Path) -> None:
    listing = {entry.name: entry for entry in list_datasets(tmp_path)}["synthetic"]
    assert listing.manifests == ()
    assert not (tmp_path / "synthetic").exists()
    split = open_split("synthetic", "val", data_root=tmp_path)
    assert np.bincount(split.labels).tolist() == [2] * synthetic.NUM_CLASSES
    assert split.class_names == synthetic.CLASS_NAMES
    assert set(split.heights.tolist()) == set(split.widths.tolist()) == {synthetic.IMAGE_SIZE}
    written = split.path.stat().st_mtime_ns
    assert open_split("synthetic", "train", data_root=tmp_path).num_images == 2 * synthetic.NUM_CLASSES
    assert split.path.stat().st_mtime_ns == written
    assert verify("synthetic", data_root=tmp_path).ok
    with Image.open(io.BytesIO(split.jpeg(7))) as stored:
        difference = np.asarray(stored, np.int16) - synthetic.draw("val", index=7)
    assert np.abs(difference).mean() < 6


@pytest.mark.usefixtures("few")
def test_another_version_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_split("synthetic", "train", data_root=tmp_path).content_hash
    monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", synthetic.SYNTHETIC_VERSION + 1)
    after = open_split("synthetic", "train", data_root=tmp_path).content_hash
    assert after != before
    assert prepare("synthetic", source=None, data_root=tmp_path).already_prepared
    assert not prepare("synthetic", source=None, data_root=tmp_path, force=True).already_prepared


@pytest.mark.usefixtures("few")
def test_a_damaged_file_is_refused_with_the_command_that_fixes_it(tmp_path: Path) -> None:
    path = open_split("synthetic", "train", data_root=tmp_path).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="data prepare synthetic --force"):
        open_split("synthetic", "train", data_root=tmp_path)


def test_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--source"):
        prepare("synthetic", source=tmp_path, data_root=tmp_path)


def test_two_processes_draw_it_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from obowlab.data import synthetic; from obowlab.data.datasets import prepare\n"
        "synthetic.IMAGES_PER_CLASS = {'train': 2, 'val': 2}\n"
        "print(prepare('synthetic', source=None, data_root=Path(sys.argv[1])).already_prepared)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(child.communicate(timeout=240)[0].strip() for child in children) == ["False", "True"]


def test_classes_are_combinations_of_shared_parts() -> None:
    classes = synthetic.class_parts()
    assert len(classes) == synthetic.NUM_CLASSES
    assert all(len(set(parts)) == synthetic.PARTS_PER_CLASS for parts in classes)
    assert set(np.bincount(list(itertools.chain(*classes))).tolist()) == {10}
    assert max(len({*one} & {*two}) for one, two in itertools.combinations(classes, 2)) == 2


def test_parts_keep_their_shape_under_a_flip() -> None:
    v, u = np.mgrid[-1:1:41j, -1:1:41j]
    for name, shape in synthetic.PARTS.items():
        np.testing.assert_allclose(shape(u, v), shape(-u, v), atol=1e-12, err_msg=name)


def test_colour_says_nothing_about_the_class(val_images: NDArray[np.uint8], val_labels: NDArray[np.int64]) -> None:
    chance = 100 / synthetic.NUM_CLASSES
    assert centroid_accuracy(val_images.mean(axis=(1, 2)), val_labels) < 3 * chance
    histograms = [np.histogram(image[..., channel], 16, (0, 256))[0] for image in val_images for channel in range(3)]
    assert centroid_accuracy(np.reshape(histograms, (len(val_images), -1)).astype(np.float64), val_labels) < 3 * chance


def test_parts_tell_the_class_and_raw_pixels_hardly(val_images: NDArray[np.uint8], val_labels: NDArray[np.int64]) -> None:
    scores = part_scores(val_images[::4])
    scores = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    of_class = np.stack([scores[:, list(parts)].sum(axis=1) for parts in synthetic.class_parts()], axis=1)
    oracle = 100 * (of_class.argmax(axis=1) == val_labels[::4]).mean()
    pixels = centroid_accuracy(val_images.mean(axis=3).reshape(len(val_images), -1), val_labels)
    assert oracle > 50
    assert pixels < oracle / 2
