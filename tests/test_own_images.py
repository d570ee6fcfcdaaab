"""Images as people have them: class folders without val, images without labels, lists, tables, tars of pairs, torchvision's."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from obowlab.data.datasets import Split, open_split, prepare, verify
from obowlab.data.manifest import read_manifest
from obowlab.data.opening import open_source
from obowlab.data.sources import Source
from obowlab.errors import UserError
from tests.command_line import Obowlab


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """Return an image file whose pixels depend on its number."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def made(root: Path, names: str) -> Path:
    """Write images at paths that spaces separate."""
    for number, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def classes(*, count: int, names: str = "ab", split: str = "") -> str:
    return " ".join(f"{split}{name}/{number:02d}.jpg" for name in names for number in range(count))


def names_of(source: Source) -> dict[str, list[str]]:
    return {split.name: [image.name for image in split.images] for split in source.splits}


def labels_of(source: Source) -> dict[str, dict[str, str]]:
    return {split.name: {each.name: split.class_names[each.label] for each in split.images} for split in source.splits}


def prepared(source: Path | str, root: Path, *, name: str = "own", split: str = "train", **options: float) -> Split:
    prepare(name, source=source, data_root=root, workers=1, **options)  # type: ignore[arg-type]
    assert verify(name, data_root=root).ok
    assert verify(name, data_root=root).num_compared > 0
    return open_split(name, split, data_root=root)


# ------------------------------------------------------------------------------------------------------- class folders alone


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_tenth_of_every_class_becomes_val_where_there_is_none(tmp_path: Path, split: str) -> None:
    source = open_source(made(tmp_path, f"{classes(count=30, split=split)} {split}few/1.jpg {split}few/2.jpg {split}one/1.jpg"))
    train, val = source.splits
    assert val.class_names == train.class_names == ("a", "b", "few", "one")
    assert np.bincount([image.label for image in val.images]).tolist() == [3, 3, 1]
    assert np.bincount([image.label for image in train.images]).tolist() == [27, 27, 1, 1]
    assert not {image.name for image in train.images} & {image.name for image in val.images}
    assert source.notes == ("no val in the source: 10 % of every class become val, chosen by name (--val-fraction)",)
    assert [image.name for image in train.images] == sorted(image.name for image in train.images)


def test_classes_of_one_image_each_have_no_val(tmp_path: Path) -> None:
    source = open_source(made(tmp_path, classes(count=1)))
    assert (len(source.splits), source.notes) == (1, ("no val: no class has two images",))


def test_which_images_are_val_depends_on_their_names_alone(tmp_path: Path) -> None:
    """The choice of today, for ever: a run that is continued elsewhere must find the same images."""
    first = names_of(open_source(made(tmp_path / "x", classes(count=30)), val_fraction=0.1))
    assert first["val"] == ["a/03.jpg", "a/20.jpg", "a/23.jpg", "b/10.jpg", "b/22.jpg", "b/28.jpg"]
    made(tmp_path / "x", "b/new.jpg c/1.jpg c/2.jpg")
    again = names_of(open_source(tmp_path / "x", val_fraction=0.1))
    assert [name for name in again["val"] if not name.startswith("c/")] == first["val"]


def test_the_share_is_noted_and_holds_the_next_time(tmp_path: Path) -> None:
    source, root = made(tmp_path / "in", classes(count=10)), tmp_path / "root"
    assert prepared(source, root, val_fraction=0.3, split="val").num_images == 6
    noted = read_manifest(root, "own", "val")
    assert noted is not None
    assert noted.val_fraction == 0.3
    assert prepare("own", source=source, data_root=root).already_prepared
    with pytest.raises(UserError, match="labels or validation images differ"):
        prepare("own", source=source, data_root=root, val_fraction=0.2)
    made(source, "a/new.jpg")
    prepare("own", source=source, data_root=root, force=True)
    assert open_split("own", "val", data_root=root).num_images == 6


def test_what_was_prepared_without_val_stays_so(tmp_path: Path) -> None:
    source, root = made(tmp_path / "in", classes(count=10)), tmp_path / "root"
    prepare("own", source=source, data_root=root, val_fraction=0.0)
    manifest = root / "own/train.json"
    before = manifest.read_bytes()
    text = json.loads(before)
    assert text["val_fraction"] == 0.0
    assert prepare("own", source=source, data_root=root).already_prepared
    assert manifest.read_bytes() == before


def test_a_source_with_val_is_not_split(tmp_path: Path) -> None:
    made(tmp_path, f"{classes(count=2, split='train/')} {classes(count=2, split='val/')}")
    assert open_source(tmp_path).val_fraction is None
    with pytest.raises(UserError, match="leave --val-fraction out"):
        open_source(tmp_path, val_fraction=0.1)


def test_the_command_says_what_it_does(tmp_path: Path, workplace: Path, obowlab: Obowlab) -> None:
    source = made(tmp_path / "in", classes(count=30))
    code, out, _ = obowlab("data", "prepare", "own", "--source", str(source), "--dry-run")
    assert code == 0
    assert "54 train, 6 val images of 2 classes" in out
    assert "  note: no val in the source: 10 % of every class become val, chosen by name (--val-fraction)" in out
    assert not (workplace / "data").exists()
    code, out, _ = obowlab("data", "prepare", "own", "--source", str(source), "--val-fraction", "0.5")
    assert "  val: 30 images of 2 classes" in out
    code, out, _ = obowlab("data", "verify", "own")
    assert (code, "as it was prepared; 30 train, 30 val images, 60 decoded, 60 compared" in out) == (0, True)
    assert obowlab("data", "prepare", "own", "--source", str(source), "--val-fraction", "1")[0] == 2


# ---------------------------------------------------------------------------------------------------------------- no labels


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("1.jpg 2.jpg 3.jpg", {"train": 3}),
        ("train/1.jpg train/2.jpg", {"train": 2}),
        ("train/1.jpg train/2.jpg val/1.jpg", {"train": 2, "val": 1}),
        ("train2017/1.jpg val2017/1.jpg test2017/1.jpg", {"train": 1, "val": 1}),
        ("coco/train2017/1.jpg coco/val2017/1.jpg", {"train": 1, "val": 1}),
    ],
)
def test_images_without_class_folders_have_no_labels(tmp_path: Path, names: str, splits: dict[str, int]) -> None:
    source = open_source(made(tmp_path, names))
    assert not source.is_labelled
    assert {split.name: len(split.images) for split in source.splits} == splits
    assert source.notes[0].startswith("images without labels")


@pytest.mark.parametrize("names", ["train/1.jpg bus/1.jpg car/1.jpg", "training-shoes/1.jpg hats/1.jpg"])
def test_class_folders_that_are_called_like_a_split_stay_classes(tmp_path: Path, names: str) -> None:
    assert open_source(made(tmp_path, names)).is_labelled


def test_labels_can_be_left_out_however_deep_the_folders_are(tmp_path: Path) -> None:
    made(tmp_path, "2023/05/1.jpg 2023/2.jpg 3.jpg")
    with pytest.raises(UserError, match="add --no-labels"):
        open_source(tmp_path)
    assert names_of(open_source(tmp_path, labelled=False)) == {"train": ["3.jpg", "2023/2.jpg", "2023/05/1.jpg"]}
    assert len(open_source(tmp_path, labelled=False, val_fraction=0.4).splits) == 2


def test_a_folder_of_images_is_prepared_and_verified(tmp_path: Path) -> None:
    split = prepared(made(tmp_path / "in", "1.jpg 2.jpg"), tmp_path / "root")
    assert (split.class_names, split.labels.tolist()) == (("unlabelled",), [0, 0])


# -------------------------------------------------------------------------------------------------------------------- lists

LISTS = {
    "plain": "b/1.jpg,rose\na/1.jpg,daisy\n",
    "header": "path,label\nb/1.jpg,rose\na/1.jpg,daisy\n",
    "other order": "id;class;filename\n7;rose;b/1.jpg\n8;daisy;a/1.jpg\n",
    "one other column": "species,file\nrose,b/1.jpg\ndaisy,a/1.jpg\n",
    "tabs": "b/1.jpg\trose\na/1.jpg\tdaisy\n",
    "blanks": "b/1.jpg rose\na/1.jpg   daisy\n",
    "quotes": '"b/1.jpg","rose"\n"a/1.jpg", "daisy"\n',
    "Windows": "﻿path,label\r\nb\\1.jpg,rose\r\n\r\na\\1.jpg,daisy\r\n",
    "absolute": "{root}/b/1.jpg,rose\n{root}/a/1.jpg,daisy",
    "dots": "./b/1.jpg,rose\n../in/a/1.jpg,daisy",
    "twice": "b/1.jpg,rose\na/1.jpg,daisy\nb/1.jpg,rose\n",
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_of_paths_and_labels(tmp_path: Path, kind: str, encoding: str) -> None:
    root = made(tmp_path / "in", "a/1.jpg b/1.jpg")
    text = LISTS[kind].replace("{root}", str(root))
    (root / "list.csv").write_bytes((text.lstrip("﻿") if encoding == "utf-16" else text).encode(encoding))
    (split,) = open_source(root / "list.csv", val_fraction=0.0).splits
    assert split.class_names == ("daisy", "rose")
    assert [Path(image.path).parent.name for image in split.images] == ["a", "b"]
    assert [image.label for image in split.images] == [0, 1]
    assert [image.name for image in split.images] == ["daisy/a/1.jpg", "rose/b/1.jpg"], "the same for all ways to write a path"


def test_a_list_gives_the_images_of_its_folder(tmp_path: Path) -> None:
    root = made(tmp_path / "in", classes(count=3))
    (tmp_path / "list.txt").write_text("".join(f"in/{name} {name[0]}\n" for name in reversed(classes(count=3).split())))
    listed = prepared(tmp_path / "list.txt", tmp_path / "root", val_fraction=0.0)
    assert listed.content_hash == prepared(root, tmp_path / "root", name="folder", val_fraction=0.0).content_hash


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    made(tmp_path, "1.jpg 2.jpg 3.jpg 4.jpg")
    (tmp_path / "list.csv").write_text("1.jpg,10\n2.jpg,9\n3.jpg,0\n4.jpg,9\n")
    (split,) = open_source(tmp_path / "list.csv", val_fraction=0.0).splits
    assert split.class_names == ("0", "9", "10")
    assert [image.label for image in split.images] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("words", "val"), [(("train", "val"), "3"), (("Training", "TEST"), "3"), (("train", "valid", "test"), "2")]
)
def test_a_third_column_names_the_split(tmp_path: Path, words: tuple[str, ...], val: str) -> None:
    made(tmp_path, "1.jpg 2.jpg 3.jpg")
    middle = words[1] if len(words) == 3 else words[0]
    (tmp_path / "list.csv").write_text(f"1.jpg,x,{words[0]}\n2.jpg,x,{middle}\n3.jpg,x,{words[-1]}\n")
    source = open_source(tmp_path / "list.csv")
    assert names_of(source)["val"] == [f"x/{val}.jpg"]
    assert source.num_ignored == len(words) - 2


def test_a_split_that_is_none_is_named(tmp_path: Path) -> None:
    made(tmp_path, "1.jpg 2.jpg 3.jpg")
    (tmp_path / "list.csv").write_text("1.jpg,x,train\n2.jpg,x,trian\n3.jpg,x,val\n")
    assert open_source(tmp_path / "list.csv").notes == ("neither train nor val: 1 images of split 'trian'",)


def test_photos_of_a_kind_that_is_not_read_are_named(tmp_path: Path) -> None:
    made(tmp_path, classes(count=2))
    (tmp_path / "a/IMG_1.HEIC").write_bytes(b"0")
    source = open_source(tmp_path, val_fraction=0.0)
    assert source.notes == ("photos of a kind that is not read: 1 .heic files; convert them to JPEG or PNG",)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/IMG_1.HEIC").write_bytes(b"0")
    with pytest.raises(UserError, match=r"holds 1 \.heic files, which are not read: convert them to JPEG or PNG"):
        open_source(tmp_path / "phone")


def test_a_list_without_labels(tmp_path: Path) -> None:
    made(tmp_path, "my 1.jpg 2.jpg")
    (tmp_path / "my 1.jpg").write_bytes(picture(1))
    (tmp_path / "list.txt").write_text("my 1.jpg\n2.jpg\n")
    source = open_source(tmp_path / "list.txt")
    assert (source.is_labelled, names_of(source)) == (False, {"train": ["2.jpg", "my 1.jpg"]})


def test_files_that_are_missing_are_listed_and_left_out(tmp_path: Path, workplace: Path, obowlab: Obowlab) -> None:
    made(tmp_path / "in", classes(count=4))
    lines = [*classes(count=4).split(), "gone/1.jpg"]
    (tmp_path / "in/list.csv").write_text("".join(f"{name},{name[0]}\n" for name in lines))
    code, out, _ = obowlab("data", "prepare", "own", "--source", str(tmp_path / "in/list.csv"), "--val-fraction", "0")
    assert code == 0
    assert "note: named in the list, but not there: 1 files (gone/1.jpg)" in out
    assert "train/g/gone/1.jpg: cannot be read: No such file or directory" in out
    assert open_split("own", "train", data_root=workplace / "data").num_images == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("gone/1.jpg,a\ngone/2.jpg,a\n", r"names 2 images and none of them is there, such as gone/1.jpg: .* relative to"),
        ("1.jpg,a\n1.jpg,b\n", "line 2: 1.jpg stood before with another label"),
        ("1.jpg,a\n2.jpg\n", "line 2: 1 columns instead of 2"),
        ("1.jpg,a\n2.jpg,\n", "1 images without a label, such as 2.jpg"),
        ("1.jpg,a,train\n2.jpg,a,\n", "line 2: no split"),
        ("1.jpg,a,fold1\n2.jpg,a,fold2\n", "splits 'fold1', 'fold2', and it is not clear"),
        ("1.jpg,a,train\n2.jpg,b,val\n", "such as 'b': give those images a class of train, or leave them out"),
        ("a,1.jpg\nb,2.jpg\n", "the path of the image comes first"),
        ("id,breed\nx,y\n", "names neither an image"),
        ("path,breed,owner\n1.jpg,y,z\n", r"none of its columns \(path, breed, owner\) is called `label`"),
        ('"1.jpg,a\n2.jpg,b\n', "line 1: a quote is not closed"),
        ("1.jpg\0,a\n", "no list of images"),
    ],
)
def test_lists_that_cannot_be_understood_are_refused_with_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    made(tmp_path, "1.jpg 2.jpg")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        open_source(tmp_path / "list.csv")


# ------------------------------------------------------------------------------------------------- tables and tars of pairs

FEATURES = {"info": {"features": {"label": {"names": ["rose", "daisy"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
SAME = {"train/0": "rose", "train/1": "daisy", "train/2": "rose", "val/3": "daisy"}
"""What all the sources of this section hold: which picture has which class."""


def table(numbers: range, *, plain: bool = False) -> pa.Table:
    """Return pictures as Hugging Face's datasets store them, or as plain bytes with class names."""
    if plain:
        names = ["rose" if number in (0, 2) else "daisy" for number in numbers]
        return pa.table({"label": names, "img": pa.array([picture(number) for number in numbers], pa.binary())})
    images = pa.array(
        [{"bytes": picture(each), "path": None} for each in numbers], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    labels = pa.array([0 if number in (0, 2) else 1 for number in numbers])
    return pa.table({"image": images, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(FEATURES)})


def parquet(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    pq.write_table(table(range(3)), root / "data/train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table(range(3, 4)), root / "data/validation-00000-of-00001.parquet")
    return root


def plain_parquet(root: Path) -> Path:
    for split, numbers in (("train", range(3)), ("test", range(3, 4))):
        (root / split).mkdir(parents=True)
        pq.write_table(table(numbers, plain=True), root / split / "0.parquet")
    return root


def saved(root: Path) -> Path:
    root.mkdir()
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for split, numbers in (("train", range(3)), ("test", range(3, 4))):
        (root / split).mkdir()
        with pa.ipc.new_stream(str(root / split / "data-00000-of-00001.arrow"), table(numbers).schema) as stream:
            stream.write_table(table(numbers), max_chunksize=2)
        (root / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (root / split / "dataset_info.json").write_text("{}")
    return root


def pairs(root: Path) -> Path:
    root.mkdir()
    for split, numbers in (("train", range(3)), ("val", range(3, 4))):
        with tarfile.open(root / f"{split}-000000.tar", "w") as tar:
            for number in numbers:
                label = b"0" if number in (0, 2) else b"1"
                for suffix, data in (("cls", label), ("jpg", picture(number)), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / "classnames.txt").write_text("rose\ndaisy\n")
    return root


def json_pairs(root: Path) -> Path:
    pairs(root)
    for shard in root.glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        with tarfile.open(shard, "w") as tar:
            for name, data in members:
                if name.endswith(".cls"):
                    name, data = name.replace(".cls", ".json"), json.dumps({"label": int(data), "width": 32}).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


@pytest.mark.parametrize("make", [parquet, plain_parquet, saved, pairs, json_pairs])
def test_tables_and_tars_give_the_images_and_classes_they_hold(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "in")
    train, val = prepared(source, tmp_path / "root"), open_split("own", "val", data_root=tmp_path / "root")
    found = {}
    for split in (train, val):
        for index in range(split.num_images):
            number = next(each for each in range(4) if picture(each) == bytes(split.jpeg(index)))
            found[f"{split.name}/{number}"] = split.class_names[split.labels[index]]
    assert found == SAME
    assert train.class_names == (("daisy", "rose") if make is plain_parquet else ("rose", "daisy"))
    assert prepare("own", source=source, data_root=tmp_path / "root").already_prepared
    assert not open_source(source, labelled=False).is_labelled


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("data/train-0.parquet data/test-0.parquet data/unsupervised-0.parquet", {"train": 1, "val": 1}),
        ("cifar10-train.parquet cifar10-test.parquet", {"train": 1, "val": 1}),
        ("train/0.parquet train/1.parquet validation/0.parquet test/0.parquet", {"train": 2, "val": 1}),
        ("0.parquet 1.parquet", {"train": 2}),
    ],
)
def test_names_and_folders_of_shards_tell_the_split(tmp_path: Path, names: str, splits: dict[str, int]) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(range(1)), tmp_path / name)
    source = open_source(tmp_path, val_fraction=None if "val" in splits else 0.0)
    assert {split.name: len(split.images) for split in source.splits} == splits
    assert source.num_ignored == len(names.split()) - sum(splits.values())


def test_one_file_of_a_table_is_enough(tmp_path: Path) -> None:
    source = open_source(parquet(tmp_path / "in") / "data/train-00000-of-00001.parquet", val_fraction=0.4)
    assert [len(split.images) for split in source.splits] == [2, 1]


def test_a_table_without_images_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has no column of encoded images among text, label"):
        open_source(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"y\.parquet cannot be read"):
        open_source(tmp_path / "y.parquet")


def test_tables_without_pyarrow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="`pip install pyarrow`"):
        open_source(source)


def test_a_folder_of_other_files_says_which_could_be_meant(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("x")
    with pytest.raises(UserError, match=r"holds no image; .* as in `--source \S+/list.csv`"):
        open_source(tmp_path)


# -------------------------------------------------------------------------------------------------------------- torchvision


def cifar(root: Path) -> Path:
    """Write a CIFAR10 of 12 images; torchvision's checksums are made to fit."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), np.uint8)
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        batch = {"data": pixels[2 * number : 2 * number + 2], "labels": [number, 9 - number]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


def test_torchvision_data_sets_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    root = cifar(tmp_path / "in")
    split = prepared(f"torchvision:cifar10:{root}", tmp_path / "root")
    expected = CIFAR10(str(root))
    assert split.class_names[:2] == ("airplane", "automobile")
    assert sorted(split.labels.tolist()) == sorted(expected.targets)
    first = next(index for index in range(10) if expected.targets[index] == split.labels[0])
    shown = np.asarray(Image.open(io.BytesIO(bytes(split.jpeg(0)))), np.int16)
    assert np.abs(shown - np.asarray(expected[first][0], np.int16)).mean() < 16  # noise, as JPEG of quality 95
    assert open_split("own", "val", data_root=tmp_path / "root").num_images == 2


def test_files_of_torchvision_data_sets_are_kept_as_they_are(tmp_path: Path) -> None:
    made(tmp_path / "eurosat/2750", "Forest/1.jpg Forest/2.jpg River/1.jpg River/2.jpg")
    split = prepared(f"torchvision:EuroSAT:{tmp_path}", tmp_path / "root", val_fraction=0.0)
    assert split.class_names == ("Forest", "River")
    assert [bytes(split.jpeg(index)) for index in range(4)] == [picture(index) for index in range(4)]


def test_pets_are_split_as_published(tmp_path: Path) -> None:
    folder = made(
        tmp_path / "oxford-iiit-pet/images", "Abyssinian_1.jpg Abyssinian_2.jpg american_bulldog_1.jpg american_bulldog_2.jpg"
    )
    (folder.parent / "annotations").mkdir()
    for split, number in (("trainval", 1), ("test", 2)):
        text = f"Abyssinian_{number} 1 1 1\namerican_bulldog_{number} 2 2 1\n"
        (folder.parent / f"annotations/{split}.txt").write_text(text)
    split = prepared(f"torchvision:OxfordIIITPet:{tmp_path}", tmp_path / "root")
    assert split.class_names == ("Abyssinian", "American Bulldog")
    assert [bytes(split.jpeg(index)) for index in range(2)] == [picture(0), picture(2)]
    assert bytes(open_split("own", "val", data_root=tmp_path / "root").jpeg(1)) == picture(3)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("torchvision:CIFAR10", "write torchvision:NAME:ROOT"),
        ("torchvision:CIFAR10:/gone", "there is no folder /gone"),
        ("torchvision:CIFAR11:{root}", r"no data set 'CIFAR11'. Did you mean 'CIFAR10'\?"),
        ("torchvision:CIFAR10:{root}", "does not find CIFAR10 there .* nothing is downloaded"),
    ],
)
def test_torchvision_data_sets_that_are_not_there(tmp_path: Path, spec: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        open_source(spec.replace("{root}", str(tmp_path)))


def test_an_archive_of_archives_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        for name in ("n01440764.tar", "n01443537.tar"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"holds 2 archives, such as n01440764\.tar, and no image; .* unpack each archive into"):
        open_source(tmp_path / "ILSVRC2012_img_train.tar")


def test_transparent_palettes_are_read_without_a_warning(tmp_path: Path) -> None:
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).quantize(16)
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        palette.save(tmp_path / "x" / name, transparency=bytes([0, 128] + [255] * 14))
    words = ["data", "prepare", "own", "--source", str(tmp_path / "x"), "--data-root", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-m", "obowlab.cli", *words], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
