"""What a detector's test leaves in a run's folder: `detection/ID/`, a folder for each training ID whose detector was tested.

Each holds `detection.json`, the pictures that it names, and `index.html`, which is made of both (`pages.detection`). In the
folder of the training it is one folder; a run whose encoder was measured has one for each training that began with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from obowlab.errors import UserError
from obowlab.files.opening import read_file

DETECTION_FORMAT: Literal[1] = 1
"""Version of `detection.json`; raise it when a field changes its meaning."""

DETECTION_FOLDER = "detection"
FACTS = "detection.json"
PAGE = "index.html"

DETECTION_FILE = re.compile(r"index\.html|detection\.json|[0-9]{6,10}\.jpg")
"""What is written into such a folder; whatever else lies there stays there."""

LARGEST_PICTURE = 2 * 2**20
"""No picture is larger, in bytes: a JPEG of 480 pixels takes a tenth of it, even of noise."""

MOST_PICTURES = 200
JPEG = b"\xff\xd8\xff"
"""How a picture begins."""

_RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}-s[0-9]{1,10}-[0-9a-f]{8}$"

Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image, in continuous coordinates from 0."""

Verdict = Literal["right", "wrong", "neither"]


class _Given(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Curve(_Given):
    """Precision over recall of a class at one overlap.

    Attributes:
        overlap: that a detection needs with an object.
        ap: average precision of the metric, percent.
        recall: after some of the right detections, the surest first.
        precision: there.
    """

    overlap: Share
    ap: Percent
    recall: tuple[Share, ...]
    precision: tuple[Share, ...]


class ClassCurves(_Given):
    """The curves of a class.

    Attributes:
        name: of the class.
        num_objects: that there are to find.
        curves: one for each overlap.
    """

    name: str
    num_objects: Count
    curves: tuple[Curve, ...]


class ShownObject(_Given):
    """A true box; `label` is the position of its class in `DetectionFacts.classes`, and a crowd counts as difficult."""

    label: Count
    difficult: bool
    box: Box


class ShownDetection(_Given):
    """A predicted box and whether it is right; on a difficult object it is neither right nor wrong."""

    label: Count
    score: Share
    verdict: Verdict
    box: Box


class Picture(_Given):
    """One image with its boxes.

    Attributes:
        file: its name in the folder.
        image: position of the image in its split.
        width: of the file, pixels.
        height: of the file, pixels.
        f1: 2 · right / (2 · right + wrong + missed); None of an image without objects to find.
        right: detections that are right.
        wrong: those that are wrong.
        missed: objects that none of them found.
        objects: the true boxes.
        detections: the predicted ones, the surest first; the first is drawn with the number 1.
    """

    file: Annotated[str, StringConstraints(pattern=r"^[0-9]{6,10}\.jpg$")]
    image: Count
    width: Annotated[int, Field(ge=1, le=10_000)]
    height: Annotated[int, Field(ge=1, le=10_000)]
    f1: Share | None
    right: Count
    wrong: Count
    missed: Count
    objects: tuple[ShownObject, ...]
    detections: tuple[ShownDetection, ...]


class Groups(_Given):
    """Positions in `DetectionFacts.pictures`: the best first, the worst first, and in the order in which they were drawn."""

    best: tuple[Count, ...]
    worst: tuple[Count, ...]
    random: tuple[Count, ...]


class DetectionFacts(_Given):
    """All of `detection.json`.

    Attributes:
        format: `DETECTION_FORMAT`.
        run_id: of the training.
        title: of its recipe.
        version: of obowlab.
        dataset: that was tested on.
        split: of it.
        num_images: that were tested.
        num_with_objects: those that show objects to find.
        metric: whose `Curve.ap` it is, in words.
        score: that a detection needs to be drawn and counted in `Picture`.
        overlap: at which it is right there.
        classes: of the data set, in its order.
        pictures: each image once.
        groups: which of them are shown for what.
    """

    format: Literal[1]
    run_id: Annotated[str, StringConstraints(pattern=_RUN_ID)]
    title: str
    version: str
    dataset: str
    split: str
    num_images: Count
    num_with_objects: Count
    metric: str
    score: Share
    overlap: Share
    classes: Annotated[tuple[ClassCurves, ...], Field(min_length=1)]
    pictures: Annotated[tuple[Picture, ...], Field(max_length=MOST_PICTURES)]
    groups: Groups


def detection_folders(run: Path) -> list[Path]:
    """Return the folders of a run that should hold a detector's test, by name; none behind a link.

    Args:
        run: the run's folder.
    """
    place = run / DETECTION_FOLDER
    if place.is_symlink() or not place.is_dir():
        return []
    return sorted(
        each for each in place.iterdir() if re.fullmatch(_RUN_ID, each.name) and each.is_dir() and not each.is_symlink()
    )


def read_detection(folder: Path) -> tuple[DetectionFacts, dict[str, bytes]]:
    """Return the facts of a detector's test, every value of the kind that it has to be, and the pictures by name.

    Args:
        folder: `detection/ID`; whoever may write to the run store may have written it.

    Raises:
        OSError: a file is missing, a link or too large, or cannot be read.
        UserError: a file is not what an evaluation writes.
    """
    path = folder / FACTS
    try:
        facts = DetectionFacts.model_validate_json(read_file(path))
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "no JSON"
        raise _not_written_here(path, place) from None
    if (contradicted := _contradiction(facts, name=folder.name)) is not None:
        raise _not_written_here(path, contradicted)
    return facts, {picture.file: _read_picture(folder / picture.file) for picture in facts.pictures}


def _contradiction(facts: DetectionFacts, *, name: str) -> str | None:
    """Return which field does not fit the others, or the name of the folder; None when all do."""
    if facts.run_id != name:
        return "run_id"
    curves = [curve for each in facts.classes for curve in each.curves]
    if any(len(curve.recall) != len(curve.precision) for curve in curves):
        return "classes.curves"
    if len({picture.file for picture in facts.pictures}) != len(facts.pictures):
        return "pictures.file"
    labels = [each.label for picture in facts.pictures for each in picture.objects]
    labels += [each.label for picture in facts.pictures for each in picture.detections]
    if max(labels, default=0) >= len(facts.classes):
        return "pictures.label"
    places = (*facts.groups.best, *facts.groups.worst, *facts.groups.random)
    return "groups" if any(place >= len(facts.pictures) for place in places) else None


def _read_picture(path: Path) -> bytes:
    content = read_file(path, limit=LARGEST_PICTURE)
    if not content.startswith(JPEG):
        raise UserError(f"{path} is not a picture of the kind that its name says.")
    return content


def _not_written_here(path: Path, place: str) -> UserError:
    return UserError(f"{path} is not what an evaluation of this version writes ({place}).")
