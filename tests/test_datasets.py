"""Preparing, opening and verifying data sets."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from obowlab.data import decoding, planning, writing
from obowlab.data.beton import BetonWriter, ContentHash, Record, page_size_for, read_index
from obowlab.data.catalogue import check_spelling
from obowlab.data.datasets import DATASETS, list_datasets, open_split, plan_prepare, prepare, subset, verify
from obowlab.data.identity import NOTES
from obowlab.data.image_folder import read_source
from obowlab.errors import UserError
from obowlab.files import room
from tests.conftest import draw_photo

JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAIAAgD"
    "ASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAX/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAAAAb/xAAUEQEA"
    "AAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCWAKZ//9k="
)
"""A picture of 8x8 pixels, as bytes: the encoder at hand does not matter."""


def jpeg_bytes(seed: int, *, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    draw_photo(seed, height=size, width=size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_folder(root: Path, *, names: dict[str, int]) -> Path:
    """Write JPEG files at the given paths, drawn with the given seeds."""
    for name, seed in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg_bytes(seed))
    return root


# ------------------------------------------------------------------------------------------------------------ the format


def test_split_holds_the_images_of_the_folder_in_sorted_order(data_root: Path, image_folder: Path) -> None:
    for name, per_class in (("train", 12), ("val", 6)):
        split = open_split("small", name, data_root=data_root)
        files = sorted((image_folder / name).glob("*/*"))
        assert split.num_images == len(files) == 5 * per_class
        assert split.class_names == tuple(f"class_{label}" for label in range(5))
        assert split.labels.tolist() == [label for label in range(5) for _ in range(per_class)]
        for index, file in enumerate(files):
            with Image.open(file) as original, Image.open(io.BytesIO(split.jpeg(index))) as stored:
                assert stored.format == "JPEG"
                assert stored.size == original.size == (split.widths[index], split.heights[index])
                if original.format == "JPEG":
                    assert bytes(split.jpeg(index)) == file.read_bytes()
                else:
                    difference = np.asarray(stored, np.int16) - np.asarray(original.convert("RGB"), np.int16)
                    assert np.abs(difference).mean() < 4


def test_content_hash_is_that_of_labels_and_images(data_root: Path) -> None:
    split = open_split("small", "val", data_root=data_root)
    digest = ContentHash()
    for index, label in enumerate(split.labels.tolist()):
        digest.add(label, split.jpeg(index))
    assert digest.hexdigest() == split.content_hash
    digest.add(0, b"one more")
    assert digest.hexdigest() != split.content_hash


def test_file_is_the_same_to_the_byte_for_any_number_of_threads(tmp_path: Path, data_root: Path, image_folder: Path) -> None:
    prepare("small", source=image_folder, data_root=tmp_path, workers=3)
    assert (tmp_path / "small/train.beton").read_bytes() == (data_root / "small/train.beton").read_bytes()


def test_images_do_not_cross_pages(tmp_path: Path) -> None:
    path = tmp_path / "set" / "train.beton"
    path.parent.mkdir()
    blobs = [bytes([number]) * (700_000 + number) for number in range(1, 8)]
    page_size = page_size_for(max(map(len, blobs)))
    with BetonWriter(path, capacity=9, page_size=page_size) as writer:
        for number, blob in enumerate(blobs):
            writer.append(Record(label=number, jpeg=blob, height=1, width=2))
    index = read_index(path)
    assert (index.pointers // page_size == (index.pointers + index.sizes - 1) // page_size).all()
    data = path.read_bytes()
    assert [data[start : start + size] for start, size in zip(index.pointers, index.sizes, strict=True)] == blobs
    assert index.stamp == writer.content_hash


def test_page_holds_the_largest_image() -> None:
    assert page_size_for(10) == 1 << 21
    assert page_size_for((1 << 21) + 1) == 1 << 22


def test_split_travels_to_other_processes_without_its_images(data_root: Path) -> None:
    split = open_split("small", "train", data_root=data_root)
    first = bytes(split.jpeg(0))
    pickled = pickle.dumps(split)
    assert len(pickled) < split.path.stat().st_size / 10
    assert bytes(pickle.loads(pickled).jpeg(0)) == first


@pytest.mark.ffcv
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_our_files(data_root: Path, os_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    import ffcv.loader.loader
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.reader import Reader

    monkeypatch.setattr(ffcv.loader.loader, "OSCacheManager", OSCacheManager)  # our backend puts another one there
    split = open_split("small", "train", data_root=data_root)
    reader = Reader(str(split.path))
    assert reader.num_samples == split.num_images
    assert reader.metadata["f0"]["height"].tolist() == split.heights.tolist()
    assert reader.metadata["f0"]["width"].tolist() == split.widths.tolist()
    assert reader.alloc_table["size"].tolist() == split.sizes.tolist()
    loader = Loader(
        str(split.path),
        batch_size=7,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        pipelines={"image": None, "label": [IntDecoder()]},
    )
    context = loader.memory_manager.schedule_epoch([list(range(split.num_images))])
    with context:
        context.start_batch(0)
        read = loader.memory_manager.compile_reader()
        for index in (0, 15, split.num_images - 1):
            assert bytes(read(np.uint64(split.pointers[index]), context.state)) == bytes(split.jpeg(index))
    labels = [label for batch in loader for label in np.asarray(batch[0]).ravel().tolist()]
    assert labels == split.labels.tolist()


# --------------------------------------------------------------------------------------------------------------- subsets


def test_subset_takes_the_first_of_every_class(data_root: Path) -> None:
    split = open_split("small", "train", data_root=data_root)
    assert subset(split, images_per_class=None).tolist() == list(range(60))
    assert subset(split, images_per_class=2).tolist() == [0, 1, 12, 13, 24, 25, 36, 37, 48, 49]
    assert subset(split, images_per_class=100).tolist() == list(range(60))


# --------------------------------------------------------------------------------------------------------------- sources


def test_tar_gives_the_same_files_as_its_folder(tmp_path: Path, data_root: Path, image_folder: Path) -> None:
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(image_folder, arcname="outer/inner")
    report = prepare("small", source=archive, data_root=tmp_path / "root")
    assert [manifest.num_images for manifest in report.manifests] == [60, 30]
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "root/small" / name).read_bytes() == (data_root / "small" / name).read_bytes()


def test_class_folders_alone_can_all_be_train(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={"b/1.JPEG": 1, "a/2.JPEG": 2, "a/10.jpg": 3, "a/notes.txt": 4})
    report = prepare("flat", source=source, data_root=tmp_path / "root", val_fraction=0.0)
    assert [manifest.split for manifest in report.manifests] == ["train"]
    assert report.notes == ("left out, as no image of train/ or val/: 1 files",)
    split = open_split("flat", "train", data_root=tmp_path / "root")
    assert bytes(split.jpeg(0)) == jpeg_bytes(3)  # '10.jpg' sorts before '2.JPEG'
    with pytest.raises(UserError, match="has no val images"):
        open_split("flat", "val", data_root=tmp_path / "root")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"train/a/1.jpg": 1, "val/1.jpg": 2}, r"without a class folder, such as val/1.jpg; expected train/CLASS"),
        ({"val/a/1.jpg": 1}, "no train/"),
        ({"train/a/1.jpg": 1, "val/b/1.jpg": 2}, "such as 'b': name the folders of val/ as those of train/, or"),
        ({"train/a/1.txt": 1}, "holds no image"),
        ({"1.jpg": 1, "a/1.jpg": 1}, "add --no-labels to take all images without labels"),
    ],
)
def test_other_layouts_are_refused_with_the_layout_expected(tmp_path: Path, names: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_source(make_folder(tmp_path / "in", names=names))


def empty_files(root: Path, names: str) -> Path:
    """Make files of one byte at paths that spaces separate."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def with_classes(*splits: str) -> str:
    return " ".join(f"{split}/{name}/1.jpg" for split in splits for name in "ab")


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        (("Train", "Val"), "Train", "Val"),
        (("TRAIN", "TEST"), "TRAIN", "TEST"),
        (("training", "validation"), "training", "validation"),
        (("train", "valid", "test"), "train", "valid"),
        (("train", "val", "validation"), "train", "val"),
        (("train", "val", "train_extra"), "train", "val"),
        (("train", "eval"), "train", "eval"),
        (("train2017", "val2017"), "train2017", "val2017"),
        (("imagenet-train", "imagenet-val"), "imagenet-train", "imagenet-val"),
        (("ILSVRC2012_img_train", "ILSVRC2012_img_val", "devkit"), "ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        (("TrainImages", "ValImages"), "TrainImages", "ValImages"),
        (("mytrain", "myval"), "mytrain", "myval"),
        (("trainset", "test-set"), "trainset", "test-set"),
        (("train2017",), "train2017", None),
        (("Training", "more"), "Training", None),
    ],
)
@pytest.mark.parametrize("outer", ["", "x/y/"])
def test_split_folders_of_other_names_are_understood(
    tmp_path: Path, splits: tuple[str, ...], train: str, val: str | None, outer: str
) -> None:
    source = read_source(empty_files(tmp_path, with_classes(*(outer + split for split in splits))))
    folders = {split.name: {Path(image.path).parents[1].name for image in split.images} for split in source.splits}
    assert folders == {"train": {train}} | ({"val": {val}} if val else {})
    assert all(split.class_names == ("a", "b") and len(split.images) == 2 for split in source.splits)
    assert source.num_ignored == 2 * (len(splits) - len(folders))


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (with_classes("train", "valid", "validation"), r"not clear which .* `cd \S+ && mv valid val`"),
        (with_classes("train", "val2017"), r"train/ and val2017/, which look like splits.* mv val2017 val`"),
        (with_classes("train_128", "train_256", "val"), "mv train_128 train`"),
        (with_classes("trainA", "testA", "trainB", "testB"), "mv testA val`"),
        (with_classes("Validation"), "has Validation/ but no train/"),
        (with_classes("x/set/train", "x/set/val", "y"), r"splits further inside.*`--source \S+/x/set`"),
        ("daisy/train/1.jpg daisy/val/1.jpg rose/train/1.jpg", "splits further inside, such as daisy/train"),
        ("a/b/1.jpg c/1.jpg d/e/f/1.jpg", "is no ImageFolder: its folders hold images at different depths"),
    ],
)
def test_what_is_no_image_folder_is_refused_with_what_to_type(tmp_path: Path, names: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_source(empty_files(tmp_path, names))


@pytest.mark.parametrize("names", ["training-shoes hats", "constraints values", "vehicles/train pets/cat"])
def test_classes_that_sound_like_splits_are_classes(tmp_path: Path, names: str) -> None:
    source = read_source(empty_files(tmp_path, " ".join(f"{name}/1.jpg" for name in names.split())))
    assert [split.name for split in source.splits] == ["train"]
    assert source.splits[0].class_names == tuple(sorted(name.split("/")[0] for name in names.split()))


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_files_are_left_out_and_counted_and_empty_classes_are_said(tmp_path: Path, packed: bool) -> None:
    source = make_folder(tmp_path / "in", names={"train/a/1.jpg": 1, "train/b/2.jpg": 2, "val/b/3.jpg": 3})
    hidden = (
        "train/.ipynb_checkpoints/1-checkpoint.jpg train/a/.ipynb_checkpoints/1-checkpoint.jpg val/.cache/x/1.jpg .git/config "
        "train/@eaDir/a/thumb.jpg train/a/@eaDir/1.jpg/thumb.jpg __MACOSX/train/a/._1.jpg train/a/._1.jpg train/.DS_Store "
        "val/b/Thumbs.db train/lost+found/1.jpg"
    )
    empty_files(source, hidden)
    (source / "train/a/.gone.jpg").symlink_to("nowhere")
    for folder in ("train/c", "val/c"):
        (source / folder).mkdir()
    if packed:
        (source / "train/a/.gone.jpg").unlink()
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            tar.add(source, "./outer")
        source = tmp_path / "in.tar"
    report = prepare("set", source=source, data_root=tmp_path / "root")
    assert [(manifest.num_images, manifest.class_names) for manifest in report.manifests] == [(2, ("a", "b")), (1, ("a", "b"))]
    assert report.skipped == ()
    assert report.notes == (
        f"left out, as hidden or a thumbnail: {len(hidden.split())} files",
        "class folders without an image: 2 (train/c, val/c)",
        "val has no image of class a",
    )


def test_links_in_an_archive_are_the_files_they_point_to(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={"train/a/1.jpg": 1, "train/b/2.jpg": 2})
    os.link(source / "train/a/1.jpg", source / "train/a/hard.jpg")
    (source / "train/b/soft.jpg").symlink_to("../a/1.jpg")
    (source / "train/b/chain.jpg").symlink_to("soft.jpg")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(source, "in")
    for name, given in (("folder", source), ("archive", tmp_path / "in.tar")):
        prepare(name, source=given, data_root=tmp_path / "root", val_fraction=0.0)
    first, second = (open_split(name, "train", data_root=tmp_path / "root") for name in ("folder", "archive"))
    assert first.num_images == 5
    assert first.content_hash == second.content_hash


@pytest.mark.parametrize(
    ("kind", "target", "complaint"),
    [
        (tarfile.SYMTYPE, "gone.jpg", r"'train/a/x.jpg', a link to 'gone.jpg', which is no file of it"),
        (tarfile.SYMTYPE, "/etc/passwd", "which is no file of it"),
        (tarfile.SYMTYPE, "../../../x.jpg", "which is no file of it"),
        (tarfile.SYMTYPE, "x.jpg", "which is no file of it"),
        (tarfile.LNKTYPE, "train/gone.jpg", "which is no file of it"),
        (tarfile.SYMTYPE, "../a", "a link to the folder '../a'"),
    ],
)
def test_links_of_an_archive_that_lead_nowhere_are_refused_by_name(
    tmp_path: Path, kind: bytes, target: str, complaint: str
) -> None:
    source = make_folder(tmp_path / "in", names={"train/a/1.jpg": 1})
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(source / "train", "train")
        info = tarfile.TarInfo("train/a/x.jpg")
        info.type, info.linkname = kind, target
        tar.addfile(info)
    with pytest.raises(UserError, match=complaint):
        read_source(tmp_path / "in.tar")


def test_an_archive_that_ends_early_or_goes_on_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={"train/a/1.jpg": 1, "train/b/2.jpg": 2})
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(source / "train", "train")
        end = tar.offset
    content = whole.read_bytes()
    assert len(read_source(whole).splits[0].images) == 2
    damaged = bytearray(content)
    damaged[content.index(b"train/b/2.jpg") + 150] ^= 1  # in the check sum of its header
    for name, changed, complaint in (
        ("cut", content[:end], "has no end marker"),
        ("cut_within", content[: end - 700], "unexpected end of data"),
        ("joined", content + content, "goes on behind its end marker.*--ignore-zeros"),
        ("joined_closely", content[: end + 512] + content, "goes on behind its end marker"),
        ("damaged", bytes(damaged), "is damaged at byte|bad checksum"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(changed)
        with pytest.raises(UserError, match=complaint):
            read_source(path)
    (tmp_path / "short.tar").write_bytes(content[: end + 512])  # one block of zeros
    assert len(read_source(tmp_path / "short.tar").splits[0].images) == 2


@pytest.mark.parametrize("name", ["imagenett", "imagnet", "tinyimagenet-100s", "syntetic"])
def test_a_misspelt_name_of_the_catalogue_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"Did you mean '(imagenet|tinyimagenet100|synthetic)'.* choose a name that differs more"):
        plan_prepare(name, source=tmp_path, data_root=tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "imagenet100", "imagenette", "imagewoof", "tinyimagenet", "my-imagenett", "photos"])
def test_names_that_only_resemble_the_catalogue_are_taken(name: str) -> None:
    check_spelling(name)


def test_an_incomplete_data_set_of_the_catalogue_is_said(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={"train/a/1.jpg": 1, "train/b/1.jpg": 2, "val/a/1.jpg": 3, "val/b/1.jpg": 4})
    plan = plan_prepare("tinyimagenet100", source=source, data_root=tmp_path)
    assert plan.notes == (
        "tinyimagenet100 is incomplete: train has 2 of 20000 images and 2 of 100 classes",
        "tinyimagenet100 is incomplete: val has 2 of 5000 images and 2 of 100 classes",
    )
    assert plan_prepare("own", source=source, data_root=tmp_path).notes == ()


def test_archive_members_cannot_point_outside(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("train/a/1.jpg", "../escaped.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(UserError, match="points outside"):
        prepare("evil", source=archive, data_root=tmp_path / "root")
    assert not (tmp_path / "escaped.jpg").exists()


def test_compressed_archive_is_refused(tmp_path: Path, image_folder: Path) -> None:
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(image_folder / "val", arcname="train")
    with pytest.raises(UserError, match="unpack it and give the folder"):
        prepare("packed", source=tmp_path / "images.tar.gz", data_root=tmp_path / "root")


@pytest.mark.parametrize("name", ["../up", "a/b", "", "-x", "Big", "a.b", "a\n"])
def test_name_cannot_become_a_path(tmp_path: Path, image_folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a data set"):
        prepare(name, source=image_folder, data_root=tmp_path)
    with pytest.raises(UserError, match="cannot name a data set"):
        open_split(name, "train", data_root=tmp_path)


# ------------------------------------------------------------------------------------------------------------- preparing


def test_unreadable_images_are_reported_and_noted(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={f"train/{name}/{number}.jpg": number for name in "ab" for number in range(4)})
    (source / "train/a/0.jpg").write_bytes(b"no image at all")
    (source / "train/b/1.jpg").write_bytes(jpeg_bytes(1, size=64)[:-400])
    (source / "train/b/2.jpg").write_bytes(b"")
    (source / "train/b/3.jpg").write_bytes(b"\xff\xd8\xff")
    report = prepare("torn", source=source, data_root=tmp_path / "root", val_fraction=0.0)
    assert [image.name for image in report.skipped] == ["train/a/0.jpg", "train/b/1.jpg", "train/b/2.jpg", "train/b/3.jpg"]
    assert "truncated" in report.skipped[1].reason
    assert "0x" not in report.skipped[0].reason  # no memory address: the manifest would change from call to call
    assert report.notes == ("train/b: 3 of 4 images cannot be read",)
    split = open_split("torn", "train", data_root=tmp_path / "root")
    assert split.labels.tolist() == [0, 0, 0, 1]
    noted = json.loads((tmp_path / "root/torn/train.json").read_text())["skipped"]
    assert [image["name"] for image in noted] == ["a/0.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg"]
    assert verify("torn", data_root=tmp_path / "root").ok


def test_no_readable_image_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", names={"a/1.jpg": 1})
    (source / "a/1.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="No image of"):
        prepare("none", source=source, data_root=tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".none.lock"]


def test_other_modes_become_rgb() -> None:
    photo = draw_photo(1, height=20, width=30)
    for mode, kind in (("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "BMP"), ("RGB", "WEBP")):
        buffer = io.BytesIO()
        photo.convert(mode).save(buffer, kind)
        record = decoding.to_jpeg(buffer.getvalue())
        with Image.open(io.BytesIO(record.jpeg)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (30, 20))


def test_a_grayscale_jpeg_is_kept_as_it_is() -> None:
    buffer = io.BytesIO()
    draw_photo(1, height=20, width=30).convert("L").save(buffer, "JPEG", quality=60)
    kept = decoding.to_jpeg(buffer.getvalue())
    assert kept == decoding.DecodedImage(jpeg=buffer.getvalue(), height=20, width=30)


def encoded(values: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize(
    "data",
    [
        encoded((RAMP * 65535).astype(np.uint16), "PNG"),
        encoded((RAMP * 65535).astype(np.uint16), "TIFF"),
        b"P5 64 48 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
        b"P5 64 48 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
        encoded(RAMP.astype(np.float32), "TIFF"),
    ],
    ids=["png16", "tiff16", "pgm16", "pgm12", "float"],
)
def test_images_of_more_than_8_bits_are_scaled_by_their_range(data: bytes) -> None:
    with Image.open(io.BytesIO(decoding.to_jpeg(data).jpeg)) as image:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image)[..., 1] - RAMP * 255).max() < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded((RAMP * 4095).astype(np.uint16), "PNG"), "integers of 16 bits from 0 to 4095"),
        (encoded((RAMP * 65535).astype(np.int32), "TIFF"), "integers from 0 to 65535"),
        (encoded((RAMP * 255).astype(np.float32), "TIFF"), "floats from 0 to 255"),
        (encoded((RAMP - 0.5).astype(np.float32), "TIFF"), "floats from -0.5 to 0.5"),
        (encoded((RAMP * np.nan).astype(np.float32), "TIFF"), "floats from nan to nan"),
    ],
    ids=["12bit", "int32", "float255", "signed", "nan"],
)
def test_images_of_no_known_range_are_skipped_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(decoding.UnreadableImageError, match=f"^{reason}, whose range is not known: convert it to 8 bits$"):
        decoding.to_jpeg(data)


def test_the_same_files_give_the_same_bytes_as_ever(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in "ab":
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(JPEG)
    (tmp_path / "source" / "train" / "a" / "x.jpg").write_bytes(b"torn")
    report = prepare("set", source=tmp_path / "source", data_root=tmp_path / "root", workers=2)
    assert [image.name for image in report.skipped] == ["train/a/x.jpg"]
    assert [manifest.file_sha256[:16] for manifest in report.manifests] == ["7b2e2ef214796b00", "d804c515c66e87dd"]


def test_prepare_again_is_idle_for_the_same_source_and_refused_for_another(tmp_path: Path, image_folder: Path) -> None:
    assert not prepare("set", source=image_folder, data_root=tmp_path).already_prepared
    (tmp_path / "set" / "lowshot_classes.json").write_text("{}")
    before = (tmp_path / "set/train.beton").stat().st_mtime_ns
    again = prepare("set", source=image_folder, data_root=tmp_path)
    assert again.already_prepared
    assert [manifest.num_images for manifest in again.manifests] == [60, 30]
    assert (tmp_path / "set/train.beton").stat().st_mtime_ns == before
    other = make_folder(tmp_path / "other", names={"x/1.jpg": 1})
    with pytest.raises(UserError, match="--force"):
        prepare("set", source=other, data_root=tmp_path)
    prepare("set", source=other, data_root=tmp_path, force=True)
    assert open_split("set", "train", data_root=tmp_path).class_names == ("x",)
    names = sorted(path.name for path in (tmp_path / "set").iterdir() if path.name != NOTES)
    assert names == ["lowshot_classes.json", "train.beton", "train.json", "train.names.gz"]


def test_plan_tells_size_and_time_and_writes_nothing(tmp_path: Path, image_folder: Path) -> None:
    plan = plan_prepare("set", source=image_folder, data_root=tmp_path / "root")
    assert plan.num_images == {"train": 60, "val": 30}
    assert plan.num_bytes == sum(file.stat().st_size for file in image_folder.glob("*/*/*"))
    assert 0 < plan.estimated_s < 60
    assert not (tmp_path / "root").exists()


def test_full_disk_is_noticed_first(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="make room"):
        prepare("set", source=image_folder, data_root=tmp_path / "root")


def test_progress_reaches_the_end(tmp_path: Path, image_folder: Path) -> None:
    seen: list[writing.Progress] = []
    plans: list[planning.Plan] = []
    prepare("set", source=image_folder, data_root=tmp_path, progress=seen.append, announce=plans.append)
    assert {(update.split, update.done) for update in seen if update.done == update.total} == {("train", 60), ("val", 30)}
    assert len(plans) == 1


def test_killed_prepare_leaves_nothing_visible_and_starts_over(tmp_path: Path, image_folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from obowlab.data.datasets import prepare\n"
        "prepare('set', source=Path(sys.argv[1]), data_root=Path(sys.argv[2]), workers=1,\n"
        "        progress=lambda update: os.kill(os.getpid(), signal.SIGKILL))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(image_folder), str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / ".set.preparing").is_dir()
    assert [listing.name for listing in list_datasets(tmp_path)] == list(DATASETS)
    with pytest.raises(UserError, match="data prepare set --source"):
        open_split("set", "train", data_root=tmp_path)
    prepare("set", source=image_folder, data_root=tmp_path)
    assert verify("set", data_root=tmp_path).ok
    assert not (tmp_path / ".set.preparing").exists()


def test_two_cannot_prepare_the_same(tmp_path: Path, image_folder: Path) -> None:
    with (tmp_path / ".set.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process"):
            prepare("set", source=image_folder, data_root=tmp_path)


def test_what_is_prepared_is_said_while_another_process_looks(tmp_path: Path, image_folder: Path) -> None:
    prepare("set", source=image_folder, data_root=tmp_path)
    with (tmp_path / ".set.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare("set", source=image_folder, data_root=tmp_path).already_prepared
        with pytest.raises(UserError, match="Another process"):
            prepare("set", source=image_folder, data_root=tmp_path, force=True)


# --------------------------------------------------------------------------------------------------- damage and verifying


@pytest.fixture
def own(tmp_path: Path, image_folder: Path) -> Path:
    """A data root that a test may damage."""
    prepare("small", source=image_folder, data_root=tmp_path, workers=1)
    return tmp_path


def test_verify_finds_nothing_wrong_with_what_was_just_prepared(own: Path, image_folder: Path) -> None:
    report = verify("small", data_root=own, source=image_folder, sample=None)
    assert report.ok
    assert (report.num_decoded, report.num_compared) == (90, 90)


def test_truncated_file(own: Path) -> None:
    path = own / "small/train.beton"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"train\.beton is damaged.*data verify small"):
        open_split("small", "train", data_root=own)
    with pytest.raises(UserError, match="truncated"):
        read_index(path)
    report = verify("small", data_root=own)
    assert [problem.split for problem in report.problems] == ["train"]
    assert "data prepare small --source DIR --force" in report.problems[0].fix


@pytest.mark.parametrize("position", [0, 2, 8, 9, 16, 17, 26, 24 + 1044, 2 * 1044 + 32, 2 * 1044 + 30])
def test_tampered_header_is_noticed(own: Path, position: int) -> None:
    path = own / "small/val.beton"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x41
    path.write_bytes(data)
    report = verify("small", data_root=own)
    assert {problem.split for problem in report.problems} == {"val"}
    try:
        open_split("small", "val", data_root=own)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017  (some single bits, such as of a width, only the hash can tell)


def test_nonsense_is_refused_by_the_reader(own: Path) -> None:
    path = own / "small/val.beton"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(good)
        place = int(rng.integers(24 + 2 * 1041, 24 + 2 * 1041 + 30 * 24))
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            index = read_index(path)
        except UserError:
            continue
        assert ((index.pointers >= 0) & (index.sizes > 0) & (index.pointers + index.sizes <= len(good))).all()


def test_changed_image_is_found_by_hash_and_by_comparison(own: Path, image_folder: Path) -> None:
    split = open_split("small", "train", data_root=own)
    path = split.path
    data = bytearray(path.read_bytes())
    data[int(split.pointers[7]) + int(split.sizes[7]) // 2] ^= 0xFF
    path.write_bytes(data)
    told = " ".join(problem.what for problem in verify("small", data_root=own, source=image_folder, sample=None).problems)
    assert "SHA-256" in told
    assert "content hash" in told


def test_source_with_other_files_is_told(own: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", names={"train/x/1.jpg": 1, "val/x/1.jpg": 1})
    report = verify("small", data_root=own, source=other)
    assert ["other files" in problem.what for problem in report.problems] == [True, True]


def test_files_of_two_preparations_do_not_mix(own: Path) -> None:
    (own / "small/train.json").write_text((own / "small/val.json").read_text())
    with pytest.raises(UserError, match="describes small/val"):
        open_split("small", "train", data_root=own)
    (own / "small/train.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_split("small", "train", data_root=own)
    problems = {listing.name: listing.problem for listing in list_datasets(own)}
    assert "is damaged" in str(problems["small"])


def test_verify_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not prepared"):
        verify("small", data_root=tmp_path)


def test_list_shows_known_and_prepared(data_root: Path) -> None:
    listings = {listing.name: listing for listing in list_datasets(data_root)}
    assert set(DATASETS) <= set(listings)
    assert listings["small"].problem is None
    assert [manifest.num_images for manifest in listings["small"].manifests] == [60, 30]
    assert listings["imagenet"].manifests == ()
    assert all(info.obtain and info.num_classes > 1 for info in DATASETS.values())


# ---------------------------------------------------------------------------------------------------------------- photos


@pytest.mark.photos
def test_photographs(photos_dir: Path, tmp_path: Path) -> None:
    report = prepare("photos200", source=photos_dir / "photos200", data_root=tmp_path)
    assert report.skipped == ()
    split = open_split("photos200", "train", data_root=tmp_path)
    assert (split.num_images, split.num_classes) == (200, 200)
    assert split.class_names[0] == "n01440764"
    assert verify("photos200", data_root=tmp_path).num_compared == 200
