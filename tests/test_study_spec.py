"""Study files: what they mean, and what is refused before anything is trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from obowlab.config.scales import SCALES, recipe_for
from obowlab.errors import UserError
from obowlab.runs.metrics import lookup
from obowlab.studies.spec import choice_label, load_study, plan_study, study_files
from tests.studies import STUDY, tuning_of

GOOD = STUDY.replace("{pruner}", "median").replace("{seeds}", "[0]")


def test_scales_give_recipes_by_their_names(tmp_path: Path) -> None:
    found = [recipe_for("vanilla", scale, folder=tmp_path) for scale in SCALES]
    assert found == ["imagenet20-vanilla", "tiny-vanilla", "demo-vanilla"]
    with pytest.raises(UserError, match=r"no scale 'tyny'\. Did you mean 'tiny'\?"):
        recipe_for("vanilla", "tyny", folder=tmp_path)


def test_a_recipe_of_ones_own_lies_beside_the_file_and_is_the_same_at_every_scale(tmp_path: Path) -> None:
    for name in ("mine", "vanilla"):
        (tmp_path / f"{name}.toml").write_text('extends = "demo"\ntitle = "Mine"\n[training]\nepochs = 6\n')
    own, vanilla = (str(tmp_path / f"{name}.toml") for name in ("mine", "vanilla"))
    assert [recipe_for("mine", scale, folder=tmp_path) for scale in SCALES] == [own] * len(SCALES)
    assert recipe_for("mine.toml", "tiny", folder=tmp_path) == own
    assert recipe_for("vanilla", "tiny", folder=tmp_path) == "tiny-vanilla", "a shipped word keeps its meaning"
    assert recipe_for("vanilla.toml", "tiny", folder=tmp_path) == vanilla
    assert recipe_for("absent", "tiny", folder=tmp_path) == "tiny-absent"


def test_a_study_of_ones_own_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "demo"\ntitle = "Mine"\n[method]\nnum_words = 77\n')
    tuning = tuning_of(tmp_path, text=GOOD.replace('base = "vanilla"', 'base = "mine"'))
    assert tuning.base.name == "mine"
    assert tuning.recipe(tuning.paper_point()).recipe.method.num_words == 77


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", study_files())
def test_shipped_studies_fit_their_recipes(name: str, scale: str) -> None:
    tuning = plan_study(name, scale=scale)
    assert tuning.name == f"{name}-{scale}"
    assert tuning.maximize == (lookup(tuning.spec.objective).direction == "max")
    first, second, *_ = study_files()[name].read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"# obowlab tune {name}")
    assert second.startswith("# Cost: ")
    assert tuning.spec.title


def test_kappa_delta_starts_at_the_papers_values() -> None:
    tuning = plan_study("kappa-delta", scale="paper")
    paper = tuning.paper_point()
    assert paper == {"method.kappa": 5.0, "method.delta_base": 0.1}
    recipe = tuning.recipe(paper).recipe
    assert recipe.fingerprint(seed=0) == tuning.base.recipe.fingerprint(seed=0)
    assert tuning.given_points() == [{"method.kappa": 8.0, "method.delta_base": 1 / 15}], "of the paper's section 4.3"
    assert recipe.evaluation.every_epochs == 0, "nothing is pruned"
    assert {parameter.kind for parameter in tuning.spec.parameters.values()} == {"float"}
    assert all(parameter.log for parameter in tuning.spec.parameters.values())  # type: ignore[union-attr]


def test_a_point_becomes_its_recipe_exactly(tmp_path: Path) -> None:
    lists = '[parameters."method.levels"]\nkind = "categorical"\nchoices = [["conv5"], ["conv4", "conv5"]]\n'
    whole = '[parameters."method.num_words"]\nkind = "int"\nlow = 64\nhigh = 512\nlog = true\n'
    start, end = GOOD.index("[paper]"), GOOD.index("[sampler]")
    tuning = tuning_of(tmp_path, text=GOOD[:start] + lists + whole + GOOD[end:])
    kappa = 1.0000000000000002 * 3
    recipe = tuning.recipe({"method.kappa": kappa, "method.levels": '["conv4", "conv5"]', "method.num_words": 77}).recipe
    assert recipe.method.kappa == kappa
    assert recipe.method.levels == ("conv4", "conv5")
    assert recipe.method.num_words == 77
    assert recipe.training.epochs == 6
    assert choice_label(["conv5"]) == '["conv5"]'


def test_only_what_makes_trials_comparable_is_the_definition(tmp_path: Path) -> None:
    base = tuning_of(tmp_path).definition()
    assert tuning_of(tmp_path, pruner="median").definition() == base
    assert tuning_of(tmp_path, text=STUDY.replace("trials = 4", "trials = 99")).definition() == base
    assert tuning_of(tmp_path, seeds=(0, 1)).definition() != base
    for change in ("optimizer.learning_rate=0.2", "evaluation.fewshot.num_episodes=5"):
        assert tuning_of(tmp_path, overrides=(change,)).definition() != base
    assert tuning_of(tmp_path, overrides=("evaluation.linear.epochs=5",)).definition() == base


BAD = {
    ("trials = 4", "trails = 4"): "Unknown key 'trails' in search.toml. Did you mean 'trials'?",
    ("trials = 4", "trials = 0"): "'trials' in search.toml",
    ('objective = "fewshot_5shot"\n', ""): "search.toml lacks 'objective'",
    ('objective = "fewshot_5shot"', 'objective = "loss"'): "must be a metric of the finished encoder",
    ('objective = "fewshot_5shot"', 'objective = "fewshoot"'): "must be fewshot_NUMBERshot, linear_top1 or knn_top1",
    ('objective = "fewshot_5shot"', 'objective = "fewshot_3shot"'): "measures fewshot_1shot, fewshot_5shot",
    ('objective = "fewshot_5shot"', 'objective = "knn_top1"'): "needs evaluation.protocols with 'knn'",
    ('base = "vanilla"', 'base = "vanila"'): "no recipe 'demo-vanila'. Did you mean 'demo-vanilla'?",
    ("seeds = [0]", "seeds = [0, 0]"): "seeds must differ",
    ('"training.epochs" = 6', '"training.epoch" = 6'): "Unknown key 'training.epoch'",
    ('"training.epochs" = 6', '"method.kappa" = 6.0'): "is a parameter of search.toml",
    ('[parameters."method.kappa"]', '[parameters."method.kapa"]'): "Unknown key 'method.kapa' in [parameters]",
    ('[parameters."method.kappa"]', "[parameters.method.kappa]"): "the key of a recipe needs quotes",
    ('[parameters."method.kappa"]', '[parameters."evaluation.knn.temperature"]'): "does not change the weights",
    ('kind = "float"', 'kind = "flaot"'): "'kind' must be one of float, int, categorical, not 'flaot'",
    ("low = 1.0", "lo = 1.0"): "Unknown key 'lo' in [parameters.\"method.kappa\"] of search.toml. Did you mean 'low'?",
    ("low = 1.0", "low = 70.0"): "must be below high",
    ("low = 1.0", "low = 0.0"): "has no logarithm",
    ("low = 1.0", "low = -1.0"): "has no logarithm",
    ("high = 64.0\nlog = true", "high = 64.0\nlog = 1"): "'log' in [parameters",
    ('"method.kappa" = 5.0', '"method.kappa" = 500.0'): "must lie between 1.0 and 64.0",
    ('"method.kappa" = 5.0', '"method.delta_base" = 0.1'): "[paper] of search.toml must give a value to every parameter",
    (
        "[sampler]",
        '[[points]]\n"method.kappa" = 99.0\n[sampler]',
    ): "'method.kappa' in [[points]], number 1, of search.toml must lie",
    ("[sampler]", "[[points]]\nkappa = 9.0\n[sampler]"): "[[points]], number 1, of search.toml must give a value to every",
    ("[sampler]", '[points]\n"method.kappa" = 9.0\n[sampler]'): "'points' in search.toml must be tables, [[points]]",
    ("startup_trials = 3", "start_trials = 3"): "Unknown key 'start_trials' in [sampler] of search.toml",
    ('kind = "median"', 'kind = "mean"'): "'kind' in [pruner] of search.toml",
    ("points = 5", 'metric = "knn_top1"'): "needs a few-shot 'metric'",
    ("[pruner]", "[[pruner]]"): "must be a table, [pruner]",
    ("[pruner]", "[pruner"): "is not valid TOML",
}


@pytest.mark.parametrize("change", BAD, ids=lambda change: change[1].strip() or "absent")
def test_mistakes_are_one_sentence_that_names_the_place(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in GOOD
    with pytest.raises(UserError) as caught:
        tuning_of(tmp_path, text=GOOD.replace(*change))
    assert BAD[change] in str(caught.value)


def test_a_range_that_leaves_the_recipes_is_refused(tmp_path: Path) -> None:
    other = GOOD.replace("method.kappa", "method.msd_momentum").replace("high = 64.0", "high = 1.5").replace("= 5.0", "= 1.2")
    with pytest.raises(UserError, match=r"goes where no recipe can be: 'method.msd_momentum'.*less than or equal to 1"):
        tuning_of(tmp_path, text=other)
    whole = GOOD.replace("method.kappa", "training.batch_size").replace("low = 1.0", "low = 2.0")
    with pytest.raises(UserError, match=r"'training.batch_size' in .* is no float in the recipe"):
        tuning_of(tmp_path, text=whole)


def test_studies_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert load_study("kappa-delta")[0] == study_files()["kappa-delta"]
    with pytest.raises(UserError, match=r"no study 'kappa-dleta'\. Did you mean 'kappa-delta'\?"):
        load_study("kappa-dleta")
    with pytest.raises(UserError, match=r"no study file 'nowhere\.toml'"):
        load_study("nowhere.toml")


def test_reading_a_study_and_its_report_needs_no_optuna() -> None:
    program = "import sys, obowlab.studies.spec, obowlab.studies.schema; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
