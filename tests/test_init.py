"""`obowlab init`: a recipe that suits the images found, that runs, and says why."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from obowlab.config import load_recipe, project_root
from obowlab.config.fitted import SIZES, ImagesFound, fit_recipe
from obowlab.config.methods import Obow
from obowlab.config.recipe import Recipe
from obowlab.data.prepare import prepare
from obowlab.errors import UserError
from tests.command_line import Obowlab, contents


def found(*, per_class: int, num_classes: int = 1, val: int | None = None, side: int = 224, labelled: bool = True) -> ImagesFound:
    return ImagesFound(
        dataset="mine",
        train_per_class=(per_class,) * num_classes,
        val_per_class=() if val is None else (val,) * num_classes,
        is_labelled=labelled,
        short_sides=(side - 8, side, side + 8),
    )


def recipe_of(images: ImagesFound, folder: Path, *, gpu: bool = True, size: int | None = None) -> Recipe:
    (folder / "mine.toml").write_text(fit_recipe(images, has_gpu=gpu, size=size).toml)
    return load_recipe(str(folder / "mine.toml")).recipe


CASES = {
    "60 photos of 5 classes, without val": found(per_class=54, num_classes=5, val=6, side=70),
    "500 without labels": found(per_class=500, labelled=False),
    "100 classes of 64 pixels": found(per_class=200, num_classes=100, val=50, side=64),
    "a handful": found(per_class=3, num_classes=2, val=1, side=300),
    "huge": found(per_class=300, num_classes=10, val=30, side=4000),
    "smaller than a view": found(per_class=6000, num_classes=10, val=1000, side=16),
    "two images": found(per_class=2, labelled=False),
    "ImageNet": found(per_class=1281, num_classes=1000, val=50, side=375),
    "one class": found(per_class=100, side=100),
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_recipe_is_valid_and_keeps_the_rules(tmp_path: Path, case: str, gpu: bool) -> None:
    images = CASES[case]
    recipe = recipe_of(images, tmp_path, gpu=gpu)
    assert isinstance(recipe.method, Obow)
    views, training = recipe.views, recipe.training
    assert views.original_size in SIZES
    assert gpu or views.original_size == 32
    stride = 8 if recipe.backbone.stem == "small" else 32
    assert views.original_size % stride == views.crop_size % stride == 0
    assert views.original_size // stride - 2 * recipe.method.border >= 3, "local_average needs 3x3"
    assert 2 <= training.batch_size <= min(128, images.num_train)
    most = 8192 if views.original_size > 64 else 2048
    assert recipe.method.num_words == most or images.num_train < recipe.method.num_words <= max(64, images.num_train * 3)
    steps = training.epochs * (images.num_train // training.batch_size)
    assert steps >= 3000 or training.epochs == 400
    assert recipe.data.images_per_class is None
    assert recipe.optimizer.warmup_epochs < training.epochs / 2
    evaluation = recipe.evaluation
    assert (evaluation.protocols == ()) == (not images.is_labelled or not images.val_per_class)
    if "fewshot" in evaluation.protocols:
        assert evaluation.fewshot.num_ways <= images.num_classes
        assert max(evaluation.fewshot.shots) + evaluation.fewshot.num_queries <= min(images.val_per_class)
    assert "knn" not in evaluation.protocols or evaluation.knn.num_neighbours <= images.num_train


def test_the_measured_recipes_come_out_near_themselves(tmp_path: Path) -> None:
    """The rules were read off `demo`, `tiny-vanilla` and the paper's, and must give them back."""
    for name, images in {
        "demo": found(per_class=540, num_classes=10, val=100, side=32),
        "tiny-vanilla": found(per_class=200, num_classes=100, val=50, side=32),
        "imagenet20-vanilla": found(per_class=260, num_classes=1000, val=50, side=375),
    }.items():
        ours, theirs = recipe_of(images, tmp_path), load_recipe(name).recipe
        assert isinstance(ours.method, Obow)
        assert isinstance(theirs.method, Obow)
        crops = {"crop_scale": (0.08, 0.6)} if name == "tiny-vanilla" else {}  # the paper's, which the tables keep
        assert ours.views.model_copy(update=crops) == theirs.views
        assert ours.backbone.arch == theirs.backbone.arch
        assert ours.optimizer.learning_rate == theirs.optimizer.learning_rate
        assert ours.method.msd_momentum == theirs.method.msd_momentum
        assert ours.training.batch_size == theirs.training.batch_size
        assert ours.method.num_words >= theirs.method.num_words  # docs/results/scaling.md
        assert ours.method.delta_base == theirs.method.delta_base
        assert ours.method.msd_start == theirs.method.msd_start
        assert 0.5 < theirs.training.epochs / ours.training.epochs < 2 or name == "demo"


@pytest.mark.parametrize("number", [1_000, 10_000])
def test_what_was_measured_as_its_recipe_is_its_recipe(tmp_path: Path, number: int) -> None:
    folder = project_root() / "ablations" / "results" / "tiny"
    measured = load_recipe(str(folder / f"fitted-{number}.toml")).recipe
    written = recipe_of(found(per_class=number // 50, num_classes=50, val=50, side=64), tmp_path, gpu=False)
    for part in ("views", "backbone", "method", "optimizer", "training"):
        assert getattr(written, part) == getattr(measured, part)


@pytest.mark.parametrize(
    ("side", "gpu", "size"),
    [
        (28, True, 32),
        (64, True, 64),
        (57, True, 64),
        (96, True, 64),
        (128, True, 128),
        (200, True, 224),
        (4000, True, 224),
        (500, False, 32),
    ],
)
def test_views_are_no_larger_than_the_images(tmp_path: Path, side: int, gpu: bool, size: int) -> None:
    assert recipe_of(found(per_class=1000, side=side), tmp_path, gpu=gpu).views.original_size == size


def test_a_size_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    assert recipe_of(found(per_class=1000, side=500), tmp_path, gpu=False, size=128).views.original_size == 128
    assert "enlarged" in " ".join(fit_recipe(found(per_class=1000, side=28), has_gpu=False, size=224).warnings)


def test_every_value_has_a_reason_and_lines_are_short() -> None:
    for images in CASES.values():
        for line in fit_recipe(images, has_gpu=True).toml.splitlines():
            assert not line or line.startswith(("#", "[")) or "  # " in line
            assert "=" not in line or len(line) <= 140, line


@pytest.mark.parametrize(
    ("case", "warning"),
    [
        ("a handful", "too few to learn features from"),
        ("500 without labels", "500 training images are few"),
        ("huge", "shrink them to about 448"),
    ],
)
def test_what_will_not_work_well_is_said(case: str, warning: str) -> None:
    fitted = fit_recipe(CASES[case], has_gpu=True)
    assert warning in " ".join(fitted.warnings)
    assert warning in fitted.toml
    assert fit_recipe(CASES["ImageNet"], has_gpu=True).warnings == ()


def test_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 training image"):
        fit_recipe(found(per_class=1), has_gpu=False)


def test_few_shot_is_left_out_where_classes_are_poor(tmp_path: Path) -> None:
    images = ImagesFound("mine", (9, 1), (1, 0), is_labelled=True, short_sides=(40,))
    assert recipe_of(images, tmp_path).evaluation.protocols == ("linear", "knn")
    assert "one class has 0" in (tmp_path / "mine.toml").read_text()


@pytest.mark.parametrize("count", [300, 20_000, 130_000, 1_281_167])
def test_the_warm_up_is_as_many_steps_as_its_reason_says(count: int, tmp_path: Path) -> None:
    images = ImagesFound("mine", (count,), (), is_labelled=False, short_sides=(40,))
    recipe = recipe_of(images, tmp_path)
    line = next(line for line in (tmp_path / "mine.toml").read_text().splitlines() if line.startswith("warmup_epochs"))
    steps = recipe.optimizer.warmup_epochs * (count // recipe.training.batch_size)
    assert f"# {round(steps)} steps: " in line
    assert 60 <= steps < 321


# ------------------------------------------------------------------------------------------------------------- the command


def images_at(folder: Path, *, num_classes: int, count: int, size: tuple[int, int]) -> Path:
    """Write JPEG images into class folders, or into the folder itself for no class."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(buffer, "JPEG", quality=30)
    for each in range(max(1, num_classes)):
        place = folder / f"class_{each}" if num_classes else folder
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (place / f"{number:03d}.jpg").write_bytes(buffer.getvalue())
    return folder


FOLDERS = {
    "flowers": (5, 60, (71, 54)),
    "photos": (0, 500, (224, 160)),
    "thumbnails": (100, 4, (64, 64)),
    "handful": (2, 3, (90, 80)),
    "huge": (2, 20, (1500, 2100)),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_prepare_init_and_run_as_printed(name: str, workplace: Path, obowlab: Obowlab) -> None:
    num_classes, count, size = FOLDERS[name]
    images_at(workplace / name, num_classes=num_classes, count=count, size=size)
    code, out, err = obowlab("init", name)
    assert code == 0, err
    assert out.splitlines()[-3:] == ["Next:", f"  obowlab data prepare {name} --source {name}", f"  obowlab run {name}"]
    assert obowlab("data", "prepare", name, "--source", name)[0] == 0
    code, out, err = obowlab("run", name, "--dry-run")
    assert code == 0, err
    assert f"Would train run {name}-s0-" in out
    assert "left out" not in out
    before = (workplace / f"{name}.toml").read_bytes()
    assert "add --force" in obowlab("init", name)[2]
    assert obowlab("init", name, "--force")[0] == 0
    after = tomllib.loads((workplace / f"{name}.toml").read_text())
    assert after == tomllib.loads(before.decode()), "the prepared data set and its source give the same recipe"


def test_a_list_gives_its_name_and_options_reach_the_next_command(workplace: Path, obowlab: Obowlab) -> None:
    images_at(workplace / "in", num_classes=0, count=8, size=(40, 40))
    (workplace / "My List (2).csv").write_text("".join(f"in/{number:03d}.jpg,{number % 2}\n" for number in range(8)))
    code, out, _ = obowlab("init", "My List (2).csv", "--val-fraction", "0.25", "--data-root", "elsewhere")
    assert code == 0
    assert out.splitlines()[-2:] == [
        "  obowlab data prepare my-list-2 --source 'My List (2).csv' --val-fraction 0.25 --data-root elsewhere",
        "  obowlab run my-list-2 --data-root elsewhere",
    ]
    assert load_recipe("my-list-2").recipe.evaluation.protocols == ("linear", "knn")


@pytest.mark.parametrize(
    ("folder", "dataset", "recipe"), [("demo", "demo", "my-demo"), ("Synthetic", "my-synthetic", "my-synthetic")]
)
def test_names_of_recipes_and_data_sets_that_are_taken(
    folder: str, dataset: str, recipe: str, workplace: Path, obowlab: Obowlab
) -> None:
    images_at(workplace / folder, num_classes=2, count=4, size=(40, 40))
    code, out, _ = obowlab("init", folder)
    assert code == 0
    assert out.splitlines()[-2:] == [f"  obowlab data prepare {dataset} --source {folder}", f"  obowlab run {recipe}"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("gone",), "there is nothing of that name"),
        (("in", "--out", "x.txt"), "ends in .toml"),
        (("in", "--out", "gone/x.toml"), "Cannot write gone/x.toml"),
        (("in", "--name", "No Name"), "cannot name a data set"),
        (("in", "--val-fraction", "2"), "not in the range"),
        (("done", "--no-labels"), "is prepared already"),
    ],
)
def test_mistakes_are_one_sentence(words: tuple[str, ...], complaint: str, workplace: Path, obowlab: Obowlab) -> None:
    images_at(workplace / "in", num_classes=2, count=4, size=(40, 40))
    prepare("done", source=workplace / "in", data_root=workplace / "data", workers=1)
    code, _, err = obowlab("init", *words)
    assert (code, complaint in err) == (2, True), err


def test_a_dry_run_writes_nothing(workplace: Path, obowlab: Obowlab) -> None:
    images_at(workplace / "in", num_classes=2, count=4, size=(40, 40))
    before = contents(workplace)
    code, out, _ = obowlab("init", "in", "--dry-run")
    assert (code, out.startswith("Would write in.toml: tiny-vanilla fitted to 6 training and 2 validation")) == (0, True)
    assert contents(workplace) == before


def test_it_needs_no_torch(workplace: Path) -> None:
    images_at(workplace / "in", num_classes=2, count=4, size=(40, 40))
    code = "import sys; from obowlab.cli import main; main(['init', 'in']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -------------------------------------------------------------------------------------------------------------- recipe names


def test_a_recipe_in_this_folder_is_found_by_its_name(workplace: Path) -> None:
    (workplace / "mine.toml").write_text('extends = "demo"\n[method]\nkappa = 8.0\n')
    mine = load_recipe("mine")
    assert isinstance(mine.recipe.method, Obow)
    assert (mine.name, mine.recipe.method.kappa) == ("mine", 8.0)
    assert load_recipe("./mine.toml").recipe == load_recipe("mine").recipe
    (workplace / "demo.toml").write_text('extends = "tiny-moco"\n')
    assert load_recipe("demo").recipe.method.name == "obow", "a shipped recipe keeps its name"
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        load_recipe("mien")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe("x/mine")
