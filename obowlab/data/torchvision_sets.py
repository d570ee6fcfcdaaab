"""Read a data set of torchvision that lies on this disk, `torchvision:NAME:ROOT`; nothing is downloaded.

The only module of this package that imports torchvision, and with it torch, and only when such a source is read.
"""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from obowlab.config import nearest
from obowlab.data.sources import Entry, FetchedImage, Source, SourceImage, source_of_entries
from obowlab.errors import UserError

PREFIX = "torchvision:"
_TRAIN = ("train", "trainval", "train-standard", "balanced")
_VAL = ("val", "valid", "test")
_UNLABELLED = ("train+unlabeled", *_TRAIN)
"""Splits in the order in which they are tried; STL10's `train+unlabeled` where labels are not wanted."""


def read_torchvision(spec: str, *, labelled: bool = True) -> Source:
    """List the images of a data set of torchvision: the classes and numbers are torchvision's.

    Files of images are kept as they are; images that torchvision holds as arrays are encoded as those of other formats are.

    Args:
        spec: `torchvision:NAME:ROOT`, as in `torchvision:CIFAR10:/data/cifar`.
        labelled: whether to use the labels.

    Raises:
        UserError: there is no such data set, it is not below ROOT, or it is not one of images with one class each.
    """
    name, _, root = spec.removeprefix(PREFIX).partition(":")
    if not name or not root:
        raise UserError(f"--source {spec}: write torchvision:NAME:ROOT, as in `torchvision:CIFAR10:downloads`.")
    folder = Path(root).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--source {spec}: there is no folder {folder}.")
    kind = _class_of(name)
    path = Path(f"{PREFIX}{kind.__name__}:{folder}")
    train = _opened(kind, folder, splits=_TRAIN if labelled else _UNLABELLED, train=True, spec=spec)
    has_splits = bool({"train", "split"} & set(inspect.signature(kind).parameters))
    val = _opened(kind, folder, splits=_VAL, train=False, spec=spec) if has_splits and labelled else None
    names = _class_names(train) if labelled else None
    entries = [
        Entry(split, _class_name(label, names) if labelled else None, image)
        for split, dataset in (("train", train), ("val", val))
        if dataset is not None
        for image, label in _images(dataset, split=split, spec=spec)
    ]
    return source_of_entries(path, entries, class_names=names, by_class=True)


def _class_of(name: str) -> Any:
    """Return torchvision's class of a name in any case.

    Raises:
        UserError: torchvision has none.
    """
    from torchvision import datasets

    known = {each.lower(): each for each in datasets.__all__}
    if name.lower() not in known or name in ("ImageFolder", "DatasetFolder", "FakeData"):
        raise UserError(f"torchvision has no data set '{name}'.{nearest(name, list(known.values()))}")
    return getattr(datasets, known[name.lower()])


def _opened(kind: Any, root: Path, *, splits: tuple[str, ...], train: bool, spec: str) -> Any:
    """Return a split of a data set; for `val` None where there is none.

    Raises:
        UserError: it is not there.
    """
    parameters = inspect.signature(kind).parameters
    options = {"loader": _as_path} if "loader" in parameters else {}
    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": train}]
    elif "split" in parameters:
        choices = [{"split": split} for split in splits]
    problem = ""
    for choice in choices:
        if choice.get("split") == "balanced":  # EMNIST, whose splits are tasks
            choice["train"] = True
        try:
            return kind(str(root), **options, **choice)
        except (ValueError, TypeError) as error:  # there is no such split
            problem = problem or str(error)
        except (RuntimeError, OSError, ImportError, ModuleNotFoundError) as error:
            problem = str(error)
            if "scipy" in problem or "h5py" in problem:
                break
    if not train:
        return None
    raise UserError(
        f"--source {spec}: torchvision does not find {kind.__name__} there ({' '.join(problem.split())[:160]}); ROOT is the "
        "folder that was given to torchvision when it was downloaded, and nothing is downloaded now."
    )


def _as_path(path: str | Path) -> str:
    """Stand in for torchvision's loader: the file itself is kept, not its pixels."""
    return str(path)


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(names, list | tuple):
        return None
    texts = [", ".join(name) if isinstance(name, list | tuple) else str(name) for name in names]
    return texts if len(set(texts)) == len(texts) else None


def _class_name(label: int, names: list[str] | None) -> str | None:
    if label < 0:
        return None
    return names[label] if names is not None else str(label)


def _images(dataset: Any, *, split: str, spec: str) -> Iterator[tuple[SourceImage, int]]:
    """Yield every image with its label.

    Raises:
        UserError: the data set holds something else.
    """
    files = _files(dataset)
    for index in range(len(dataset)):
        image, label = dataset[index]
        image = files[index] if files is not None else image
        if not isinstance(image, str | Image.Image):
            raise UserError(f"--source {spec}: a data set of {type(image).__name__}, not of images with one class each.")
        try:
            number = int(label)
        except (TypeError, ValueError):
            raise UserError(f"--source {spec}: its labels are {type(label).__name__}, not one class an image.") from None
        file = image if isinstance(image, str) else str(getattr(image, "filename", ""))
        if isinstance(image, str) or file:
            size = os.stat(file).st_size  # noqa: PTH116
            yield SourceImage(-1, os.path.relpath(file, dataset.root), file, offset=0, size=size), number
        else:
            found = SourceImage(-1, f"{split}/{index:07d}", str(dataset.root), offset=0, size=image.width * image.height * 3)
            yield FetchedImage(**vars(found), fetch=partial(_pixels, dataset, index)), number


def _files(dataset: Any) -> list[str] | None:
    """Return the files of a data set that keeps a list of them but takes no loader, as Oxford's pets; None where it does not."""
    for name in ("samples", "_samples", "_images", "_image_files"):
        found = getattr(dataset, name, None)
        if isinstance(found, list) and len(found) == len(dataset):
            paths = [each[0] if isinstance(each, tuple) else each for each in found]
            if all(isinstance(path, str | Path) for path in paths):
                return [str(path) for path in paths]
    return None


def _pixels(dataset: Any, index: int) -> bytes:
    """Return an image as an uncompressed file."""
    image = dataset[index][0]
    buffer = io.BytesIO()
    image.save(buffer, "PPM" if image.mode in ("RGB", "L") else "PNG")
    return buffer.getvalue()
