"""Encoders as files: our own format, the authors' released checkpoints, and torchvision's naming.

An encoder file is safetensors: the state dict of the student's `ResNet` (torchvision's names) and, under the metadata key
`obowlab`, an `EncoderInfo` as JSON. Torch files are read with `weights_only=True`. Whatever is read must fit to the last key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import safetensors
import safetensors.torch
import torch
import torchvision.models
from pydantic import ValidationError
from torch import Tensor, nn

from obowlab.config import Backbone, Level, Recipe, Section, Views, load_machine
from obowlab.errors import UserError
from obowlab.evaluation.features import frozen, weights_hash
from obowlab.files import write_atomic
from obowlab.methods import OBoW, ResNet
from obowlab.methods.backbones import LEVELS
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import ENCODER_FILE
from obowlab.tracking.model import is_model_version, read_model_version
from obowlab.views.centre import CentreView
from obowlab.views.photometric import MEAN, STD
from obowlab.weights import WEIGHTS_SUFFIXES
from obowlab.weights.reading import WeightsFile, read_weights
from obowlab.weights.released import Kind, authors_name, build_encoder, build_model, infer_backbone, kind_of, torchvision_names

METADATA_KEY = "obowlab"
ROUND_TRIP_TOLERANCE = 1e-5
"""Largest difference of a feature after export, on inputs of unit variance."""

Format = Literal["torchvision", "safetensors"]


class EncoderInfo(Section):
    """What must be known to use an encoder: how to build it and what to show it."""

    backbone: Backbone
    original_resize: int
    original_size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    source: str
    fingerprint: str | None = None
    weights_hash: str


class Encoder(nn.Module):
    """A trained encoder: a torch module with all that is needed to use it or to train it further.

    It comes on the CPU and in evaluation mode. Calling it gives the features. Gradients flow through everything.

    Attributes:
        model: the student's ResNet, with torchvision's names.
        info: what the file says about it; sizes are the paper's where a foreign file has none.
        path: the file, or the address of the model version.
        transform: what evaluation does to an image: PIL image to float32 [3, S, S], resized, cut and normalised. It is small
            and can be sent to the workers of a DataLoader.
    """

    model: ResNet

    def __init__(self, *, model: ResNet, info: EncoderInfo, path: Path) -> None:
        super().__init__()
        self.model = model
        self.info = info
        self.path = path
        self.transform = CentreView(resize=info.original_resize, size=info.original_size)
        self.train(model.training)

    @property
    def num_features(self) -> int:
        """Length D of a feature."""
        return int(self.model.num_features)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.conv1.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """Return the features; see `features`."""
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the globally averaged last map, float32 [B, D].

        Args:
            images: as `transform` gives them, [B, 3, H, W] on the encoder's device; any size will do.
        """
        return self.model(images)  # type: ignore[no-any-return]

    def maps(self, images: Tensor, level: Level = "conv5") -> Tensor:
        """Return the feature map of a level, float32 [B, C, H', W'].

        Args:
            images: as for `features`.
            level: `conv4` or `conv5`, the paper's names of the last two stages.

        Raises:
            UserError: there is no such level.
        """
        if level not in LEVELS:
            raise UserError(f"There is no level '{level}' of an encoder; choose {' or '.join(LEVELS)}.")
        return self.model.levels(images, (level,))[0][level]


# ------------------------------------------------------------------------------------------------------- our own files


def save_encoder(encoder: nn.Module, *, path: Path, recipe: Recipe, fingerprint: str | None, source: str) -> EncoderInfo:
    """Write the encoder of a run atomically.

    Args:
        encoder: the student's ResNet.
        path: `.safetensors` file to write or replace.
        recipe: its backbone and views are kept in the file.
        fingerprint: of the run, if there is one.
        source: where the weights come from, for example the run id.
    """
    info = EncoderInfo(
        backbone=recipe.backbone,
        original_resize=recipe.views.original_resize,
        original_size=recipe.views.original_size,
        source=source,
        fingerprint=fingerprint,
        weights_hash=weights_hash(encoder),
    )
    write_encoder(encoder, path=path, info=info)
    return info


def write_encoder(encoder: nn.Module, *, path: Path, info: EncoderInfo) -> None:
    """Write an encoder file from weights and what is known about them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    _write(path, safetensors.torch.save(state, metadata={METADATA_KEY: info.model_dump_json()}))


def load(ref: str | Path, *, runs_root: str | Path | None = None) -> Encoder:
    """Load an encoder, on the CPU and in evaluation mode.

    Args:
        ref: a run (its id, the beginning of one, or its folder), a weights file (obowlab's own, torchvision's or the authors'),
            or a model version of a run in MLflow, `models:/NAME/VERSION`.
        runs_root: the run store. By default that of the command line: `runs`, or what the machine file and
            `$OBOWLAB_RUNS_ROOT` say. The MLflow store is found in the same way.

    Raises:
        UserError: there is no such run, file or version, the run has no encoder yet, or the weights do not fit strictly.
    """
    machine = load_machine(overrides={"runs_root": None if runs_root is None else Path(runs_root)})
    return load_encoder(str(ref), runs_root=machine.runs_root, tracking_uri=machine.tracking_uri)


def load_encoder(ref: str, *, runs_root: Path, tracking_uri: str | None = None) -> Encoder:
    """Load the encoder of a run, a weights file or a model version; as `load`, without defaults.

    Args:
        ref: as for `load`.
        runs_root: the run store.
        tracking_uri: the MLflow store; that of the run store if absent.

    Raises:
        UserError: as `load`.
    """
    if is_model_version(ref):
        return _model_version(ref, runs_root=runs_root, tracking_uri=tracking_uri)
    path = Path(ref)
    if path.is_file():
        return read_encoder(path)
    if path.suffix in WEIGHTS_SUFFIXES:
        raise UserError(f"There is no weights file '{ref}'.")
    folder = RunFolder.find(ref, runs_root=runs_root)
    if not (folder.path / ENCODER_FILE).is_file():
        raise UserError(f"Run '{folder.run_id}' has no encoder yet (it is {folder.state.status}); finish it with 'obowlab run'.")
    return read_encoder(folder.path / ENCODER_FILE)


def read_encoder(path: Path) -> Encoder:
    """Load the encoder from a weights file; see `load_encoder`."""
    file = read_weights(path)
    if METADATA_KEY not in file.metadata:
        imported = _import(file, origin=path)
        return Encoder(model=imported.encoder, info=imported.info, path=path)
    try:
        info = EncoderInfo.model_validate_json(file.metadata[METADATA_KEY])
    except ValidationError as error:
        raise UserError(f"{path} was written by another version of obowlab: {error.errors()[0]['msg']}.") from None
    if (info.mean, info.std) != (MEAN, STD):
        raise UserError(
            f"{path} expects pixels normalised with mean {info.mean} and deviation {info.std}, which obowlab does not do."
        )
    model = build_encoder(file.state, backbone=info.backbone, origin=path)
    if weights_hash(model) != info.weights_hash:
        raise UserError(f"The weights in {path} are not those it was written with (hash differs); copy the file again.")
    return Encoder(model=model, info=info, path=path)


def _model_version(ref: str, *, runs_root: Path, tracking_uri: str | None) -> Encoder:
    """Load a model version: the weights of its graph in a ResNet that can be trained further."""
    version = read_model_version(ref, tracking_uri=tracking_uri, runs_root=runs_root)
    recipe, origin = Recipe.model_validate_json(json.dumps(version.recipe_values)), Path(ref)
    model = build_encoder(version.state, backbone=recipe.backbone, origin=origin)
    info = EncoderInfo(
        backbone=recipe.backbone,
        original_resize=recipe.views.original_resize,
        original_size=recipe.views.original_size,
        source=version.run_id,
        fingerprint=version.fingerprint,
        weights_hash=weights_hash(model),
    )
    return Encoder(model=model, info=info, path=origin)


def _foreign_info(model: ResNet, *, backbone: Backbone, source: str) -> EncoderInfo:
    views = Views()
    return EncoderInfo(
        backbone=backbone,
        original_resize=views.original_resize,
        original_size=views.original_size,
        source=source,
        weights_hash=weights_hash(model),
    )


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


# --------------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Export:
    """What was written: the file, and the largest difference of a feature between the encoder and the file read back."""

    path: Path
    max_difference: float


def export(encoder: Encoder, *, format: Format, path: Path) -> Export:
    """Write an encoder for use elsewhere, read it back and compare features on a random batch.

    `torchvision` is a plain state dict without classifier. To load it: `model = torchvision.models.resnet18()`,
    `model.fc = torch.nn.Identity()`, `model.load_state_dict(torch.load(path, weights_only=True))`. Inputs are RGB in [0, 1],
    normalised with ImageNet's mean and deviation. `safetensors` is our own encoder file.

    Raises:
        UserError: torchvision has no such network (small stem, other width), or the file cannot be written.
        RuntimeError: the features after the round trip differ by more than `ROUND_TRIP_TOLERANCE`; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{'.safetensors' if format == 'safetensors' else ''}")
    try:
        if format == "torchvision":
            returned = _write_torchvision(encoder, temporary)
        else:
            write_encoder(encoder.model, path=temporary, info=encoder.info)
            returned = read_encoder(temporary).model
        difference = feature_difference(encoder.model, returned, size=encoder.info.original_size)
        if not difference <= ROUND_TRIP_TOLERANCE:
            raise RuntimeError(f"features differ by {difference:.3g} after writing and reading {path}; the file was not kept")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Export(path=path, max_difference=difference)


def _write_torchvision(encoder: Encoder, path: Path) -> nn.Module:
    backbone = encoder.info.backbone
    if backbone.stem != "imagenet" or backbone.width != 64:
        raise UserError(
            f"torchvision has no {backbone.arch} with stem '{backbone.stem}' and width {backbone.width}; use safetensors."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}, path)
    except OSError as error:
        raise UserError(f"Cannot write {path.parent}: {error.strerror}.") from None
    model = cast(nn.Module, torchvision.models.get_model(backbone.arch, weights=None))
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return model


def feature_difference(first: nn.Module, second: nn.Module, *, size: int) -> float:
    """Return the largest absolute difference of the features of two encoders on four images of Gaussian noise."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with frozen(first), frozen(second):
        return float((first(images) - second(images)).abs().max())


# --------------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class Imported:
    """What a torch file held.

    Attributes:
        encoder: the student's ResNet (of a full model), or the one network of the file; in evaluation mode.
        info: of the encoder.
        kind: `model` (the authors' full OBoW), `extractor` (their feature extractor) or `torchvision`.
        method: everything a full model holds, as a method of ours.
        unused: keys that have no place here, with the reason.
    """

    encoder: ResNet
    info: EncoderInfo
    kind: Kind
    method: OBoW | None = None
    unused: Mapping[str, str] = field(default_factory=dict)


def import_authors(path: Path) -> Imported:
    """Read a released checkpoint of the authors or a file in torchvision's naming, strictly.

    Takes `{"network": ...}`, `{"state_dict": ...}`, `{"model": ...}` or a bare state dict, as a torch or safetensors file or in
    a zip archive, with or without `module.` or the name of a larger module's part before the names. Architecture, stem, width,
    levels and number of words follow from names and shapes.

    Raises:
        UserError: the file is not plain, finite tensors, or a key is missing, left over or of another shape.
    """
    file = read_weights(path)
    if METADATA_KEY in file.metadata:
        raise UserError(f"{path} is an encoder file of obowlab already; use it as it is.")
    return _import(file, origin=path)


def _import(file: WeightsFile, *, origin: Path) -> Imported:
    state, unused = file.state, dict(file.unused)
    kind = kind_of(state, origin=origin, prefix=file.prefix)
    method: OBoW | None = None
    if kind == "model":
        method, backbone, left = build_model(state, origin=origin, prefix=file.prefix)
        unused |= left
        encoder = method.encoder
    else:
        if kind == "torchvision":
            classifier = [name for name in state if name in ("fc.weight", "fc.bias")]
            unused |= {f"{file.prefix}{name}": "a classifier, which an encoder does not have" for name in classifier}
            state = {name: tensor for name, tensor in state.items() if name not in classifier}
        named = torchvision_names(state)
        backbone = infer_backbone(named, origin=origin)

        def spell(name: str) -> str:
            return file.prefix + (authors_name(name) if kind == "extractor" else name)

        encoder = build_encoder(named, backbone=backbone, origin=origin, spell=spell)
    info = _foreign_info(encoder, backbone=backbone, source=origin.name)
    return Imported(encoder=encoder, info=info, kind=kind, method=method, unused=unused)


def write_method(imported: Imported, *, path: Path) -> Path:
    """Write all that a full model holds (student, teacher, heads, vocabulary) and return the file.

    Args:
        imported: with a method.
        path: of the encoder; the method goes beside it as `NAME.method.safetensors`.
    """
    assert imported.method is not None
    target = path.with_suffix(".method.safetensors")
    state = {name: tensor.detach().contiguous() for name, tensor in imported.method.state_dict().items()}
    metadata = {METADATA_KEY: imported.info.model_dump_json(), "method": imported.method.method.model_dump_json()}
    _write(target, safetensors.torch.save(state, metadata=metadata))
    return target
