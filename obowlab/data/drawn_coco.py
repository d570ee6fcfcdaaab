"""Draw a folder laid out as COCO's, of the synthetic set's parts: for trying detection with masks without a download.

Images are those of `drawn_voc` with other random numbers, and one in twenty shows nothing. A part's outline is its outer edge;
what is drawn faint stands for a crowd, which a detector neither learns nor has to find.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from obowlab.data import synthetic
from obowlab.data.drawing import drawn_into
from obowlab.data.drawn_voc import CLASS_NAMES, PlacedPart, draw_scene

NUM_IMAGES = {"train": 600, "val": 400}

CATEGORIES = tuple(1 + number + number // 8 for number in range(len(CLASS_NAMES)))
"""Numbers of the classes, with gaps as COCO's have them."""

_STREAMS = {"train": 20, "val": 21}
_EMPTY_EVERY = 20
_CORNERS = 48
_RADII = np.linspace(0.0, 1.5, 301)
_SILHOUETTES = tuple(synthetic.silhouette if " " in name else shape for name, shape in synthetic.PARTS.items())


def draw_coco(folder: Path) -> Path:
    """Write FOLDER/coco and return it.

    Args:
        folder: is made; its coco must not be there.

    Raises:
        UserError: there is something already, or the disk refuses.
    """
    place = folder / "coco"
    with drawn_into(place) as new:
        (new / "annotations").mkdir(parents=True)
        first = 1
        for split, count in NUM_IMAGES.items():
            (new / f"{split}2017").mkdir()
            images, objects = [], []
            for index in range(count):
                pixels, shown = draw(split, index=index)
                height, width = pixels.shape[:2]
                name = f"{first + index:012d}.jpg"
                Image.fromarray(pixels).save(new / f"{split}2017" / name, quality=95, subsampling=0)
                images.append({"id": first + index, "file_name": name, "height": height, "width": width})
                objects += [{"image_id": first + index, **each} for each in shown]
            categories = [{"id": number, "name": name} for number, name in zip(CATEGORIES, CLASS_NAMES, strict=True)]
            numbered = [{"id": number, **each} for number, each in enumerate(objects, start=1)]
            content = {"images": images, "annotations": numbered, "categories": categories}
            (new / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="ascii")
            first += count
    return place


def draw(split: str, *, index: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Return an image of a split, uint8 [H, W, 3], and its objects as COCO's annotation files have them."""
    pixels, parts = draw_scene(_STREAMS[split], index=index, is_empty=index % _EMPTY_EVERY == _EMPTY_EVERY - 1)
    return pixels, [_object(part, height=pixels.shape[0], width=pixels.shape[1]) for part in parts]


def _object(part: PlacedPart, *, height: int, width: int) -> dict[str, Any]:
    points = outline(part, height=height, width=width)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    x, y = points.T
    area = 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    counts = run_lengths(inside(part, height=height, width=width)) if part.is_faint else None
    return {
        "category_id": CATEGORIES[part.number],
        "bbox": [round(float(side), 2) for side in (left, top, right - left, bottom - top)],
        "area": round(area, 2),
        "iscrowd": int(part.is_faint),
        "segmentation": {"counts": counts, "size": [height, width]} if part.is_faint else [points.reshape(-1).tolist()],
    }


def outline(part: PlacedPart, *, height: int, width: int) -> NDArray[np.float64]:
    """Return the outer edge of a part, within the image, [P, 2], x and y in hundredths of a pixel."""
    angles = np.arange(_CORNERS)[:, None] * (2.0 * math.pi / _CORNERS)
    u, v = np.cos(angles) * _RADII, np.sin(angles) * _RADII
    covered = _SILHOUETTES[part.number](u, v) <= 0
    last = _RADII[covered.shape[1] - 1 - covered[:, ::-1].argmax(axis=1)]
    edge_u, edge_v = np.cos(angles[:, 0]) * last, np.sin(angles[:, 0]) * last
    cos, sin = part.turned
    x = part.at[0] + part.radius * (cos * edge_u - sin * edge_v)
    y = part.at[1] + part.radius * (sin * edge_u + cos * edge_v)
    points: NDArray[np.float64] = np.stack((x.clip(0, width), y.clip(0, height)), axis=1).round(2)
    return points


def inside(part: PlacedPart, *, height: int, width: int) -> NDArray[np.bool_]:
    """Return which pixels a part covers with its outline, bool [H, W]."""
    x = (np.arange(width) + 0.5 - part.at[0])[None, :] / part.radius
    y = (np.arange(height) + 0.5 - part.at[1])[:, None] / part.radius
    cos, sin = part.turned
    covered: NDArray[np.bool_] = _SILHOUETTES[part.number](cos * x + sin * y, cos * y - sin * x) <= 0
    return covered


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return how many pixels of a mask [H, W] are in turn outside and inside, column by column, beginning with those outside."""
    flat = np.concatenate(([False], mask.T.reshape(-1)))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(length) for length in np.diff(np.concatenate(([0], changes, [mask.size])))]
