"""Encoders in MLflow: what a version holds without obowlab, what its card says, which runs get one, and who can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import obowlab as lab
from obowlab.config import Backbone, Data, Evaluation, Loaded, Recipe, Views
from obowlab.errors import UserError
from obowlab.methods import build_backbone
from obowlab.runs.folder import RunFolder
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.model import save_encoder_model
from obowlab.tracking.server import connect
from obowlab.weights.encoder_file import save_encoder
from obowlab.weights.export import plain_network
from obowlab.weights.reading import read_module
from tests.command_line import Obowlab, result

RECIPE = Recipe(
    title="A narrow network",
    data=Data(dataset="small"),
    views=Views(original_size=24, original_resize=28, num_crops=1, crop_size=16),
    backbone=Backbone(stem="small", width=4),
    evaluation=Evaluation(protocols=("knn",)),
)
ABOUT = {"obowlab.preprocessing": {"resize": 28, "size": 24}}


def trained_run(runs_root: Path, *, seed: int = 0, status: str = "finished", name: str = "mine") -> RunFolder:
    """A run with an encoder whose batch norms have statistics, and its MLflow model, as the end of a training leaves them."""
    run = RunFolder.create(Loaded(name, RECIPE, {}), seed=seed, runs_root=runs_root)
    model = build_backbone(RECIPE.backbone, seed=seed)
    with torch.no_grad():
        model(torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(1)))
    path = run.path / "encoder.safetensors"
    info = save_encoder(model, path=path, recipe=RECIPE, fingerprint=run.info.fingerprint, source=run.run_id)
    plain = plain_network(model, info=info)
    save_encoder_model(plain, path=run.path / "model", example=torch.zeros(2, 3, 24, 24), metadata=ABOUT)
    run.set_state(status=status)
    return run


def sync(run: RunFolder) -> Any:
    """Send a run and return a client of its store."""
    mirror = Mirror(run)
    report = mirror.sync(timeout_s=60)
    assert (report.error, report.pending) == (None, 0)
    return connect(mirror.uri)


CHILD = """
import sys
sys.modules["obowlab"] = None  # it cannot be imported
import mlflow, numpy, torch
from PIL import Image
torch.set_num_threads(1)
mlflow.set_tracking_uri(sys.argv[1])
address, images = "models:/obowlab-mine/1", numpy.load("images.npy")
model = mlflow.pytorch.load_model(address)
assert not any(part.training for part in model.modules())
assert model.eval() is model
with torch.no_grad():
    numpy.save("features.npy", model(torch.from_numpy(images)).numpy())
    numpy.save("shown.npy", model.transform(Image.open("photo.png")).numpy())
numpy.save("predicted.npy", mlflow.pyfunc.load_model(address).predict(images))
classifier = torch.nn.Sequential(model, torch.nn.Linear(32, 3)).train()
before = model.layer4[1].conv2.weight.detach().clone(), model.bn1.running_mean.clone()
optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
torch.nn.functional.cross_entropy(classifier(torch.from_numpy(images)), torch.arange(5) % 3).backward()
assert all(weight.grad is not None for weight in classifier.parameters())
optimizer.step()
assert not torch.equal(before[0], model.layer4[1].conv2.weight)
assert not torch.equal(before[1], model.bn1.running_mean)
info = mlflow.models.get_model_info(address)
assert info.signature.inputs.inputs[0].shape == (-1, 3, -1, -1)
assert info.signature.outputs.inputs[0].shape == (-1, 32)
assert info.metadata["obowlab.preprocessing"] == {"resize": 28, "size": 24}
folder = mlflow.artifacts.download_artifacts(address)
example = mlflow.models.Model.load(folder).load_input_example(folder)
assert example.shape == (2, 3, 24, 24)
"""


def test_mlflow_loads_a_module_that_can_be_trained_without_obowlab(workplace: Path) -> None:
    run = trained_run(workplace / "runs")
    sync(run)
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.standard_normal((5, 3, 30, 24), dtype=np.float32))
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("photo.png")
    subprocess.run([sys.executable, "-I", "-c", CHILD, Mirror(run).uri], check=True, timeout=120)
    encoder = lab.load(run.path)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(np.load("images.npy"))).numpy()
    np.testing.assert_allclose(np.load("features.npy"), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.load("predicted.npy"), expected, rtol=1e-5, atol=1e-6)
    shown = encoder.transform(Image.open("photo.png")).numpy()
    np.testing.assert_allclose(np.load("shown.npy"), shown, rtol=0, atol=1e-5)


def test_the_card_has_recipe_results_and_how_to_load_and_follows_the_results(workplace: Path) -> None:
    run = trained_run(workplace / "runs")
    run.add_result(result("knn", "student", 31.25))
    client = sync(run)

    def card() -> str:
        version = client.get_model_version("obowlab-mine", "1")
        file = Path(client.download_artifacts(version.run_id, "model/README.md", str(workplace)))
        assert file.read_text() == version.description
        return str(version.description)

    first = card()
    assert first.startswith("# obowlab-mine, version 1\n\nA narrow network\n")
    assert f"run `{run.run_id}`: recipe `mine`, seed 0, method obow" in first
    assert "| trained | synthetic | knn_top1 | 31.25 ± 0.50 | 200 |" in first
    assert "resized to 28 pixels, centre of 24" in first
    assert 'mlflow.pytorch.load_model("models:/obowlab-mine/1")' in first
    run.add_result(result("linear", "random", 11.75))
    assert Mirror(run).pending() > 0
    sync(run)
    assert "| untrained | synthetic | linear_top1 | 11.75 ± 0.50 | 200 |" in card()
    assert Mirror(run).sync(timeout_s=60).sent == 0


def test_versions_are_for_finished_runs_that_are_no_trials(workplace: Path) -> None:
    runs = {
        status: trained_run(workplace / "runs", seed=seed, status=status) for seed, status in enumerate(("unevaluated", "failed"))
    }
    trial = trained_run(workplace / "runs", seed=7)
    trial.add_labels({"obowlab.study": "kappa", "obowlab.trial": "3", "obowlab.study.kappa": "3"})
    for run in (*runs.values(), trial):
        client = sync(run)
        assert client.search_model_versions("name = 'obowlab-mine'") == []
    runs["unevaluated"].set_state(status="finished")
    client = sync(runs["unevaluated"])
    (version,) = client.search_model_versions("name = 'obowlab-mine'")
    assert version.tags["obowlab.run_id"] == runs["unevaluated"].run_id


def test_every_command_takes_a_version(workplace: Path, data_root: Path, image_folder: Path, obowlab: Obowlab) -> None:
    run = trained_run(workplace / "runs")
    sync(run)
    (workplace / "data").symlink_to(data_root)
    address, place = "models:/obowlab-mine/1", ("--loader", "torch", "--workers", "0", "--device", "cpu")
    code, out, err = obowlab("eval", address, "--dry-run")
    assert (code, err) == (0, "")
    assert f"Would measure knn of {address} on small" in out
    code, out, _ = obowlab("eval", address, "--set", "evaluation.knn.num_neighbours=5", "--json", "version.json", *place)
    assert code == 0
    code, out, _ = obowlab(
        "eval", "mine", "--no-random", "--set", "evaluation.knn.num_neighbours=5", "--json", "run.json", *place
    )
    assert code == 0
    first, second = (json.loads((workplace / f"{name}.json").read_text())[0] for name in ("version", "run"))
    assert first["weights_hash"] == second["weights_hash"]
    assert first["measurements"] == second["measurements"]
    assert obowlab("weights", "export", address, "--out", "net")[0] == 0
    assert lab.load("net/encoder.safetensors").info.weights_hash == first["weights_hash"]
    assert obowlab("embed", address, str(image_folder), "--out", "x.npz", "--dry-run")[0] == 0
    for words in (
        ("eval", "models:/obowlab-mine/7"),
        ("weights", "export", "models:/obowlab-mine/7", "--out", "other", "--dry-run"),
        ("embed", "models:/obowlab-mine/7", str(image_folder), "--out", "y.npz", "--dry-run"),
    ):
        code, _, err = obowlab(*words)
        assert (code, err.count("\n")) == (2, 1)
        assert "Cannot load models:/obowlab-mine/7" in err
    code, _, err = obowlab("eval", address, "--recipe", "demo")
    assert (code, "--recipe is for weights files" in err) == (2, True)


class Surprise:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code from the file has run",))


def test_no_code_of_a_version_is_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained_run(workplace / "runs")
    client = sync(run)
    folder = Path(client.get_run(client.get_model_version("obowlab-mine", "1").run_id).info.artifact_uri.removeprefix("file://"))
    path = folder / "model" / "data" / "model.pth"
    assert read_module(path, origin=path).keys() == lab.load(run.path).model.state_dict().keys()
    for content in (Surprise(), {"conv1": Surprise()}, torch.nn.Linear(2, 2), {"a": torch.zeros(2)}):
        torch.save(content, path)
        with pytest.raises(UserError, match="models:/obowlab-mine/1 holds no encoder of obowlab"):
            lab.load("models:/obowlab-mine/1")
    assert "has run" not in capsys.readouterr().out
    path.unlink()
    with pytest.raises(UserError, match=rf"its run may still have the file: '{run.run_id}'"):
        lab.load("models:/obowlab-mine/1")


def test_a_run_folder_or_store_that_was_taken_away_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a run or its mirror writes makes the folder again: what is there comes back later."""
    recipe = Recipe(data=Data(dataset="none"), backbone=Backbone(stem="small", width=4))
    run = RunFolder.create(Loaded("gone", recipe, {}), seed=0, runs_root=tmp_path / "runs")
    model = build_backbone(recipe.backbone, seed=0)
    (tmp_path / "runs").rename(tmp_path / "away")
    result = {"subject": "student", "protocol": "knn", "protocol_hash": "0"}
    about = {"recipe": recipe, "fingerprint": None, "source": "a run"}
    with pytest.raises(FileNotFoundError):
        run.add_result(result)
    with pytest.raises(UserError, match="Cannot write"):
        save_encoder(model, path=run.path / "encoder.safetensors", **about)
    with pytest.raises(FileNotFoundError):
        save_encoder_model(model.eval(), path=run.path / "model", example=torch.zeros(2, 3, 16, 16))
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # it waits two minutes for a file to come back
    with pytest.raises(Exception, match=r"unable to open database file|No such file"):
        connect(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}").search_experiments()
    assert not (tmp_path / "runs").exists()
