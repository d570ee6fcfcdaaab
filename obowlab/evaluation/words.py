"""What the visual words look like: for every word the image patches with the highest assignment score (paper, figures 5 and 6).

The images are read once, whatever their number; of each word only its best locations so far are kept (`TopPatches`). The
winners are then looked at again, a sheet of patches at a time (`draw_level`). Images are seen as in evaluation: the centre
view, without augmentation. The teacher is in evaluation mode: its own batch-norm statistics, as training left them, in float32
whatever training ran in. The border of its maps is dropped as in training.

Shapes: B images, U locations of a map without its border, K words, P patches per word, C channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from obowlab.config import Level, Machine, Recipe, Views
from obowlab.data.datasets import Split, open_split, subset
from obowlab.data.loaders import centre_loader
from obowlab.data.photometric import normalise
from obowlab.data.views import Ints
from obowlab.evaluation.features import frozen, weights_hash
from obowlab.methods import LevelWords, VisualWords, bow

WORDS_FORMAT = 1
"""Version of `words.json`; raise it when a field changes its meaning."""

PATCH_SHARE: dict[Level, float] = {"conv4": 64 / 224, "conv5": 96 / 224}
"""Side of a patch as a share of the view's, by level.

The paper does not say. 64 of 224 pixels, what the authors' code cuts, are four locations of conv4. A location of conv5 is
twice as wide and sees more around it: three of them are 96 pixels. (All that could reach a unit is wider than the view; what
does is mostly near its centre.)
"""

TILE = 64
"""Side of a patch as it is stored, in pixels: a multiple of 16, so that JPEG's blocks end where patches do."""

WORDS_PER_SHEET = 32
"""Rows of a sheet: 512 x 2048 pixels with eight patches, 4 MB in a browser; 8192 words are 256 files."""

JPEG_QUALITY = 88
BATCH_SIZE = 128
REPORT_EVERY_S = 20.0


@dataclass(frozen=True)
class CentreViews:
    """The centre views of a split's images, ready for a network.

    Attributes:
        split: the images.
        views: sizes; only those of the original view are used.
        machine: loader backend, workers and memory layout.
        device: where to compute.
    """

    split: Split
    views: Views
    machine: Machine
    device: torch.device

    def batches(self, indices: Ints, *, batch_size: int) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        """Yield positions [B], pixels uint8 [B, S, S, 3] and the network's input float32 [B, 3, S, S], in the order given."""
        workers = max(1, torch.get_num_threads()) if self.machine.workers is None else self.machine.workers
        layout = torch.channels_last if self.machine.channels_last else torch.contiguous_format
        loader = centre_loader(
            self.split, indices=indices, views=self.views, batch_size=batch_size, backend=self.machine.loader, workers=workers
        )
        for positions, pixels in loader:
            yield positions, pixels, normalise(pixels, device=self.device).contiguous(memory_format=layout)


class TopPatches:
    """The best P locations of every word among all images seen so far, at most one per image.

    A location is better when the word's soft code there (eq. 4) is higher; as codes saturate at 1 and at 0, then when it is
    nearer to the word; then when its image came earlier. At most one per image is a choice: the paper does not say, and
    neighbouring locations would fill a row with one thing. What is kept does not grow with the number of images.

    Attributes:
        scores_KP: codes in [0, 1], the best first; -1 where there were fewer than P images.
        distances_KP: squared distances to the word.
        images_KP: positions of the images in the split, int64; -1 where there were fewer than P images.
        locations_KP: row-major numbers of the locations in the map without its border, int64.
        nearest_K: how many locations were nearest to each word, int64.
        num_locations: how many locations were seen.
    """

    def __init__(self, *, num_words: int, per_word: int, device: torch.device) -> None:
        self.per_word = per_word
        self.scores_KP = torch.full((num_words, per_word), -1.0, device=device)
        self.distances_KP = torch.full((num_words, per_word), torch.inf, device=device)
        self.images_KP = torch.full((num_words, per_word), -1, dtype=torch.int64, device=device)
        self.locations_KP = torch.full((num_words, per_word), -1, dtype=torch.int64, device=device)
        self.nearest_K = torch.zeros(num_words, dtype=torch.int64, device=device)
        self.num_locations = 0

    def update(self, local_BUC: Tensor, *, words: LevelWords, images: Ints) -> None:
        """Take in the features of a batch of images that were not seen before.

        Args:
            local_BUC: the teacher's features without the border.
            words: of the level.
            images: positions of the images in the split, [B].
        """
        best: list[tuple[Tensor, Tensor, Tensor]] = []
        for _, dist_BUK in bow.Distances(local_BUC, words.vectors, kept_elements=0).chunks():
            nearest_BU = dist_BUK.argmin(dim=-1)
            self.nearest_K += torch.bincount(nearest_BU.flatten(), minlength=len(self.nearest_K))
            self.num_locations += nearest_BU.numel()
            best.append(best_locations(dist_BUK, delta=words.delta))
        scores_BK, distances_BK, locations_BK = (torch.cat(parts) for parts in zip(*best, strict=True))
        images_KB = torch.from_numpy(images).to(scores_BK.device).expand(len(self.nearest_K), -1)
        # What is kept comes first: the stable sorts then leave the earlier of two equals in front.
        scores = torch.cat((self.scores_KP, scores_BK.T), dim=1)
        distances = torch.cat((self.distances_KP, distances_BK.T), dim=1)
        by_distance = distances.argsort(dim=1, stable=True)
        by_score = scores.gather(1, by_distance).argsort(dim=1, descending=True, stable=True)
        kept = by_distance.gather(1, by_score)[:, : self.per_word]
        self.scores_KP, self.distances_KP = scores.gather(1, kept), distances.gather(1, kept)
        self.images_KP = torch.cat((self.images_KP, images_KB), dim=1).gather(1, kept)
        self.locations_KP = torch.cat((self.locations_KP, locations_BK.T), dim=1).gather(1, kept)


def best_locations(dist_BUK: Tensor, *, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for every image and word the best location: its code, squared distance and number, [B, K] each.

    The nearest distance is taken off first, which changes no code and keeps every code finite, also where delta is 0 and a
    code is one-hot.
    """
    shifted_BUK = dist_BUK.amin(dim=-1, keepdim=True) - dist_BUK
    codes_BUK = torch.softmax(shifted_BUK.div_(delta.clamp(min=torch.finfo(dist_BUK.dtype).tiny)), dim=-1)
    scores_BK = codes_BUK.amax(dim=1)
    nearest = torch.where(codes_BUK == scores_BK[:, None], dist_BUK, torch.inf).min(dim=1)
    return scores_BK, nearest.values, nearest.indices


def find_patches(
    words: VisualWords,
    *,
    levels: Sequence[Level],
    views: CentreViews,
    indices: Ints,
    per_word: int,
    report: Callable[[str], None],
) -> tuple[dict[Level, TopPatches], dict[Level, tuple[int, int]]]:
    """Read every image once and return the best patches of every level, and height and width of the levels' maps.

    Args:
        words: teacher and vocabularies, on the device of `views`.
        levels: which to look at.
        views: the images.
        indices: positions of the images in the split, each once.
        per_word: P.
        report: called with a line now and then.
    """
    tops = {
        level: TopPatches(num_words=len(words.levels[level].vectors), per_word=per_word, device=views.device) for level in levels
    }
    sizes: dict[Level, tuple[int, int]] = {}
    done, started = 0, time.monotonic()
    last = started
    with frozen(words.teacher):
        for positions, _, images in views.batches(indices, batch_size=BATCH_SIZE):
            maps, _ = words.teacher.levels(images, levels)
            for level, top in tops.items():
                sizes[level] = (maps[level].shape[2], maps[level].shape[3])
                local_BUC = bow.crop_border(maps[level], border=words.levels[level].border).flatten(2).transpose(1, 2)
                assert torch.isfinite(local_BUC).all(), "the teacher's features must be finite"
                top.update(local_BUC, words=words.levels[level], images=positions)
            done += len(positions)
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                rate = done / (last - started)
                report(f"{done}/{len(indices)} images · {rate:.0f} img/s · {(len(indices) - done) / rate / 60:.0f} min left")
    return tops, sizes


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
    alike = _Likeness()
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
            for row, word in enumerate(rows.tolist()):
                described.append(
                    {
                        "number": word,
                        "use": 100.0 * int(count_K[word]) / top.num_locations,
                        "coherence": coherence[row],
                        "score": float(scores_KP[word].mean()),
                        "age": int(ages_K[word]),
                        "sheet": len(sheets) - 1,
                        "row": row,
                        "patches": [
                            {"image": image, "place": place, "corner": corner, "score": score}
                            for image, place, corner, score in zip(
                                images_KP[word].tolist(),
                                places_KP2[word].tolist(),
                                corners_KP2[word].tolist(),
                                scores_KP[word].tolist(),
                                strict=True,
                            )
                        ],
                    }
                )
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
    sheet.save(path, quality=JPEG_QUALITY)


def _features(words: VisualWords, level: Level, images: Tensor, places: Tensor) -> Tensor:
    """Return the teacher's feature at one place of each image's map, [B, C]."""
    maps, _ = words.teacher.levels(images, (level,))
    picked: Tensor = maps[level][torch.arange(len(images), device=images.device), :, places[:, 0], places[:, 1]]
    return bow.at_least_float32(picked)


class _Likeness:
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
        if per_word == 1:
            return [None] * len(unit_NPC)
        pairs = per_word * (per_word - 1)
        coherence_N = (squared_N - unit_NPC.square().sum(dim=(1, 2))) / pairs
        used = used.to(sum_NC.device)
        self._within += coherence_N[used].tolist()
        self._sum_C = sum_NC[used].sum(dim=0) + (0.0 if self._sum_C is None else self._sum_C)
        self._sums_squared += float(squared_N[used].sum())
        self._num_patches += per_word * int(used.sum())
        self._num_pairs_within += per_word**2 * int(used.sum())
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


def show_words(
    words: VisualWords,
    *,
    recipe: Recipe,
    machine: Machine,
    levels: Sequence[Level],
    dataset: str,
    split: str,
    per_word: int,
    step: int,
    device: torch.device,
    folder: Path,
    about: Mapping[str, Any],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Find every word's best patches, draw them into sheets in `folder`, and write and return the facts (`words.json`).

    Of the recipe's own training images those are looked at that were trained on (`data.images_per_class`), of others all.

    Args:
        words: teacher and vocabularies, on `device`.
        recipe: the run's; its views say what is cut.
        machine: data root, loader backend, workers and memory layout.
        levels: of `words.levels`.
        dataset: a prepared data set.
        split: `train` or `val`.
        per_word: patches per word, at least 1.
        step: updates that the words come after; ages count from here.
        device: where to compute.
        folder: an empty folder.
        about: facts to put in front, such as the run's id; JSON values.
        report: called with one line at a time.

    Raises:
        UserError: the split is not prepared or damaged, or the folder cannot be written to.
    """
    images = open_split(dataset, split, data_root=machine.data_root)
    own = dataset == recipe.data.dataset and split == "train"
    indices = subset(images, images_per_class=recipe.data.images_per_class if own else None)
    views = CentreViews(split=images, views=recipe.views, machine=machine, device=device)
    report(f"Looking for the words of {', '.join(levels)} in {len(indices)} images of {dataset}/{split}.")
    tops, sizes = find_patches(words, levels=levels, views=views, indices=indices, per_word=per_word, report=report)
    facts = {
        "format": WORDS_FORMAT,
        **about,
        "step": step,
        "network": "teacher, evaluation mode, float32",
        "teacher_hash": weights_hash(words.teacher),
        "dataset": dataset,
        "split": split,
        "num_images": len(indices),
        "data_hash": images.content_hash,
        "view": {"resize": recipe.views.original_resize, "size": recipe.views.original_size},
        "patches_per_word": min(per_word, len(indices)),
        "levels": {
            level: draw_level(
                top, level=level, words=words, map_size=sizes[level], step=step, views=views, folder=folder, report=report
            )
            for level, top in tops.items()
        },
    }
    (folder / "words.json").write_text(json.dumps(facts, separators=(",", ":"), allow_nan=False), encoding="utf-8")
    return facts
