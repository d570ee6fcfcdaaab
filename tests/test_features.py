from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from obowlab.config import Backbone, Classes, Data, Evaluation, FewShot, Knn, Linear, Machine, Recipe, Views
from obowlab.data.datasets import open_split
from obowlab.errors import UserError
from obowlab.evaluation import EVALUATORS, Result, evaluate, features
from obowlab.evaluation.features import FeatureStore, frozen, weights_hash
from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.views.views import MEAN, STD

VIEWS = Views(original_size=24, original_resize=28, num_crops=1, crop_size=16)
CPU = torch.device("cpu")


@pytest.fixture
def encoder() -> ResNet:
    return build_backbone(Backbone(stem="small", width=4), seed=0)


@pytest.fixture
def recipe() -> Recipe:
    measured = Evaluation(
        fewshot=FewShot(num_ways=3, num_episodes=20), linear=Linear(epochs=3, batch_size=16), knn=Knn(num_neighbours=5)
    )
    return Recipe(data=Data(dataset="small"), views=VIEWS, evaluation=measured)


@pytest.fixture
def machine(data_root: Path) -> Machine:
    return Machine(data_root=data_root, workers=0, loader="torch")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every pass over the images: split and number of images."""
    made: list[tuple[str, int]] = []
    real = features.centre_loader

    def counting(split, *, indices, **rest):
        made.append((split.name, len(indices)))
        return real(split, indices=indices, **rest)

    monkeypatch.setattr(features, "centre_loader", counting)
    return made


@pytest.fixture
def open_store(encoder: ResNet, recipe: Recipe, data_root: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    def store(said: list[str] | None = None, **changes: object) -> FeatureStore:
        settings = {"encoder": encoder, "recipe": recipe, **changes}
        return FeatureStore(
            **settings,
            dataset=None,
            data_root=data_root,
            runs_root=tmp_path,
            cache_dir=tmp_path / "features",
            device=CPU,
            backend="torch",
            workers=0,
            channels_last=True,
            report=(said if said is not None else []).append,
        )

    return store


def test_features_equal_torchvisions_transforms(
    encoder: ResNet, data_root: Path, open_store: Callable[..., FeatureStore]
) -> None:
    split = open_split("small", "val", data_root=data_root)
    transform = transforms.Compose(
        [transforms.Resize(28), transforms.CenterCrop(24), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    pictures = [Image.open(io.BytesIO(bytes(split.jpeg(i)))).convert("RGB") for i in range(split.num_images)]
    images = torch.stack([transform(picture) for picture in pictures])
    with frozen(encoder):
        expected, mirrored = encoder(images), encoder(images.flip(3))
    centre_got, mirrored_got = open_store().get("val", views=("centre", "mirrored"))
    torch.testing.assert_close(centre_got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored_got, mirrored, rtol=1e-4, atol=1e-5)
    assert (expected - mirrored).abs().max() > 1e-3


def test_an_encoder_is_shown_pixels_normalised_in_its_own_way(
    encoder: ResNet, data_root: Path, open_store: Callable[..., FeatureStore]
) -> None:
    imagenets = open_store().get("val")[0]
    encoder.pixel_mean, encoder.pixel_std = (0.0, 0.25, 0.5), (1.0, 0.5, 2.0)
    own = open_store().get("val")[0]  # not those that are kept of the same weights
    assert not torch.equal(own, imagenets)
    split = open_split("small", "val", data_root=data_root)
    transform = transforms.Compose(
        [
            transforms.Resize(28),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(encoder.pixel_mean, encoder.pixel_std),
        ]
    )
    pictures = [Image.open(io.BytesIO(bytes(split.jpeg(i)))).convert("RGB") for i in range(split.num_images)]
    with frozen(encoder):
        expected = encoder(torch.stack([transform(picture) for picture in pictures]))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_an_encoders_own_pixels_are_no_other_protocol(encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path) -> None:
    (usual,) = run(encoder, recipe, machine, tmp_path, protocols=("knn",))
    encoder.pixel_mean, encoder.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    (own,) = run(encoder, recipe, machine, tmp_path, protocols=("knn",))
    assert own.protocol_hash == usual.protocol_hash
    assert (usual.details["view"]["mean"], own.details["view"]["mean"]) == (list(MEAN), [0.0, 0.0, 0.0])


def test_kept_features_are_used_again(open_store: Callable[..., FeatureStore], passes: list[tuple[str, int]]) -> None:
    first = open_store().get("train", views=("centre", "mirrored"))
    assert passes == [("train", 60)]  # both views in one pass
    again = open_store().get("train", views=("mirrored", "centre"))
    assert passes == [("train", 60)]
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])


def test_other_weights_images_or_views_are_other_features(
    encoder: ResNet, recipe: Recipe, open_store: Callable[..., FeatureStore], passes: list[tuple[str, int]]
) -> None:
    open_store().get("train")
    with torch.no_grad():
        encoder.bn1.running_mean[0] += 1e-6
    open_store().get("train")
    fewer = recipe.model_copy(update={"data": Data(dataset="small", images_per_class=4)})
    assert len(open_store(recipe=fewer).get("train")[0]) == 20
    smaller = recipe.model_copy(update={"views": VIEWS.model_copy(update={"original_resize": 30})})
    open_store(recipe=smaller).get("train")
    assert passes == [("train", 60), ("train", 60), ("train", 20), ("train", 60)]


def test_the_same_weights_with_another_padding_are_another_encoder(
    encoder: ResNet, open_store: Callable[..., FeatureStore], passes: list[tuple[str, int]]
) -> None:
    padded = build_backbone(Backbone(stem="small", width=4, padding="same"), seed=0)
    padded.load_state_dict(encoder.state_dict())
    stores = open_store(), open_store(encoder=padded)
    usual, same = (store.get("train")[0] for store in stores)
    assert passes == [("train", 60), ("train", 60)]
    assert not torch.allclose(usual, same, atol=1e-3)
    places = [store.place_beside("voc07-svm", {}) for store in stores]
    assert places[0] != places[1]


@pytest.mark.parametrize("harm", ["flip a bit", "cut short", "lose the label"])
def test_damaged_features_are_noticed(
    open_store: Callable[..., FeatureStore], passes: list[tuple[str, int]], tmp_path: Path, harm: str
) -> None:
    (sound,) = open_store().get("val")
    sound = sound.clone()
    (file,) = (tmp_path / "features").glob("*/features.npy")
    content = bytearray(file.read_bytes())
    if harm == "flip a bit":
        content[-3] ^= 1
        file.write_bytes(content)
    elif harm == "cut short":
        file.write_bytes(content[:-100])
    else:
        (file.parent / "entry.json").unlink()
    said: list[str] = []
    (again,) = open_store(said).get("val")
    assert torch.equal(sound, again)
    assert len(passes) == 2
    assert len(said) == 1
    assert "damaged" in said[0]


def test_a_killed_pass_leaves_nothing(
    encoder: ResNet, open_store: Callable[..., FeatureStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = features.centre_loader

    def breaking(*args, **rest):
        for number, batch in enumerate(real(*args, **rest)):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features, "BATCH_SIZE", 8)
    monkeypatch.setattr(features, "centre_loader", breaking)
    encoder.train()
    with pytest.raises(KeyboardInterrupt):
        open_store().get("val")
    assert list((tmp_path / "features").iterdir()) == []
    assert encoder.training


def test_a_cache_that_cannot_be_written(open_store: Callable[..., FeatureStore], tmp_path: Path) -> None:
    (tmp_path / "features").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="--runs-root"):
        open_store().get("val")


def test_frozen_restores_every_mode(encoder: ResNet) -> None:
    encoder.train()
    encoder.layer1.eval()
    before = {name: module.training for name, module in encoder.named_modules()}
    with frozen(encoder):
        assert not any(module.training for module in encoder.modules())
        assert not encoder(torch.zeros(1, 3, 24, 24)).requires_grad
    assert {name: module.training for name, module in encoder.named_modules()} == before


def test_the_weights_hash_sees_values_and_nothing_else(encoder: ResNet) -> None:
    before = weights_hash(encoder)
    assert weights_hash(encoder.to(memory_format=torch.channels_last)) == before
    assert weights_hash(encoder.eval()) == before
    with torch.no_grad():
        encoder.layer4[1].conv2.weight[-1, -1, -1, -1] += 1e-6
    assert weights_hash(encoder) != before


def run(encoder: ResNet, recipe: Recipe, machine: Machine, cache_dir: Path, **rest: object) -> list[Result]:
    return evaluate(
        encoder,
        recipe=recipe,
        machine=machine,
        subject="student",
        cache_dir=cache_dir,
        device=CPU,
        report=lambda line: None,
        **rest,
    )


def test_evaluate_runs_every_protocol(
    encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path, passes: list[tuple[str, int]]
) -> None:
    encoder.train()
    results = run(encoder, recipe, machine, tmp_path)
    assert encoder.training
    assert sorted(passes) == [("train", 60), ("val", 30)]  # one pass per split for all protocols
    assert [result.protocol for result in results] == ["fewshot", "linear", "knn"]
    names = [measurement.name for result in results for measurement in result.measurements]
    assert names == ["fewshot_1shot", "fewshot_5shot", "linear_top1", "knn_top1"]
    for result in results:
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
        assert (result.subject, result.weights_hash) == ("student", weights_hash(encoder))
        assert all(0 <= m.value <= 100 and m.interval > 0 for m in result.measurements)
    assert results[1].details["training_images"] == 60
    assert len({result.protocol_hash for result in results}) == 3
    again = run(encoder, recipe, machine, tmp_path)
    assert [r.measurements for r in again] == [r.measurements for r in results]
    assert [r.protocol_hash for r in again] == [r.protocol_hash for r in results]


OF_DETECTORS = ("voc-detection", "coco-detection")
"""What test_detection.py and test_mask_rcnn.py test, as test_voc.py does `voc07-svm`."""


@pytest.mark.parametrize("protocol", [name for name in EVALUATORS if name not in ("voc07-svm", *OF_DETECTORS)])
def test_the_protocol_hash_is_that_of_what_matters(
    encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path, protocol: str
) -> None:
    def digest(changed: Recipe, on: Machine = machine) -> str:
        return run(encoder, changed, on, tmp_path, protocols=(protocol,), classifier=classifier)[0].protocol_hash

    def with_evaluation(**changes: object) -> Recipe:
        return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=changes)})

    classifier = nn.Linear(encoder.num_features, 5)
    reference = digest(recipe)
    changed = {
        "classes": with_evaluation(classes=Classes(ranks=(1, 2))),
        "fewshot": with_evaluation(fewshot=FewShot(num_ways=3, num_episodes=21)),
        "linear": with_evaluation(linear=Linear(epochs=2, batch_size=16)),
        "knn": with_evaluation(knn=Knn(num_neighbours=6)),
    }
    for name, other in changed.items():
        assert (digest(other) != reference) == (name == protocol)
    assert (
        digest(recipe.model_copy(update={"title": "another"}), machine.model_copy(update={"channels_last": False})) == reference
    )
    fewer = recipe.model_copy(update={"data": Data(dataset="small", images_per_class=4)})
    assert (digest(fewer) != reference) == (protocol == "classes" or "train" in EVALUATORS[protocol].needs(recipe.evaluation))
    slower = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"learning_rate": 0.001})})
    assert (digest(slower) != reference) == (protocol == "classes"), "of which the training is a part"


def test_a_class_list_counts_by_its_classes_not_its_name(
    encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path
) -> None:
    def digest(file: str, names: str) -> str:
        (tmp_path / file).write_text(names)
        fewshot = FewShot(num_ways=3, num_episodes=20, classes=str(tmp_path / file))
        changed = recipe.model_copy(update={"evaluation": Evaluation(fewshot=fewshot)})
        return run(encoder, changed, machine, tmp_path, protocols=("fewshot",))[0].protocol_hash

    four = "class_0\nclass_1\nclass_2\nclass_3\n"
    assert digest("one.txt", four) == digest("two.txt", four) != digest("one.txt", four + "class_4\n")


def test_unknown_protocols_and_data_sets(encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        run(encoder, recipe, machine, tmp_path, protocols=("liner",))
    with pytest.raises(UserError, match="absent"):
        run(encoder, recipe, machine, tmp_path, dataset="absent")


def test_another_data_set_is_used_whole(encoder: ResNet, recipe: Recipe, machine: Machine, tmp_path: Path) -> None:
    elsewhere = recipe.model_copy(update={"data": Data(dataset="other", images_per_class=4)})
    (result,) = run(encoder, elsewhere, machine, tmp_path, protocols=("knn",), dataset="small")
    assert result.details["training_images"] == 60
    assert result.details["dataset"] == "small"
    assert np.isfinite(result.measurements[0].value)
