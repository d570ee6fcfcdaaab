"""Encoders for use elsewhere: every format, read as its readers do, and refused where there is no such network."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import pickle
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
from obowlab.weights.encoder_file import Encoder, import_weights, info_of, load_encoder, read_encoder
from obowlab.weights.export import export, module_text, plain_network, timm_config
from obowlab.weights.formats import FORMATS, Format, choose_format, refuse_format
from obowlab.weights.info import EncoderInfo, Origin
from obowlab.weights.usage import usage

ARCHS = ("resnet10", "resnet18", "resnet34", "resnet50")
NARROW = [Backbone(arch=arch, stem=stem, width=width) for arch in ARCHS for stem, width in (("small", 6), ("imagenet", 5))]
USUAL = [Backbone(arch=arch) for arch in ARCHS[1:]]


def encoder_of(backbone: Backbone, *, size: int = 36, resize: int = 40, source: str = "test") -> Encoder:
    """An encoder whose batch norms differ in every channel, as a trained one's do: what is lost or swapped must show."""
    model, generator = build_backbone(backbone, seed=0), torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(part.bias, 0, 0.1, generator=generator)
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


def test_timm_reads_a_torchvision_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder = encoder_of(USUAL[0])
    file = export(encoder, format="torchvision", path=tmp_path / "net.pth").path
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(file))
    assert torch.equal(features(model.eval()), features(encoder.model))


# ------------------------------------------------------------------------------------- Detectron2, OpenMMLab and ONNX


def detectron2_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """The parameters of Detectron2's ResNet, by its documentation: a norm of four arrays behind every convolution."""
    shapes: dict[str, tuple[int, ...]] = {}

    def put(place: str, *shape: int) -> None:
        shapes[f"{place}.weight"] = shape
        shapes.update({f"{place}.norm.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")})

    put("stem.conv1", 64, 3, 7, 7)
    channels = 64
    for stage, depth in enumerate((2, 2, 2, 2) if arch == "resnet18" else (3, 4, 6, 3), start=2):
        inner = 64 * 2 ** (stage - 2)
        outer = inner * (4 if arch == "resnet50" else 1)
        for block in range(depth):
            place = f"res{stage}.{block}"
            if arch == "resnet50":
                put(f"{place}.conv1", inner, channels, 1, 1)
                put(f"{place}.conv2", inner, inner, 3, 3)
                put(f"{place}.conv3", outer, inner, 1, 1)
            else:
                put(f"{place}.conv1", inner, channels, 3, 3)
                put(f"{place}.conv2", inner, inner, 3, 3)
            if channels != outer:
                put(f"{place}.shortcut", outer, channels, 1, 1)
            channels = outer
    return shapes


@pytest.mark.parametrize("backbone", USUAL, ids=ident)
def test_a_pickle_for_detectron2_has_its_arrays_and_settings(tmp_path: Path, backbone: Backbone) -> None:
    encoder = encoder_of(backbone)
    written = export(encoder, format="detectron2", path=tmp_path / "net.pkl")
    assert written.max_difference == 0
    content = pickle.loads(written.path.read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("obowlab", True)
    arrays = content["model"]
    assert {name: array.shape for name, array in arrays.items()} == detectron2_shapes(backbone.arch)
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert len(arrays) == {"resnet18": 100, "resnet34": 180, "resnet50": 265}[backbone.arch]
    torch.save({"model": {name: torch.from_numpy(array) for name, array in arrays.items()}}, tmp_path / "back.pth")
    back = import_weights(tmp_path / "back.pth")
    assert back.found.release.key == "detectron2"
    state, other = back.encoder.state_dict(), encoder.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state if not name.endswith("num_batches_tracked"))
    settings = (tmp_path / "net.yaml").read_text()
    for line in ("PIXEL_MEAN: [123.675, 116.28, 103.53]", "PIXEL_STD: [58.395, 57.12, 57.375]", "STRIDE_IN_1X1: false"):
        assert line in settings
    assert ("RES2_OUT_CHANNELS: 64" in settings) == (backbone.arch != "resnet50")


def test_openmmlab_reads_torchvisions_names(tmp_path: Path) -> None:
    encoder = encoder_of(USUAL[0])
    written = export(encoder, format="mmpretrain", path=tmp_path / "net.pth")
    assert written.max_difference == 0
    names = torch.load(written.path, weights_only=True).keys()
    assert set(names) == timm_names("resnet18")
    told = usage("mmpretrain", info=encoder.info, path=written.path)
    assert 'style="pytorch"' in told
    assert "mean=[123.675, 116.28, 103.53]" in told


@pytest.mark.parametrize("backbone", [USUAL[0], USUAL[2], NARROW[0], Backbone(width=8, padding="same")], ids=ident)
def test_onnxruntime_computes_the_features_of_any_batch(tmp_path: Path, backbone: Backbone) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = encoder_of(backbone)
    written = export(encoder, format="onnx", path=tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 36, 36]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 36, 36, generator=torch.Generator().manual_seed(count))
        with frozen(encoder):
            expected = encoder(images)
        found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    kept = {entry.key: entry.value for entry in onnx.load(written.path).metadata_props}
    assert EncoderInfo.model_validate_json(kept["obowlab"]) == encoder.info


def test_onnx_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--format onnx needs onnx and onnxscript and onnxruntime: pip install onnx onnx"):
        refuse_format("onnx", backbone=NARROW[0], name="a run")


@pytest.mark.parametrize("format_", ["torchvision", "timm", "mmpretrain", "detectron2", "safetensors", "module"])
def test_licence_and_source_are_carried_on(tmp_path: Path, format_: Format) -> None:
    encoder = encoder_of(USUAL[0])
    origin = Origin(sha256="ab" * 32, licence="CC BY-NC 4.0", release="moco-v2")
    encoder.info = encoder.info.model_copy(update={"origin": origin, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    out = tmp_path / ("net" + {"torchvision": ".pth", "mmpretrain": ".pth", "detectron2": ".pkl"}.get(format_, ""))
    export(encoder, format=format_, path=out.with_suffix(".safetensors") if format_ == "safetensors" else out)
    if out.suffix == ".pth":  # it comes back as it went out, with its pixels
        assert read_encoder(out).info == encoder.info
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    for text in ("CC BY-NC 4.0", "ab" * 32):
        assert any(text.encode() in path.read_bytes() for path in files), format_


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
    for format_ in ("torchvision", "timm", "mmpretrain", "detectron2"):
        message = rf"{format_} has no {backbone.arch} with stem '{backbone.stem}' and width {backbone.width}.*--format module"
        with pytest.raises(UserError, match=message):
            export(encoder_of(backbone), format=format_, path=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_target_says_the_format() -> None:
    assert choose_format(None, out=Path("a.pth")) == choose_format(None, out=Path("a.pt")) == "torchvision"
    assert choose_format(None, out=Path("a.safetensors")) == "safetensors"
    assert choose_format(None, out=Path("a")) == "module"
    assert choose_format(None, out=Path("a.pkl")) == "detectron2"
    assert choose_format(None, out=Path("a.onnx")) == "onnx"
    for format_, out, message in (
        (None, "a.caffemodel", "says no format"),
        ("detectron2", "a.pth", "must end in .pkl"),
        ("onnx", "a", "must end in .onnx"),
        ("timm", "a.pkl", "must be a folder"),
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
    assert set(FORMATS) == {"torchvision", "timm", "mmpretrain", "detectron2", "onnx", "safetensors", "module"}
    assert encoder_file.EncoderInfo is EncoderInfo
