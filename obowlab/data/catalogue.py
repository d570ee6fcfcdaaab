"""The data sets that recipes know, and what is missing of one or wrong with its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from obowlab.data import synthetic
from obowlab.data.sources import LAYOUT, Source
from obowlab.data.split_names import SPLITS
from obowlab.errors import UserError

_MISSPELT = 0.9
"""Names more alike than this, digits aside, are one name misspelt: `imagenett`, but neither `imagenet100` nor `imagenette`."""


@dataclass(frozen=True)
class DatasetInfo:
    """A data set the recipes know: what it is and how to come by it."""

    name: str
    title: str
    num_classes: int
    num_images: dict[str, int]
    """Images of each split when nothing is missing."""
    layout: str
    obtain: str
    """What to do to have it, in one or two sentences."""


DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="imagenet",
            title="ImageNet, ILSVRC 2012: photographs of 1000 classes",
            num_classes=1000,
            num_images={"train": 1_281_167, "val": 50_000},
            layout=LAYOUT,
            obtain=(
                "Register at image-net.org and accept its terms, unpack the training and validation archives into train/CLASS "
                "and val/CLASS (val has one folder per class too), then `obowlab data prepare imagenet --source DIR`."
            ),
        ),
        DatasetInfo(
            name="tinyimagenet100",
            title="100 classes of Tiny ImageNet: photographs of 64x64 pixels",
            num_classes=100,
            num_images={"train": 20_000, "val": 5_000},
            layout=LAYOUT,
            obtain=(
                "From Tiny ImageNet's training images, take 100 classes, 200 images of each for train/CLASS and 50 for "
                "val/CLASS, as a folder or a .tar, then `obowlab data prepare tinyimagenet100 --source DIR`."
            ),
        ),
        DatasetInfo(
            name="places205",
            title="Places205: photographs of 205 kinds of places",
            num_classes=205,
            num_images={"train": 2_448_873, "val": 20_500},
            layout=LAYOUT,
            obtain=(
                "Ask for Places205 at places.csail.mit.edu, unpack imagesPlaces205_resize and trainvalsplit_places205 into one "
                "folder, then `obowlab data prepare places205 --source DIR`."
            ),
        ),
        DatasetInfo(
            name="voc07",
            title="PASCAL VOC 2007: photographs that show several of 20 classes",
            num_classes=20,
            num_images={"train": 5_011, "val": 4_952},
            layout="VOC2007/JPEGImages, VOC2007/ImageSets/Main",
            obtain=(
                "From the PASCAL VOC 2007 challenge, unpack trainval and test into one folder, then `obowlab data prepare voc07 "
                "--source VOCdevkit/VOC2007`: trainval becomes train, test becomes val."
            ),
        ),
        DatasetInfo(
            name="voc0712",
            title="PASCAL VOC 2007 and 2012: photographs with boxes around objects of 20 classes",
            num_classes=20,
            num_images={"train": 16_551, "val": 4_952},
            layout="VOC2007/Annotations and VOC2012/Annotations, beside JPEGImages and ImageSets/Main",
            obtain=(
                "From the PASCAL VOC challenges, unpack trainval and test of 2007 and trainval of 2012 into one folder, then "
                "`obowlab data prepare voc0712 --source VOCdevkit`: both trainval become train, test of 2007 becomes val."
            ),
        ),
        DatasetInfo(
            name="coco",
            title="COCO 2017: photographs with boxes around objects of 80 classes, and their outlines",
            num_classes=80,
            num_images={"train": 118_287, "val": 5_000},
            layout="annotations/instances_train2017.json, train2017, and the same for val2017",
            obtain=(
                "From cocodataset.org, unpack train2017, val2017 and annotations into one folder, then "
                "`obowlab data prepare coco --source DIR`."
            ),
        ),
        DatasetInfo(
            name=synthetic.NAME,
            title="Drawn scenes of recurring parts; a class is a combination of parts, never a colour",
            num_classes=len(synthetic.CLASS_NAMES),
            num_images={split: synthetic.num_images(split) for split in SPLITS},
            layout="drawn by obowlab",
            obtain="Nothing to do: it is drawn on first use.",
        ),
    )
}


def check_spelling(name: str) -> None:
    """Refuse a name that is almost one of the catalogue's: no recipe would find the data set.

    Raises:
        UserError: names the one that is probably meant.
    """
    letters = _letters(name)
    for known in DATASETS:
        if letters != _letters(known) and difflib.SequenceMatcher(None, letters, _letters(known)).ratio() > _MISSPELT:
            raise UserError(
                f"'{name}' is not a data set the recipes know. Did you mean '{known}'? "
                f"For a data set of your own choose a name that differs more, such as 'my-{name}'."
            )


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name))


def missing(name: str, source: Source) -> Iterator[str]:
    """Yield a sentence for each split of which a source has fewer classes or images than the catalogue says."""
    info = DATASETS.get(name)
    for split, count in info.num_images.items() if info is not None else ():
        found = source.split(split)
        num_images = len(found.images) if found is not None else 0
        num_classes = len({image.label for image in found.images}) if found is not None else 0
        if info is not None and (num_images < count or num_classes < info.num_classes):
            classes = f"{num_classes} of {info.num_classes} classes"
            yield f"{name} is incomplete: {split} has {num_images} of {count} images and {classes}"
