"""Settings that a recipe's other choices leave without effect; no torch."""

from __future__ import annotations

from collections.abc import Iterator

from obowlab import text
from obowlab.config.base import Section
from obowlab.config.methods import Obow
from obowlab.config.recipe import Linear, Optimizer, Recipe, Views

_Unused = Iterator[tuple[tuple[str, ...], str]]
"""Keys of a section, and the choice that leaves them without effect."""


def unused_settings(recipe: Recipe) -> dict[str, str]:
    """Return the settings of a recipe that change nothing, by dotted key, each with the choice that is the reason.

    They may differ from their defaults: a recipe has them for those that extend it.
    """
    sections: list[tuple[str, Section, _Unused]] = [
        ("views", recipe.views, _of_views(recipe.views)),
        ("optimizer", recipe.optimizer, _of_optimizer(recipe.optimizer)),
    ]
    if isinstance(recipe.method, Obow):
        sections.append(("method", recipe.method, _of_obow(recipe.method)))
    linear = recipe.evaluation.linear
    sections.append(("evaluation.linear", linear, _of_linear(linear)))
    return {
        f"{place}.{key}": f"{place}.{choice} is {text.toml(getattr(section, choice))}"
        for place, section, found in sections
        for keys, choice in found
        for key in keys
    }


def _of_views(views: Views) -> _Unused:
    unused = {
        "part": ("whole_scale",),
        "whole": ("crop_size", "crop_scale"),
        "resized": ("crop_size", "crop_scale", "whole_scale"),
    }
    if not views.num_crops:
        yield ("crop_extent", "crop_size", "crop_scale", "whole_scale"), "num_crops"
    else:
        yield unused[views.crop_extent], "crop_extent"
    if not views.num_small_crops:
        yield ("small_crop_size", "small_crop_scale"), "num_small_crops"
    if not views.num_patches:
        yield ("patch_size", "patch_source_size", "patch_scale", "patch_jitter"), "num_patches"
    if not views.cutmix_probability:
        yield ("cutmix_alpha",), "cutmix_probability"


def _of_optimizer(optimizer: Optimizer) -> _Unused:
    if optimizer.name == "sgd":
        yield ("trust",), "name"
    if not optimizer.warmup_epochs:
        yield ("warmup_start",), "warmup_epochs"
    if optimizer.schedule == "cosine":
        yield ("decay_every", "decay_after", "decay_factor"), "schedule"
    else:
        yield ("end_learning_rate", "cosine_per"), "schedule"
        yield ("decay_every",) if optimizer.decay_after else ("decay_factor",), "decay_after"


def _of_obow(method: Obow) -> _Unused:
    if method.vocabulary == "queue":
        yield ("kmeans_momentum", "kmeans_patience"), "vocabulary"
    else:
        yield ("queue_vector",), "vocabulary"
    if method.vocabulary != "kmeans_sinkhorn":
        yield ("sinkhorn_epsilon", "sinkhorn_iterations"), "vocabulary"
    softness = ("delta_base", "msd_start", "msd_momentum")
    if method.vocabulary == "kmeans_sinkhorn":  # in which every word is used in every step
        yield (*softness, "kmeans_patience"), "vocabulary"
    elif method.codes == "hard":
        yield softness, "codes"
    if method.head == "fixed":
        yield ("kappa", "learn_kappa", "head_batchnorm"), "head"


def _of_linear(linear: Linear) -> _Unused:
    if linear.schedule == "cosine":
        yield ("decay_every",), "schedule"
    else:
        yield ("cosine_per",), "schedule"
