"""The package's own names: an encoder, features of a folder, a recipe, a training step by step."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import obowlab
from obowlab.config import Backbone, Data, Recipe, Views
from obowlab.data.datasets import open_split
from obowlab.errors import UserError
from obowlab.evaluation.features import FeatureStore
from obowlab.methods import build_backbone
from obowlab.weights.encoder_file import save_encoder
from tests.command_line import finished_run

VIEWS = Views(original_size=24, original_resize=28, num_crops=1, crop_size=16)
RECIPE = Recipe(data=Data(dataset="small"), views=VIEWS, backbone=Backbone(stem="small", width=4))
CPU = torch.device("cpu")


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """An encoder file with weights that were trained a little: its batch norms have statistics."""
    model = build_backbone(RECIPE.backbone, seed=0)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "encoder.safetensors"
    save_encoder(model, path=path, recipe=RECIPE, fingerprint=None, source="test")
    return path


def evaluated(encoder: torch.nn.Module, *, data_root: Path, cache_dir: Path) -> torch.Tensor:
    """Return the features that `obowlab eval` computes of the validation images."""
    return FeatureStore(
        encoder,
        recipe=RECIPE,
        dataset=None,
        data_root=data_root,
        runs_root=cache_dir,
        cache_dir=cache_dir,
        device=CPU,
        backend="torch",
        workers=0,
        channels_last=True,
        report=print,
    ).get("val")[0]


def test_importing_obowlab_imports_nothing_heavy() -> None:
    program = "import sys, obowlab; dir(obowlab); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "obowlab" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "mlflow", "click"}


def test_public_names_are_there_and_documented() -> None:
    for name in obowlab.__all__:
        assert getattr(obowlab, name).__doc__
        assert name in dir(obowlab)
    assert set(obowlab.__all__) == set(obowlab._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = obowlab.laod


# --------------------------------------------------------------------------------------------------------------- encoder


def test_runs_and_files_load(weights_file: Path, workplace: Path) -> None:
    run = finished_run(workplace / "runs")
    (run.path / "encoder.safetensors").write_bytes(weights_file.read_bytes())
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = obowlab.load(weights_file)(images)
    for ref in (run.run_id, "demo", f"runs/{run.run_id}", run.path):
        assert torch.equal(obowlab.load(ref)(images), expected)
    assert torch.equal(obowlab.load("demo", runs_root="runs")(images), expected)
    with pytest.raises(UserError, match="no run 'demo'"):
        obowlab.load("demo", runs_root="elsewhere")


def test_transform_gives_the_features_of_evaluation(weights_file: Path, data_root: Path, tmp_path: Path) -> None:
    encoder = obowlab.load(weights_file)
    split = open_split("small", "val", data_root=data_root)
    images = [Image.open(io.BytesIO(bytes(split.jpeg(index)))) for index in range(split.num_images)]
    shown = torch.stack([encoder.transform(image) for image in images]).contiguous(memory_format=torch.channels_last)
    assert shown.shape == (30, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(encoder.features(shown), evaluated(encoder.model, data_root=data_root, cache_dir=tmp_path / "f"))


def test_transform_takes_images_of_any_mode(weights_file: Path) -> None:
    transform = obowlab.load(weights_file).transform
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    expected = transform(Image.fromarray(grey))
    assert torch.equal(transform(Image.fromarray(np.stack([grey] * 3, axis=-1))), expected)
    assert torch.equal(transform(Image.fromarray(grey.astype(np.uint16) * 257)), expected)
    with pytest.raises(UserError, match="whose range is not known"):
        transform(Image.fromarray(grey.astype(np.int32) * 70000))


def test_maps_average_to_the_features(weights_file: Path) -> None:
    encoder = obowlab.load(weights_file)
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert encoder.maps(images, "conv5").shape == (2, 32, 4, 3)
        assert encoder.maps(images, "conv4").shape == (2, 16, 8, 6)
        assert torch.equal(encoder.maps(images).mean(dim=(2, 3)), encoder.features(images))
    assert encoder(images).shape == (2, encoder.num_features)
    with pytest.raises(UserError, match="no level 'layer4'"):
        encoder.maps(images, "layer4")  # type: ignore[arg-type]


def test_an_encoder_can_be_trained_further(weights_file: Path) -> None:
    encoder = obowlab.load(weights_file)
    assert not any(part.training for part in encoder.modules())
    before = copy.deepcopy(encoder.state_dict())
    classifier = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, 3)).train()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(classifier(torch.randn(6, 3, 24, 24)), torch.arange(6) % 3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    optimizer.step()
    assert not any(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_a_model_version_is_the_encoder_of_its_run(weights_file: Path, workplace: Path) -> None:
    from obowlab.config import Loaded
    from obowlab.runs.folder import RunFolder
    from obowlab.tracking.mirror import Mirror, save_encoder_model

    encoder = obowlab.load(weights_file)
    run = RunFolder.create(Loaded("mine", RECIPE, {}), seed=0, runs_root=workplace / "runs")
    with pytest.raises(UserError, match=r"mlflow\.db"):
        obowlab.load("models:/obowlab-mine/1")
    save_encoder_model(encoder.model, path=run.path / "model", example=torch.zeros(2, 3, 24, 24))
    run.set_state(status="finished")
    assert Mirror(run).sync(timeout_s=60).error is None
    found = obowlab.load("models:/obowlab-mine/1")
    assert not found.training
    assert (found.info.source, found.info.weights_hash) == (run.run_id, encoder.info.weights_hash)
    assert found.transform == encoder.transform
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(images), encoder(images))
    found.train()(images).sum().backward()
    with pytest.raises(UserError, match="Cannot load models:/obowlab-mine/7"):
        obowlab.load("models:/obowlab-mine/7")
    with pytest.raises(UserError, match="write models:/NAME/VERSION"):
        obowlab.load("models:/obowlab-mine")
