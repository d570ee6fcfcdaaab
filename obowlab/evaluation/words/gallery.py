"""What the visual words look like: for every word the image patches with the highest assignment score (paper, figures 5 and 6).

The images are read once, whatever their number (`word_search`); the winners are then looked at again, a sheet of patches at a
time (`word_sheets`). Images are seen as in evaluation: the centre view, without augmentation. The teacher is in evaluation mode:
its own batch-norm statistics, as training left them, in float32 whatever training ran in. The border of its maps is dropped
as in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from obowlab.config import Level, Machine, Recipe
from obowlab.data.datasets import open_split, trained_on
from obowlab.evaluation.features import weights_hash
from obowlab.evaluation.words.search import CentreViews, find_patches
from obowlab.evaluation.words.sheets import draw_level
from obowlab.methods import VisualWords

WORDS_FORMAT = 1
"""Version of `words.json`; raise it when a field changes its meaning."""


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
    images = open_split(dataset, split, data_root=machine.data_root, runs_root=machine.runs_root)
    own = dataset == recipe.data.dataset and split == "train"
    indices = trained_on(images, recipe.data if own else None)
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
