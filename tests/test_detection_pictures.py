"""Pictures and curves of a detector's test: which images, what is drawn and written, and what a report makes of it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from obowlab.cli.transfer import add_detections
from obowlab.data.annotations import Annotation, Outline
from obowlab.data.datasets import Split
from obowlab.errors import UserError
from obowlab.evaluation.detection.judged import MOST_POINTS, JudgedDetections, curve
from obowlab.evaluation.detection.pictures import (
    COLOURS,
    LONGEST,
    NUM_PICTURES,
    WHITE,
    Counts,
    choose,
    count,
    draw,
    is_left_out,
    show_detections,
)
from obowlab.evaluation.detection.scoring import Judged, by_image, class_curves, judge
from obowlab.evaluation.detection.voc_metric import Found, Truth, as_written
from obowlab.pages.detection import keep_detection, render_detection
from obowlab.report.pages import build_site
from obowlab.report.read import Tables, find_detections, gather, read_store
from obowlab.runs.bundle import BUNDLED, write_bundle
from obowlab.runs.detection_facts import (
    LARGEST_PICTURE,
    ClassCurves,
    Curve,
    DetectionFacts,
    Groups,
    Picture,
    ShownDetection,
    ShownObject,
    detection_folders,
    read_detection,
)
from obowlab.runs.folder import RunFolder
from obowlab.tracking.outbox import Outbox
from tests.oracles import voc_average_precision
from tests.report_store import add_run
from tests.test_report import HOSTILE, Page

# ------------------------------------------------------------------------------------------------------ the hand-made case

CLASSES = ("dog", "cat")
SIZE = (40, 52)
"""Height and width of every image."""

Sides = tuple[int, int, int, int]
BOX_A, BOX_B, BOX_C = (4, 4, 16, 20), (24, 6, 44, 30), (2, 26, 12, 38)
DOG, CAT = 0, 1

SHOWN: list[list[tuple[Sides, int, bool]]] = [
    [(BOX_A, DOG, False), (BOX_B, CAT, False)],
    [(BOX_A, DOG, False)],
    [(BOX_B, CAT, False)],
    [],
    [(BOX_A, DOG, False)],
    [(BOX_B, DOG, True)],
    [(BOX_A, DOG, False)],
]
FOUND: list[list[tuple[Sides, int, float]]] = [
    [(BOX_A, DOG, 0.9), (BOX_B, CAT, 0.8)],
    [(BOX_A, DOG, 0.95), (BOX_B, DOG, 0.6)],
    [(BOX_A, CAT, 0.7), (BOX_C, DOG, 0.65)],
    [(BOX_A, CAT, 0.55)],
    [(BOX_A, DOG, 0.4)],
    [(BOX_B, DOG, 0.85)],
    [(BOX_A, DOG, 0.75), (BOX_A, DOG, 0.3)],
]
"""Box, class and score of every detection; the last of all finds an object that a surer one has."""

COUNTS = [Counts(2, 0, 0), Counts(1, 1, 0), Counts(0, 2, 1), Counts(0, 1, 0), Counts(0, 0, 1), Counts(0, 0, 0), Counts(1, 0, 0)]
BEST, WORST = [0, 6, 1], [2, 4]


@dataclass(frozen=True)
class DrawnSplit:
    """Grey images as a prepared split has them."""

    num_images: int = len(SHOWN)
    dataset: str = "drawn"
    name: str = "val"
    class_names: tuple[str, ...] = CLASSES

    @property
    def heights(self) -> list[int]:
        return [SIZE[0]] * self.num_images

    @property
    def widths(self) -> list[int]:
        return [SIZE[1]] * self.num_images

    def jpeg(self, index: int) -> bytes:
        content = io.BytesIO()
        Image.new("RGB", (SIZE[1], SIZE[0]), (128, 128, 128)).save(content, "JPEG")
        return content.getvalue()


def truths() -> list[Annotation]:
    return [
        Annotation(
            size=SIZE,
            boxes=np.array([box for box, _, _ in each], dtype=np.float64).reshape(-1, 4),
            labels=np.array([label for _, label, _ in each], dtype=np.int64),
            difficult=np.array([difficult for _, _, difficult in each], dtype=np.bool_),
        )
        for each in SHOWN
    ]


def found_and_judged() -> tuple[dict[str, list[Found]], dict[str, Judged]]:
    names = [f"{image:06d}" for image in range(len(SHOWN))]
    found: dict[str, list[Found]] = {name: [] for name in CLASSES}
    of_class: dict[str, dict[str, Truth]] = {name: {} for name in CLASSES}
    for name, detections, truth in zip(names, FOUND, truths(), strict=True):
        for box, label, score in detections:
            found[CLASSES[label]].append(as_written(name, score=score, box=box))
        for label in set(truth.labels.tolist()):
            own = truth.labels == label
            of_class[CLASSES[label]][name] = Truth(truth.as_counted[own], truth.difficult[own])
    return found, {name: judge(found[name], truths=of_class[name], images=names) for name in CLASSES}


def detections() -> tuple[JudgedDetections, ...]:
    found, judged = found_and_judged()
    return by_image(found, judged=judged, num_images=len(SHOWN))


@pytest.fixture
def training(tmp_path: Path) -> RunFolder:
    """A run with the pictures of the hand-made case."""
    folder = add_run(tmp_path / "runs", points=3)
    _, judged = found_and_judged()
    show_detections(
        cast(Split, DrawnSplit()),
        detections=detections(),
        truths=truths(),
        classes=class_curves(judged, num_images=len(SHOWN)),
        metric="11 recalls",
        title="Small dogs",
        folder=folder,
    )
    return folder


def place_of(folder: RunFolder) -> Path:
    return folder.path / "detection" / folder.run_id


# ------------------------------------------------------------------------------------------------------------ what is found


def test_detections_of_an_image_are_those_that_were_found_in_it_the_surest_first() -> None:
    for image, (each, expected) in enumerate(zip(detections(), FOUND, strict=True)):
        by_score = sorted(expected, key=lambda one: -one[2])
        assert each.boxes.tolist() == [list(map(float, box)) for box, _, _ in by_score], image
        assert each.labels.tolist() == [label for _, label, _ in by_score]
        assert each.scores.tolist() == [score for _, _, score in by_score]
    verdicts = [list(zip(each.right.tolist(), each.wrong.tolist(), strict=True)) for each in detections()]
    right, wrong, neither = (True, False), (False, True), (False, False)
    assert verdicts == [[right] * 2, [right, wrong], [wrong] * 2, [wrong], [right], [neither], [right, wrong]]


def test_right_wrong_and_missed_are_counted_among_sure_detections() -> None:
    counts = [count(each, truth=truth) for each, truth in zip(detections(), truths(), strict=True)]
    assert counts == COUNTS
    assert [each.f1 for each in counts] == [1.0, pytest.approx(2 / 3), 0.0, None, 0.0, None, 1.0]


def test_difficult_objects_and_crowds_need_not_be_found() -> None:
    boxes, labels, difficult = np.zeros((3, 4)), np.zeros(3, dtype=np.int64), np.array([False, False, True])
    outlines = tuple(Outline(polygons=(), counts=counts, area=4.0) for counts in (None, np.array([2, 2]), None))
    assert is_left_out(Annotation(SIZE, boxes, labels, difficult)).tolist() == [False, False, True]
    assert is_left_out(Annotation(SIZE, boxes, labels, difficult, outlines)).tolist() == [False, True, True]
    assert is_left_out(Annotation(SIZE, boxes[:0], labels[:0], difficult[:0])).tolist() == []


def test_nothing_found_at_all_is_no_detection_of_any_image() -> None:
    judged = {"dog": judge([], truths={}, images=["a", "b"])}
    none = by_image({"dog": []}, judged=judged, num_images=2)
    assert [each.boxes.shape for each in none] == [(0, 4), (0, 4)]
    assert class_curves(judged, num_images=2)[0].curves[0].recall == ()


# ------------------------------------------------------------------------------------------------------------ which images


def test_best_and_worst_come_in_their_order_and_have_objects() -> None:
    best, worst, random = choose(COUNTS)
    assert (best, worst) == (BEST, WORST)
    assert sorted(random) == list(range(7)), "random ones are of all images"


def test_of_many_images_a_dozen_are_of_each_kind_and_none_is_best_and_worst() -> None:
    numbers = np.random.default_rng(0).integers(0, 5, (200, 3))
    counts = [Counts(*row) for row in numbers.tolist()]
    best, worst, random = choose(counts)
    assert len(best) == len(worst) == len(set(random)) == NUM_PICTURES
    assert not set(best) & set(worst)
    f1 = {image: each.f1 for image, each in enumerate(counts) if each.f1 is not None}
    assert [f1[image] for image in best] == sorted(f1.values(), reverse=True)[:NUM_PICTURES]
    assert [f1[image] for image in worst] == sorted(f1.values())[:NUM_PICTURES]
    assert choose([Counts(0, 0, 1)] * 200)[2] == random, "whatever was found"
    assert random != sorted(random)


def test_no_images_are_no_pictures() -> None:
    assert choose([]) == ([], [], [])


# -------------------------------------------------------------------------------------------------------------- the curves


def slow_curve(right: list[bool], wrong: list[bool], *, num_objects: int) -> list[tuple[float, float]]:
    """Return recall and precision after each right detection."""
    points = []
    for place, is_right in enumerate(right):
        if is_right:
            num_right, num_wrong = sum(right[: place + 1]), sum(wrong[: place + 1])
            points.append((num_right / num_objects, num_right / (num_right + num_wrong)))
    return points


@pytest.mark.parametrize("length", [0, 1, 7, 90, 1500])
def test_a_curve_is_that_of_a_slow_version(length: int) -> None:
    kinds = np.random.default_rng(length).integers(0, 3, length)
    right, wrong = kinds == 0, kinds == 1
    num_objects = int(right.sum()) + 3
    got = curve(right, wrong, num_objects=num_objects, overlap=0.5, ap=12.345678)
    points = list(zip(got.recall, got.precision, strict=True))
    expected = [(round(r, 5), round(p, 5)) for r, p in slow_curve(right.tolist(), wrong.tolist(), num_objects=num_objects)]
    assert got.ap == 12.3457
    if len(expected) <= MOST_POINTS:
        assert points == expected
    else:
        assert len(points) == MOST_POINTS
        assert set(points) <= set(expected)
        assert (points[0], points[-1]) == (expected[0], expected[-1])
        steps = np.diff([expected.index(point) for point in points])
        assert steps.max() - steps.min() <= 1, "evenly spread"


def test_the_curves_of_a_class_are_at_both_overlaps_with_its_average_precision() -> None:
    found, judged = found_and_judged()
    dog, cat = class_curves(judged, num_images=len(SHOWN))
    assert (dog.name, dog.num_objects, cat.name, cat.num_objects) == ("dog", 4, "cat", 2)
    of_dogs = {f"{i:06d}": Truth(t.as_counted[t.labels == DOG], t.difficult[t.labels == DOG]) for i, t in enumerate(truths())}
    assert [each.overlap for each in dog.curves] == [0.5, 0.75]
    for each in dog.curves:
        assert each.ap == pytest.approx(voc_average_precision(found["dog"], truths=of_dogs, overlap=each.overlap), abs=1e-4)
    # By score: right .95, right .9, neither .85, right .75, wrong .65 and .6, right .4, wrong .3.
    assert dog.curves[0].recall == (0.25, 0.5, 0.75, 1.0)
    assert dog.curves[0].precision == (1.0, 1.0, 1.0, round(4 / 6, 5))


# ------------------------------------------------------------------------------------------------------------ the pictures


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_verdict() -> None:
    predicted = [
        ShownDetection(label=DOG, score=0.9, verdict="right", box=(10, 10, 30, 34)),
        ShownDetection(label=DOG, score=0.8, verdict="wrong", box=(36, 4, 50, 36)),
    ]
    true = ShownObject(label=DOG, difficult=False, box=(4, 2, 33, 38))
    drawn = draw(Image.new("RGB", (52, 40), (128, 128, 128)), objects=[true], detections=predicted)
    assert drawn.size == (LONGEST, round(40 * LONGEST / 52)), "a small image is enlarged"
    pixels, scale = np.asarray(drawn).astype(int), LONGEST / 52
    for each in predicted:
        x0, y0, x1, y1 = (round(side * scale) for side in each.box)
        for row, column in ((y1 - 1, (x0 + x1) // 2), ((y0 + y1) // 2, x0), ((y0 + y1) // 2, x1 - 1)):
            assert tuple(pixels[row, column]) == COLOURS[each.verdict], (each.verdict, row, column)
        assert tuple(pixels[(y0 + y1) // 2, (x0 + x1) // 2]) == (128, 128, 128), "the inside stays as it is"
    line = pixels[round(2 * scale), round(4 * scale) : round(33 * scale)]
    white = (line == WHITE).all(axis=1)
    assert 0.3 < white.mean() < 0.8, "a true box is dashed"


@pytest.mark.parametrize(("size", "drawn"), [((1920, 960), (480, 240)), ((30, 3000), (5, 480)), ((1, 5000), (1, 480))])
def test_large_images_are_shrunk_and_boxes_at_or_beyond_the_edge_do_no_harm(size: Sides, drawn: tuple[int, int]) -> None:
    boxes = [(-5.0, -5.0, 10_000.0, 10_000.0), (0.0, 0.0, 0.1, 0.1), (size[0] - 0.1, size[1] - 0.1, size[0], size[1])]
    predicted = [ShownDetection(label=DOG, score=0.9, verdict="neither", box=box) for box in boxes]
    objects = [ShownObject(label=DOG, difficult=True, box=box) for box in boxes]
    assert draw(Image.new("RGB", size), objects=objects, detections=predicted).size == drawn


# -------------------------------------------------------------------------------------------------------------- the folder


def test_facts_and_pictures_of_the_hand_made_case_lie_in_the_trainings_folder(training: RunFolder) -> None:
    place = place_of(training)
    assert detection_folders(training.path) == [place]
    facts, pictures = read_detection(place)
    names = sorted(pictures)
    assert names == [f"{image:06d}.jpg" for image in range(7)]
    assert sorted(path.name for path in place.iterdir()) == sorted([*names, "detection.json", "index.html"])
    assert [path.name for path in place.parent.iterdir()] == [training.run_id], "nothing is left over"
    shown = {group: [facts.pictures[at].image for at in getattr(facts.groups, group)] for group in ("best", "worst", "random")}
    assert (shown["best"], shown["worst"], sorted(shown["random"])) == (BEST, WORST, list(range(7)))
    assert (facts.num_images, facts.num_with_objects, facts.title, facts.dataset) == (7, 5, "Small dogs", "drawn")
    for each in facts.pictures:
        with Image.open(io.BytesIO(pictures[each.file])) as image:
            assert (image.format, image.size) == ("JPEG", (each.width, each.height))
        assert Counts(each.right, each.wrong, each.missed) == COUNTS[each.image]
        assert len(each.objects) == len(SHOWN[each.image])
        assert [one.score for one in each.detections] == [score for _, _, score in FOUND[each.image] if score >= 0.5]
    by_image = {each.image: each for each in facts.pictures}
    assert [one.verdict for one in by_image[1].detections] == ["right", "wrong"]
    assert by_image[1].detections[0].box == tuple(map(float, BOX_A))
    assert (by_image[5].detections[0].verdict, by_image[5].objects[0].difficult, by_image[5].f1) == ("neither", True, None)


def test_a_later_test_replaces_the_pictures_of_an_earlier_one(training: RunFolder) -> None:
    facts, pictures = read_detection(place_of(training))
    (place_of(training) / "more.txt").write_text("of an earlier version")
    fewer = facts.model_copy(update={"pictures": facts.pictures[:1], "groups": Groups(best=(0,), worst=(), random=())})
    keep_detection(fewer, pictures={facts.pictures[0].file: pictures[facts.pictures[0].file]}, run=training.path)
    names = sorted(path.name for path in place_of(training).iterdir())
    assert names == sorted([facts.pictures[0].file, "detection.json", "index.html"])


def test_a_run_folder_that_is_away_is_not_made_anew_and_a_link_is_not_followed(training: RunFolder, tmp_path: Path) -> None:
    facts, pictures = read_detection(place_of(training))
    with pytest.raises(FileNotFoundError):
        keep_detection(facts, pictures=pictures, run=tmp_path / "away")
    (other := tmp_path / "other").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (other / "detection").symlink_to(elsewhere)
    with pytest.raises(OSError, match="it is a link"):
        keep_detection(facts, pictures=pictures, run=other)
    assert not list(elsewhere.iterdir())


def test_the_run_whose_encoder_was_measured_gets_a_folder_for_each_training(training: RunFolder, tmp_path: Path) -> None:
    measured = add_run(tmp_path / "runs", seed=7, points=3)
    (secret := tmp_path / "secret").write_text("of somebody else")
    (place_of(training) / "script.html").write_text("<script>")
    (place_of(training) / "000009.jpg").symlink_to(secret)
    other = add_run(tmp_path / "runs", seed=8, points=3)
    facts, pictures = read_detection(place_of(training))
    keep_detection(facts.model_copy(update={"run_id": other.run_id}), pictures=pictures, run=other.path)
    for each in (training, other, training):
        add_detections(each, to=measured)
    assert [folder.name for folder in detection_folders(measured.path)] == sorted([training.run_id, other.run_id])
    for folder in detection_folders(measured.path):
        assert sorted(path.name for path in folder.iterdir()) == sorted([*pictures, "detection.json", "index.html"])
    assert read_detection(measured.path / "detection" / training.run_id) == (facts, pictures)


def test_damaged_pictures_are_not_added_and_the_results_are(
    training: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = add_run(tmp_path / "runs", seed=7, points=3)
    (place_of(training) / "detection.json").write_text("{")
    add_detections(training, to=measured)
    assert f"The pictures of {training.run_id} were not added: " in capsys.readouterr().err
    assert detection_folders(measured.path) == []


# ---------------------------------------------------------------------------------------------------- what leaves the folder


def test_nothing_but_what_was_written_is_sent_the_page_after_its_pictures(training: RunFolder, tmp_path: Path) -> None:
    place = place_of(training)
    (secret := tmp_path / "secret").write_text("of somebody else")
    for name in ("credentials.txt", "page.html", "1.jpg", "0000001.png"):
        (place / name).write_text("own")
    (place / "000100.jpg").symlink_to(secret)
    os.mkfifo(place / "000101.jpg")
    (place.parent / "loose.jpg").write_text("own")
    (place.parent / "no-id").mkdir()
    (place.parent / "no-id" / "000001.jpg").write_text("own")
    (place.parent / "linked-s0-00000000").symlink_to(place)
    outbox = Outbox(training, store="x")
    sent = [path.relative_to(training.path).as_posix() for path in outbox.artifacts()]
    of_detection = [name for name in sent if name.startswith("detection/")]
    names = [*(f"{image:06d}.jpg" for image in range(7)), "detection.json", "index.html"]
    assert of_detection == [f"detection/{training.run_id}/{name}" for name in names]
    assert outbox.left_out() == []
    (place.parent.rename(tmp_path / "moved"))
    place.parent.symlink_to(tmp_path / "moved")
    assert not [path for path in outbox.artifacts() if "detection" in path.parts]
    assert outbox.left_out() == ["detection (it is a link, and links are not followed here)"]
    assert find_detections(training.path) == ()


def test_an_exported_run_takes_its_pictures_along(training: RunFolder, tmp_path: Path) -> None:
    assert "detection" in BUNDLED
    write_bundle(training, names=["detection"], target=tmp_path / "run.tar.gz")
    with tarfile.open(tmp_path / "run.tar.gz") as bundle:
        assert f"{training.run_id}/detection/{training.run_id}/000000.jpg" in bundle.getnames()


# ---------------------------------------------------------------------------------------------------------------- the page


def hostile_facts(run_id: str) -> DetectionFacts:
    line = Curve(overlap=0.5, ap=50.0, recall=(0.5,), precision=(1.0,))
    none = Curve(overlap=0.75, ap=0.0, recall=(), precision=())
    picture = Picture(
        file="000003.jpg",
        image=3,
        width=8,
        height=8,
        f1=0.5,
        right=1,
        wrong=0,
        missed=2,
        objects=(ShownObject(label=0, difficult=True, box=(0, 0, 1, 1)),),
        detections=(ShownDetection(label=0, score=0.5, verdict="right", box=(0, 0, 1, 1)),),
    )
    return DetectionFacts(
        format=1,
        run_id=run_id,
        title=HOSTILE,
        version=HOSTILE,
        dataset=HOSTILE,
        split=HOSTILE,
        num_images=12_345,
        num_with_objects=3,
        metric=HOSTILE,
        score=0.5,
        overlap=0.5,
        classes=(ClassCurves(name=HOSTILE, num_objects=2, curves=(line, none)),),
        pictures=(picture,),
        groups=Groups(best=(0,), worst=(), random=(0,)),
    )


def test_every_text_of_the_page_is_escaped_and_it_runs_no_script(tmp_path: Path) -> None:
    content = render_detection(hostile_facts("demo-s0-01234567"))
    (tmp_path / "index.html").write_text(content)
    page = Page(tmp_path / "index.html")
    assert page.scripts == []
    assert page.tags.count("img") == 2, "the picture in both of its groups"
    assert "<script" not in content
    assert page.text.count(HOSTILE.split('"')[0]) >= 6
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:;" in content
    assert "http:" not in content
    assert "https:" not in content


def test_the_page_says_in_words_what_the_pictures_and_curves_show(training: RunFolder) -> None:
    content = (place_of(training) / "index.html").read_text()
    page = Page(place_of(training) / "index.html")
    assert 'alt="Image 1. True boxes: dog. Predicted boxes: 1 dog 0.95 right, 2 dog 0.60 wrong."' in content
    assert 'alt="Image 5. True boxes: dog (difficult). Predicted boxes: 1 dog 0.85 neither."' in content
    assert 'aria-label="Precision over recall of cat"' in content
    assert "Image 1 · F1 0.67: 1 right, 1 wrong, 0 missed true: dog" in page.text
    assert "Image 3 · no objects to find, 1 wrong true: none" in page.text
    for said in ("true box: dashed, white", "wrong: solid, orange", "overlap 0.5: solid", "overlap 0.75: dashed"):
        assert said in page.text
    assert content.count("<polyline") == 4
    assert page.tags.count("img") == len(BEST) + len(WORST) + 7
    assert set(page.links) - {"data:,"} == {f"{image:06d}.jpg" for image in range(7)}


def test_curves_lie_within_their_chart_and_a_single_point_is_a_dot() -> None:
    content = render_detection(hostile_facts("demo-s0-01234567"))
    assert 'points="135.0,8.0 135.0,8.0"' in content
    assert content.count("<polyline") == 1, "nothing found has no line"
    assert "AP at 0.75: 0.0 % (nothing found)" in content


# -------------------------------------------------------------------------------------------------------------- the report


def site_of(folder: RunFolder, *, out: Path) -> Path:
    build_site(gather(read_store(folder.path.parent), tables=Tables()), out=out)
    return out


def test_a_report_shows_the_pictures_of_a_run(training: RunFolder, tmp_path: Path) -> None:
    site = site_of(training, out=tmp_path / "site")
    shown = site / "detection" / training.run_id / training.run_id
    for path in place_of(training).iterdir():
        assert (shown / path.name).read_bytes() == path.read_bytes(), path.name
    overview, listed = Page(site / "index.html"), Page(site / "detections.html")
    assert "detections.html" in overview.links
    address = f"detection/{training.run_id}/{training.run_id}/index.html"
    assert address in listed.links
    assert f"runs/{training.run_id}.html" in listed.links
    run = Page(site / "runs" / f"{training.run_id}.html")
    assert f"../{address}" in run.links
    assert "The detector of this run" in run.text
    for page, up in ((listed, ""), (run, "../")):
        pictures = [link for link in page.links if link.endswith(".jpg")]
        assert pictures == [f"{up}detection/{training.run_id}/{training.run_id}/{image:06d}.jpg" for image in _previewed(shown)]


def _previewed(shown: Path) -> list[int]:
    facts, _ = read_detection(shown)
    first = [getattr(facts.groups, group)[0] for group in ("best", "worst", "random")]
    return list(dict.fromkeys(facts.pictures[place].image for place in first))


def test_a_report_leads_from_a_measured_run_to_the_training(training: RunFolder, tmp_path: Path) -> None:
    measured = add_run(training.path.parent, seed=7, points=3)
    add_detections(training, to=measured)
    site = site_of(training, out=tmp_path / "site")
    run = Page(site / "runs" / f"{measured.run_id}.html")
    assert f"../detection/{measured.run_id}/{training.run_id}/index.html" in run.links
    assert f"../runs/{training.run_id}.html" in run.links
    assert "The training that began with this run’s encoder" in run.text


def test_a_report_without_detectors_has_no_page_of_them(tmp_path: Path) -> None:
    folder = add_run(tmp_path / "runs", points=3)
    site = site_of(folder, out=tmp_path / "site")
    assert not (site / "detections.html").exists()
    assert "Detections" not in Page(site / "runs" / f"{folder.run_id}.html").text


ATTACK = "document.documentElement.dataset.attacked = 'yes'"


def test_nothing_else_that_lies_in_the_folder_gets_into_a_report(training: RunFolder, tmp_path: Path) -> None:
    place = place_of(training)
    (place / "index.html").write_text(f"<script>{ATTACK}</script>")
    (place / "more.html").write_text(f"<script>{ATTACK}</script>")
    (place / "words.js").write_text(ATTACK)
    (place / "000100.jpg").write_text(ATTACK)
    (place.parent / "index.html").write_text(f"<script>{ATTACK}</script>")
    (place.parent / "index.html-s0-00000000").mkdir()
    facts = json.loads((place / "detection.json").read_text())
    facts["title"], facts["classes"][0]["name"], facts["more"] = HOSTILE, HOSTILE, f"<script>{ATTACK}</script>"
    (place / "detection.json").write_text(json.dumps(facts))
    site = site_of(training, out=tmp_path / "site")
    shown = site / "detection" / training.run_id
    assert [path.name for path in shown.iterdir()] == [training.run_id]
    names = [f"{image:06d}.jpg" for image in range(7)]
    assert sorted(path.name for path in (shown / training.run_id).iterdir()) == sorted([*names, "detection.json", "index.html"])
    assert not [path for path in site.rglob("*") if path.is_file() and ATTACK.encode() in path.read_bytes()]
    assert Page(shown / training.run_id / "index.html").scripts == []


def facts_changed(place: Path, change: Callable[[Any], Any]) -> None:
    facts = json.loads((place / "detection.json").read_text())
    change(facts)
    (place / "detection.json").write_text(json.dumps(facts))


def linked(place: Path, name: str, *, secret: Path) -> None:
    (place / name).unlink()
    (place / name).symlink_to(secret)


JPG = "000000.jpg"
ATTACKS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "linked picture": (lambda place, secret: linked(place, JPG, secret=secret), "it is a link"),
    "linked facts": (lambda place, secret: linked(place, "detection.json", secret=secret), "it is a link"),
    "page as picture": (lambda place, _: (place / JPG).write_text("<html>"), "is not a picture of the kind"),
    "oversized": (lambda place, _: os.truncate(place / JPG, LARGEST_PICTURE + 1), "it is larger than 2 MiB"),
    "pipe": (lambda place, _: ((place / JPG).unlink(), os.mkfifo(place / JPG)), "it is a pipe"),
    "absent picture": (lambda place, _: (place / JPG).unlink(), "No such file"),
    "absent facts": (lambda place, _: (place / "detection.json").unlink(), "No such file"),
    "deep facts": (lambda place, _: (place / "detection.json").write_text("[" * 100_000), "(no JSON)"),
    "other format": (lambda place, _: facts_changed(place, lambda f: f.update(format=2)), "(format)"),
    "other run": (lambda place, _: facts_changed(place, lambda f: f.update(run_id="demo-s1-00000000")), "(run_id)"),
    "path as run": (lambda place, _: facts_changed(place, lambda f: f.update(run_id="../x-s0-00000000")), "(run_id)"),
    "text as number": (lambda place, _: facts_changed(place, lambda f: f.update(score="0.5")), "(score)"),
    "recall of 2": (
        lambda place, _: facts_changed(place, lambda f: f["classes"][0]["curves"][0]["recall"].__setitem__(0, 2)),
        "(classes.0.curves.0.recall.0)",
    ),
    "shorter recall": (
        lambda place, _: facts_changed(place, lambda f: f["classes"][0]["curves"][0]["recall"].pop()),
        "(classes.curves)",
    ),
    "unknown class": (
        lambda place, _: facts_changed(place, lambda f: f["pictures"][0]["objects"][0].update(label=2)),
        "(pictures.label)",
    ),
    "unknown picture": (lambda place, _: facts_changed(place, lambda f: f["groups"]["best"].append(7)), "(groups)"),
    "one file twice": (
        lambda place, _: facts_changed(place, lambda f: f["pictures"][0].update(file=f["pictures"][1]["file"])),
        "(pictures.file)",
    ),
    **{
        f"picture {name!r}": (
            lambda place, _, n=name: facts_changed(place, lambda f: f["pictures"][0].update(file=n)),
            "(pictures.0.file)",
        )
        for name in ("../../run.json", "x.svg", "000000.html", "/etc/passwd.jpg", "000000.jpg\n", ".jpg")
    },
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_folder_that_is_none_of_ours_is_refused(training: RunFolder, tmp_path: Path, attack: str) -> None:
    (secret := tmp_path / "secret").write_text("of somebody else")
    change, said = ATTACKS[attack]
    change(place_of(training), secret)
    with pytest.raises((OSError, UserError)) as refused:
        read_detection(place_of(training))
    assert said in str(refused.value)


@pytest.mark.parametrize("attack", ["linked picture", "oversized", "unknown class", "absent facts"])
def test_what_cannot_be_shown_is_left_out_of_a_report_and_named(training: RunFolder, tmp_path: Path, attack: str) -> None:
    (secret := tmp_path / "secret").write_text("of somebody else")
    change, said = ATTACKS[attack]
    change(place_of(training), secret)
    site = site_of(training, out=tmp_path / "site")
    overview = Page(site / "index.html").text
    assert f"The detections of run {training.run_id} cannot be shown: " in overview
    assert said in overview
    assert not (site / "detection").exists()
    assert not (site / "detections.html").exists()
    assert (site / "runs" / f"{training.run_id}.html").is_file()
    assert not [path for path in site.rglob("*") if path.is_file() and path.read_bytes() == secret.read_bytes()]
