"""Encoders for use elsewhere: every format, read as its readers do, and refused where there is no such network."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from PIL import Image
from torch import nn

from obowlab.config import Backbone, Recipe, Views, load_recipe
from obowlab.config.loading import recipe_files
from obowlab.errors import UserError
from obowlab.evaluation.features import frozen
from obowlab.methods import build_backbone
from obowlab.weights import encoder_file, standalone
from obowlab.weights.encoder_file import Encoder, info_of, load_encoder, read_encoder
from obowlab.weights.export import export, module_text, plain_network, timm_config
from obowlab.weights.formats import FORMATS, choose_format, refuse_format
from obowlab.weights.info import EncoderInfo

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50")
NARROW = [Backbone(arch=arch, stem=stem, width=width) for arch in ARCHS for stem, width in (("small", 6), ("imagenet", 5))]
USUAL = [Backbone(arch=arch) for arch in ARCHS[1:]]


def encoder_of(backbone: Backbone, *, size: int = 36, resize: int = 40, source: str = "test") -> Encoder:
    """An encoder whose batch norms have statistics, as a trained one has: a lost buffer must show."""
    model, generator = build_backbone(backbone, seed=0), torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.num_batches_tracked.fill_(7)
    recipe = Recipe(backbone=backbone, views=Views(original_size=size, original_resize=resize))
    return Encoder(model=model.eval(), info=info_of(model, recipe=recipe, source=source, fingerprint=None), path=Path("test"))


def features(model: nn.Module, *, size: int = 36) -> torch.Tensor:
    with frozen(model):
        return model(torch.randn(3, 3, size, size + 9, generator=torch.Generator().manual_seed(5)))


def ident(backbone: Backbone) -> str:
    return f"{backbone.arch}-{backbone.stem}-{backbone.width}"


# ------------------------------------------------------------------------------------------------------- stand-alone module

CHILD = """
import importlib.util, sys
from pathlib import Path
sys.modules["obowlab"] = sys.modules["safetensors"] = None  # neither can be imported
import numpy, torch
from PIL import Image
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location("net", folder / "encoder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.load()
    assert not any(part.training for part in net.modules())
    with torch.no_grad():
        numpy.save(folder / "features.npy", net(torch.from_numpy(numpy.load(folder / "images.npy"))).numpy())
        shown = torch.stack([module.transform(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    numpy.save(folder / "shown.npy", shown.numpy())
    net.train()(torch.randn(2, 3, 40, 40)).sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())
"""


def test_the_module_gives_the_features_to_the_bit_without_obowlab(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [(60, 47), (47, 60), (40, 133), (200, 41)]
    folders = []
    threads = torch.get_num_threads()
    for backbone in [*NARROW, Backbone()]:
        folder = tmp_path / ident(backbone)
        written = export(encoder_of(backbone), format="module", path=folder)
        assert (written.path, written.max_difference) == (folder, 0)
        assert sorted(path.name for path in folder.iterdir()) == ["encoder.py", "encoder.safetensors"]
        for number, (height, width) in enumerate(pictures):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        np.save(folder / "images.npy", rng.standard_normal((3, 3, 45, 36), dtype=np.float32))
        folders.append(folder)
    subprocess.run([sys.executable, "-I", "-c", CHILD, *map(str, folders)], check=True, timeout=120)
    torch.set_num_threads(1)
    try:
        for folder in folders:
            encoder = read_encoder(folder / "encoder.safetensors")
            with torch.no_grad():
                expected = encoder(torch.from_numpy(np.load(folder / "images.npy")))
            assert np.array_equal(np.load(folder / "features.npy"), expected.numpy()), folder.name
            shown = torch.stack([encoder.transform(Image.open(path)) for path in sorted(folder.glob("*.png"))])
            assert np.array_equal(np.load(folder / "shown.npy"), shown.numpy()), folder.name
    finally:
        torch.set_num_threads(threads)


def test_the_module_is_short_and_needs_nothing_else() -> None:
    text = module_text(encoder_of(NARROW[0], source='a" or """\nimport os #').info)
    imported = [line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))]
    assert set(imported) == {"json", "pathlib", "torch", "PIL", "torchvision"}
    module = ModuleType("encoder")
    module.__file__ = str(Path("somewhere/encoder.py"))
    exec(text, vars(module))
    assert (module.ARCH, module.STEM, module.WIDTH, module.RESIZE, module.SIZE) == ("resnet10", "small", 6, 40, 36)
    assert "os" not in vars(module)
    assert len(text.splitlines()) < 100


def test_every_recipe_has_an_encoder_that_can_be_exported(tmp_path: Path) -> None:
    backbones = {load_recipe(name).recipe.backbone for name in recipe_files()}
    assert len(backbones) > 2
    for backbone in backbones:
        refuse_format("module", backbone=backbone, name="a run")
        with torch.device("meta"):
            ours, plain = build_backbone(backbone), standalone.build(backbone.arch, backbone.stem, backbone.width)
        shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (ours, plain)]
        assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------------------------------- torchvision and timm


@pytest.mark.parametrize("backbone", USUAL, ids=ident)
def test_torchvision_reads_its_file(tmp_path: Path, backbone: Backbone) -> None:
    encoder = encoder_of(backbone)
    written = export(encoder, format="torchvision", path=tmp_path / "out" / "net.pth")
    assert written.max_difference == 0
    model = torchvision.models.get_model(backbone.arch)
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(written.path, weights_only=True))
    assert torch.equal(features(model.eval()), features(encoder.model))
    again = load_encoder(str(written.path), runs_root=tmp_path)
    assert again.info.backbone == backbone
    assert again.info.weights_hash == encoder.info.weights_hash


def timm_names(arch: str) -> set[str]:
    """The names of timm's ResNets without classifier, as its documentation lays them out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", *(f"bn1.{name}" for name in norm)}
    convolutions = 3 if arch == "resnet50" else 2
    for layer, depth in enumerate((2, 2, 2, 2) if arch == "resnet18" else (3, 4, 6, 3), start=1):
        for block in range(depth):
            place = f"layer{layer}.{block}"
            for number in range(1, convolutions + 1):
                names |= {f"{place}.conv{number}.weight", *(f"{place}.bn{number}.{name}" for name in norm)}
            if block == 0 and (layer > 1 or arch == "resnet50"):
                names |= {f"{place}.downsample.0.weight", *(f"{place}.downsample.1.{name}" for name in norm)}
    return names


@pytest.mark.parametrize("backbone", USUAL, ids=ident)
def test_a_folder_for_timm_has_its_names_and_preprocessing(tmp_path: Path, backbone: Backbone) -> None:
    encoder = encoder_of(backbone, size=224, resize=256)
    encoder.info = encoder.info.model_copy(update={"original_size": 32})  # small images suffice for the check
    export(encoder, format="timm", path=tmp_path / "net")
    state = safetensors.torch.load_file(tmp_path / "net" / "model.safetensors")
    assert set(state) == timm_names(backbone.arch)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (backbone.arch, 0)
    assert config["num_features"] == encoder.num_features
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


def test_timm_itself_reads_the_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for backbone in USUAL:
        encoder = encoder_of(backbone)
        export(encoder, format="timm", path=tmp_path / backbone.arch)
        model = timm.create_model(f"local-dir:{tmp_path / backbone.arch}", pretrained=True)
        assert torch.equal(features(model.eval()), features(encoder.model))
        shown = timm.data.resolve_model_data_config(model)
        assert (list(shown["input_size"]), list(shown["mean"])) == ([3, 36, 36], [0.485, 0.456, 0.406])
        assert shown["interpolation"] == "bilinear"
        assert math.floor(36 / shown["crop_pct"]) == 40


def test_timm_resizes_to_the_size_of_the_recipe() -> None:
    info = encoder_of(NARROW[0]).info
    for size in range(8, 300, 7):
        for resize in range(size, 2 * size, 3):
            shown = info.model_copy(update={"original_size": size, "original_resize": resize})
            fraction = timm_config(shown)["pretrained_cfg"]["crop_pct"]
            assert math.floor(size / fraction) == resize


# ------------------------------------------------------------------------------------------------------- other properties


def test_obowlabs_own_file(tmp_path: Path) -> None:
    encoder = encoder_of(NARROW[0])
    written = export(encoder, format="safetensors", path=tmp_path / "out.safetensors")
    assert written.max_difference == 0
    assert read_encoder(written.path).info == encoder.info


def test_an_export_that_does_not_come_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, text = torch.load, Path(standalone.__file__).read_text()

    def disturbing(*args, **rest):
        state = real(*args, **rest)
        state["conv1.weight"] = state["conv1.weight"][:, [2, 1, 0]]  # BGR
        return state

    wrong, place = tmp_path / "standalone.py", tmp_path / "place"
    wrong.write_text(text.replace("return net.eval()", "net.bn1.reset_running_stats(); return net.eval()"))
    place.mkdir()
    monkeypatch.setattr(torch, "load", disturbing)
    monkeypatch.setattr(standalone, "__file__", str(wrong))
    for format_ in ("torchvision", "module"):
        with pytest.raises(RuntimeError, match="features differ"):
            export(encoder_of(Backbone()), format=format_, path=place / "out")
    assert list(place.iterdir()) == []


def test_other_files_of_a_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    export(encoder_of(NARROW[0]), format="module", path=tmp_path / "net")
    export(encoder_of(NARROW[1]), format="module", path=tmp_path / "net")
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"
    assert read_encoder(tmp_path / "net" / "encoder.safetensors").info.backbone == NARROW[1]


@pytest.mark.parametrize("backbone", NARROW, ids=ident)
def test_networks_that_a_format_does_not_have(tmp_path: Path, backbone: Backbone) -> None:
    for format_ in ("torchvision", "timm"):
        message = rf"{format_} has no {backbone.arch} with stem '{backbone.stem}' and width {backbone.width}.*--format module"
        with pytest.raises(UserError, match=message):
            export(encoder_of(backbone), format=format_, path=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_target_says_the_format() -> None:
    assert choose_format(None, out=Path("a.pth")) == choose_format(None, out=Path("a.pt")) == "torchvision"
    assert choose_format(None, out=Path("a.safetensors")) == "safetensors"
    assert choose_format(None, out=Path("a")) == "module"
    for format_, out, message in (
        (None, "a.onnx", "says no format"),
        ("torchvision", "a.safetensors", "must end in .pth or .pt or .tar"),
        ("safetensors", "a", "must end in .safetensors"),
        ("module", "a.pth", "must be a folder for --format module: it holds encoder.py and encoder.safetensors"),
        ("timm", "a.safetensors", "must be a folder"),
    ):
        with pytest.raises(UserError, match=message):
            choose_format(format_, out=Path(out))


# ------------------------------------------------------------------------------------------------------ a plain network


def test_a_plain_network_is_torchvisions_and_shares_nothing() -> None:
    encoder = encoder_of(NARROW[0])
    encoder.model.train()
    generator = torch.get_rng_state()
    plain = plain_network(encoder.model, info=encoder.info)
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(plain) is torchvision.models.resnet.ResNet
    assert not plain.training
    assert all(weight.requires_grad for weight in plain.parameters())
    before = copy.deepcopy(encoder.model.state_dict())
    assert torch.equal(features(plain), features(encoder.model))
    plain.train()(torch.randn(4, 3, 36, 36)).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.model.state_dict().items())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    assert (plain.transform(image) - encoder.transform(image)).abs().max() < 1.5 / 255 / 0.224


def test_what_encoder_files_say_is_what_formats_need() -> None:
    assert set(FORMATS) == {"torchvision", "timm", "safetensors", "module"}
    assert encoder_file.EncoderInfo is EncoderInfo
