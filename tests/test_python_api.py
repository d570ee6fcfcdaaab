"""The package's own names: an encoder, features of a folder, a recipe, a training step by step."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import obowlab as lab
from obowlab import Steps
from obowlab.config import Backbone, Data, Loaded, Machine, Recipe, Views, load_recipe
from obowlab.data.datasets import open_split
from obowlab.errors import UserError
from obowlab.evaluation.features import FeatureStore
from obowlab.methods import Batch, OBoW, StepOutput, build_backbone
from obowlab.weights.encoder_file import save_encoder
from obowlab.weights.export import plain_network
from tests.command_line import Obowlab, contents, finished_run
from tests.runs import chain_recipe, complete, small_recipe, weights

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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "obowlab" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "mlflow", "click"}


def test_public_names_are_there_and_documented() -> None:
    for name in lab.__all__:
        assert getattr(lab, name).__doc__
        assert name in dir(lab)
    assert set(lab.__all__) == set(lab._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = lab.laod


# --------------------------------------------------------------------------------------------------------------- encoder


def test_runs_and_files_load(weights_file: Path, workplace: Path) -> None:
    run = finished_run(workplace / "runs")
    (run.path / "encoder.safetensors").write_bytes(weights_file.read_bytes())
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = lab.load(weights_file)(images)
    for ref in (run.run_id, "demo", f"runs/{run.run_id}", run.path):
        assert torch.equal(lab.load(ref)(images), expected)
    assert torch.equal(lab.load("demo", runs_root="runs")(images), expected)
    with pytest.raises(UserError, match="no run 'demo'"):
        lab.load("demo", runs_root="elsewhere")


def test_transform_gives_the_features_of_evaluation(weights_file: Path, data_root: Path, tmp_path: Path) -> None:
    encoder = lab.load(weights_file)
    split = open_split("small", "val", data_root=data_root)
    images = [Image.open(io.BytesIO(bytes(split.jpeg(index)))) for index in range(split.num_images)]
    shown = torch.stack([encoder.transform(image) for image in images]).contiguous(memory_format=torch.channels_last)
    assert shown.shape == (30, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(encoder.features(shown), evaluated(encoder.model, data_root=data_root, cache_dir=tmp_path / "f"))


def test_transform_takes_images_of_any_mode(weights_file: Path) -> None:
    transform = lab.load(weights_file).transform
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    expected = transform(Image.fromarray(grey))
    assert torch.equal(transform(Image.fromarray(np.stack([grey] * 3, axis=-1))), expected)
    assert torch.equal(transform(Image.fromarray(grey.astype(np.uint16) * 257)), expected)
    with pytest.raises(UserError, match="whose range is not known"):
        transform(Image.fromarray(grey.astype(np.int32) * 70000))


def test_maps_average_to_the_features(weights_file: Path) -> None:
    encoder = lab.load(weights_file)
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert encoder.maps(images, "conv5").shape == (2, 32, 4, 3)
        assert encoder.maps(images, "conv4").shape == (2, 16, 8, 6)
        assert torch.equal(encoder.maps(images).mean(dim=(2, 3)), encoder.features(images))
    assert encoder(images).shape == (2, encoder.num_features)
    with pytest.raises(UserError, match="no level 'layer4'"):
        encoder.maps(images, "layer4")  # type: ignore[arg-type]


def test_an_encoder_can_be_trained_further(weights_file: Path) -> None:
    encoder = lab.load(weights_file)
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
    from obowlab.runs.folder import RunFolder
    from obowlab.tracking.mirror import Mirror
    from obowlab.tracking.model import save_encoder_model

    encoder = lab.load(weights_file)
    run = RunFolder.create(Loaded("mine", RECIPE, {}), seed=0, runs_root=workplace / "runs")
    with pytest.raises(UserError, match=r"mlflow\.db"):
        lab.load("models:/obowlab-mine/1")
    save_encoder_model(
        plain_network(encoder.model, info=encoder.info), path=run.path / "model", example=torch.zeros(2, 3, 24, 24)
    )
    run.set_state(status="finished")
    assert Mirror(run).sync(timeout_s=60).error is None
    found = lab.load("models:/obowlab-mine/1")
    assert not found.training
    assert (found.info.source, found.info.weights_hash) == (run.run_id, encoder.info.weights_hash)
    assert found.transform == encoder.transform
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(images), encoder(images))
    found.train()(images).sum().backward()
    with pytest.raises(UserError, match="Cannot load models:/obowlab-mine/7"):
        lab.load("models:/obowlab-mine/7")
    with pytest.raises(UserError, match="write models:/NAME/VERSION"):
        lab.load("models:/obowlab-mine")


# -------------------------------------------------------------------------------------------------- features of a folder


def test_features_of_a_folder_are_those_of_evaluation(
    weights_file: Path, image_folder: Path, data_root: Path, tmp_path: Path
) -> None:
    encoder = lab.load(weights_file).train()
    features, paths = lab.embed(encoder, image_folder / "val", workers=2)
    assert encoder.training
    assert features.dtype == np.float32
    assert paths == sorted((image_folder / "val").rglob("*.jpg"))
    expected = evaluated(encoder.model, data_root=data_root, cache_dir=tmp_path / "f")
    assert np.array_equal(features, expected.numpy())
    by_seven, again = lab.embed(encoder, str(image_folder / "val"), batch_size=7)
    assert again == paths
    np.testing.assert_allclose(by_seven, features, rtol=1e-5, atol=1e-6)


def test_images_that_cannot_be_read_are_left_out_and_named(
    weights_file: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = lab.load(weights_file)
    folder = tmp_path / "mixed"
    (folder / "b" / "inner").mkdir(parents=True)
    good = (image_folder / "val" / "class_0" / "image_00.jpg").read_bytes()
    (folder / "b" / "inner" / "deep.JPG").write_bytes(good)
    (folder / "a.jpg").write_bytes(good)
    (folder / ".hidden.jpg").write_bytes(good)
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "b" / "text.png").write_text("no image")
    with caplog.at_level("WARNING", logger="obowlab"):
        features, paths = lab.embed(encoder, folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == ["a.jpg", "b/inner/deep.JPG"]
    assert np.array_equal(features[0], features[1])
    (message,) = caplog.messages
    assert "2 of 4 images" in message
    assert "b/text.png (not an image in a format Pillow knows)" in message
    assert "cut.jpg (" in message
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="None of the 2 images"):
        lab.embed(encoder, folder)


def test_features_that_overflow_and_impossible_requests_are_refused(
    weights_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    encoder = lab.load(weights_file)
    with pytest.raises(UserError, match="There is no folder"):
        lab.embed(encoder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        lab.embed(encoder, image_folder, batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            lab.embed(encoder, image_folder, device="cuda")
    with torch.no_grad():
        encoder.model.bn1.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        lab.embed(encoder, image_folder / "val")


def test_the_command_writes_what_the_function_returns(
    weights_file: Path, image_folder: Path, obowlab: Obowlab, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(workplace / "runs")
    (run.path / "encoder.safetensors").write_bytes(weights_file.read_bytes())
    encoder = lab.load(run.path)
    expected, paths = lab.embed(encoder, image_folder)
    names = [path.relative_to(image_folder).as_posix() for path in paths]
    for out in ("x.npz", "x.parquet"):
        code, said, err = obowlab("embed", "demo", str(image_folder), "--out", out, "--device", "cpu")
        assert (code, err) == (0, "")
        assert f"Wrote {out}: 90 images, 32 features each, by {run.run_id}." in said
        code, _, err = obowlab("embed", "demo", str(image_folder), "--out", out, "--device", "cpu")
        assert (code, "is there already" in err) == (2, True)
    with np.load("x.npz") as file:
        assert np.array_equal(file["features"], expected)
        assert file["paths"].tolist() == names
        assert str(file["weights_hash"]) == encoder.info.weights_hash
    table = pytest.importorskip("pyarrow.parquet").read_table("x.parquet")
    assert table["path"].to_pylist() == names
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), expected)
    assert table.schema.metadata[b"weights_hash"].decode() == encoder.info.weights_hash
    assert sorted(path.name for path in workplace.iterdir()) == ["runs", "x.npz", "x.parquet"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = obowlab("embed", "demo", str(image_folder), "--out", "y.parquet")
    assert (code, "needs pyarrow" in err) == (2, True)


# ------------------------------------------------------------------------------------------------- recipes and trainings


def test_recipes_take_changes_as_texts_or_values() -> None:
    assert lab.recipe("demo") == load_recipe("demo").recipe
    changed = load_recipe("demo", overrides=["method.kappa=9", "views.crop_scale=[0.1, 0.5]"]).recipe
    assert lab.recipe("demo", overrides=["method.kappa=9", "views.crop_scale=[0.1, 0.5]"]) == changed
    assert lab.recipe("demo", overrides={"method.kappa": 9, "views.crop_scale": [0.1, 0.5]}) == changed
    assert lab.recipe("demo", overrides="method.kappa=1").method.kappa == 1
    with pytest.raises(UserError, match=r"Did you mean 'method\.kappa'"):
        lab.recipe("demo", overrides={"method.kapa": 9})


def steps_of(loaded: Loaded, *, data_root: Path, runs_root: Path, **options: Any) -> Steps:
    return lab.trainer(loaded.recipe, seed=3, data_root=data_root, runs_root=runs_root, device="cpu", workers=0, **options)


@pytest.mark.parametrize("chain", [False, True])
def test_steps_are_those_of_a_run_to_the_bit(chain: bool, workplace: Path, data_root: Path) -> None:
    machine = Machine(data_root=data_root, runs_root=workplace / "runs", device="cpu", loader="torch", workers=0)
    overrides = ("evaluation.protocols=[]", "teacher.evaluation.protocols=[]") if chain else ("evaluation.protocols=[]",)
    loaded = (chain_recipe if chain else small_recipe)(workplace, dataset="small", epochs=2, overrides=overrides)
    runs = [complete(stage, machine=machine, seed=3) for stage in loaded.stages()]
    before = contents(workplace)
    steps = steps_of(loaded, data_root=data_root, runs_root=machine.runs_root)
    logged = {point.step: point.values["loss"] for point in runs[-1].metrics()}
    for batch in steps.batches():
        assert batch.step == steps.num_done
        output = steps.step(batch)
        assert not output.loss.requires_grad
        assert float(output.metrics["loss"].double()) == logged[steps.num_done]
    assert steps.num_done == steps.total_steps == 2 * steps.steps_per_epoch == 14
    expected = weights(runs[-1])
    ours = steps.method.state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    assert list(steps.batches()) == []
    assert contents(workplace) == before, "nothing is written"


def test_a_loop_can_stop_and_go_on(workplace: Path, data_root: Path) -> None:
    loaded = small_recipe(workplace, dataset="small", epochs=2)
    whole, halves = (steps_of(loaded, data_root=data_root, runs_root=workplace) for _ in range(2))
    for batch in whole.batches():
        whole.step(batch)
    for count in (3, 6, 14):
        for batch in halves.batches():
            halves.step(batch)
            if halves.num_done == count:
                break
    ours, theirs = halves.method.state_dict(), whole.method.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_loss_and_a_method_of_ones_own(workplace: Path, data_root: Path) -> None:
    class Halved(OBoW):
        def forward(self, batch: Batch) -> StepOutput:
            output = super().forward(batch)
            return StepOutput(loss=output.loss / 2, metrics=output.metrics)

    loaded = small_recipe(workplace, dataset="small", overrides=("training.monitor=false",))
    gradients, losses = [], []
    plain, own = ({}, {"method": Halved})
    for options, loss in ((plain, None), (own, None), (plain, lambda output: output.loss / 2)):
        steps = steps_of(loaded, data_root=data_root, runs_root=workplace, **options)
        losses.append(steps.step(next(steps.batches()), loss=loss).loss)
        gradients.append(steps.method.encoder.conv1.weight.grad)
    assert losses[1] == losses[2] == losses[0] / 2
    assert torch.equal(gradients[1], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[0] / 2)


def test_steps_refuse_what_a_run_refuses(workplace: Path, data_root: Path) -> None:
    with pytest.raises(UserError, match="obowlab data prepare tinyimagenet100"):
        lab.trainer(lab.recipe("tiny-vanilla"), data_root=data_root)
    loaded = chain_recipe(workplace, dataset="small")
    with pytest.raises(UserError, match="learns from the stage before it"):
        steps_of(loaded, data_root=data_root, runs_root=workplace)
    steps = steps_of(small_recipe(workplace, dataset="small"), data_root=data_root, runs_root=workplace)
    before = copy.deepcopy(steps.method.encoder.state_dict())
    with pytest.raises(UserError, match="not finite at step 0"):
        steps.step(next(steps.batches()), loss=lambda output: output.loss * torch.nan)
    assert steps.num_done == 0
    weight = steps.method.encoder.conv1.weight
    assert torch.equal(weight, before["conv1.weight"])
