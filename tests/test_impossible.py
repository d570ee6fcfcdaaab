"""Settings that cannot be trained with: a dry run and the run itself refuse them alike, before anything is drawn or trained."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.command_line import Obowlab

SMALL = ("views.original_size=8", "views.original_resize=8")
CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a map too small for 3x3 averages": ("demo", SMALL, "The conv5 map of the original view is 1x1"),
    "the same of conv4": ("demo", ("method.levels=['conv4']", *SMALL), "The conv4 map of the original view is 2x2"),
    "a stem that halves twice": ("demo", ("backbone.stem=imagenet",), "The conv5 map of the original view is 1x1"),
    "a border that eats the map": ("demo", ("method.border=50",), "method.border = 50 leaves 0x0"),
    "the same with k-means words": (
        "demo",
        ("method.vocabulary=kmeans_replace", "method.border=50"),
        "the vocabulary needs 1x1: lower method.border or raise views.original_size.",
    ),
    "the same of BoWNet": ("demo-bownet", ("method.border=2",), "method.border = 2 leaves 0x0"),
    "more words than local features": (
        "demo-bownet",
        ("method.num_words=100000",),
        "The 5400 training images have 86400 local features in all, too few for 100000 words: lower method.num_words",
    ),
    "the same with few images": (
        "demo-bownet",
        ("data.images_per_class=1", "training.batch_size=12", "teacher.training.batch_size=12", "method.num_words=5000"),
        "too few for 5000 words",
    ),
    "a batch larger than the training set": (
        "demo",
        ("data.images_per_class=1", "training.batch_size=64"),
        "training.batch_size (64) is larger than the training set",
    ),
    "the same in the stage before": (
        "demo-bownet",
        ("teacher.training.batch_size=6000",),
        "training.batch_size (6000) is larger",
    ),
    "a map of 1x1 in bfloat16": (
        "demo",
        ("backbone.stem=imagenet", "views.original_size=96", "views.original_resize=96", "views.crop_size=16", "method.border=0"),
        "wrong gradients in bfloat16 where a stage begins with a map of 1x1, as of views.crop_size 16 with",
    ),
    "a narrow network and a large map": (
        "demo",
        (
            "backbone.width=8",
            "training.precision=float32",
            "views.original_size=64",
            "views.original_resize=64",
            "views.crop_size=56",
        ),
        "begins with a map of 56x56, as of views.crop_size 56 with backbone.width 8: set backbone.width to 16 or a smaller size.",
    ),
    "one view for MoCo": ("demo-moco", ("views.num_crops=1",), "set views.num_crops to 2."),
    "no key for MoCo": (
        "demo-moco",
        ("views.num_crops=0", "views.num_patches=2", "views.patch_size=8", "views.patch_jitter=0"),
        "MoCo needs one crop as the key",
    ),
    "one view for SimSiam": ("demo-simsiam", ("views.num_crops=1",), "SimSiam compares two crops of an image"),
    "patches in SimSiam": (
        "demo-simsiam",
        ("views.num_patches=2", "views.patch_size=8", "views.patch_jitter=0"),
        "set views.num_crops to 2 and views.num_patches to 0.",
    ),
    "cutmix in SimSiam": ("demo-simsiam", ("views.cutmix_probability=0.5",), "SimSiam has no targets that cutmix could mix"),
    "one view for BYOL": ("demo-byol", ("views.num_crops=1", "views.per_crop=[]"), "BYOL compares two crops of an image"),
    "cutmix in BYOL": ("demo-byol", ("views.cutmix_probability=0.5",), "BYOL has no targets that cutmix could mix"),
    "patches in SimCLR": (
        "demo-simclr",
        ("views.num_patches=2", "views.patch_size=8", "views.patch_jitter=0"),
        "SimCLR compares two crops of an image",
    ),
    "one crop for SwAV": ("demo-swav", ("views.num_crops=1",), "SwAV assigns two crops of an image to prototypes"),
    "patches in SwAV": (
        "demo-swav",
        ("views.num_patches=2", "views.patch_size=8", "views.patch_jitter=0"),
        "SwAV has no use for views.num_patches (2): set it to 0",
    ),
    "cutmix in SwAV": ("demo-swav", ("views.cutmix_probability=0.5",), "SwAV has no targets that cutmix could mix"),
    "a queue that the batch does not divide": (
        "demo-swav",
        ("method.queue_size=500",),
        "method.queue_size (500) must be a multiple of training.batch_size (32)",
    ),
    "groups of one image": ("demo-moco", ("method.batchnorm_splits=64",), "into groups of two images or more: change either."),
    "groups that differ": ("demo-moco", ("method.batchnorm_splits=7",), "method.batchnorm_splits (7) must divide"),
    "cutmix without targets": ("demo-moco", ("views.cutmix_probability=0.5",), "set views.cutmix_probability to 0.0."),
    "the same in RotNet": (
        "demo-bownet",
        ("teacher.teacher.views.cutmix_probability=0.5",),
        "RotNet has no targets that cutmix could mix",
    ),
}


def words(case: str) -> tuple[str, ...]:
    recipe, changes, _ = CASES[case]
    return ("run", recipe, *(word for change in changes for word in ("--set", change)))


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_and_the_run_refuse_in_the_same_words(case: str, obowlab: Obowlab, workplace: Path) -> None:
    code, out, err = obowlab(*words(case), "--dry-run")
    refused = [line.removeprefix("Would be refused: ") for line in out.splitlines() if line.startswith("Would be refused: ")]
    assert (code, err) == (2, "")
    assert any(CASES[case][2] in line for line in refused), out
    code, out, err = obowlab(*words(case))
    assert (code, out) == (2, "")
    assert err == f"Error: {refused[0]}\n"
    assert not list(workplace.iterdir())


@pytest.mark.skipif(find_spec("ffcv") is not None, reason="ffcv is installed")
def test_a_loader_that_is_not_installed_is_said_by_a_dry_run(obowlab: Obowlab, workplace: Path) -> None:
    code, out, _ = obowlab("run", "demo", "--loader", "ffcv", "--dry-run")
    assert code == 0
    assert "not on this machine: --loader is ffcv, which is not installed" in out
    assert obowlab("run", "demo", "--loader", "ffcv")[0] == 2


def test_tables_refuse_them_as_well(obowlab: Obowlab, workplace: Path) -> None:
    (workplace / "short.toml").write_text('extends = "demo"\ntitle = "A short one"\n[training]\nepochs = 1\n')
    row = '[[row]]\nkey = "wide"\nlabel = "a wide border"\nset = {"method.border" = 50}\n'
    (workplace / "mine.toml").write_text(
        'title = "Borders"\nbase = "short.toml"\nprimary = "fewshot_5shot"\n[columns]\nfewshot_5shot = "5-shot"\n'
        f'[[row]]\nkey = "base"\nlabel = "base"\n{row}'
    )
    sentence = "method.border = 50 leaves 0x0"
    code, out, _ = obowlab("ablate", "mine.toml", "--scale", "demo", "--dry-run")
    assert code == 2
    assert sentence in out
    code, _, err = obowlab("ablate", "mine.toml", "--scale", "demo")
    assert code == 2
    assert sentence in err
    assert not (workplace / "runs").exists()


def test_the_checks_import_no_torch() -> None:
    code = "import sys, obowlab.config.compatibility, obowlab.launch.preflight; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
