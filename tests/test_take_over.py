"""A run that goes on where the authors' code stopped: everything arrives, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from obowlab.config import Machine, load_recipe
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.training import checkpoint as checkpoints
from obowlab.training.take_over import TakenOver, read_momenta, take_over
from obowlab.weights.encoder_file import import_weights
from tests.command_line import Obowlab
from tests.test_weights import authors_model, save

RECIPE = """
[data]
dataset = "small"

[views]
original_size = 72
original_resize = 80
num_crops = 2
crop_size = 32
num_patches = 0

[backbone]
width = 8

[method]
levels = ["conv4", "conv5"]
num_words = 24
border = 0

[training]
epochs = 40
batch_size = 8

[evaluation]
protocols = ["knn"]
random_baseline = false
"""
TRAINED = ("feature_extractor.", "bow_predictor.", "linear_classifier.")


def momenta_of(state: dict[str, Tensor], *, with_scale: bool = False) -> dict[str, object]:
    """An optimiser's state as torch keeps it, of what their code trains, in the order of the model."""
    names = [
        name
        for name in state
        if name.startswith(TRAINED) and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    names = [name for name in names if with_scale or name != "bow_predictor.scale"]
    generator = torch.Generator().manual_seed(3)
    buffers = {number: torch.rand(state[name].shape, generator=generator) for number, name in enumerate(names)}
    return {
        "names": names,
        "buffers": buffers,
        "file": {
            "epoch": 3,
            "optimizer": {
                "state": {number: {"momentum_buffer": buffer} for number, buffer in buffers.items()},
                "param_groups": [{"lr": 0.1, "params": list(buffers)}],
            },
        },
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def machine(tmp_path: Path, data_root: Path) -> Machine:
    return Machine(runs_root=tmp_path / "runs", data_root=data_root, device="cpu", loader="torch", workers=0)


def continued(file: Path, recipe: Path, machine: Machine, *overrides: str, optimizer: Path | None = None) -> TakenOver:
    loaded = load_recipe(str(recipe), overrides=list(overrides))
    return take_over(file, loaded=loaded, seed=0, machine=machine, optimizer_file=optimizer)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("module", [False, True])
def test_everything_of_the_file_is_in_the_checkpoint(
    tmp_path: Path, recipe: Path, machine: Machine, module: bool, with_scale: bool
) -> None:
    state, student, teacher = authors_model(levels=2, monitor=False)
    momenta = momenta_of(state, with_scale=with_scale)
    torch.save(momenta["file"], tmp_path / "model_optim_checkpoint_3.pth.tar")
    file = save(tmp_path / "model_net_checkpoint_3.pth.tar", state, module=module)
    made = continued(file, recipe, machine, optimizer=tmp_path / "model_optim_checkpoint_3.pth.tar")
    found, complaints = checkpoints.newest(
        made.folder.path, fingerprint=made.folder.info.fingerprint, map_location=torch.device("cpu")
    )
    assert found is not None
    assert complaints == []
    assert (found.step, made.step) == (120, 120)
    assert made.folder.state.status == "interrupted"
    for prefix, network in (("student.", student), ("teacher.", teacher)):
        for name, tensor in network.state_dict().items():
            assert torch.equal(found.method[prefix + name], tensor), prefix + name
    for index, level in enumerate(("conv4", "conv5")):
        place = f"bow_extractor.bow_extractor.{index}"
        assert torch.equal(found.method[f"vocabularies.{level}.words"], state[f"{place}._embedding"])
        assert found.method[f"vocabularies.{level}.pointer"] == state[f"{place}._embedding_ptr"]
        assert found.method[f"vocabularies.{level}.msd"] == state[f"{place}._min_distance_mean"]
        assert torch.equal(
            found.method[f"heads.{level}.fc2.bias"], state[f"bow_predictor.layers_w.{index}.b{index}_last_layer.bias"]
        )
    buffers = [entry["momentum_buffer"] for entry in found.optimizer["state"].values()]
    expected = [buffer for number, buffer in momenta["buffers"].items() if momenta["names"][number] != "bow_predictor.scale"]
    assert made.num_momenta == len(expected) == len(buffers)
    assert sorted(buffer.sum().item() for buffer in buffers) == pytest.approx(sorted(buffer.sum().item() for buffer in expected))
    assert made.folder.attempts()[-1]["taken_over_from"] == file.name


def test_a_momentum_is_that_of_its_parameter(tmp_path: Path) -> None:
    state, _, _ = authors_model(levels=2, monitor=True)
    momenta = momenta_of(state)
    torch.save(momenta["file"], tmp_path / "optim.pth.tar")
    imported = import_weights(save(tmp_path / "net.pth.tar", state))
    found = read_momenta(tmp_path / "optim.pth.tar", imported=imported)
    by_theirs = dict(zip(momenta["names"], momenta["buffers"].values(), strict=True))
    for ours, theirs in {
        "student.conv1.weight": "feature_extractor._feature_blocks.0.Conv.weight",
        "student.layer4.1.bn2.bias": "feature_extractor._feature_blocks.4.1.bn2.bias",
        "heads.conv4.fc1.weight": "bow_predictor.layers_w.0.b0_fc.weight",
        "heads.conv5.norm.weight": "bow_predictor.layers_w.1.b1_bn.weight",
        "monitor.fc.bias": "linear_classifier.layers.prediction_layer.bias",
    }.items():
        assert torch.equal(found[ours].flatten(), by_theirs[theirs].flatten()), ours


def test_the_run_goes_on_and_ends(tmp_path: Path, recipe: Path, machine: Machine, obowlab: Obowlab, data_root: Path) -> None:
    file = save(tmp_path / "net.pth.tar", authors_model(levels=2, monitor=False)[0])
    roots = ("--runs-root", str(machine.runs_root), "--data-root", str(data_root))
    epochs = ("--set", "training.epochs=9")
    code, out, err = obowlab("weights", "continue", str(file), str(recipe), *epochs, *roots)
    assert code == 2
    assert "has taken 120 steps, and the recipe ends at" in err
    steps_per_epoch = int(err.split("ends at ")[1].split(":")[0]) // 9
    epochs = ("--set", f"training.epochs={120 // steps_per_epoch + 1}")
    assert not machine.runs_root.exists() or not list(machine.runs_root.glob("mine-*"))
    code, out, err = obowlab("weights", "continue", str(file), str(recipe), *epochs, *roots)
    assert code == 0, err
    assert "step 120 of" in out
    assert "momentum begins at 0" in out
    command = out.splitlines()[-1].removeprefix("Continue it with: obowlab ").split()
    how = ("--device", "cpu", "--loader", "torch", "--workers", "0", "--no-quote", "--no-progress")
    code, out, err = obowlab(*command, *roots, *how)
    assert code == 0, err
    (run,) = machine.runs_root.glob("mine-*")
    folder = RunFolder.open(run)
    assert folder.state.status == "finished"
    assert [attempt["step"] for attempt in folder.attempts()] == [120, 120]
    assert min(point.step for point in folder.metrics()) > 120
    code, _, err = obowlab("weights", "continue", str(file), str(recipe), *epochs, *roots)
    assert code == 2
    assert "is there already: choose another --seed" in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method.num_words=32",), "--set method.num_words=24"),
        (("method.kappa=8",), "--set method.kappa=5.0"),
        (('method.levels=["conv5"]',), r"--set method.levels=\['conv4','conv5'\]"),
        (("backbone.width=4",), "--set backbone.width=8"),
        (("training.monitor=true",), "--set training.monitor=false"),
        (("method.vocabulary=kmeans_replace",), "--set method.vocabulary=queue"),
        (("method.head=fixed",), "--set method.head=dynamic"),
        (("method.head_batchnorm=false",), "--set method.head_batchnorm=true"),
        (("backbone.padding=same",), "--set backbone.padding=torchvision"),
        (("method.num_words=32", "method.kappa=8"), "--set method.num_words=24 --set method.kappa=5.0"),
    ],
)
def test_a_recipe_of_another_model_is_refused_with_what_fits(
    tmp_path: Path, recipe: Path, machine: Machine, overrides: tuple[str, ...], words: str
) -> None:
    file = save(tmp_path / "net.pth.tar", authors_model(levels=2, monitor=False)[0])
    with pytest.raises(UserError, match=words):
        continued(file, recipe, machine, *overrides)
    assert not machine.runs_root.exists()


def test_kappas_that_were_learnt_go_on_being_learnt(tmp_path: Path, recipe: Path, machine: Machine) -> None:
    state, _, _ = authors_model(levels=2, monitor=False)
    state["bow_predictor.scale"] = torch.tensor([5.0, 7.3])
    file = save(tmp_path / "net.pth.tar", state)
    with pytest.raises(UserError, match=r"these settings continue it: --set method\.learn_kappa=true$"):
        continued(file, recipe, machine)
    assert continued(file, recipe, machine, "method.learn_kappa=true").step == 120


def test_what_cannot_be_continued_is_refused(tmp_path: Path, recipe: Path, machine: Machine) -> None:
    state, _, _ = authors_model(levels=2, monitor=True)
    file = save(tmp_path / "net.pth.tar", state)
    with pytest.raises(UserError, match="online classifier of 11 classes, and 'small' has"):
        continued(file, recipe, machine, "training.monitor=true")
    assert "Its online classifier is left out" in continued(file, recipe, machine).notes[0]
    student = {name: tensor for name, tensor in state.items() if name.startswith("feature_extractor.")}
    bare = {name.removeprefix("feature_extractor."): tensor for name, tensor in student.items()}
    bare_file = save(tmp_path / "extractor.pth.tar", bare)
    with pytest.raises(UserError, match="holds an encoder alone"):
        continued(bare_file, recipe, machine, "training.epochs=41")
    for level in range(2):
        state[f"bow_extractor.bow_extractor.{level}._track_num_batches"].zero_()
    early = save(tmp_path / "early.pth.tar", state)
    with pytest.raises(UserError, match="does not say how many steps"):
        continued(early, recipe, machine, "training.epochs=42")


def test_an_optimiser_of_another_model_is_refused(tmp_path: Path) -> None:
    state, _, _ = authors_model(levels=2, monitor=False)
    imported = import_weights(save(tmp_path / "net.pth.tar", state))
    file = momenta_of(state)["file"]
    optimizer = file["optimizer"]
    path = tmp_path / "optim.pth.tar"
    torch.save({"network": state}, path)
    with pytest.raises(UserError, match="holds no optimiser's state"):
        read_momenta(path, imported=imported)
    shorter = {**optimizer, "param_groups": [{"params": optimizer["param_groups"][0]["params"][:-1]}]}
    torch.save({"optimizer": shorter}, path)
    with pytest.raises(UserError, match=r"is of \d+ parameters, and the model has"):
        read_momenta(path, imported=imported)
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(file, path)
    with pytest.raises(UserError, match="its parameter 0 has the shape"):
        read_momenta(path, imported=imported)
