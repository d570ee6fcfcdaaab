"""An evaluation that the images cannot carry: told before the training, left out of it, and measured once it can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obowlab.config import FewShot, Knn, Machine
from obowlab.data.class_lists import class_list
from obowlab.data.datasets import prepare
from obowlab.data.protocol_needs import few_shot_need, knn_need, unmet_needs
from obowlab.errors import UserError
from obowlab.launch import local
from obowlab.launch.local import launch, plan
from obowlab.launch.preflight import check_data, to_measure
from obowlab.launch.stages import find_obstacles, open_stages
from obowlab.runs.folder import RunFolder
from obowlab.tracking.outbox import STATUSES
from obowlab.training import final_evaluation as final
from obowlab.training.__main__ import main
from tests.command_line import Obowlab
from tests.fork_server import Fork
from tests.runs import complete, quiet, small_recipe

MANY_WAYS = "evaluation.fewshot.num_ways=50"
WHY = "evaluation.fewshot.num_ways = 50 exceeds the 5 classes of 'all'; --set evaluation.fewshot.num_ways=5 measures it"
QUICK = ("training.epochs=2", "evaluation.random_baseline=false", "evaluation.knn.num_neighbours=5")


def machine_of(data_root: Path, folder: Path) -> Machine:
    return Machine(data_root=data_root, runs_root=folder / "runs", device="cpu", loader="torch", workers=0)


def names_of(folder: RunFolder) -> list[str]:
    return sorted(result["protocol"] for result in folder.results())


# ------------------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    ("per_class", "settings", "reason"),
    [
        ([6, 6, 6], {"num_ways": 3}, None),
        ([6, 6, 6], {"num_ways": 4}, "exceeds the 3 classes of 'all'; --set evaluation.fewshot.num_ways=3 measures it"),
        ([6, 6, 5], {"num_ways": 3}, "need 6 validation images per class, but 'c2' has 5; --set 'evaluation.fewshot.shots=[1]'"),
        ([6, 6, 4], {"num_ways": 3, "shots": (9,)}, "but 'c2' has 4; --set 'evaluation.fewshot.shots=[3]' measures it"),
        ([6, 6, 2], {"num_ways": 3, "num_queries": 3}, "shots=[1]' --set evaluation.fewshot.num_queries=1 measures it"),
        ([6, 6, 5], {"num_ways": 9}, "num_ways=3 --set 'evaluation.fewshot.shots=[1]' measures it"),
        ([6, 6, 0], {"num_ways": 3}, "but 'c2' has 0; name classes that have them in a file for evaluation.fewshot.classes"),
        ([6], {"num_ways": 2}, "has 1 class, and episodes need two"),
    ],
)
def test_what_episodes_need_and_a_setting_that_would_do(
    per_class: list[int], settings: dict[str, Any], reason: str | None
) -> None:
    names = [f"c{number}" for number in range(len(per_class))]
    labels = np.repeat(np.arange(len(per_class)), per_class)
    classes = class_list("all", class_names=names, folder=Path("nowhere"))
    found = few_shot_need(labels, classes=classes, class_names=names, config=FewShot(**settings))
    assert found is None if reason is None else reason in (found or "")


def test_what_neighbours_need() -> None:
    assert knn_need(20, config=Knn()) is None
    assert "num_neighbours=19 measures it" in (knn_need(19, config=Knn()) or "")


def test_a_bank_has_the_images_that_are_trained_on(tmp_path: Path, data_root: Path) -> None:
    def unmet(*overrides: str) -> dict[str, str]:
        recipe = small_recipe(tmp_path, dataset="small", overrides=overrides).recipe
        return unmet_needs(recipe, data_root=data_root, runs_root=tmp_path)

    assert unmet() == {}
    assert list(unmet("data.images_per_class=3")) == ["knn"], "15 images, and 20 neighbours"
    assert unmet("evaluation.protocols=[]", MANY_WAYS) == {}
    assert unmet("evaluation.protocols=[]", "evaluation.every_epochs=1", MANY_WAYS) == {"fewshot": WHY}


def test_without_validation_images_all_is_left_out_and_training_goes_on(tmp_path: Path, image_folder: Path) -> None:
    prepare("flat", source=image_folder / "train", data_root=tmp_path / "data", val_fraction=0.0, workers=1)
    machine = machine_of(tmp_path / "data", tmp_path)
    loaded = small_recipe(tmp_path, dataset="flat", overrides=QUICK)
    said: list[str] = []
    check_data(loaded, machine=machine, dry_run=True, say=said.append)
    assert said[0].startswith("fewshot, linear, knn are left out: 'flat' has no val images")
    folder = complete(loaded, machine=machine)
    assert folder.results() == []


@pytest.mark.parametrize(
    ("layout", "labelled", "reason"),
    [
        ("class_0", True, "'mine' has images without labels; `obowlab eval RUN --dataset OTHER` measures"),
        (".", False, "'mine' has images without labels"),
        ("..", True, "'mine' has one class only"),
    ],
)
def test_without_labels_all_is_left_out_and_training_goes_on(
    tmp_path: Path, image_folder: Path, layout: str, labelled: bool, reason: str
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copytree(image_folder / "train/class_0", tmp_path / "one/class_0")
    source = tmp_path / "one" if layout == ".." else image_folder / "train" / layout
    prepare("mine", source=source, data_root=tmp_path / "data", labelled=labelled, val_fraction=0.3, workers=1)
    machine = machine_of(tmp_path / "data", tmp_path)
    loaded = small_recipe(tmp_path, dataset="mine", overrides=(*QUICK, "training.batch_size=4", "training.monitor=true"))
    said: list[str] = []
    check_data(loaded, machine=machine, dry_run=True, say=said.append)
    assert said[0].startswith(f"fewshot, linear, knn are left out: {reason}")
    if layout == "class_0":
        assert complete(loaded, machine=machine).results() == []


# ------------------------------------------------------------------------------------------------------ before the training


def test_it_is_told_before_the_training_and_in_a_dry_run(tmp_path: Path, data_root: Path) -> None:
    loaded, machine = small_recipe(tmp_path, dataset="small", overrides=(MANY_WAYS,)), machine_of(data_root, tmp_path)
    said: list[str] = []
    obstacles = find_obstacles([loaded, loaded], machine=machine, say=said.append)
    assert (obstacles.refused, said) == ((), [f"fewshot is left out: {WHY}."])
    obstacles = find_obstacles([loaded], machine=machine, say=said.append, required="fewshot")
    assert obstacles.refused == (f"{WHY}.",), "a study without its objective would train for nothing"


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    """A finished run whose few-shot protocol was left out, in the middle and at the end."""
    folder = tmp_path_factory.mktemp("needs")
    overrides = (*QUICK, MANY_WAYS, "evaluation.every_epochs=1")
    return complete(small_recipe(folder, dataset="small", overrides=overrides), machine=machine_of(data_root, folder))


def code_of(process: Fork) -> int | None:
    process.communicate(timeout=120)
    return process.returncode


def copy_of(run: RunFolder, place: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run.path, place / "runs" / run.run_id)))


def test_a_run_is_trained_and_the_rest_measured(trained: RunFolder) -> None:
    assert names_of(trained) == ["knn", "linear"]
    assert trained.metrics("online") == []
    log = (trained.path / "log.txt").read_text()
    assert f"fewshot is left out: {WHY}." in log


def test_a_finished_run_measures_what_is_missing_for_the_settings_of_now(
    tmp_path: Path, data_root: Path, trained: RunFolder, no_mirror: None
) -> None:
    folder, machine = copy_of(trained, tmp_path), machine_of(data_root, tmp_path)
    checkpoint = (folder.path / "checkpoint.pt").stat().st_mtime_ns
    before = {path.name: path.read_bytes() for path in folder.path.glob("results/*.json")}

    def run(*overrides: str) -> list[str]:
        loaded = small_recipe(tmp_path, dataset="small", overrides=(*QUICK, *overrides))
        assert loaded.recipe.fingerprint(seed=3) == folder.info.fingerprint
        (stage,) = open_stages(loaded, seed=3, machine=machine, last=None, resume=None)
        action = plan(loaded, seed=3, machine=machine, fresh=False).action
        assert (action == "measure") == stage.is_due
        if stage.is_due:
            assert launch(loaded, seed=3, machine=machine, fresh=False, progress=False, quiet=True) == 0
        now = RunFolder.open(folder.path)
        assert now.state.status == "finished"
        assert {name: (now.path / "results" / name).read_bytes() for name in before} == before, "results stay"
        assert now.info.fingerprint == folder.info.fingerprint
        return names_of(now)

    assert run(MANY_WAYS) == ["knn", "linear"]
    assert run("evaluation.fewshot.num_ways=3") == ["fewshot", "knn", "linear"]
    assert run("evaluation.fewshot.num_ways=4") == ["fewshot", "fewshot", "knn", "linear"]
    assert run("evaluation.fewshot.num_ways=3") == ["fewshot", "fewshot", "knn", "linear"], "nothing is measured twice"
    hashes = {each["protocol_hash"] for each in RunFolder.open(folder.path).results() if each["protocol"] == "fewshot"}
    assert len(hashes) == 2
    assert (folder.path / "checkpoint.pt").stat().st_mtime_ns == checkpoint, "nothing was trained"
    assert len(RunFolder.open(folder.path).attempts()) == len(trained.attempts())


def test_the_kept_encoder_gives_the_results_of_the_trained_one(tmp_path: Path, data_root: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    folder.write_machine(machine_of(data_root, tmp_path))
    before = {result["protocol"]: result["measurements"] for result in folder.results()}
    for path in folder.path.glob("results/*.json"):
        path.unlink()
    assert code_of(Fork(main, [str(folder.path)], environment=quiet())) == 0
    assert {result["protocol"]: result["measurements"] for result in folder.results()} == before


def test_what_another_machine_could_measure_is_no_reason_to_refuse(tmp_path: Path, trained: RunFolder, obowlab: Obowlab) -> None:
    folder = copy_of(trained, tmp_path)
    loaded = small_recipe(tmp_path, dataset="small", overrides=QUICK)
    machine = machine_of(tmp_path / "nothing", tmp_path)
    assert to_measure(loaded.recipe, folder=folder, machine=machine) == ()
    words = [word for each in QUICK for word in ("--set", each)]
    roots = ["--data-root", str(machine.data_root), "--runs-root", str(machine.runs_root)]
    code, out, _ = obowlab("run", str(tmp_path / "small.toml"), "--seed", "3", *words, *roots)
    assert code == 0
    assert "Not measured as the recipe says now (evaluation.fewshot.num_ways changed): fewshot." in out


def breaks(path: str) -> int:
    """Be a training whose linear probe cannot be made."""

    def evaluate(*arguments: Any, protocols: tuple[str, ...], **options: Any) -> Any:
        if protocols == ("linear",):
            raise UserError("The linear probe diverged.")
        return real(*arguments, protocols=protocols, **options)

    real: Callable[..., Any] = final.evaluate
    final.evaluate = evaluate
    return main([path])


def test_a_trained_run_never_fails_for_its_evaluation(tmp_path: Path, data_root: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    folder.write_machine(machine_of(data_root, tmp_path))
    for path in folder.path.glob("results/*.json"):
        path.unlink()
    assert code_of(Fork(breaks, str(folder.path), environment=quiet())) == 2
    assert folder.state.status == "unevaluated"
    assert folder.state.message.startswith("student, linear: The linear probe diverged. The run is trained:")
    assert names_of(folder) == ["knn"], "the others are measured"
    assert STATUSES[folder.state.status] == "FINISHED"
    assert code_of(Fork(main, [str(folder.path)], environment=quiet())) == 0
    assert (folder.state.status, folder.state.message, names_of(folder)) == ("finished", "", ["knn", "linear"])


@pytest.mark.parametrize(("has_encoder", "status"), [(True, "unevaluated"), (False, "failed")])
def test_a_process_that_dies_after_the_training_leaves_it_trained(
    has_encoder: bool, status: str, tmp_path: Path, trained: RunFolder
) -> None:
    folder = copy_of(trained, tmp_path)
    folder.set_state(status="running")
    if not has_encoder:
        (folder.path / "encoder.safetensors").unlink()
    assert local._settle(folder, returncode=1, asked=[], place="here") == 1
    assert folder.state.status == status
    assert local._settle(folder, returncode=0, asked=[], place="here") == 2, "a group ends with 0"
