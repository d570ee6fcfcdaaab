"""The page of a detector's test: pictures with boxes and curves, one file beside the pictures, that runs no script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from obowlab.files.opening import UnusableFileError
from obowlab.files.replacing import folder_written
from obowlab.pages import environment, templates
from obowlab.runs.detection_facts import DETECTION_FOLDER, FACTS, PAGE, ClassCurves, Curve, DetectionFacts, Picture

TEMPLATE = "detection.html"

LEFT, RIGHT, TOP, BOTTOM = 38.0, 232.0, 8.0, 158.0
"""Where recalls of 0 and 1, and precisions of 1 and 0, lie in a chart."""

HEADINGS = {
    "best": "Best",
    "worst": "Worst",
    "random": "Random",
}


@dataclass(frozen=True)
class Line:
    """A curve as the page draws it: its overlap, average precision in percent, and the points of a polyline."""

    overlap: float
    ap: float
    points: str


def keep_detection(facts: DetectionFacts, *, pictures: Mapping[str, bytes], run: Path) -> Path:
    """Write a detector's test into a run's folder, replacing an earlier one of the same training, and return where it is.

    Args:
        facts: of the test.
        pictures: by name.
        run: the run's folder, which is not made anew.

    Raises:
        OSError: the disk refuses, or a link has the name.
    """
    place = run / DETECTION_FOLDER
    place.mkdir(exist_ok=True)
    if place.is_symlink():
        raise UnusableFileError(place, "it is a link, and links are not followed here")
    with folder_written(place / facts.run_id) as beside:
        write_detection(facts, pictures=pictures, folder=beside)
    return place / facts.run_id


def write_detection(facts: DetectionFacts, *, pictures: Mapping[str, bytes], folder: Path) -> None:
    """Write pictures, facts and the page made of them: what a browser shows comes from this program, never from a run folder.

    Args:
        facts: of the test.
        pictures: by name.
        folder: is made where it is absent, and holds none of these files.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        with (folder / name).open("xb") as file:
            file.write(content)
    for name, text in ((FACTS, facts.model_dump_json()), (PAGE, render_detection(facts))):
        with (folder / name).open("x", encoding="utf-8") as page:
            page.write(text)


def render_detection(facts: DetectionFacts) -> str:
    """Return `index.html` for the facts of a detector's test; the pictures lie beside it."""
    here = environment(templates())
    here.globals.update({"described": described, "lines_of": lines_of})
    groups = {heading: [facts.pictures[place] for place in getattr(facts.groups, group)] for group, heading in HEADINGS.items()}
    frame = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return here.get_template(TEMPLATE).render(facts=facts, groups=groups, frame=frame)


def described(picture: Picture, *, classes: tuple[ClassCurves, ...]) -> str:
    """Return what a picture shows in words, for readers who do not see it."""
    objects = [f"{classes[each.label].name}{' (difficult)' if each.difficult else ''}" for each in picture.objects]
    found = [
        f"{number} {classes[each.label].name} {each.score:.2f} {each.verdict}"
        for number, each in enumerate(picture.detections, start=1)
    ]
    return f"Image {picture.image}. True boxes: {', '.join(objects) or 'none'}. Predicted boxes: {', '.join(found) or 'none'}."


def lines_of(curves: tuple[Curve, ...]) -> list[Line]:
    """Return the curves of a class as the page draws them; one without a right detection has no points."""
    return [Line(curve.overlap, curve.ap, _points(curve)) for curve in curves]


def _points(curve: Curve) -> str:
    ends = [
        f"{LEFT + recall * (RIGHT - LEFT):.1f},{BOTTOM - precision * (BOTTOM - TOP):.1f}"
        for recall, precision in zip(curve.recall, curve.precision, strict=True)
    ]
    return " ".join(ends * 2 if len(ends) == 1 else ends)  # a line of one point is drawn as a dot
