"""Write a recipe that suits the images a person has: pure rules from their number, size and classes to settings.

The rules interpolate between the recipes that were measured (docs/recipes.md, section 5): `demo` (5 000 images of 32 pixels),
`tiny-vanilla` (20 000) and the paper's (260 000 of 224); words and crops were tried on 1 000 and 10 000 photos
(docs/results/scaling.md). The report's rules on the health of a vocabulary judge what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from obowlab import text
from obowlab.errors import UserError


@dataclass(frozen=True)
class ImagesFound:
    """What a recipe is fitted to.

    Attributes:
        dataset: name under which the images are, or will be, prepared.
        train_per_class: training images of every class; one number for images without labels.
        val_per_class: validation images of every class; empty without a val split.
        is_labelled: whether the images have labels.
        short_sides: of the images looked at, in pixels.
    """

    dataset: str
    train_per_class: tuple[int, ...]
    val_per_class: tuple[int, ...]
    is_labelled: bool
    short_sides: tuple[int, ...]

    @property
    def num_train(self) -> int:
        """Training images."""
        return sum(self.train_per_class)

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.train_per_class)

    @property
    def short_side(self) -> int:
        """Median of the shorter sides, in pixels."""
        return sorted(self.short_sides)[len(self.short_sides) // 2]

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        val = f" and {sum(self.val_per_class)} validation" if self.val_per_class else ""
        kind = f"of {self.num_classes} class{'es' if self.num_classes > 1 else ''}" if self.is_labelled else "without labels"
        return f"{self.num_train} training{val} images {kind}, {self.short_side} pixels on the shorter side"


@dataclass(frozen=True)
class _Scale:
    """Sizes of views in pixels, all near the paper's 224 : 256 : 160, and the recipe that is measured nearest."""

    base: str
    size: int
    resize: int
    crop: int
    blur: float
    """Largest standard deviation of the blur; it shrinks with the views."""
    border: int
    most_words: int
    largest_batch: int
    steps: int
    """Steps after which an encoder is worth looking at."""
    fewest_epochs: int


_SCALES = {
    scale.size: scale
    for scale in (
        _Scale("tiny-vanilla", 32, 36, 24, 0.3, border=0, most_words=2048, largest_batch=64, steps=4_000, fewest_epochs=10),
        _Scale("tiny-vanilla", 64, 72, 48, 0.6, border=1, most_words=2048, largest_batch=64, steps=4_000, fewest_epochs=10),
        _Scale(
            "imagenet20-vanilla", 128, 144, 96, 1.1, border=0, most_words=8192, largest_batch=128, steps=10_000, fewest_epochs=80
        ),
        _Scale(
            "imagenet20-vanilla", 224, 256, 160, 2.0, border=1, most_words=8192, largest_batch=128, steps=10_000, fewest_epochs=80
        ),
    )
}
SIZES = tuple(_SCALES)
"""Sizes of the original view for which there are rules."""

_ENLARGED = 1.15
"""Images may be enlarged so much to fill a view."""

_LONG = 20_000
"""Steps from which a training has the time that the paper's values take."""

_LONGEST_WARMUP = 320
"""Steps: an epoch of `tiny-vanilla`."""

_FEW, _TOO_FEW = 2_000, 200
_HUGE = 1024
"""Shorter side, in pixels, from which decoding costs more than training."""


@dataclass(frozen=True)
class Fitted:
    """A recipe as text, and what its reader should know before running it, a sentence each."""

    toml: str
    base: str
    warnings: tuple[str, ...]


def fit_recipe(found: ImagesFound, *, has_gpu: bool, size: int | None = None, command: str = "obowlab init") -> Fitted:
    """Return a recipe for the images found, with the reason for every value beside it.

    Args:
        found: number, size and classes of the images.
        has_gpu: whether views of more than 32 pixels can be afforded without being asked for.
        size: side of the original view, one of `SIZES`; by the images and the machine if absent.
        command: what was typed, for the opening comment.

    Raises:
        UserError: there are fewer than two training images.
    """
    if found.num_train < 2:
        raise UserError(f"'{found.dataset}' has {found.num_train} training image: a recipe needs two, and learning thousands.")
    scale = _SCALES[size] if size is not None else _scale(found.short_side, has_gpu=has_gpu)
    warnings = tuple(_warnings(found, scale=scale))
    lines = [
        f"# obowlab run {found.dataset}",
        "#",
        f"# Written by `{command}` for {found.sentence}.",
        *(f"# {warning}" for warning in warnings),
        _line("extends", scale.base, "the shipped recipe nearest to these images; what is not said here comes from it"),
        _line("title", f"OBoW on {found.dataset}, {scale.size} pixels", "shown in lists and reports"),
    ]
    section = ""
    for key, value, why in _settings(found, scale=scale, chosen=size is not None, has_gpu=has_gpu):
        group, _, name = key.rpartition(".")
        if group != section:
            lines += ["", f"[{group}]"]
            section = group
        lines.append(_line(name, value, why))
    return Fitted("\n".join(lines) + "\n", scale.base, warnings)


def _line(name: str, value: Any, why: str) -> str:
    return f"{name} = {text.toml(value)}  # {why}"


def _scale(short_side: int, *, has_gpu: bool) -> _Scale:
    fitting = [size for size in SIZES if size <= _ENLARGED * short_side and (has_gpu or size == SIZES[0])]
    return _SCALES[max(fitting, default=SIZES[0])]


def _warnings(found: ImagesFound, *, scale: _Scale) -> Iterator[str]:
    if found.num_train < _TOO_FEW:
        yield (
            f"{found.num_train} training images are too few to learn features from: this shows that everything works, and hardly "
            "more. Add images; they need no labels."
        )
    elif found.num_train < _FEW:
        yield (
            f"{found.num_train} training images are few: look at the results beside those of the random initialisation, and add "
            "images if you can; they need no labels."
        )
    if found.short_side >= _HUGE:
        yield (
            f"Images of {found.short_side} pixels are decoded whole in every epoch, which will bound the speed: shrink them to "
            f"about {2 * scale.size} pixels before preparing them."
        )
    if found.short_side * _ENLARGED < scale.size:
        yield f"Images of {found.short_side} pixels are enlarged to views of {scale.size}, and are blurred by it."


def _settings(found: ImagesFound, *, scale: _Scale, chosen: bool, has_gpu: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield every setting with the reason for its value."""
    batch = _power_of_two(found.num_train / 160, low=min(32, found.num_train), high=scale.largest_batch)
    per_epoch = found.num_train // batch
    epochs = min(max(scale.fewest_epochs, math.ceil(scale.steps / per_epoch)), 400)
    steps = epochs * per_epoch
    num_words = min(max(64, 2 ** round(math.log2(2 * found.num_train))), scale.most_words)
    is_long = steps >= _LONG

    yield "data.dataset", found.dataset, "`obowlab data list` shows what is prepared"
    yield "data.images_per_class", "all", "a number trains on the first so many of every class"
    if chosen:
        why = "side of the whole-image view, as --size says"
    elif not has_gpu and found.short_side * _ENLARGED >= SIZES[1]:
        why = "side of the whole-image view; for a CPU: with a GPU, `obowlab init --size` takes more of these images"
    else:
        why = f"side of the whole-image view; images have {found.short_side} pixels"
    yield "views.original_size", scale.size, why
    yield "views.original_resize", scale.resize, "the shorter side before the centre is kept; 256 : 224 as in the paper"
    yield "views.crop_size", scale.crop, "what the student sees; 160 : 224 as in the paper, at a multiple of 8 or 32"
    if scale.size == SIZES[0]:
        why = "area of a crop; the paper's 0.08 is 10 of 36 pixels wide, and larger ones learned more"
        yield "views.crop_scale", [0.2, 0.6], why
    else:
        yield "views.crop_scale", [0.08, 0.6], "area of a crop: the paper's"
    yield "views.blur_sigma", [0.1, scale.blur], "the paper's 2.0 is for 224 pixels"
    why = f"visual words: two an image, but 64 to {scale.most_words}: more were better on photos, and cost time"
    yield "method.num_words", num_words, why
    border = "drop one location around the teacher's map, as the authors do" if scale.border else "the map has 4x4: keep all"
    yield "method.border", scale.border, border
    if is_long:
        yield "method.delta_base", 0.1, "the paper's; lower it if the report finds that images look alike"
        yield "method.msd_start", "authors", "0.5 fits after some hundred steps, which are few of these"
        yield "method.msd_momentum", 0.99, "the paper's"
    else:
        yield "method.delta_base", 0.02, "at 0.1 bags look alike for thousands of steps; lower it if the report still finds so"
        yield "method.msd_start", "first_batch", "the authors' 0.5 is far off for some hundred steps"
        yield (
            "method.msd_momentum",
            0.9,
            "distances fall to a third within a hundred steps; at 0.99 targets are too soft for long",
        )
    yield (
        "method.teacher_momentum",
        0.99 if steps >= 5_000 else 0.95,
        "the paper's" if steps >= 5_000 else "in a few thousand steps a teacher at 0.99 would follow too slowly",
    )
    yield "optimizer.learning_rate", 0.05 if is_long else 0.1, "the paper's" if is_long else "few steps want twice the paper's"
    warmup = float(max(1, round(80 / per_epoch))) if per_epoch <= _LONGEST_WARMUP else round(_LONGEST_WARMUP / per_epoch, 4)
    warm = round(warmup * per_epoch)
    yield "optimizer.warmup_epochs", warmup, f"{warm} steps: the first ones throw the weights about"
    most = ", at most 400" if epochs == 400 else ""
    yield "training.epochs", epochs, f"{steps} steps of {per_epoch} an epoch{most}: steps count more than images"
    yield (
        "training.batch_size",
        batch,
        f"about 160 steps an epoch, but 32 to {scale.largest_batch} images a step, and no more than there are",
    )
    yield from _evaluation(found)


def _evaluation(found: ImagesFound) -> Iterator[tuple[str, Any, str]]:
    """Yield what can be measured with these labels and validation images."""
    if not found.is_labelled or found.num_classes < 2:
        kind = "one class" if found.is_labelled else "no labels"
        yield "evaluation.protocols", [], f"{kind}: `obowlab eval RUN --dataset OTHER` measures on a data set with labels"
        return
    if not found.val_per_class:
        way = "`obowlab data prepare --val-fraction 0.1 --force` sets some apart"
        way = way if max(found.train_per_class) > 1 else "no class has two images"
        yield "evaluation.protocols", [], f"no validation images: {way}"
        return
    poorest = min(found.val_per_class)
    shots = [shot for shot in (1, 5) if shot < poorest]
    protocols = ["fewshot", "linear", "knn"] if shots else ["linear", "knn"]
    without = "" if shots else f"; few-shot needs two of every class, and one class has {poorest}"
    yield "evaluation.protocols", protocols, f"what {sum(found.val_per_class)} validation images can carry{without}"
    yield "evaluation.random_baseline", True, "the untrained weights beside it: what training has added"
    if shots:
        ways = min(50, found.num_classes)
        yield "evaluation.fewshot.classes", "all", "a .txt file with a class name a line takes some of them"
        share = "all of them" if ways == found.num_classes else "as in the paper"
        yield "evaluation.fewshot.num_ways", ways, f"classes of an episode: {share}"
        yield "evaluation.fewshot.shots", shots, f"and one query each: the poorest class has {poorest} validation images"
    neighbours = min(20, max(1, found.num_train // found.num_classes))
    yield "evaluation.knn.num_neighbours", neighbours, "at most what a class has on average"


def _power_of_two(value: float, *, low: int, high: int) -> int:
    """Return the largest power of two that is not above `value`, within bounds that need not be powers of two."""
    bounded = min(max(value, low), high)
    return int(2 ** math.floor(math.log2(max(2.0, bounded))))
