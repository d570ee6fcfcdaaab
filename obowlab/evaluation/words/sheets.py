"""The best patches of every visual word as pictures: cut, arranged into sheets, and compared with each other.

Shapes: K words, N of them, P patches per word, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from obowlab.config import Level
from obowlab.evaluation.features import BATCH_SIZE, REPORT_EVERY_S, frozen
from obowlab.evaluation.words.search import CentreViews, TopPatches
from obowlab.methods import VisualWords, bow
from obowlab.randomness import Ints

PATCH_SHARE: dict[Level, float] = {"conv4": 64 / 224, "conv5": 96 / 224}
"""Side of a patch as a share of the view's, by level.

The paper does not say. 64 of 224 pixels, what the authors' code cuts, are four locations of conv4. A location of conv5 is
twice as wide and sees more around it: three of them are 96 pixels. (All that could reach a unit is wider than the view; what
does is mostly near its centre.)
"""

TILE = 64
"""Side of a patch as it is stored, in pixels: a multiple of 8, so that JPEG's blocks end where patches do."""

WORDS_PER_SHEET = 32
"""Rows of a sheet: 512 x 2048 pixels with eight patches, 4 MB in a browser; 8192 words are 256 files."""

JPEG_QUALITY = 85


def draw_level(
    top: TopPatches,
    *,
    level: Level,
    words: VisualWords,
    map_size: tuple[int, int],
    step: int,
    views: CentreViews,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Draw the patches of a level into sheets, a word per row, the most used word first, and return the facts of the level.

    The winning images are read once more: patches and features of all words at once would need gigabytes.

    Args:
        top: the level's best patches.
        level: its name.
        words: teacher and vocabularies.
        map_size: height and width of the level's map, border included.
        step: updates that the words come after.
        views: the images.
        folder: where `LEVEL-NNN.jpg` are written.
        report: called with a line now and then.
    """
    read_with = words.levels[level]
    count_K = top.nearest_K.cpu().numpy()
    order_K = np.argsort(-count_K, kind="stable")
    found = int((top.images_KP[0] >= 0).sum())  # the same for all words: every image has a best location for each
    scores_KP, images_KP, locations_KP = (
        each[:, :found].cpu().numpy() for each in (top.scores_KP, top.images_KP, top.locations_KP)
    )
    places_KP2 = map_places(locations_KP, width=map_size[1] - 2 * read_with.border, border=read_with.border)
    side = max(1, round(PATCH_SHARE[level] * views.views.original_size))
    corners_KP2 = patch_corners(places_KP2, map_size=map_size, side=side, view=views.views.original_size)
    ages_K = step - read_with.inserted_at.cpu().numpy()
    described: list[dict[str, Any]] = []
    sheets: list[str] = []
    alike = Likeness()
    last = time.monotonic()
    wanted = images_KP[order_K].reshape(-1)
    with frozen(words.teacher):
        for _, pixels, images in views.batches(wanted, batch_size=WORDS_PER_SHEET * found):  # a batch is a sheet
            rows = order_K[len(described) : len(described) + WORDS_PER_SHEET]
            places = torch.from_numpy(places_KP2[rows].reshape(-1, 2)).to(views.device)
            parts = (slice(start, start + BATCH_SIZE) for start in range(0, len(images), BATCH_SIZE))
            features = torch.cat([_features(words, level, images[part], places[part]) for part in parts])
            coherence = alike.add(features.view(len(rows), found, -1), used=torch.from_numpy(count_K[rows] > 0))
            sheets.append(f"{level}-{len(sheets):03}.jpg")
            draw_sheet(pixels.numpy(), corners_KP2[rows], side=side, path=folder / sheets[-1])
            described += [
                {
                    "number": word,
                    "use": 100.0 * int(count_K[word]) / top.num_locations,
                    "coherence": coherence[row],
                    "score": float(scores_KP[word].mean()),
                    "age": int(ages_K[word]),
                    "places": len(np.unique(locations_KP[word])),
                    "sheet": len(sheets) - 1,
                    "row": row,
                    "patches": _patches(images_KP[word], places_KP2[word], corners_KP2[word], scores_KP[word]),
                }
                for row, word in enumerate(rows.tolist())
            ]
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                report(f"patches of {level}: {len(described)}/{len(order_K)} words")
    assert len(described) == len(order_K), "every word must be drawn once"
    return {
        "num_words": len(order_K),
        "used": int((count_K > 0).sum()),
        "num_locations": top.num_locations,
        "map": list(map_size),
        "border": read_with.border,
        "delta": float(read_with.delta),
        "distance": float(top.distance_sum) / top.num_locations,
        "patch_side": side,
        "coherence": alike.median(),
        "coherence_of_others": alike.of_others(),
        "tile": TILE,
        "words_per_sheet": WORDS_PER_SHEET,
        "sheets": sheets,
        "words": described,
    }


def map_places(locations: Ints, *, width: int, border: int) -> Ints:
    """Return row and column in the whole map, [..., 2], of locations numbered row by row in the map without its border."""
    return np.stack(np.divmod(locations, width), axis=-1) + border


def patch_corners(places: Ints, *, map_size: tuple[int, int], side: int, view: int) -> Ints:
    """Return top and left of the squares around the centres of map locations, [..., 2], moved to lie within the view.

    Args:
        places: row and column in the whole map, [..., 2].
        map_size: its height and width.
        side: of a square, in pixels, at most `view`.
        view: side of the view, in pixels.
    """
    centres = (places + 0.5) * (view / np.array(map_size))
    corners: Ints = np.rint(centres - side / 2).astype(np.int64).clip(0, view - side)
    return corners


def draw_sheet(pixels: npt.NDArray[np.uint8], corners_NP2: Ints, *, side: int, path: Path) -> None:
    """Write the squares of N words as a JPEG: a word per row, a patch per column, each `TILE` pixels wide.

    Args:
        pixels: views, one per patch, all of a word together, [N·P, S, S, 3].
        corners_NP2: top and left of the squares.
        side: of the squares, in pixels.
        path: the file to write.
    """
    num_words, per_word, _ = corners_NP2.shape
    sheet = Image.new("RGB", (per_word * TILE, num_words * TILE))
    finest = Image.Resampling.LANCZOS if side > TILE else Image.Resampling.BICUBIC
    for number, (top, left) in enumerate(corners_NP2.reshape(-1, 2).tolist()):
        patch = Image.fromarray(pixels[number, top : top + side, left : left + side])
        row, column = divmod(number, per_word)
        sheet.paste(patch.resize((TILE, TILE), finest), (column * TILE, row * TILE))
    sheet.save(path, quality=JPEG_QUALITY, subsampling=0)  # halved colours would run over into the neighbour


def _patches(*columns: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Return the facts of a word's patches, given their image, place, corner and score, each [P, ...]."""
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(("image", "place", "corner", "score"), row, strict=True)) for row in rows]


def _features(words: VisualWords, level: Level, images: Tensor, places: Tensor) -> Tensor:
    """Return the teacher's feature at one place of each image's map, [B, C]."""
    maps, _ = words.teacher.levels(images, (level,))
    picked: Tensor = maps[level][torch.arange(len(images), device=images.device), :, places[:, 0], places[:, 1]]
    return bow.at_least_float32(picked)


class Likeness:
    """Mean cosine similarities of features: within the words, and for comparison between patches of different words.

    Only sums of unit vectors are kept: the squared length of a sum is the sum over all pairs. A feature of length 0 resembles
    nothing.
    """

    def __init__(self) -> None:
        self._within: list[float] = []
        self._sum_C: Tensor | None = None
        self._sums_squared = 0.0
        self._num_patches = 0
        self._num_pairs_within = 0

    def add(self, features_NPC: Tensor, *, used: Tensor) -> list[float | None]:
        """Take in the patches of some words and return each one's mean over its pairs; None where there is one patch.

        Args:
            features_NPC: of the patches.
            used: which words count for `median` and `of_others`, [N].
        """
        unit_NPC = F.normalize(features_NPC.double(), dim=-1)
        sum_NC = unit_NPC.sum(dim=1)
        per_word = unit_NPC.shape[1]
        squared_N = sum_NC.square().sum(dim=1)
        used = used.to(sum_NC.device)
        self._sum_C = sum_NC[used].sum(dim=0) + (0.0 if self._sum_C is None else self._sum_C)
        self._sums_squared += float(squared_N[used].sum())
        self._num_patches += per_word * int(used.sum())
        self._num_pairs_within += per_word**2 * int(used.sum())
        if per_word == 1:
            return [None] * len(unit_NPC)
        coherence_N = (squared_N - unit_NPC.square().sum(dim=(1, 2))) / (per_word * (per_word - 1))
        self._within += coherence_N[used].tolist()
        return list(coherence_N.tolist())

    def median(self) -> float | None:
        """Return the median over the words in use."""
        return float(np.median(self._within)) if self._within else None

    def of_others(self) -> float | None:
        """Return the mean over all pairs of patches of different words in use; None when there are no two."""
        pairs = self._num_patches**2 - self._num_pairs_within
        if self._sum_C is None or pairs <= 0:
            return None
        return (float(self._sum_C.square().sum()) - self._sums_squared) / pairs
