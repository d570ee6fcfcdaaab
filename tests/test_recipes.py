"""The shipped recipes: what they resolve to, that they are the paper's, and that they say how they are run.

`make golden` (OBOWLAB_WRITE_GOLDEN=1) writes the golden files again; a difference there is a change of results.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from obowlab.cli.config import cost_line
from obowlab.config import flatten, load_recipe, recipe_files

GOLDEN = Path(__file__).parent / "golden" / "recipes"
NAMES = list(recipe_files())

IMAGENET20 = {  # paper, section 4 and appendix C, column RN18 on 20 % of ImageNet
    "data.dataset": "imagenet",
    "data.images_per_class": 260,
    "views.original_resize": 256,
    "views.original_size": 224,
    "views.crop_size": 160,
    "views.crop_scale": [0.08, 0.6],
    "views.patch_size": 96,
    "views.patch_source_size": 256,
    "views.patch_scale": [0.6, 1.0],
    "views.patch_jitter": 24,
    "views.flip_probability": 0.5,
    "views.jitter_probability": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.4,
    "views.hue": 0.1,
    "views.grayscale_probability": 0.2,
    "views.blur_probability": 0.5,
    "views.blur_sigma": [0.1, 2.0],
    "backbone.arch": "resnet18",
    "backbone.stem": "imagenet",
    "backbone.width": 64,
    "method.name": "obow",
    "method.num_words": 8192,
    "method.border": 1,
    "method.codes": "soft",
    "method.pooling": "max",
    "method.delta_base": 1 / 10,
    "method.msd_momentum": 0.99,
    "method.vocabulary": "queue",
    "method.queue_vector": "local_average",
    "method.head": "dynamic",
    "method.kappa": 5.0,
    "method.learn_kappa": False,
    "method.teacher_momentum": 0.99,
    "method.teacher_momentum_schedule": "cosine",
    "optimizer.learning_rate": 0.05,
    "optimizer.end_learning_rate": 0.0,
    "optimizer.warmup_epochs": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "training.epochs": 80,
    "training.batch_size": 128,
    "training.precision": "float32",
    "training.monitor": False,
    "evaluation.fewshot.classes": "novel_classes_1",
    "evaluation.fewshot.num_ways": 50,
    "evaluation.fewshot.shots": [1, 5],
    "evaluation.fewshot.num_queries": 1,
    "evaluation.fewshot.num_episodes": 200,
    "evaluation.linear.epochs": 50,
    "evaluation.linear.batch_size": 256,
    "evaluation.linear.learning_rate": 10.0,
    "evaluation.linear.schedule": "steps",
    "evaluation.linear.decay_every": 15,
    "evaluation.linear.momentum": 0.9,
    "evaluation.linear.weight_decay": 2e-6,
}
FULL_VIEWS = {"views.num_crops": 2, "views.num_patches": 5, "method.levels": ["conv4", "conv5"]}
PAPER = {
    "imagenet20-vanilla": {**IMAGENET20, "views.num_crops": 1, "views.num_patches": 0, "method.levels": ["conv5"]},
    "imagenet20-full": {**IMAGENET20, **FULL_VIEWS},
    "full": {
        **IMAGENET20,
        **FULL_VIEWS,
        "data.images_per_class": None,
        "backbone.arch": "resnet50",
        "method.kappa": 8.0,
        "method.delta_base": 1 / 15,
        "optimizer.learning_rate": 0.03,
        "optimizer.end_learning_rate": 3e-5,
        "optimizer.warmup_epochs": 10.0,
        "optimizer.weight_decay": 1e-4,
        "training.epochs": 200,
        "training.batch_size": 256,
        "evaluation.linear.epochs": 100,
        "evaluation.linear.batch_size": 1024,
        "evaluation.linear.schedule": "cosine",
        "evaluation.linear.weight_decay": 0.0,
    },
}
AUTHORS = {
    "imagenet20-vanilla": {"training.batch_size": 256},
    "imagenet20-full": {},
    "full": {"evaluation.linear.cosine_per": "epoch"},
}
AUTHORS_EVERYWHERE = {"optimizer.cosine_per": "epoch", "training.monitor": True, "evaluation.fewshot.classes": "novel_classes_2"}


def resolved(name: str) -> dict[str, Any]:
    return flatten(load_recipe(name).recipe)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves_to_its_golden_file(name: str) -> None:
    recipe = load_recipe(name).recipe
    found = {"fingerprint_of_seed_0": recipe.fingerprint(seed=0), "recipe": recipe.model_dump(mode="json")}
    path = GOLDEN / f"{name}.json"
    if os.environ.get("OBOWLAB_WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert path.is_file(), f"{name} has no golden file; write it with `make golden`"
    assert found == json.loads(path.read_text(encoding="utf-8")), f"{name} changed; look at it, then `make golden`"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_is_the_papers_column(name: str) -> None:
    values = resolved(name)
    assert {key: values[key] for key in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_variant_differs_in_just_what_their_code_does(name: str) -> None:
    paper, authors = resolved(name), resolved(f"{name}-authors")
    differing = {key: value for key, value in authors.items() if value != paper[key] and key != "title"}
    assert differing == {**AUTHORS_EVERYWHERE, **AUTHORS[name]}


def test_authors_files_hold_nothing_but_what_differs() -> None:
    for name in AUTHORS:
        own = {key for key, source in load_recipe(f"{name}-authors").sources.items() if source == f"{name}-authors.toml"}
        assert own == {"title", *AUTHORS_EVERYWHERE, *AUTHORS[name]}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("tiny", "demo"))])
def test_small_recipes_keep_the_papers_proportions(name: str) -> None:
    views, paper = load_recipe(name).recipe.views, load_recipe("full").recipe.views
    scale = views.original_size / paper.original_size
    for size in ("original_resize", "crop_size", "patch_source_size", "patch_size"):
        assert getattr(views, size) / getattr(paper, size) == pytest.approx(scale, rel=0.2), size
    smallest = 0.2 if name.startswith("demo") else paper.crop_scale[0]  # 8 % of a synthetic image would hold no whole part
    assert (views.crop_scale, views.patch_scale) == ((smallest, paper.crop_scale[1]), paper.patch_scale)
    assert load_recipe(name).recipe.evaluation.random_baseline, "a small run is judged against its random initialisation"


BUDGET = {"training.epochs", "training.batch_size", "views.patch_size"}
"""What the tiny full recipe gives up to end as soon as the vanilla one; at the paper's scale nothing is given up."""


@pytest.mark.parametrize(("scale", "also"), [("imagenet20", set()), ("tiny", BUDGET), ("demo", BUDGET)])
def test_full_differs_from_vanilla_in_levels_and_views_only(scale: str, also: set[str]) -> None:
    first, second = resolved(f"{scale}-vanilla"), resolved(f"{scale}-full")
    assert {key for key in first if first[key] != second[key]} <= {"title", *FULL_VIEWS} | also


def test_the_demo_has_two_names_and_one_identity() -> None:
    assert load_recipe("demo-vanilla").recipe.fingerprint(seed=0) == load_recipe("demo").recipe.fingerprint(seed=0)


@pytest.mark.parametrize("scale", ["imagenet20", "tiny", "demo"])
def test_bownet_takes_the_papers_three_stages(scale: str) -> None:
    stages = [stage.recipe for stage in load_recipe(f"{scale}-bownet").stages()]
    assert [stage.method.name for stage in stages] == ["rotnet", "bownet", "bownet"]
    epochs = [stage.training.epochs for stage in stages]
    assert epochs == [epochs[0], 2 * epochs[0], 2 * epochs[0]]
    assert scale != "imagenet20" or epochs == [40, 80, 80]
    assert [stage.views.crop_extent for stage in stages] == ["whole"] * 3
    assert [stage.views.cutmix_probability for stage in stages] == [0.0, 1.0, 1.0]
    row = {"views.crop_extent": "part", "views.cutmix_probability": 0.0}
    crops = [stage.recipe for stage in load_recipe(f"{scale}-bownet", changes=row).stages()]
    assert crops[0].fingerprint(seed=0) == stages[0].fingerprint(seed=0), "both rows of Table 5 share the RotNet stage"
    assert [stage.views.crop_extent for stage in crops[1:]] == ["part"] * 2
    assert [stage.views.cutmix_probability for stage in crops] == [0.0] * 3


@pytest.mark.parametrize("scale", ["imagenet20", "tiny", "demo"])
def test_baselines_differ_from_vanilla_in_method_views_and_budget_only(scale: str) -> None:
    vanilla = resolved(f"{scale}-vanilla")
    for method in ("bownet", "moco"):
        ours = resolved(f"{scale}-{method}")
        changed = {key for key in vanilla.keys() & ours.keys() if vanilla[key] != ours[key]}
        allowed = {"title", "training.epochs"} if scale != "imagenet20" else {"title"}
        assert {key for key in changed if not key.startswith(("method.", "views."))} <= allowed, method


@pytest.mark.parametrize("name", NAMES)
def test_file_opens_with_its_command_and_its_cost(name: str) -> None:
    first, second, *_ = recipe_files()[name].read_text(encoding="utf-8").splitlines()
    words = shlex.split(first.removeprefix("# "))
    assert words[:3] == ["obowlab", "run", name]
    assert second.startswith("# Cost: ")
    assert cost_line(recipe_files()[name])
    assert load_recipe(name).recipe.title
