"""Recipes and machines: strict keys and types, `extends`, overrides, identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from obowlab import text
from obowlab.config import (
    FewShot,
    Linear,
    Machine,
    Obow,
    Recipe,
    canonical_hash,
    flatten,
    load_machine,
    load_recipe,
    nearest,
    parse_override,
    read_toml,
    recipe_files,
    recipe_from_values,
)
from obowlab.errors import UserError


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -------------------------------------------------------------------------------------------------------------- extends


def test_extends_overrides_value_by_value_and_remembers_who_set_what(tmp_path: Path) -> None:
    write(tmp_path, "base", 'title = "Base"\n[method]\nkappa = 4.0\nnum_words = 64\n[training]\nepochs = 3\n')
    write(tmp_path, "middle", 'extends = "base"\n[method]\nkappa = 6.0\n')
    top = write(tmp_path, "top", 'extends = "middle"\n[training]\nbatch_size = 16\n')
    loaded = load_recipe(top, overrides=["training.epochs=9"])
    assert loaded.name == "top"
    assert (loaded.recipe.method.kappa, loaded.recipe.method.num_words) == (6.0, 64)
    assert (loaded.recipe.training.epochs, loaded.recipe.training.batch_size) == (9, 16)
    assert loaded.sources == {
        "method.kappa": "middle.toml",
        "method.num_words": "base.toml",
        "training.epochs": "--set training.epochs=9",
        "training.batch_size": "top.toml",
    }
    assert loaded.recipe.title == "", "a title belongs to the file it stands in"


def test_naming_the_method_that_is_the_default_anyway_keeps_what_was_inherited(tmp_path: Path) -> None:
    write(tmp_path, "base", "[method]\nkappa = 4.0\n")
    assert load_recipe(write(tmp_path, "top", 'extends = "base"\n[method]\nname = "obow"\n')).recipe.method.kappa == 4.0


def test_a_file_outside_the_shipped_ones_may_extend_a_shipped_one(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine", 'extends = "imagenet20-vanilla"\n[method]\nkappa = 7.0\n')
    assert load_recipe(mine).recipe.data.images_per_class == 260


def test_extends_that_goes_in_circles_is_told(tmp_path: Path) -> None:
    write(tmp_path, "one", 'extends = "two"\n')
    two = write(tmp_path, "two", 'extends = "one"\n')
    with pytest.raises(UserError, match=r"extends itself through two\.toml -> one\.toml"):
        load_recipe(two)


def test_all_undoes_an_inherited_number_of_images(tmp_path: Path) -> None:
    write(tmp_path, "base", "[data]\nimages_per_class = 5\n")
    assert (
        load_recipe(write(tmp_path, "top", 'extends = "base"\n[data]\nimages_per_class = "all"\n')).recipe.data.images_per_class
        is None
    )


# -------------------------------------------------------------------------------------------------------------- refusal

BAD_FILES = [
    ("[method]\nkapa = 3.0\n", r"Unknown key 'method\.kapa' \(bad\.toml\)\. Did you mean 'method\.kappa'\?"),
    ("[metod]\nkappa = 3.0\n", r"Unknown key 'metod\.kappa' .* Did you mean 'method\.kappa'\?"),
    ("zzz = 1\n", r"Unknown key 'zzz' .* lists every key"),
    ("[training]\nepochs = 0\n", r"'training\.epochs' \(bad\.toml\): .* greater than or equal to 1, not 0\."),
    ("[training]\nepochs = 2.5\n", r"'training\.epochs' \(bad\.toml\)"),
    ('[training]\nepochs = "2"\n', r"'training\.epochs' \(bad\.toml\): .*integer, not '2'"),
    ("[training]\nmonitor = 1\n", r"'training\.monitor' \(bad\.toml\): .*boolean"),
    ("[optimizer]\nlearning_rate = nan\n", r"'optimizer\.learning_rate' .*finite"),
    ("[optimizer]\nlearning_rate = inf\n", r"'optimizer\.learning_rate' .*finite"),
    ('[method]\nlevels = ["conv3"]\n', r"'method\.levels' .*conv4"),
    ("[method]\nlevels = []\n", r"levels must name conv4, conv5 or both"),
    ('[method]\nlevels = ["conv5", "conv5"]\n', r"each once"),
    ('[method]\ncodes = "medium"\n', r"'method\.codes' .*'soft' or 'hard', not 'medium'"),
    ('[data]\ndataset = "../elsewhere"\n', r"'data\.dataset'"),
    ("[views]\nnum_crops = 0\n", r"\(bad\.toml\): num_crops and num_patches are both 0"),
    ("[views]\noriginal_size = 300\n", r"original_resize must be at least original_size"),
    ("[views]\nnum_patches = 5\npatch_size = 250\n", r"must fit into patch_source_size"),
    ("[views]\ncrop_scale = [0.6, 0.08]\n", r"'views\.crop_scale' \(bad\.toml\): crop_scale must be \[low, high\]"),
    ("[views]\ncrop_scale = [0.0, 0.5]\n", r"crop_scale are fractions"),
    ("[views]\nblur_sigma = [0.1]\n", r"'views\.blur_sigma'"),
    ("[[views.per_crop]]\n[[views.per_crop]]\n", r"'views\.per_crop' \(bad\.toml\): per_crop describes 2 crops, but num_"),
    (
        "[[views.per_crop]]\nblur_sigm = 1\n",
        r"Unknown key 'views\.per_crop\.blur_sigm' \(bad\.toml\)\. .*'views\.per_crop\.blur_si",
    ),
    ("[[views.per_crop]]\nhue = 1.1\n", r"'views\.per_crop\.hue' \(bad\.toml\): .* equal to 0\.5, not 1\.1"),
    ("[[views.per_crop]]\nscale = [0.5, 0.1]\n", r"'views\.per_crop' \(bad\.toml\): scale must be \[low, high\]"),
    ("[[views.per_crop]]\nscale = [0.0, 0.1]\n", r"'views\.per_crop' \(bad\.toml\): scale are fractions"),
    ("[views]\nper_crop = 3\n", r"'views\.per_crop' \(bad\.toml\): .*(array|tuple|list)"),
    ("extends = 3\n", r"'extends' .* must be the name of one recipe"),
    ('extends = "ful"\n', r"no recipe 'ful'\. Did you mean 'full'\?"),
    ("[method\n", r"bad\.toml is not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[text.replace("\n", " ").strip() for text, _ in BAD_FILES])
def test_bad_file_is_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, "bad", text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_crops_of_their_own_are_read_shown_and_identified(tmp_path: Path) -> None:
    own = "[[views.per_crop]]\nblur_probability = 1.0\n[[views.per_crop]]\nblur_sigma = [0.1, 0.2]\nsolarise_probability = 0.2\n"
    path = write(tmp_path, "own", f'extends = "demo-moco"\n{own}')
    recipe = load_recipe(path).recipe
    assert [recipe.views.crop(number).blur_probability for number in range(2)] == [1.0, 0.5]
    assert [recipe.views.crop(number).solarise_probability for number in range(2)] == [0.0, 0.2]
    shown = text.override(flatten(recipe)["views.per_crop"])
    assert shown == "[{blur_probability = 1.0}, {blur_sigma = [0.1, 0.2], solarise_probability = 0.2}]"
    again = load_recipe("demo-moco", overrides=[f"views.per_crop={shown}"]).recipe
    assert again.views == recipe.views
    assert again.fingerprint(seed=0) == recipe.fingerprint(seed=0) != load_recipe("demo-moco").recipe.fingerprint(seed=0)
    assert load_recipe(path, overrides=["views.per_crop=[]"]).recipe.fingerprint(seed=0) == load_recipe(
        "demo-moco"
    ).recipe.fingerprint(seed=0)


def test_missing_recipe_file_is_named() -> None:
    with pytest.raises(UserError, match=r"There is no recipe file 'nowhere/mine\.toml'"):
        load_recipe("nowhere/mine.toml")


def test_settings_that_do_not_fit_name_the_option_before_the_file() -> None:
    with pytest.raises(UserError, match=r"'views\.patch_size' \(--set views\.patch_size=250\): patch_size"):
        load_recipe("full", overrides=["views.patch_size=250"])


# ------------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("method.kappa=3", "method.kappa", 3),
        ("method.kappa = 3.5", "method.kappa", 3.5),
        ("optimizer.learning_rate=.05", "optimizer.learning_rate", 0.05),
        ("optimizer.weight_decay=5e-4", "optimizer.weight_decay", 5e-4),
        ("method.codes=hard", "method.codes", "hard"),
        ('method.codes="hard"', "method.codes", "hard"),
        ("training.monitor=true", "training.monitor", True),
        ('method.levels=["conv4", "conv5"]', "method.levels", ["conv4", "conv5"]),
        ("title=a=b", "title", "a=b"),
    ],
)
def test_override_values_are_toml_or_a_bare_word(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize(
    "text", ["method.kappa", "=3", "views.crop_scale=[.1,.5]", "method.levels=[conv4]", "training.epochs=1\nx=2"]
)
def test_override_that_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        load_recipe("full", overrides=[text])


def test_later_override_wins_and_whole_numbers_do_for_floats() -> None:
    recipe = load_recipe("full", overrides=["method.kappa=3", "method.kappa=4"]).recipe
    assert recipe.method.kappa == 4.0
    assert isinstance(recipe.method.kappa, float)
    assert recipe.fingerprint(seed=0) == load_recipe("full", overrides=["method.kappa=4.0"]).recipe.fingerprint(seed=0)


# ------------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("name", recipe_files())
def test_flat_settings_rebuild_the_recipe(name: str) -> None:
    recipe = load_recipe(name).recipe
    values = flatten(recipe)
    assert recipe_from_values(values, sources=dict.fromkeys(values, "test")) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_fingerprint_is_of_everything_that_changes_weights_and_of_nothing_else() -> None:
    recipe = load_recipe("tiny-full").recipe
    base = recipe.fingerprint(seed=0)
    changed = {
        "title": "Another",
        "data.dataset": "other",
        "data.images_per_class": 3,
        "data.image_list": "a" * 64,
        "views.crop_extent": "whole",
        "views.per_crop": [{}, {"blur_probability": 0.1}],
        "backbone.arch": "resnet50",
        "backbone.stem": "imagenet",
        "backbone.padding": "same",
        "method.levels": ["conv4"],
        "method.codes": "hard",
        "method.pooling": "mean",
        "method.vocabulary": "kmeans_replace",
        "method.queue_vector": "local",
        "method.head": "fixed",
        "method.msd_start": "authors",
        "method.teacher_momentum_schedule": "constant",
        "optimizer.name": "larc",
        "optimizer.schedule": "steps",
        "optimizer.cosine_per": "epoch",
        "evaluation.linear.cosine_per": "epoch",
        "optimizer.decay_after": [3],
        "evaluation.classes.name": "semi1",
        "views.interpolation": "bicubic",
        "training.precision": "float32",
        "evaluation.voc07_svm.features": "pool5_bn",
        "evaluation.voc07_svm.view": "centre",
    }
    for key, value in flatten(recipe).items():
        if key in ("method.name", "evaluation.protocols", "evaluation.fewshot.sampler", "evaluation.linear.schedule"):
            continue
        if key not in changed:
            if isinstance(value, bool):
                changed[key] = not value
            elif isinstance(value, int):
                changed[key] = value + 1
            elif isinstance(value, float):
                changed[key] = value / 2 if value else 0.25
            elif isinstance(value, list):
                changed[key] = [value[0], value[1] * 0.9] if isinstance(value[1], float) else [1, 7]
            else:
                changed[key] = "novel_classes_1"
        values = {**flatten(recipe), key: changed[key]}
        other = recipe_from_values(values, sources=dict.fromkeys(values, "test"))
        assert other != recipe, key
        same = key == "title" or key.startswith("evaluation.")
        assert (other.fingerprint(seed=0) == base) == same, key
    assert recipe.fingerprint(seed=1) != base


def test_a_setting_of_a_later_version_leaves_the_identity_of_runs_alone() -> None:
    values = {key: value for key, value in flatten(Recipe()).items() if value is not None}
    spelt_out = recipe_from_values(values, sources=dict.fromkeys(values, "test"))
    assert spelt_out.fingerprint(seed=0) == recipe_from_values({}, sources={}).fingerprint(seed=0)
    assert Recipe().fingerprint(seed=0).startswith("164a0bcd385b3551"), "another default: raise FINGERPRINT_VERSION"


def test_canonical_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_hash({"a": 1, "b": [1, 2]}) == canonical_hash({"b": [1, 2], "a": 1})
    assert canonical_hash({"a": [1, 2]}) != canonical_hash({"a": [2, 1]})
    with pytest.raises(ValueError, match="Out of range"):
        canonical_hash(float("nan"))


def test_recipes_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().method.kappa = 3.0  # type: ignore[misc]


def test_defaults_are_the_papers() -> None:
    assert (Obow().num_words, Obow().kappa, Obow().delta_base, Obow().queue_vector) == (8192, 5.0, 0.1, "local_average")
    assert (FewShot().num_ways, FewShot().shots, FewShot().num_queries, FewShot().num_episodes) == (50, (1, 5), 1, 200)
    assert (Linear().epochs, Linear().learning_rate, Linear().decay_every, Linear().weight_decay) == (50, 10.0, 15, 2e-6)


# -------------------------------------------------------------------------------------------------------------- machine


def test_machine_file_then_environment_then_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine.toml"
    file.write_text('data_root = "/file/data"\nruns_root = "/file/runs"\nprocs = 2\nworkers = 3\n')
    assert load_machine(file=file).data_root == Path("/file/data")
    monkeypatch.setenv("OBOWLAB_DATA_ROOT", "/env/data")
    monkeypatch.setenv("OBOWLAB_RUNS_ROOT", "/env/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    machine = load_machine(file=file, overrides={"runs_root": Path("/option/runs"), "workers": 0, "device": None})
    assert machine == Machine(
        data_root=Path("/env/data"), runs_root=Path("/option/runs"), tracking_uri="http://127.0.0.1:5000", procs=2, workers=0
    )
    monkeypatch.setenv("OBOWLAB_MACHINE", str(file))
    assert load_machine().procs == 2


def test_the_machine_file_is_where_the_desktop_standard_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings" / "obowlab" / "machine.toml"
    file.parent.mkdir(parents=True)
    file.write_text("workers = 5\n")
    assert load_machine().workers is None
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    assert load_machine().workers == 5


def test_machine_without_a_file_has_absolute_default_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    machine = load_machine(overrides={"data_root": Path("~/photos")})
    assert machine.runs_root == tmp_path / "runs"
    assert machine.data_root == tmp_path / "home" / "photos"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proc = 2\n", r"Unknown key 'proc' \(.*machine\.toml\)\. Did you mean 'procs'\?"),
        ("procs = 0\n", r"'procs' \(.*machine\.toml\): .*greater than or equal to 1"),
        ('device = "tpu"\n', r"'device' .*'cuda', not 'tpu'"),
        ("procs = \n", r"is not valid TOML"),
    ],
)
def test_bad_machine_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_machine(file=file)


def test_missing_machine_file_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    assert load_machine().procs == 1
    with pytest.raises(UserError, match=r"Cannot read .*machine\.toml"):
        load_machine(file=tmp_path / "machine.toml")


def test_nothing_of_the_machine_is_in_a_recipe() -> None:
    assert not set(flatten(Machine())) & set(flatten(Recipe()))
    assert json.dumps(flatten(Recipe()))


def test_nearest_proposes_lists_or_stays_silent() -> None:
    assert nearest("fulll", ["full", "demo"]) == " Did you mean 'full'?"
    assert nearest("kapa", ["method.kappa", "training.epochs"]) == " Did you mean 'method.kappa'?"
    assert nearest("xyz", ["full", "demo"]) == " Known: full, demo."
    assert nearest("xyz", []) == ""
    assert nearest("xyz", [f"recipe{i}" for i in range(30)]) == ""


# --------------------------------------------------------------------------------------------------- methods and stages

CHAIN = """
title = "Chain"
[method]
name = "bownet"
num_words = 64
[views]
crop_extent = "whole"
cutmix_probability = 1.0
[training]
epochs = 8
[teacher.training]
epochs = 6
[teacher.teacher.method]
name = "rotnet"
[teacher.teacher.views]
cutmix_probability = 0.0
"""


def test_a_teacher_is_a_sparse_change_of_its_own_student(tmp_path: Path) -> None:
    path = write(tmp_path, "chain", CHAIN)
    loaded = load_recipe(path, overrides=["views.crop_size=100", "teacher.teacher.training.epochs=4"])
    stages = loaded.stages()
    assert [stage.name for stage in stages] == ["chain-stage1", "chain-stage2", "chain"]
    assert [stage.recipe.title for stage in stages] == ["Chain (stage 1 of 3)", "Chain (stage 2 of 3)", "Chain"]
    assert [stage.recipe.method.name for stage in stages] == ["rotnet", "bownet", "bownet"]
    assert [stage.recipe.training.epochs for stage in stages] == [4, 6, 8]
    assert [stage.recipe.views.cutmix_probability for stage in stages] == [0.0, 1.0, 1.0]
    assert {stage.recipe.views.crop_size for stage in stages} == {100}, "given once, it reaches every stage"
    assert {stage.sources["views.crop_size"] for stage in stages} == {"--set views.crop_size=100"}
    assert stages[0].sources["training.epochs"] == "--set teacher.teacher.training.epochs=4"
    assert stages[1].sources["training.epochs"] == "chain.toml"
    assert "optimizer.momentum" not in stages[0].sources
    assert [len(stage.stages()) for stage in stages] == [1, 2, 3]


def test_a_stage_has_the_identity_it_would_have_alone(tmp_path: Path) -> None:
    first, second, last = load_recipe(write(tmp_path, "chain", CHAIN)).stages()
    alone = load_recipe(
        write(tmp_path, "alone", '[method]\nname = "rotnet"\n[views]\ncrop_extent = "whole"\n[training]\nepochs = 6\n')
    )
    assert alone.recipe.fingerprint(seed=3) == first.recipe.fingerprint(seed=3)
    prints = {stage.recipe.fingerprint(seed=3) for stage in (first, second, last)}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("teacher.title=Other", True),
        ("teacher.evaluation.protocols=[]", True),
        ("teacher.teacher.evaluation.linear.epochs=3", True),
        ("teacher.teacher.training.epochs=5", False),
        ("teacher.method.num_words=65", False),
    ],
)
def test_identity_covers_the_stages_before_but_not_their_measurement(override: str, same: bool, tmp_path: Path) -> None:
    path = write(tmp_path, "chain", CHAIN)
    changed = load_recipe(path, overrides=[override]).recipe
    assert changed != load_recipe(path).recipe
    assert (changed.fingerprint(seed=0) == load_recipe(path).recipe.fingerprint(seed=0)) == same


def test_flat_settings_of_a_chain_are_sparse_and_rebuild_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "chain", CHAIN)).recipe
    values = flatten(recipe)
    assert {key: value for key, value in values.items() if key.startswith("teacher.")} == {
        "teacher.training.epochs": 6,
        "teacher.teacher.method.name": "rotnet",
        "teacher.teacher.views.cutmix_probability": 0.0,
    }
    titled = recipe.model_copy(update={"title": "Chain"})
    assert recipe_from_values(flatten(titled), sources=dict.fromkeys(values, "test")) == titled
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("how", ["file", "override", "changes"])
def test_another_method_drops_the_settings_and_stages_of_the_one_before(how: str, tmp_path: Path) -> None:
    base = write(tmp_path, "base", CHAIN)
    new = {"method.name": "obow", "method.kappa": 7.0, "views.cutmix_probability": 0.5}
    if how == "file":
        loaded = load_recipe(write(tmp_path, "top", 'extends = "base"\nmethod = {name = "obow", kappa = 7.0}\n'))
    elif how == "override":
        loaded = load_recipe(base, overrides=["method.kappa=7.0", "method.name=obow"])
    else:
        loaded = load_recipe(base, changes=new)
        assert loaded.sources["method.kappa"] == "changes"
        assert loaded.recipe.views.cutmix_probability == 0.5
    assert loaded.recipe.method == Obow(kappa=7.0)
    assert loaded.recipe.teacher is None
    assert not any(key.startswith("teacher.") or key == "method.num_words" for key in loaded.sources)


def test_another_method_of_a_teacher_drops_its_settings(tmp_path: Path) -> None:
    write(tmp_path, "base", CHAIN.replace('name = "rotnet"', 'name = "moco"\nqueue_size = 32'))
    top = write(tmp_path, "top", 'extends = "base"\n[teacher.teacher.method]\nname = "rotnet"\n')
    assert load_recipe(top).stages()[0].recipe.method.name == "rotnet"


def test_overrides_lie_over_changes(tmp_path: Path) -> None:
    loaded = load_recipe("demo", changes={"training.epochs": 3, "method.kappa": 2.0}, overrides=["training.epochs=4"])
    assert (loaded.recipe.training.epochs, loaded.recipe.method.kappa) == (4, 2.0)
    assert loaded.sources["training.epochs"] == "--set training.epochs=4"
    with pytest.raises(UserError, match=r"Unknown key 'training\.epoch' \(changes\)\. Did you mean 'training\.epochs'"):
        load_recipe("demo", changes={"training.epoch": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[method]\nname = "mocco"\n', r"'method\.name' \(bad\.toml\): there is no method 'mocco'\. Did you mean 'moco'\?"),
        ("[method]\nname = 3\n", r"'method\.name' \(bad\.toml\): there is no method 3\."),
        ('[method]\nname = "moco"\ntemprature = 1.0\n', r"'method\.temprature' .*'method\.temperature'"),
        ('[method]\nname = "moco"\ntemperature = 0.0\n', r"'method\.temperature' \(bad\.toml\): .*greater than 0, not 0\.0"),
        ('[method]\nname = "moco"\nkappa = 1.0\n', r"Unknown key 'method\.kappa'"),
        ('[method]\nname = "bownet"\n', r"'method\.name' \(bad\.toml\): .*bownet, which needs a stage before it"),
        ("[teacher.training]\nepochs = 3\n", r"'method\.name' \(default\): \[teacher\] describes a stage before this one"),
        (CHAIN + "batch_sice = 3\n", r"Unknown key 'teacher\.teacher\.views\.batch_sice' \(bad\.toml\)\."),
        (CHAIN + "crop_size = 0\n", r"'teacher\.teacher\.views\.crop_size' \(bad\.toml\): .*not 0"),
        (CHAIN.replace("= 8", "= 0"), r"'training\.epochs' \(bad\.toml\): .*not 0"),
        (CHAIN + "[teacher.backbone]\nwidth = 3\n", r"teacher\.backbone must be the same"),
        (
            "[views]\nnum_crops = 0\nnum_patches = 1\ncutmix_probability = 0.5\n",
            r"'views\.cutmix_probability' \(bad\.toml\): cutmix_probability",
        ),
        ("[views]\nwhole_scale = [0.5, 2.0]\n", r"whole_scale are fractions"),
    ],
)
def test_bad_methods_and_stages_are_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, "bad", text))
    assert "\n" not in str(caught.value)


def test_a_file_read_twice_is_a_fresh_copy_and_a_changed_one_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[method]\nlevels = ['conv5']\n")
    first = read_toml(path)
    first["method"]["levels"].append("conv4")
    assert read_toml(path) == {"method": {"levels": ["conv5"]}}
    path.write_text("title = 'x'\n")
    assert read_toml(path) == {"title": "x"}


def test_fingerprints_of_several_seeds_are_those_of_each() -> None:
    recipe = load_recipe("tiny-bownet").recipe
    assert recipe.fingerprints(seeds=[3, 0, 3]) == {3: recipe.fingerprint(seed=3), 0: recipe.fingerprint(seed=0)}
    assert recipe.fingerprints(seeds=[]) == {}


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'\xef\xbb\xbfextends = "demo"\n')
    assert load_recipe(str(tmp_path / "mine.toml")).recipe.method == load_recipe("demo").recipe.method
