"""Encoders for use elsewhere: each is written, read back as its readers will, and compared before it is kept."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import pickle
import re
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torchvision.models
from torch import nn
from torchvision import transforms

from obowlab.errors import UserError
from obowlab.evaluation.features import frozen
from obowlab.weights import standalone
from obowlab.weights.encoder_file import Encoder, read_encoder, write_encoder
from obowlab.weights.formats import Format, refuse_format, targets
from obowlab.weights.info import METADATA_KEY, EncoderInfo
from obowlab.weights.naming import NAMINGS
from obowlab.weights.released import with_counters
from obowlab.weights.usage import detectron2_settings

ROUND_TRIP_TOLERANCE = 1e-5
"""Largest difference of a feature after export, relative to the largest feature or 1."""


@dataclass(frozen=True)
class Export:
    """What was written: the file or folder, and the largest difference of a feature between before and after reading it back."""

    path: Path
    max_difference: float


def export(encoder: Encoder, *, format: Format, path: Path) -> Export:
    """Write an encoder for use elsewhere, read it back and compare features on a random batch.

    `torchvision` and `mmpretrain` are a plain state dict without classifier, `timm` a folder for
    `timm.create_model("local-dir:...")`, `detectron2` its pickle of arrays with settings beside it, `onnx` a graph with a free
    batch size, `safetensors` obowlab's own encoder file, and `module` a folder with that file and a Python module which needs
    torch and torchvision only. `obowlab.weights.usage` says what must be set on the other side.

    Args:
        encoder: to write; left as it is.
        format: what to write.
        path: the file, or the folder, whose other files are left alone.

    Raises:
        UserError: there is no such network in this format (small stem, other width), or the disk refuses.
        RuntimeError: the features after the round trip differ by more than `ROUND_TRIP_TOLERANCE`; nothing is left behind.
    """
    refuse_format(format, backbone=encoder.info.backbone, name=encoder.info.source)
    written = targets(format, out=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            place = Path(folder) / (path.name if path in written else "")
            returned = _WRITERS[format](encoder, place)
            difference, largest = feature_difference(encoder.model, returned, size=encoder.info.original_size)
            if not difference <= ROUND_TRIP_TOLERANCE * max(1.0, largest):
                raise RuntimeError(f"features differ by {difference:.3g} after writing and reading {path}; nothing was kept")
            for target in written:
                target.parent.mkdir(exist_ok=True)
                (Path(folder) / target.name).replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    return Export(path=path, max_difference=difference)


def feature_difference(first: nn.Module, second: nn.Module, *, size: int) -> tuple[float, float]:
    """Return the largest difference of the features of two encoders on four images of Gaussian noise, and the largest feature."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with frozen(first), frozen(second):
        expected = first(images)
        return float((expected - second(images)).abs().max()), float(expected.abs().max())


def plain_network(encoder: nn.Module, *, info: EncoderInfo) -> nn.Module:
    """Return an encoder as torchvision's own ResNet, on the CPU in evaluation mode, with its preprocessing as `transform`.

    It is made of classes of torch and torchvision alone, and shares no memory with the encoder. `transform` takes a PIL image
    to float32 [3, S, S]; it rounds tall images in another order than `Encoder.transform` where Pillow is 13 or newer.
    """
    with torch.device("meta"):
        network = standalone.build(info.backbone.arch, info.backbone.stem, info.backbone.width, info.backbone.padding)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in encoder.state_dict().items()}
    network.load_state_dict(state, assign=True)
    network.transform = transforms.Compose(
        [
            transforms.Resize(info.original_resize),
            transforms.CenterCrop(info.original_size),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
        ]
    )
    return cast(nn.Module, network.eval())


# -------------------------------------------------------------------------------------------------------------- one format


def _write_torchvision(encoder: Encoder, path: Path) -> nn.Module:
    state = OrderedDict(_state(encoder))
    vars(state)["obowlab"] = encoder.info.model_dump(mode="json")  # torch.save keeps it, as it keeps a state dict's _metadata
    torch.save(state, path)
    model = cast(nn.Module, torchvision.models.get_model(encoder.info.backbone.arch, weights=None))
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return model


def _write_detectron2(encoder: Encoder, path: Path) -> nn.Module:
    """Write arrays under Detectron2's names, and the settings that the network needs there."""
    theirs, ours = NAMINGS["detectron2"].theirs, NAMINGS["detectron2"].ours
    arrays = {
        theirs(name): tensor.numpy() for name, tensor in _state(encoder).items() if not name.endswith("num_batches_tracked")
    }
    about = {"__author__": "obowlab", "matching_heuristics": True, METADATA_KEY: encoder.info.model_dump_json()}
    path.write_bytes(pickle.dumps({"model": arrays, **about}))
    path.with_suffix(".yaml").write_text(detectron2_settings(encoder.info, weights=path.name), encoding="utf-8")
    with path.open("rb") as file:
        written = pickle.load(file)["model"]
    network = standalone.build(encoder.info.backbone.arch)
    state = {ours(name): torch.from_numpy(array) for name, array in written.items()}
    network.load_state_dict(with_counters(state, expected=network.state_dict()), strict=True)
    return cast(nn.Module, network)


def _write_onnx(encoder: Encoder, path: Path) -> nn.Module:
    """Write a graph in evaluation form for images of the encoder's size, with what is known of it as metadata."""
    import onnx

    size = encoder.info.original_size
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            plain_network(encoder.model, info=encoder.info),
            (torch.zeros(2, 3, size, size),),  # of one image, the batch size would be taken for a constant
            path,
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
        )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {METADATA_KEY: encoder.info.model_dump_json()})
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    return _OnnxNetwork(path)


class _OnnxNetwork(nn.Module):
    """A graph that onnxruntime computes on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [B, D] of images [B, 3, S, S]."""
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


def _write_safetensors(encoder: Encoder, path: Path) -> nn.Module:
    write_encoder(encoder.model, path=path, info=encoder.info)
    return read_encoder(path).model


def _write_timm(encoder: Encoder, folder: Path) -> nn.Module:
    """Write a folder as timm's models on the Hugging Face hub are; its ResNets have torchvision's names and structure."""
    weights = folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps(timm_config(encoder.info), indent=1), encoding="utf-8")
    safetensors.torch.save_file(_state(encoder), weights, metadata={"format": "pt"})
    network = standalone.build(encoder.info.backbone.arch)
    network.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    return cast(nn.Module, network)


def timm_config(info: EncoderInfo) -> dict[str, Any]:
    """Return what timm must know of a network and its preprocessing, JSON values."""
    return {
        "architecture": info.backbone.arch,
        "num_classes": 0,
        "num_features": 512 if info.backbone.arch != "resnet50" else 2048,
        "pretrained_cfg": {
            "tag": "obowlab",
            "custom_load": False,
            "input_size": [3, info.original_size, info.original_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": _crop_fraction(info),
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": 0,
            "pool_size": [math.ceil(info.original_size / 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
            **({} if info.origin is None else {"license": info.origin.licence or "unknown", "origin_sha256": info.origin.sha256}),
        },
    }


def _crop_fraction(info: EncoderInfo) -> float:
    """Return the side of the crop over the side of the image; timm rounds the side that follows from it downwards."""
    fraction = info.original_size / info.original_resize
    while math.floor(info.original_size / fraction) < info.original_resize:
        fraction = math.nextafter(fraction, 0.0)
    return fraction


def _write_module(encoder: Encoder, folder: Path) -> nn.Module:
    """Write the weights and the module that loads them, which is `standalone` with the values of this encoder."""
    write_encoder(encoder.model, path=folder / "encoder.safetensors", info=encoder.info)
    (folder / "encoder.py").write_text(module_text(encoder.info), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("encoder", folder / "encoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(nn.Module, module.load())


def module_text(info: EncoderInfo) -> str:
    """Return the text of a module that builds this encoder, loads its weights and prepares its images."""
    backbone, text = info.backbone, Path(standalone.__file__).read_text(encoding="utf-8")
    source = re.sub(r"[^\w.-]", "_", info.source)  # it may be the name of any file
    head = f'"""The {backbone.arch} of {source}, written by obowlab: `load()` returns it, `transform` prepares its images.'
    head += f'{_origin_text(info)}"""\n'
    text = re.sub(r'\A""".*?"""\n', lambda _: head, text, flags=re.DOTALL)
    values = {
        "ARCH, STEM, WIDTH, PADDING": (backbone.arch, backbone.stem, backbone.width, backbone.padding),
        "RESIZE, SIZE": (info.original_resize, info.original_size),
        "MEAN, STD": (info.mean, info.std),
    }
    for names, value in values.items():
        text, count = re.subn(rf"^{names} = .*$", f"{names} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, names
    return text


def _origin_text(info: EncoderInfo) -> str:
    """Return lines for a docstring on where an imported encoder comes from; it may hold any text."""
    if info.origin is None:
        return ""
    facts = {"Licence of the weights": info.origin.licence or "not said", "Imported from a file of SHA-256": info.origin.sha256}
    lines = (re.sub(r"[^\w.,:/()+ -]", "_", f"{what}: {value}") for what, value in facts.items())
    return "\n\n" + "\n".join(f"{line}." for line in lines) + "\n"


def _state(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}


_WRITERS = {
    "torchvision": _write_torchvision,
    "timm": _write_timm,
    "mmpretrain": _write_torchvision,
    "detectron2": _write_detectron2,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
    "module": _write_module,
}
