"""Places205 as its archives unpack, in made folders with what goes wrong in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from obowlab.data.datasets import open_split, prepare
from obowlab.data.opening import open_source
from obowlab.errors import UserError

FOLDERS = ("a/abbey", "a/apartment_building/outdoor", "z/zen_garden")
DEEP = "data/vision/torralba/deeplearning/images256"


def make(place: Path, *, lists: str = "trainvalsplit_places205", images: str = DEEP) -> Path:
    """Make 4 images of train and 2 of val for each of three classes, whose numbers are not in the order of their names."""
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for number, folder in zip((2, 0, 1), FOLDERS, strict=True):
        for image in range(6):
            path = f"{folder}/gsun_{image}.jpg"
            file = place / images / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 12), (40 * number, 20 * image, 90)).save(file)
            lines["train" if image < 4 else "val"].append(f"{path} {number}")
    (place / lists).mkdir(parents=True, exist_ok=True)
    for split, found in lines.items():
        (place / lists / f"{split}_places205.csv").write_text("\n".join(found) + "\n")
    return place


@pytest.mark.parametrize("lists", ["trainvalsplit_places205", "."])
@pytest.mark.parametrize("images", [DEEP, "images256", ".", f"imagesPlaces205_resize/{DEEP}"])
def test_the_lists_say_split_and_class(lists: str, images: str, tmp_path: Path) -> None:
    source = open_source(make(tmp_path, lists=lists, images=images))
    train, val = source.split("train"), source.split("val")
    assert train is not None
    assert val is not None
    assert train.class_names == val.class_names == ("apartment_building-outdoor", "zen_garden", "abbey")
    assert [image.label for image in train.images] == [0] * 4 + [1] * 4 + [2] * 4
    assert [image.name for image in val.images] == [
        f"{folder}/gsun_{image}.jpg" for folder in (FOLDERS[1], FOLDERS[2], FOLDERS[0]) for image in (4, 5)
    ]
    assert train.images[0].read() == (tmp_path / images / FOLDERS[1] / "gsun_0.jpg").read_bytes()


def test_it_is_prepared_and_opened_as_any_other(tmp_path: Path) -> None:
    prepare("kinds-of-places", source=make(tmp_path / "source"), data_root=tmp_path / "data", workers=1)
    split = open_split("kinds-of-places", "val", data_root=tmp_path / "data")
    assert np.array_equal(split.labels, [0, 0, 1, 1, 2, 2])


def test_sorted_into_class_folders_it_is_an_image_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("abbey", "zen_garden"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 12)).save(folder / "gsun_0.jpg")
    train = open_source(tmp_path).split("train")
    assert train is not None
    assert train.class_names == ("abbey", "zen_garden")


def test_without_labels_it_is_a_folder_of_images(tmp_path: Path) -> None:
    (split,) = open_source(make(tmp_path), labelled=False).splits
    assert len(split.images) == 18


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"val": None}, "val_places205.csv cannot be read (No such file or directory): unpack trainvalsplit_places205 again."),
        ({"val": ""}, "val_places205.csv is empty: unpack trainvalsplit_places205 again."),
        ({"train": "a/abbey/gsun_0.jpg,2"}, "line 1: 'a/abbey/gsun_0.jpg,2' is not an image, a blank and a number"),
        ({"train": "a/abbey/gsun_0.jpg 2\na/abbey/gsun_0.jpg 2"}, "line 2: 'a/abbey/gsun_0.jpg 2' is not an image, a blank and"),
        ({"train": "a/abbey/gsun_0.jpg 2\nz/zen_garden/gsun_0.jpg 2"}, "has class 2 in two folders, a/abbey and z/zen_garden"),
        ({"train": "a/abbey/gsun_0.jpg 2", "val": "z/zen_garden/gsun_0.jpg 1"}, "has no image of class 0, but of others above"),
        (
            {"train": f"{FOLDERS[1]}/no.jpg 0"},
            "has the lists of Places205, but not the image a/apartment_building/outdoor/no.jpg",
        ),
        ({"val": f"{FOLDERS[1]}/no.jpg 0"}, "lacks 1 of the 1 images of"),
    ],
)
def test_what_is_damaged_is_named(damage: dict[str, str | None], sentence: str, tmp_path: Path) -> None:
    make(tmp_path)
    for split, text in damage.items():
        file = tmp_path / "trainvalsplit_places205" / f"{split}_places205.csv"
        file.unlink()
        if text is not None:
            file.write_text(text)
    with pytest.raises(UserError) as raised:
        open_source(tmp_path)
    assert sentence in str(raised.value)


def test_blank_lines_and_other_line_ends_are_read(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "trainvalsplit_places205/train_places205.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    train = open_source(tmp_path).split("train")
    assert train is not None
    assert len(train.images) == 12
