"""Trainings that measure an encoder: linear classifiers on frozen features of random crops, and fine-tuning."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from obowlab.config import Backbone, Data, Machine, Supervised, Views, load_recipe
from obowlab.config.protocols import unlike_the_paper
from obowlab.data.datasets import open_split, prepare, trained_on
from obowlab.data.image_lists import keep_list, listed, num_listed, read_names
from obowlab.errors import UserError
from obowlab.evaluation.classes import accuracies
from obowlab.evaluation.features import weights_hash
from obowlab.methods import Batch, OneProcess, Preparation, ResNet, SupervisedTraining, build_backbone
from obowlab.methods.schedules import learning_rate
from obowlab.methods.supervised import classifier_from
from obowlab.runs.folder import RunFolder
from obowlab.training.optimizers import build_optimizer, set_learning_rate
from obowlab.views.views import MEAN, STD, geometry
from obowlab.weights.encoder_file import Encoder, read_encoder, write_encoder
from obowlab.weights.info import EncoderInfo
from obowlab.weights.kept import keep_weights, kept_weights
from tests.command_line import Obowlab
from tests.runs import complete, points, small_recipe, start

SMALL = Backbone(stem="small", width=4)
FROZEN = {"trunk": "frozen", "head_start": "normal"}


def build(*, double: bool = True, **settings: Any) -> SupervisedTraining:
    method = SupervisedTraining(Supervised(**settings), backbone=SMALL, total_steps=10, seed=0, num_classes=3, comm=OneProcess())
    return (method.double() if double else method).train()


def batch(step: int = 0, *, num_images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        original=torch.zeros(num_images, 3, 1, 1),
        views={"crops": torch.randn(num_images, 3, 16, 16, generator=generator, dtype=torch.float64)},
        uniforms=torch.zeros(num_images, 0),
        step=step,
        labels=torch.randint(3, (num_images,), generator=generator),
    )


def beginning(encoder: ResNet) -> Preparation:
    """Return what a method is given that begins with an encoder; it looks at nothing else."""

    def nothing(*_: Any) -> Any:
        raise AssertionError

    return Preparation(teacher=encoder, num_images=0, originals=nothing, uniforms=nothing, seed=0, report=nothing)


def encoder_of(*, seed: int = 7, mean: Any = MEAN, std: Any = STD) -> Encoder:
    model = build_backbone(SMALL, seed=seed).eval()
    info = EncoderInfo(
        backbone=SMALL, original_resize=36, original_size=32, mean=mean, std=std, source="test", weights_hash=weights_hash(model)
    )
    return Encoder(model=model, info=info, path=Path("test"))


# --------------------------------------------------------------------------------------------------------- learning rates


def rate_at(recipe: str, epoch: int, *, steps_per_epoch: int, last: bool = False) -> float:
    loaded = load_recipe(recipe).recipe
    step = epoch * steps_per_epoch + (steps_per_epoch - 1 if last else 0)
    return learning_rate(step, optimizer=loaded.optimizer, epochs=loaded.training.epochs, steps_per_epoch=steps_per_epoch)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 10.0), (1, 9.997533), (25, 8.535534), (50, 5.0), (75, 1.464466), (99, 0.00246720)]
)
def test_imagenets_rate_is_a_cosine_that_stands_still_within_an_epoch(epoch: int, rate: float) -> None:
    digit = 5e-7 if rate > 1 else 5e-9
    for last in (False, True):
        assert rate_at("linear-imagenet", epoch, steps_per_epoch=1251, last=last) == pytest.approx(rate, abs=digit)


@pytest.mark.parametrize(("recipe", "epochs", "fall"), [("places205", 14, 5), ("places205-authors", 28, 10)])
def test_places_rate_is_divided_by_ten_twice(recipe: str, epochs: int, fall: int) -> None:
    assert load_recipe(recipe).recipe.training.epochs == epochs
    for epoch in range(epochs):
        rate = 0.01 * 0.1 ** (epoch // fall)
        for last in (False, True):
            assert rate_at(recipe, epoch, steps_per_epoch=9565, last=last) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("epochs", "after", "steps_per_epoch"), [(40, (24, 32), 50), (20, (12, 16), 500)])
def test_semi_supervised_rates_fall_after_their_epochs(epochs: int, after: tuple[int, ...], steps_per_epoch: int) -> None:
    recipe = load_recipe("semi-1" if epochs == 40 else "semi-10").recipe
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.method.trunk_rate) == (epochs, 256, 4e-4)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.momentum, recipe.optimizer.warmup_epochs) == (0.0, 0.9, 0.0)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "rate_factor": 4e-4}], lr=1.0)
    found = []
    for epoch in range(epochs):
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            rate = learning_rate(step, optimizer=recipe.optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
            set_learning_rate(optimizer, rate, fixed=0.5)
            found.append((rate, optimizer.param_groups[0]["lr"]))
    expected = [0.5] * after[0] + [0.1] * (after[1] - after[0]) + [0.02] * (epochs - after[1])
    assert [rate for rate, _ in found] == pytest.approx(np.repeat(expected, 2).tolist(), rel=1e-12)
    assert [rate for _, rate in found] == pytest.approx(np.repeat(np.multiply(expected, 4e-4), 2).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("protocol", "recipe", "images", "words"),
    [
        ("linear-imagenet", "linear-imagenet", 50_000, ""),
        ("places205", "places205-authors", 20_500, ""),
        ("places205", "places205", 20_499, "20499 test images instead of 20500."),
        ("semi-1", "semi-1-demo", 1200, "1200 test images instead of 50000, data.dataset synthetic instead of imagenet, "),
        ("voc07-svm", "full", 4952, ""),
        ("voc07-svm", "full", 400, "400 test images instead of 4952."),
    ],
)
def test_what_is_not_the_papers_measurement_is_said_to_be_not_comparable(
    protocol: str, recipe: str, images: int, words: str
) -> None:
    encoder = (f'method.weights="{"ab" * 32}"',) if protocol != "voc07-svm" else ()
    found = unlike_the_paper(protocol, load_recipe(recipe, overrides=encoder).recipe, num_images=images)
    assert found.startswith(f"Not comparable with the paper's value: {words}" if words else "")
    assert bool(found) == bool(words)


# ------------------------------------------------------------------------------------------------------------ frozen trunk


def step(method: SupervisedTraining, optimizer: torch.optim.Optimizer, number: int) -> float:
    output = method(batch(number))
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    optimizer.step()
    return float(output.loss.detach())


def test_a_frozen_trunk_stays_as_it_is_to_the_bit() -> None:
    method = build(**FROZEN)
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    optimizer = build_optimizer(load_recipe("linear-imagenet").recipe.optimizer, method=method)
    start_of_head = method.classifier.weight.detach().clone()
    for number in range(3):
        step(method, optimizer, number)
    assert all(torch.equal(value, before[name]) for name, value in method.student.state_dict().items())
    assert not torch.equal(method.classifier.weight, start_of_head)
    images = batch().views["crops"]
    torch.testing.assert_close(method.features(images)[:1], method.features(images[:1]), rtol=1e-12, atol=1e-12)
    (group,) = optimizer.param_groups
    assert {id(value) for value in group["params"]} == {id(method.classifier.weight), id(method.classifier.bias)}
    assert method.encoder is method.student
    assert not method.student.training


def test_two_steps_of_a_linear_classifier_are_those_of_numpy() -> None:
    method = build(**FROZEN)
    optimizer = build_optimizer(load_recipe("linear-imagenet").recipe.optimizer, method=method)
    weight, bias = (value.detach().numpy().copy() for value in (method.classifier.weight, method.classifier.bias))
    assert abs(weight.std() - 0.01) < 0.002
    assert not bias.any()
    velocity_w, velocity_b = np.zeros_like(weight), np.zeros_like(bias)
    for number in range(2):
        shown = batch(number)
        assert shown.labels is not None
        features = method.features(shown.views["crops"]).numpy()
        scores = features @ weight.T + bias
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        error = (probabilities - np.eye(3)[shown.labels.numpy()]) / len(features)
        velocity_w = 0.9 * velocity_w + error.T @ features
        velocity_b = 0.9 * velocity_b + error.sum(axis=0)
        weight, bias = weight - 10.0 * velocity_w, bias - 10.0 * velocity_b
        step(method, optimizer, number)
    np.testing.assert_allclose(method.classifier.weight.detach().numpy(), weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(method.classifier.bias.detach().numpy(), bias, rtol=1e-6, atol=1e-9)


def test_the_normalisation_before_places_classifier_is_numpys() -> None:
    """TRANSFER's check: biased variance to normalise, unbiased in the running update, weight decay on weight and bias."""
    rows = np.random.default_rng(0).normal(2.0, 3.0, (6, 4))
    labels = np.array([0, 1, 2, 2, 1, 0])
    state = {
        "0.running_mean": torch.zeros(4, dtype=torch.float64),
        "0.running_var": torch.ones(4, dtype=torch.float64),
        "0.num_batches_tracked": torch.tensor(0),
        "1.weight": torch.from_numpy(np.random.default_rng(1).normal(0.0, 0.01, (3, 4))),
        "1.bias": torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64),
    }
    head = classifier_from({name: value.clone() for name, value in state.items()}).double().train()
    head.load_state_dict(state)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    scores = head(torch.from_numpy(rows))
    nn.functional.cross_entropy(scores, torch.from_numpy(labels)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    mean, variance = rows.mean(axis=0), rows.var(axis=0)
    normal = (rows - mean) / np.sqrt(variance + 1e-5)
    weight, bias = state["1.weight"].numpy(), state["1.bias"].numpy()
    expected = normal @ weight.T + bias
    np.testing.assert_allclose(scores.detach().numpy(), expected, rtol=1e-9)
    probabilities = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    error = (probabilities - np.eye(3)[labels]) / 6
    linear = head[1]
    np.testing.assert_allclose(linear.weight.detach().numpy(), weight - 0.01 * (error.T @ normal + 1e-4 * weight), rtol=1e-9)
    np.testing.assert_allclose(linear.bias.detach().numpy(), bias - 0.01 * (error.sum(axis=0) + 1e-4 * bias), rtol=1e-9)
    np.testing.assert_allclose(head[0].running_mean.numpy(), 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(head[0].running_var.numpy(), 0.9 + 0.1 * rows.var(axis=0, ddof=1), rtol=1e-12)


def test_a_classifiers_normalisation_has_no_parameters_and_is_that_of_all_processes() -> None:
    method = build(**FROZEN, head_batchnorm=True)
    assert [name for name, value in method.named_parameters() if value.requires_grad] == ["classifier.weight", "classifier.bias"]
    method(batch())
    features = method.features(batch().views["crops"])
    torch.testing.assert_close(method.head_norm.running_mean, 0.1 * features.mean(dim=0))
    assert type(method.head_norm).__name__ == "GlobalBatchNorm1d", "which training.sync_batchnorm finds"


# -------------------------------------------------------------------------------------------------------------- fine-tuning


def test_trunk_and_classifier_learn_at_their_own_rates_as_a_slow_sgd_does() -> None:
    method = build(trunk_rate=4e-4, head_start="normal")
    recipe = load_recipe("full-supervised", overrides=["optimizer.weight_decay=0.0", "optimizer.learning_rate=0.5"]).recipe
    optimizer = build_optimizer(recipe.optimizer, method=method)
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert len(groups["method"]) == 2
    assert len(groups["method"]) + len(groups["trunk"]) == len(list(method.parameters()))
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    statistics = method.student.bn1.running_mean.clone()
    set_learning_rate(optimizer, 0.5, fixed=0.5)
    step(method, optimizer, 0)
    for name, value in method.named_parameters():
        rate = 0.5 if name.startswith("classifier") else 2e-4
        assert value.grad is not None
        torch.testing.assert_close(value.detach(), before[name] - rate * value.grad, rtol=1e-12, atol=1e-14, msg=name)
    assert not torch.equal(method.student.bn1.running_mean, statistics), "training moves the statistics"
    method.eval()
    statistics = method.student.bn1.running_mean.clone()
    method.student(batch().views["crops"])
    assert torch.equal(method.student.bn1.running_mean, statistics), "measuring does not"


# -------------------------------------------------------------------------------------------------- where a training begins


def test_a_training_begins_with_the_weights_it_names() -> None:
    encoder = encoder_of()
    method = build(double=False, weights="a" * 64)
    assert method.prepare(beginning(encoder.model))
    assert all(torch.equal(value, method.student.state_dict()[name]) for name, value in encoder.model.state_dict().items())
    without = build(double=False)
    before = {name: value.clone() for name, value in without.state_dict().items()}
    assert set(method.state_dict()) - set(before) == {"pixels"}, "a run that begins with its seed's weights is as it was"


def test_an_encoder_sees_the_pixels_it_was_trained_on() -> None:
    encoder = encoder_of(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0))
    method = build(double=False, weights="a" * 64, **FROZEN)
    method.prepare(beginning(encoder.model))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def normalised(mean: Any, std: Any) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        expected = encoder.features(normalised(encoder.info.mean, encoder.info.std))
        torch.testing.assert_close(method.features(normalised(MEAN, STD)), expected, rtol=1e-4, atol=1e-5)
        again = build(double=False, weights="a" * 64, **FROZEN)
        again.load_state_dict(method.state_dict())
        assert torch.equal(again.features(pixels), method.features(pixels)), "a resumed run knows it too"
    assert method.encoder.pixel_mean == encoder.info.mean
    assert method.encoder.pixel_std == encoder.info.std


def test_weights_are_kept_once_by_their_hash_and_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    encoder = encoder_of()
    kept = keep_weights(encoder, runs_root=tmp_path / "runs")
    path = tmp_path / "runs/.weights" / f"{kept}.safetensors"
    written = path.stat().st_mtime_ns
    assert keep_weights(encoder, runs_root=tmp_path / "runs") == kept
    assert path.stat().st_mtime_ns == written
    assert kept_weights(kept, backbone=SMALL, runs_root=tmp_path / "runs").info == encoder.info
    with pytest.raises(UserError, match="is a resnet18 of another shape than the recipe's"):
        kept_weights(kept, backbone=Backbone(stem="small", width=8), runs_root=tmp_path / "runs")
    with pytest.raises(UserError, match=r"that is not in .*\.weights: begin the run with --weights RUN or FILE"):
        kept_weights("b" * 64, backbone=SMALL, runs_root=tmp_path / "runs")
    other = encoder_of(seed=8)
    write_encoder(other.model, path=path, info=other.info)
    with pytest.raises(UserError, match="holds another encoder than its name says"):
        kept_weights(kept, backbone=SMALL, runs_root=tmp_path / "runs")


def test_the_same_weights_with_other_pixels_or_another_padding_are_kept_beside_each_other(tmp_path: Path) -> None:
    usual, plain = encoder_of(), encoder_of(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    same = SMALL.model_copy(update={"padding": "same"})
    padded = Encoder(model=usual.model, info=usual.info.model_copy(update={"backbone": same}), path=usual.path)
    kept = [keep_weights(each, runs_root=tmp_path) for each in (usual, plain, padded)]
    assert kept[0] == usual.info.weights_hash, "encoders as all others keep their names"
    assert len(set(kept)) == 3
    for identity, each in zip(kept, (usual, plain, padded), strict=True):
        found = kept_weights(identity, backbone=each.info.backbone, runs_root=tmp_path)
        assert (found.info.mean, found.info.std, found.info.backbone) == (each.info.mean, each.info.std, each.info.backbone)


# ----------------------------------------------------------------------------------------------------------------- accuracy


def test_accuracies_count_the_first_guesses_and_break_ties_by_the_lower_class() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 0.0, 2.0]])
    found = accuracies(nn.Identity(), features=scores, labels=torch.tensor([0, 2, 0, 1]), ranks=(1, 2, 3, 9), name="semi1")
    assert [(each.name, each.value) for each in found] == [
        ("semi1_top1", 25.0),
        ("semi1_top2", 50.0),
        ("semi1_top3", 100.0),
        ("semi1_top9", 100.0),
    ]


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = torch.tensor([[1.0, float("nan"), 0.0]])
    with pytest.raises(UserError, match="scores that are not finite: its training diverged"):
        accuracies(nn.Identity(), features=scores, labels=torch.tensor([0]), ranks=(1,), name="semi1")


# -------------------------------------------------------------------------------------------------------- crops of Places205


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (40, 40)])
def test_a_crop_of_a_resized_image_lies_anywhere_in_it_equally_often(height: int, width: int) -> None:
    views = Views(original_size=32, original_resize=36, crop_extent="resized")
    count = 4000
    found = geometry(
        views,
        seed=0,
        epoch=3,
        indices=np.arange(count),
        heights=np.full(count, height),
        widths=np.full(count, width),
    )
    long = 36 * max(height, width) // min(height, width)
    shape = (36, long) if height < width else (long, 36)
    assert found.sizes == (32, 32)
    assert (found.boxes[:, 1] == (0, 0, height, width)).all()
    assert (found.resized[:, 1] == shape).all()
    for axis in (0, 1):
        places = np.bincount(found.windows[:, 1, axis])
        assert len(places) == shape[axis] - 32 + 1
        assert places.min() > 0.6 * count / len(places)
    usual = geometry(
        views.model_copy(update={"crop_extent": "whole"}),
        seed=0,
        epoch=3,
        indices=np.arange(count),
        heights=np.full(count, height),
        widths=np.full(count, width),
    )
    assert (usual.windows[:, 0] == found.windows[:, 0]).all(), "the original view is the same"


# ---------------------------------------------------------------------------------------------------------- whole trainings

NUM_KILLS = 20 if os.environ.get("OBOWLAB_TEST_ALL") else 3


def of_kind(kind: str, folder: Path, *, runs_root: Path, epochs: int) -> Any:
    """Return a recipe that trains a classifier on a kept encoder, frozen or with it."""
    small = small_recipe(folder, dataset="small").recipe.backbone
    model = build_backbone(small, seed=7).eval()
    info = encoder_of().info.model_copy(update={"backbone": small, "weights_hash": weights_hash(model)})
    kept = keep_weights(Encoder(model=model, info=info, path=Path("test")), runs_root=runs_root)
    settings = {
        "frozen": ("method.trunk=frozen", "method.head_start=normal", "method.head_batchnorm=true"),
        "finetuned": ("method.trunk_rate=0.01",),
    }[kind]
    overrides = ("method.name=supervised", f'method.weights="{kept}"', *settings, 'evaluation.protocols=["classes"]')
    return small_recipe(folder, dataset="small", epochs=epochs, overrides=(*overrides, "evaluation.random_baseline=false"))


@pytest.mark.parametrize("kind", ["frozen", "finetuned"])
def test_a_training_that_is_killed_and_continued_ends_as_one_that_was_not(kind: str, tmp_path: Path, data_root: Path) -> None:
    def machine(name: str) -> Machine:
        return Machine(
            data_root=data_root,
            runs_root=tmp_path / name,
            device="cpu",
            loader="torch",
            workers=0,
            checkpoint_every_s=0.05,
        )

    epochs = 3 * NUM_KILLS
    whole = complete(of_kind(kind, tmp_path, runs_root=tmp_path / "whole", epochs=epochs), machine=machine("whole"))
    loaded = of_kind(kind, tmp_path, runs_root=tmp_path / "killed", epochs=epochs)
    total = whole.state.total_steps
    assert total is not None
    for kill in range(NUM_KILLS):
        folder, process = start(loaded, machine=machine("killed"))
        while process.poll() is None and len(folder.metrics()) < (kill + 1) * total // (NUM_KILLS + 1):
            time.sleep(0.005)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = complete(loaded, machine=machine("killed"))
    assert points(folder) == points(whole)
    for name in ("classifier.safetensors", "encoder.safetensors"):
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert folder.results()[0]["measurements"] == whole.results()[0]["measurements"]
    began = read_encoder(next((tmp_path / "killed/.weights").iterdir())).info.weights_hash
    assert (read_encoder(folder.path / "encoder.safetensors").info.weights_hash == began) == (kind == "frozen")


@pytest.fixture
def pretrained(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    return complete(small_recipe(tmp_path, dataset="small", epochs=1, overrides=("evaluation.protocols=[]",)), machine=machine)


QUICK = ("training.epochs=2", "training.batch_size=8", "optimizer.learning_rate=0.1", "views.original_size=24")
QUICK = (*QUICK, "views.original_resize=28")


def test_eval_trains_what_the_protocol_is_and_adds_it_to_the_run(
    pretrained: RunFolder, data_root: Path, tmp_path: Path, obowlab: Obowlab
) -> None:
    roots = ("--runs-root", str(tmp_path / "runs"), "--data-root", str(data_root), "--device", "cpu", "--loader", "torch")
    words = ("eval", pretrained.run_id, "--protocol", "places205", "--dataset", "small", *roots)
    words = (*words, *(word for change in QUICK for word in ("--set", change)))
    code, out, _ = obowlab(*words, "--dry-run")
    assert code == 0
    assert "Would train run places205-s0-" in out
    assert not (tmp_path / "runs/.weights").exists()
    code, out, errors = obowlab(*words)
    assert code == 0, errors
    assert f"Added to run {pretrained.run_id}." in out
    assert (
        "Not comparable with the paper's value: 30 test images instead of 20500, data.dataset small instead of places205" in out
    )
    (result,) = RunFolder.open(pretrained.path).results()
    assert [each["name"] for each in result["measurements"]] == ["places205_top1", "places205_top5"]
    assert result["details"]["not_comparable"].startswith("Not comparable with the paper's value: 30 test images")
    assert result["weights_hash"] == read_encoder(pretrained.path / "encoder.safetensors").info.weights_hash
    head = RunFolder.open(tmp_path / "runs" / result["details"]["trained_in"])
    assert result["details"]["training"]["optimizer"]["learning_rate"] == 0.1
    assert points(head)[-1][1].keys() >= {"loss", "class_accuracy"}, "its curve"
    code, out, errors = obowlab("eval", head.run_id, *roots)
    assert code == 0, errors
    (own,) = RunFolder.open(head.path).results()
    assert own["measurements"] == result["measurements"], "its own classifier once more"
    code, _, errors = obowlab("eval", head.run_id, "--dataset", "synthetic", *roots)
    assert code == 2
    assert "classes: measured is what a run has learned on its own images" in errors
    before = (head.path / "classifier.safetensors").stat().st_mtime_ns
    code, out, _ = obowlab(*words)
    assert code == 0
    assert "is finished; --fresh would train it again" in out
    assert (head.path / "classifier.safetensors").stat().st_mtime_ns == before
    assert len(RunFolder.open(pretrained.path).results()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--protocol", "places205", "--preset", "nobody"), "--protocol places205 has no preset 'nobody'. Known: authors, demo."),
        (("--protocol", "places205", "--protocol", "knn"), "--protocol places205 is a training: give it a command of its own"),
        (("--protocol", "places205", "--random"), "is a training: give it a command of its own, without --recipe, --random"),
        (("--protocol", "semi-1", "--dataset", "small"), "data.image_list names a list (SHA-256 71e82a48ba78) that is not in"),
        (("--protocol", "semi-1", "--list", "no.txt"), "Cannot read --list no.txt: No such file or directory."),
        (
            ("--protocol", "knn", "--preset", "authors"),
            "--preset, --list, --seed and --procs are for protocols that are trainings: ",
        ),
        (("--protocol", "places205", "--set", "evaluation.knn.num_neighbors=3"), "Did you mean 'evaluation.knn.num_neighbours'?"),
        (("--protocol", "places205"), "'places205'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    words: tuple[str, ...], sentence: str, pretrained: RunFolder, tmp_path: Path, obowlab: Obowlab
) -> None:
    roots = ("--runs-root", str(tmp_path / "runs"), "--data-root", str(tmp_path / "data"), "--device", "cpu")
    code, _, errors = obowlab("eval", pretrained.run_id, *words, *roots)
    assert code == 2
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_recipe_that_learns_without_labels_takes_no_weights(pretrained: RunFolder, tmp_path: Path, obowlab: Obowlab) -> None:
    code, _, errors = obowlab("run", "demo", "--weights", pretrained.run_id, "--runs-root", str(tmp_path / "runs"))
    assert code == 2
    assert errors.strip() == (
        "Error: --weights begins a training by labels, but recipe 'demo' has method.name obow: choose one with method.name "
        "supervised, such as tiny-supervised."
    )


def test_a_file_of_pixels_of_its_own_can_be_measured(tmp_path: Path, data_root: Path, obowlab: Obowlab) -> None:
    encoder = encoder_of(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    path = tmp_path / "other.safetensors"
    write_encoder(encoder.model, path=path, info=encoder.info)
    roots = ("--runs-root", str(tmp_path / "runs"), "--data-root", str(data_root), "--device", "cpu", "--loader", "torch")
    changes = (word for change in QUICK for word in ("--set", change))
    code, _, errors = obowlab("eval", str(path), "--protocol", "linear-imagenet", "--dataset", "small", *roots, *changes)
    assert code == 0, errors
    (run,) = [each for each in (tmp_path / "runs").iterdir() if each.name.startswith("linear-imagenet")]
    written = read_encoder(run / "encoder.safetensors").info
    assert (written.mean, written.std, written.weights_hash) == (encoder.info.mean, encoder.info.std, encoder.info.weights_hash)
    (result,) = json.loads(json.dumps(RunFolder.open(run).results()))
    assert result["details"]["view"]["mean"] == [0.5, 0.5, 0.5]


# -------------------------------------------------------------------------------------------------------------------- lists


def test_a_list_chooses_images_by_the_names_their_files_had(tmp_path: Path, image_folder: Path) -> None:
    prepare("listed", source=image_folder, data_root=tmp_path, workers=1)
    split = open_split("listed", "train", data_root=tmp_path)
    names = read_names(split)
    assert names == tuple(sorted(str(each.relative_to(image_folder / "train")) for each in (image_folder / "train").rglob("*.*")))
    chosen = [names[position] for position in (7, 3, 40)]
    file = tmp_path / "few.txt"
    file.write_text("\n".join(chosen) + "\n")
    digest = keep_list(file, dataset="listed", data_root=tmp_path)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert listed(split, digest).tolist() == [3, 7, 40]
    assert num_listed(digest, dataset="listed", data_root=tmp_path) == 3
    prepare("listed", source=image_folder, data_root=tmp_path, workers=1, force=True)
    assert trained_on(open_split("listed", "train", data_root=tmp_path), Data(dataset="listed", image_list=digest)).tolist() == [
        3,
        7,
        40,
    ], "the list stays when images are prepared again"


def test_a_line_without_a_folder_names_the_one_image_called_so(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/3.png"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    prepare("small", source=tmp_path / "source", data_root=tmp_path, workers=1, val_fraction=0.0)
    split = open_split("small", "train", data_root=tmp_path)

    def positions(text: str) -> list[int]:
        (tmp_path / "list.txt").write_text(text)
        return listed(split, keep_list(tmp_path / "list.txt", dataset="small", data_root=tmp_path)).tolist()

    assert positions("3.png\r\n2.png\r\n\r\n") == [1, 3]
    assert positions("b/1.png") == [2]
    for text, sentence in (
        ("1.png", "names 1.png, which several images of 'small' are called: write CLASS/1.png."),
        ("2.png\n4.png\n5.png", "2 of the 3 images of .* are not in 'small', such as 4.png: prepare all of its images"),
        ("2.png\n2.png", "names an image twice"),
        ("\n\n", "names no image"),
    ):
        with pytest.raises(UserError, match=sentence):
            positions(text)
    split.path.with_suffix(".names.gz").unlink()
    with pytest.raises(UserError, match="'small' was prepared without the names of its images"):
        positions("2.png")


def test_both_ways_to_choose_images_at_once_are_refused() -> None:
    overrides = [f'data.image_list="{"a" * 64}"', "data.images_per_class=3"]
    with pytest.raises(UserError, match="image_list and images_per_class both choose images: set one of them"):
        load_recipe("full-supervised", overrides=overrides)


def test_an_encoder_is_fine_tuned_on_the_images_of_a_list(
    pretrained: RunFolder, image_folder: Path, tmp_path: Path, obowlab: Obowlab
) -> None:
    prepare("listed", source=image_folder, data_root=tmp_path / "data", workers=1)
    names = read_names(open_split("listed", "train", data_root=tmp_path / "data"))
    (tmp_path / "few.txt").write_text("".join(f"{name}\n" for name in names[::3]))
    roots = ("--runs-root", str(tmp_path / "runs"), "--data-root", str(tmp_path / "data"), "--device", "cpu", "--loader", "torch")
    words = (
        "eval",
        pretrained.run_id,
        "--protocol",
        "semi-10",
        "--dataset",
        "listed",
        "--list",
        str(tmp_path / "few.txt"),
        *roots,
    )
    words = (*words, *(word for change in QUICK for word in ("--set", change)), "--set", "optimizer.decay_after=[1]")
    code, _, _ = obowlab(*words, "--dry-run")
    assert code == 0
    assert not (tmp_path / "data/listed/lists").exists()
    code, _, errors = obowlab(*words)
    assert code == 0, errors
    (result,) = RunFolder.open(pretrained.path).results()
    assert [each["name"] for each in result["measurements"]] == ["semi10_top1", "semi10_top5"]
    tuned = RunFolder.open(tmp_path / "runs" / result["details"]["trained_in"])
    assert tuned.state.total_steps == 2 * (20 // 8)
    before, after = (read_encoder(run.path / "encoder.safetensors").info.weights_hash for run in (pretrained, tuned))
    assert before != after
