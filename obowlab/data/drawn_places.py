"""Draw a folder laid out as Places205's archives unpack, of the synthetic set's parts: for trying transfer without a download.

A place is one part above another, each twice, on the synthetic set's ground. Its classes are none of that set's, whose images
show four different parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from obowlab.data import synthetic
from obowlab.data.drawing import drawn_into

IMAGES_PER_CLASS = {"train": 30, "val": 15}
_PARTS = tuple(name.replace(" ", "-") for name in synthetic.PARTS)
PLACES = tuple((upper, (upper + 7) % len(_PARTS)) for upper in range(len(_PARTS)))
"""The upper and the lower part of every class."""
FOLDERS = tuple(f"{_PARTS[upper][0]}/{_PARTS[upper]}/over_{_PARTS[lower]}" for upper, lower in PLACES)
NUM_IMAGES = len(PLACES) * sum(IMAGES_PER_CLASS.values())

_IMAGES = "data/vision/torralba/deeplearning/images256"
_LISTS = "trainvalsplit_places205"
_STREAMS = {"train": 18, "val": 19}
_SIDE = 44


def draw_places(folder: Path) -> Path:
    """Write FOLDER/places205 and return it.

    Args:
        folder: is made; its places205 must not be there.

    Raises:
        UserError: there is something already, or the disk refuses.
    """
    place = folder / "places205"
    with drawn_into(place) as new:
        (new / _LISTS).mkdir(parents=True)
        first = 0
        for split, count in IMAGES_PER_CLASS.items():
            lines = []
            for index in range(len(PLACES) * count):
                label, name = index // count, f"{FOLDERS[index // count]}/gsun_{first + index % count:05d}.jpg"
                file = new / _IMAGES / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(split, index=index)).save(file, quality=95, subsampling=0)
                lines.append(f"{name} {label}\n")
            (new / _LISTS / f"{split}_places205.csv").write_text("".join(lines), encoding="utf-8")
            first += count
    return place


def draw(split: str, *, index: int) -> NDArray[np.uint8]:
    """Return an image of a split, uint8 [44, 44, 3], of class `index // IMAGES_PER_CLASS[split]`; a function of both alone."""
    draws = synthetic.Draws(stream=_STREAMS[split], index=index)
    canvas = synthetic.background(draws, side=_SIDE)
    for _ in range(int(draws.one(0, 3))):
        synthetic.clutter(canvas, draws)
    for row, part in enumerate(PLACES[index // IMAGES_PER_CLASS[split]]):
        for column in range(2):
            at = tuple((0.27 + 0.46 * place) * _SIDE + draws.one(-2.5, 2.5) for place in (column, row))
            synthetic.paint(
                canvas,
                synthetic.SHAPES[part],
                at=(at[0], at[1]),
                radius=draws.one(0.19, 0.235) * synthetic.IMAGE_SIZE,
                turned=synthetic.turn(draws.one(-0.25, 0.25)),
                colour=synthetic.light_colour(draws),
            )
    canvas = canvas + (draws.many(3, _SIDE, _SIDE, 3).sum(axis=0) - 1.5) * 0.02
    image: NDArray[np.uint8] = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    return image
