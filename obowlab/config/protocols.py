"""The protocols of `obowlab eval` that are trainings of their own: each is a recipe of that name."""

from __future__ import annotations

from obowlab.config.loading import flatten, load_recipe, recipe_files
from obowlab.config.recipe import Evaluation, Recipe
from obowlab.errors import UserError
from obowlab.text import override

TRAININGS = ("linear-imagenet", "places205", "semi-1", "semi-10", "voc-detection", "coco-detection")
"""The protocols, and the recipes that they are; with a preset it is the recipe PROTOCOL-PRESET."""


def recipe_of(protocol: str, *, preset: str | None) -> str:
    """Return the name of the recipe that a protocol is.

    Raises:
        UserError: there is no such preset.
    """
    known = [name.removeprefix(f"{protocol}-") for name in recipe_files() if name.startswith(f"{protocol}-")]
    if preset is None:
        return protocol
    if preset not in known:
        raise UserError(f"--protocol {protocol} has no preset '{preset}'. Known: {', '.join(known) or 'none'}.")
    return f"{protocol}-{preset}"


TEST_IMAGES = {
    "linear-imagenet": 50_000,
    "places205": 20_500,
    "semi-1": 50_000,
    "semi-10": 50_000,
    "voc07-svm": 4952,
    "voc-detection": 4952,
    "coco-detection": 5000,
}
"""How many images the paper's values are of."""

_SETTINGS = ("data", "views", "method", "optimizer", "training")
_ENCODER = ("method.weights",)
_SHOWN = 4


def unlike_the_paper(protocol: str, recipe: Recipe, *, num_images: int) -> str:
    """Return why a measurement is not to be held against the paper's, in one sentence; empty where nothing speaks against it.

    Args:
        protocol: one of `TEST_IMAGES`.
        recipe: of the training that it is; the evaluation settings of another protocol.
        num_images: that it was tested on.
    """
    if protocol in TRAININGS:
        presets = (None, *(preset for preset in ("authors", "infomin") if f"{protocol}-{preset}" in recipe_files()))
        found = min((_differing(recipe, load_recipe(recipe_of(protocol, preset=preset)).recipe) for preset in presets), key=len)
    else:
        ours, theirs = recipe.evaluation.voc07_svm.model_dump(), Evaluation().voc07_svm.model_dump()
        found = [f"{key} {ours[key]} instead of {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if num_images != TEST_IMAGES[protocol]:
        found.insert(0, f"{num_images} test images instead of {TEST_IMAGES[protocol]}")
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"Not comparable with the paper's value: {', '.join(found[:_SHOWN])}{more}."


def _differing(recipe: Recipe, paper: Recipe) -> list[str]:
    ours, theirs = flatten(recipe), flatten(paper)
    keys = [key for key in ours if key.startswith(_SETTINGS) and key not in _ENCODER and ours[key] != theirs.get(key)]
    return [f"{key} {override(ours[key])} instead of {override(theirs.get(key))}" for key in keys]
