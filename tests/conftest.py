"""Fixtures that all tests share: photographs, if there are any, and a small prepared data set."""

from __future__ import annotations

import os

# Before torch is imported by anything: tests must not fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOS_VARIABLE = "OBOWLAB_TEST_PHOTOS"


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with photos200/CLASS/*.JPEG (unpacked) and tinyimagenet100.tar; skips where there are no photographs."""
    named = os.environ.get(PHOTOS_VARIABLE)
    found = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    missing = [name for name in ("photos200.tar", "tinyimagenet100.tar") if not (found / name).is_file()]
    if missing:
        pytest.skip(f"no photographs: {found} has no {' and no '.join(missing)} (set {PHOTOS_VARIABLE} to a folder that has)")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(found / "photos200.tar") as archive:
        archive.extractall(folder, filter="data")
    (folder / "tinyimagenet100.tar").symlink_to(found / "tinyimagenet100.tar")
    return folder


def draw_photo(seed: int, *, height: int, width: int) -> Image.Image:
    """Return a smooth RGB picture with some noise: something that JPEG, crops and colours have an effect on."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder: 5 classes with 12 train and 6 val images of varied sizes; one is a PNG, one is a grayscale JPEG."""
    folder = tmp_path_factory.mktemp("image_folder")
    seed = 0
    for split, count in (("train", 12), ("val", 6)):
        for label in range(5):
            class_dir = folder / split / f"class_{label}"
            class_dir.mkdir(parents=True)
            for number in range(count):
                seed += 1
                photo = draw_photo(seed, height=40 + 5 * (seed % 9), width=40 + 7 * (seed % 7))
                if (split, label, number) == ("train", 1, 3):
                    photo.save(class_dir / f"image_{number:02}.png")
                elif (split, label, number) == ("train", 2, 4):
                    photo.convert("L").save(class_dir / f"image_{number:02}.jpg", quality=90)
                else:
                    photo.save(class_dir / f"image_{number:02}.jpg", quality=90, progressive=bool(number % 2))
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A data root in which `small`, the images of `image_folder`, is prepared; treat it as read-only."""
    from obowlab.data.datasets import prepare

    root = tmp_path_factory.mktemp("data_root")
    prepare("small", source=image_folder, data_root=root, workers=1)
    return root
