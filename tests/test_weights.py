from __future__ import annotations

import gzip
import math
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from PIL import Image
from torch import Tensor, nn

from obowlab.config import Backbone, Obow, Recipe, Views, load_recipe
from obowlab.errors import UserError
from obowlab.evaluation.features import _entry_writer, frozen, pixel_statistics, weights_hash
from obowlab.methods import Batch, OBoW, OneProcess, ResNet, build_backbone
from obowlab.runs.folder import RunFolder
from obowlab.views.centre import CentreView
from obowlab.weights import info
from obowlab.weights.encoder_file import (
    import_weights,
    load_encoder,
    read_encoder,
    save_encoder,
    write_encoder,
    write_method,
)

State = dict[str, Tensor]
SMALL = Backbone(stem="small", width=4)
NARROW = Backbone(width=8)
"""The authors' stem, as their files have it, with few channels."""


def features(model: nn.Module, *, size: int = 64) -> Tensor:
    with frozen(model):
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5)))


def worn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics, as a trained network has: a lost buffer must show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(7)
    return model


def authors_extractor(encoder: nn.Module) -> State:
    """The same weights under the authors' names."""
    renamed = {}
    for name, tensor in encoder.state_dict().items():
        name = name.replace("conv1.", "Conv.", 1) if name.startswith("conv1.") else name
        name = f"0.{name}" if name.startswith(("Conv.", "bn1.")) else re.sub(r"^layer(\d)", r"\1", name)
        renamed[f"_feature_blocks.{name.replace('0.bn1.', '0.bn.') if name.startswith('0.') else name}"] = tensor
    return renamed


class AuthorsLayer(nn.Module):
    """One level of their prediction head, under their names."""

    def __init__(self, index: int, *, channels: int, features: int):
        super().__init__()
        self.add_module(f"b{index}_fc", nn.Linear(channels, 2 * features, bias=False))
        self.add_module(f"b{index}_bn", nn.BatchNorm1d(2 * features))
        self.add_module(f"b{index}_last_layer", nn.Linear(2 * features, features))


def authors_model(*, levels: int, monitor: bool, num_words: int = 24) -> tuple[State, nn.Module, nn.Module]:
    """A full model as their code saves it, with its student and teacher; written without our reader."""
    torch.manual_seed(levels)
    student, teacher = (worn(build_backbone(NARROW, seed=seed), seed) for seed in (1, 2))
    state = {"_alpha": torch.tensor([0.995]), "_iteration": torch.tensor([120.0])}
    state |= {f"feature_extractor.{name}": tensor for name, tensor in authors_extractor(student).items()}
    state |= {f"feature_extractor_teacher.{name}": tensor for name, tensor in authors_extractor(teacher).items()}
    for index in range(levels):
        channels = 64 // 2 ** (levels - 1 - index)
        layer = worn(AuthorsLayer(index, channels=channels, features=64), index)
        state |= {f"bow_predictor.layers_w.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
        level = f"bow_extractor.bow_extractor.{index}"
        state[f"{level}._embedding"] = torch.rand(num_words, channels)
        state[f"{level}._embedding_ptr"] = torch.tensor([8 * index + 8])
        state[f"{level}._min_distance_mean"] = torch.tensor([1.5 + index])
        state[f"{level}._track_num_batches"] = torch.tensor([120.0])
    state["bow_predictor.scale"] = torch.full((levels,), 5.0)
    if monitor:
        classifier = nn.Module()
        classifier.batch_norm = nn.BatchNorm2d(64, affine=False)
        classifier.prediction_layer = nn.Linear(64, 11)
        state |= {f"linear_classifier.layers.{name}": tensor for name, tensor in worn(classifier).state_dict().items()}
    return state, student, teacher


def save(path: Path, state: State, *, module: bool = False, legacy: bool = False) -> Path:
    """Write a file as the authors' solver does."""
    named = {f"module.{name}": tensor for name, tensor in state.items()} if module else state
    torch.save({"epoch": 3, "network": named, "meters": None}, path, _use_new_zipfile_serialization=not legacy)
    return path


# ------------------------------------------------------------------------------------------------------- our own files


def test_an_encoder_file_gives_back_the_encoder(tmp_path: Path) -> None:
    encoder = worn(build_backbone(SMALL, seed=0)).train()
    recipe = Recipe(backbone=SMALL, views=Views(original_size=32, original_resize=36))
    path = tmp_path / "encoder.safetensors"
    info = save_encoder(encoder, path=path, recipe=recipe, fingerprint="f" * 64, source="run-1")
    assert encoder.training
    loaded = load_encoder(str(path), runs_root=tmp_path)
    assert loaded.info == info
    assert (info.original_size, info.original_resize, info.source) == (32, 36, "run-1")
    assert weights_hash(loaded.model) == info.weights_hash == weights_hash(encoder)
    assert not loaded.model.training
    assert torch.equal(features(loaded.model, size=32), features(encoder, size=32))
    first = path.read_bytes()
    save_encoder(encoder, path=path, recipe=recipe, fingerprint="f" * 64, source="run-1")
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["encoder.safetensors"]


def test_encoder_files_that_will_not_do(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    encoder = build_backbone(SMALL, seed=0)
    save_encoder(encoder, path=path, recipe=Recipe(backbone=SMALL), fingerprint=None, source="test")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="hash differs"):
        read_encoder(path)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_encoder(path)
    wrong = Recipe(backbone=Backbone(stem="small", width=5))
    save_encoder(encoder, path=path, recipe=wrong, fingerprint=None, source="test")
    with pytest.raises(UserError, match=r"of another shape: conv1\.weight"):
        read_encoder(path)
    with pytest.raises(UserError, match="no weights file"):
        load_encoder(str(tmp_path / "absent.pth"), runs_root=tmp_path)
    with pytest.raises(UserError, match="There is no run 'absent'"):
        load_encoder("absent", runs_root=tmp_path)


def test_the_encoder_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(load_recipe("demo"), seed=3, runs_root=tmp_path)
    with pytest.raises(UserError, match=f"'{folder.run_id}' has no encoder yet .it is created."):
        load_encoder(folder.run_id, runs_root=tmp_path)
    encoder = build_backbone(SMALL, seed=0)
    recipe = Recipe(backbone=SMALL)
    save_encoder(
        encoder,
        path=folder.path / "encoder.safetensors",
        recipe=recipe,
        fingerprint=folder.info.fingerprint,
        source=folder.run_id,
    )
    for ref in (folder.run_id, folder.run_id[:-2], str(folder.path)):
        assert weights_hash(load_encoder(ref, runs_root=tmp_path).model) == weights_hash(encoder)


def test_an_encoder_keeps_the_mean_and_deviation_of_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    info = save_encoder(build_backbone(SMALL), path=path, recipe=Recipe(backbone=SMALL), fingerprint=None, source="test")
    other = info.model_copy(update={"mean": (0.0, 0.25, 0.5), "std": (1.0, 0.5, 2.0)})
    write_encoder(read_encoder(path).model, path=path, info=other)
    encoder = read_encoder(path)
    assert encoder.info == other
    assert pixel_statistics(encoder) == pixel_statistics(encoder.model) == (other.mean, other.std)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    views = Views(original_size=40, original_resize=40)
    shown = CentreView(resize=views.original_resize, size=views.original_size, mean=other.mean, std=other.std)
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor(other.mean).view(3, 1, 1)) / torch.tensor(
        other.std
    ).view(3, 1, 1)
    torch.testing.assert_close(shown(Image.fromarray(image)), expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_the_authors_feature_extractor(tmp_path: Path, arch: str) -> None:
    backbone = Backbone(arch=arch, width=4)
    encoder = worn(build_backbone(backbone, seed=0))
    imported = import_weights(save(tmp_path / "extractor.pth.tar", authors_extractor(encoder), module=arch == "resnet34"))
    assert imported.found.release.key == "obow-extractor"
    assert imported.info.backbone == backbone
    assert imported.method is None
    assert torch.equal(features(imported.encoder), features(encoder))


@pytest.mark.parametrize("wrapper", ["network", "state_dict", None])
def test_torchvisions_naming(tmp_path: Path, wrapper: str | None) -> None:
    model = worn(torchvision.models.resnet18(num_classes=9))  # the authors' export: fc holds the words
    path = tmp_path / "resnet18.pth"
    torch.save({wrapper: model.state_dict()} if wrapper else model.state_dict(), path)
    imported = import_weights(path)
    assert imported.found.release.key == ("obow-torchvision" if wrapper == "network" else "torchvision")
    assert imported.info.backbone == Backbone()
    assert sorted(imported.unused) == ["fc.bias", "fc.weight"]
    model.fc = nn.Identity()
    torch.testing.assert_close(features(imported.encoder), features(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "monitor", "module", "legacy"),
    [(1, False, False, False), (1, True, True, False), (2, False, True, True), (2, True, False, False)],
)
def test_the_authors_full_model(tmp_path: Path, levels: int, monitor: bool, module: bool, legacy: bool) -> None:
    state, student, teacher = authors_model(levels=levels, monitor=monitor)
    imported = import_weights(save(tmp_path / "model.pth.tar", state, module=module, legacy=legacy))
    method = imported.method
    assert method is not None
    assert imported.found.release.key == "obow"
    assert imported.info.backbone == NARROW
    assert method.method == Obow(levels=("conv5",) if levels == 1 else ("conv4", "conv5"), num_words=24, kappa=5.0)
    assert torch.equal(features(imported.encoder), features(student))
    assert torch.equal(features(method.teacher), features(teacher))
    for index, level in enumerate(method.method.levels):
        vocabulary = method.vocabularies[level]
        words = state[f"bow_extractor.bow_extractor.{index}._embedding"]
        assert torch.equal(vocabulary.words, words)
        assert (vocabulary.msd.item(), vocabulary.pointer.item()) == (1.5 + index, 8 * index + 8)
        # G(V) once more, by the formula of docs/method.md, section 5.1, on the authors' tensors.
        layer = f"bow_predictor.layers_w.{index}.b{index}"
        hidden = nn.functional.normalize(words) @ state[f"{layer}_fc.weight"].T
        hidden = (hidden - state[f"{layer}_bn.running_mean"]) / (state[f"{layer}_bn.running_var"] + 1e-5).sqrt()
        out = hidden.relu() @ state[f"{layer}_last_layer.weight"].T + state[f"{layer}_last_layer.bias"]
        with frozen(method):
            torch.testing.assert_close(method.heads[level](words), nn.functional.normalize(out), rtol=1e-4, atol=1e-5)
    assert (method.monitor is not None) == monitor
    if monitor:
        assert torch.equal(method.monitor.fc.weight, state["linear_classifier.layers.prediction_layer.weight"])
        assert torch.equal(method.monitor.norm.running_mean, state["linear_classifier.layers.batch_norm.running_mean"])
    # Every tensor of the file is in the method or named as unused: as many values, counted apart.
    ours = {name: t for name, t in method.state_dict().items() if not name.endswith(("inserted_at", "msd_started"))}
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for name, t in state.items() if name not in imported.unused)
    assert set(imported.unused) <= set(state)


def test_an_imported_model_goes_on_learning(tmp_path: Path) -> None:
    state, _, _ = authors_model(levels=2, monitor=False)
    method = import_weights(save(tmp_path / "model.pth.tar", state)).method
    assert method is not None
    views = {"crops": torch.randn(4, 3, 64, 64)}
    uniforms = torch.rand(4, method.num_uniforms, dtype=torch.float64)
    output = method.train()(Batch(original=torch.randn(4, 3, 160, 160), views=views, uniforms=uniforms, step=120))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.metrics["word_age_conv5"].item() == pytest.approx(0)


def test_saving_a_whole_imported_model(tmp_path: Path) -> None:
    state, _, _ = authors_model(levels=2, monitor=True)
    imported = import_weights(save(tmp_path / "model.pth.tar", state))
    method_file = write_method(imported, path=tmp_path / "obow.safetensors")
    again = OBoW(imported.method.method, backbone=NARROW, total_steps=1, seed=5, num_classes=11, comm=OneProcess())
    again.load_state_dict(safetensors.torch.load_file(method_file), strict=True)
    assert weights_hash(again) == weights_hash(imported.method)


def lose(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[name]

    return change


def put(name: str, tensor: Tensor) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lose("feature_extractor_teacher._feature_blocks.0.bn.running_var"),
            r"missing: feature_extractor_teacher\._feature_blocks\.0\.bn\.running_var",
        ),
        (
            lose("bow_extractor.bow_extractor.1._min_distance_mean"),
            r"missing: bow_extractor\.bow_extractor\.1\._min_distance_mean",
        ),
        (lose("bow_predictor.layers_w.0.b0_fc.weight"), r"missing: bow_predictor\.layers_w\.0\.b0_fc\.weight"),
        (lose("bow_predictor.scale"), "one kappa"),
        (put("something_else", torch.zeros(1)), "unexpected: something_else"),
        (put("feature_extractor._feature_blocks.4.9.conv1.weight", torch.zeros(1)), "2-2-2-3 blocks"),
        (put("bow_extractor.bow_extractor.0._embedding", torch.zeros(24, 7)), "7 channels"),
        (put("bow_extractor.bow_extractor.0._embedding", torch.zeros(25, 32)), "25, 24"),
        (
            put("bow_predictor.layers_w.1.b1_last_layer.bias", torch.zeros(65)),
            r"of another shape: bow_predictor\.layers_w\.1\.b1_last_layer\.bias",
        ),
    ],
)
def test_full_models_that_will_not_do(tmp_path: Path, change: Callable[[State], None], message: str) -> None:
    state, _, _ = authors_model(levels=2, monitor=True)
    change(state)
    with pytest.raises(UserError, match=message):
        import_weights(save(tmp_path / "model.pth.tar", state))


class Surprise:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code from the file has run",))


def test_files_that_are_no_plain_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"network": {"conv1.weight": Surprise()}}, path)
    with pytest.raises(UserError, match=r"it holds a Python object \(.*print\).*save model\.state_dict\(\) instead"):
        import_weights(path)
    path.write_bytes(pickle.dumps(Surprise(), protocol=2))
    with pytest.raises(UserError, match="not a torch file of plain tensors"):
        import_weights(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(UserError, match="it is a text, which begins with 'not a file of torch'"):
        import_weights(path)
    save(path, {"conv1.weight": torch.zeros(4, 3, 7, 7)}, legacy=True)
    for length in range(0, path.stat().st_size - 1, 23):
        (tmp_path / "short.pth").write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match=r"not a torch file of plain tensors|it is empty"):
            import_weights(tmp_path / "short.pth")
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no state dict"):
        import_weights(path)
    torch.save({"network": {"layers.0.weight": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match=r"its first key is 'layers\.0\.weight'"):
        import_weights(path)
    assert "has run" not in capsys.readouterr().out


def test_missing_and_left_over_keys_of_an_encoder(tmp_path: Path) -> None:
    state = build_backbone(NARROW).state_dict()
    del state["bn1.running_mean"]
    state["layer1.0.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match=r"missing: bn1\.running_mean; unexpected: layer1\.0\.extra"):
        load_encoder(str(tmp_path / "encoder.pth"), runs_root=tmp_path)


def test_the_encoder_of_an_import_is_a_resnet(tmp_path: Path) -> None:
    state, _, _ = authors_model(levels=1, monitor=False)
    assert isinstance(load_encoder(str(save(tmp_path / "model.pth.tar", state)), runs_root=tmp_path).model, ResNet)


def saved(path: Path, state: object) -> bytes:
    torch.save(state, path)
    return path.read_bytes()


def zipped(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    path, other = tmp_path / name, tmp_path / "other"
    state = build_backbone(SMALL).state_dict()
    whole = saved(other, state)
    cases = {
        b"": "it is empty",
        b"\n<!DOCTYPE html><html>Sign in</html>": "it is a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "git lfs pull",
        gzip.compress(b"x"): "packed archive",
        saved(other, nn.Linear(2, 2)): r"a Python object \(torch\.nn\.modules\.linear\.Linear\)",
        whole[: len(whole) // 2]: "is cut off",
        zipped(other, {"readme.txt": b"x"}): "a zip archive with no weights file",
        zipped(other, {"a.pth": whole, "b.pth": whole}): "several weights files: a.pth, b.pth",
        zipped(other, {"a.pth": b"<html>"}): r"\(a\.pth\) is no weights file: it is a web page",
        safetensors.torch.save(state)[:500]: "not a readable safetensors file",
        saved(other, {"state_dict": {**state, "epoch": 3}}): "'epoch' is no tensor but int",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as told:
            read_encoder(path)
        assert "weights_only" not in str(told.value)
        assert "\n" not in str(told.value)


def odd_files(folder: Path) -> dict[str, str]:
    """Write files that are no weights file of ours, and return what each of them must be called."""
    state = build_backbone(SMALL).state_dict()
    whole = safetensors.torch.save(state)
    half = {name: tensor for number, (name, tensor) in enumerate(state.items()) if number < 40}
    files = {
        **{f"cut{length}.safetensors": (whole[:length], "cut off") for length in (9, 100, 5000, len(whole) - 9)},
        "longer.safetensors": (whole + b"xx", "its length is not what its header says"),
        "header.safetensors": (whole[:20] + b"\xff" + whole[21:], "invalid UTF-8 in header"),
        "model-00001-of-00002.safetensors": (safetensors.torch.save(half), "is one of 2 files that hold the weights together"),
        "index.json": (b'{"metadata": {"total_size": 5}, "weight_map": {}}', "the index of weights that lie in several files"),
        "zeros.pth": (bytes(4096), "it holds zeros"),
        "denied.pth": (b"Access denied\n", "it is a text, which begins with 'Access denied'"),
        "array.pth": (b"\x93NUMPY\x01\x00", "it is an array of numpy"),
        "picture.pth": (b"\x89PNG\r\n\x1a\n", "it is damaged or of another kind"),
        "script.pt": (zipped(folder / "other", {"a/data.pkl": b"", "a/code/__torch__.py": b""}), "it is a TorchScript module"),
        "program.pt2": (zipped(folder / "other", {"a/archive_format": b"pt2"}), "it is a program of torch.export"),
    }
    locked = bytearray(zipped(folder / "other", {"a.pth": b"x"}))
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    files["locked.zip"] = (bytes(locked), "a zip archive with a password")
    (folder / "other").unlink()
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: message for name, (_, message) in files.items()}


def test_odd_files_are_named_with_torch_and_without(tmp_path: Path) -> None:
    for name, message in odd_files(tmp_path).items():
        for look in (info.peek, read_encoder):
            with pytest.raises(UserError, match=message) as told:
                look(tmp_path / name)
            assert str(told.value).count(". ") == 0, "one sentence"


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    with pytest.raises(UserError, match=r"net is a folder, not a weights file\."):
        load_encoder(str(tmp_path / "net"), runs_root=tmp_path)
    (tmp_path / "net" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"name the file in it: model\.safetensors"):
        load_encoder(str(tmp_path / "net"), runs_root=tmp_path)
    with pytest.raises(UserError, match="There is no run 'neither'"):
        load_encoder("neither", runs_root=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_other_floating_point_types_become_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = worn(build_backbone(NARROW, seed=2)).state_dict()
    other = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = tmp_path / f"net{suffix}"
    torch.save(other, path) if suffix == ".pth" else safetensors.torch.save_file(other, path)
    found = read_encoder(path).model.state_dict()
    assert all(found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert all(torch.equal(found[name], other[name].to(found[name].dtype)) for name in state)


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "module.encoder_q.", "_orig_mod.", "model.backbone."])
def test_names_may_have_a_prefix(tmp_path: Path, prefix: str) -> None:
    model = worn(build_backbone(NARROW, seed=2))
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": {**state, "queue": torch.zeros(3)} if prefix != "module." else state}, tmp_path / "net.pth")
    assert torch.equal(features(read_encoder(tmp_path / "net.pth").model), features(model))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.zip"])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "zip", "lightning"])
def test_weights_are_read_by_what_is_in_the_file(tmp_path: Path, name: str, kind: str) -> None:
    encoder = worn(build_backbone(NARROW, seed=3))
    state = {**encoder.state_dict(), "fc.weight": torch.ones(3, 64), "fc.bias": torch.ones(3)}
    other = tmp_path / "other"
    content = {
        "torch": lambda: saved(other, state),
        "safetensors": lambda: safetensors.torch.save(state),
        "zip": lambda: zipped(other, {"release/model.pth": saved(other, state), "release/config.yaml": b""}),
        "lightning": lambda: saved(
            other,
            {
                "epoch": 3,
                "pytorch-lightning_version": "2.1",
                "state_dict": {f"backbone.{key}": tensor for key, tensor in state.items()} | {"head.weight": torch.ones(2)},
            },
        ),
    }[kind]()
    (tmp_path / name).write_bytes(content)
    assert torch.equal(features(read_encoder(tmp_path / name).model), features(encoder))
    prefix = "backbone." if kind == "lightning" else ""
    assert set(import_weights(tmp_path / name).unused) >= {f"{prefix}fc.weight", f"{prefix}fc.bias"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor(0), math.nan), "not finite: 147 of 1176 values of conv1.weight"),
        (lambda tensor: tensor.index_fill(0, torch.tensor(0), -math.inf), "not finite"),
        (lambda tensor: tensor.half().index_fill(0, torch.tensor(0), math.inf), "not finite"),
        (lambda tensor: tensor.long(), "no floating-point numbers: conv1.weight is of type int64"),
        (lambda tensor: tensor > 0, "conv1.weight is of type bool"),
    ],
)
def test_weights_that_are_no_finite_floating_point_numbers(
    tmp_path: Path, suffix: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    state = build_backbone(NARROW).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"])
    path = tmp_path / f"bad{suffix}"
    torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=message):
        read_encoder(path)


def test_our_own_files_are_checked_too(tmp_path: Path) -> None:
    model = build_backbone(SMALL)
    nn.init.constant_(model.conv1.weight, math.nan)
    save_encoder(model, path=tmp_path / "e.safetensors", recipe=Recipe(backbone=SMALL), fingerprint=None, source="a run")
    with pytest.raises(UserError, match="not finite"):
        read_encoder(tmp_path / "e.safetensors")


@pytest.mark.parametrize("full", [True, False])
def test_weights_without_num_batches_tracked(tmp_path: Path, full: bool) -> None:
    state = authors_model(levels=2, monitor=True)[0] if full else dict(build_backbone(NARROW, seed=2).state_dict())
    before = read_encoder(save(tmp_path / "with.pth", state)).model
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    after = read_encoder(save(tmp_path / "without.pth", old)).model
    assert torch.equal(features(after), features(before))


def test_missing_keys_have_the_names_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.pth"
    for rename, told in (
        (lambda name: f"module.backbone.{name}", r"missing: module\.backbone\.bn1\.bias"),
        (lambda name: f"module.{name}", r"missing: module\.bn1\.bias"),
    ):
        state = {rename(name): tensor for name, tensor in build_backbone(NARROW).state_dict().items() if name != "bn1.bias"}
        torch.save(state, path)
        with pytest.raises(UserError, match=told):
            read_encoder(path)
    extractor = authors_extractor(build_backbone(NARROW))
    del extractor["_feature_blocks.0.bn.bias"]
    torch.save({f"module.{name}": tensor for name, tensor in extractor.items()}, path)
    with pytest.raises(UserError, match=r"missing: module\._feature_blocks\.0\.bn\.bias"):
        read_encoder(path)


def test_several_networks_in_a_file_are_named(tmp_path: Path) -> None:
    state = build_backbone(NARROW).state_dict()
    both = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"several networks \('network > student\.', 'network > teacher\.'\)"):
        read_encoder(save(tmp_path / "both.pth", both))


def test_no_assert_guards_a_weights_file(tmp_path: Path) -> None:
    """What is refused is refused by `python -O` too, which leaves assertions out."""
    state = build_backbone(NARROW).state_dict()
    state["layer1.0.conv1.weight"][0] = math.nan
    path = save(tmp_path / "nan.pth", state)
    code = "import sys; from obowlab.cli import main; sys.exit(main(['weights', 'import', sys.argv[1], '--out', sys.argv[2]]))"
    words = [sys.executable, "-O", "-c", code, str(path), str(tmp_path / "out.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "weights that are not finite" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_features_that_overflow_are_refused(tmp_path: Path) -> None:
    rows = np.full((1, 4), np.inf, np.float32)
    with (
        pytest.raises(UserError, match="features that are not finite"),
        _entry_writer(tmp_path / "entry", key="k", count=1) as writer,
    ):
        writer.append(rows)
