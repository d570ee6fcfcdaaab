"""Encoders as files: our own format, and whatever others released.

An encoder file is safetensors: the state dict of the student's `ResNet` (torchvision's names) and, under the metadata key
`obowlab`, an `EncoderInfo` as JSON. Torch files are read with `weights_only=True`. Whatever is read must fit to the last key.
Evaluators show an encoder pixels normalised as its info says (`obowlab.evaluation.features.pixel_statistics`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from obowlab.config import Backbone, Level, Padding, Recipe, Views, load_machine
from obowlab.errors import UserError
from obowlab.evaluation.features import pixel_statistics, weights_hash
from obowlab.files.replacing import write_atomic
from obowlab.methods import OBoW, ResNet
from obowlab.methods.backbones import LEVELS
from obowlab.tracking.model import ModelVersion, downloaded_weights
from obowlab.views.centre import CentreView
from obowlab.views.views import MEAN, STD
from obowlab.weights.info import METADATA_KEY, EncoderInfo, Origin, encoder_info, refuse_own
from obowlab.weights.networks import DROPPED, Found, find
from obowlab.weights.reading import WeightsFile, check_tensors, read_module, read_weights
from obowlab.weights.released import build_encoder, build_model, infer_backbone
from obowlab.weights.releases import Mean
from obowlab.weights.source import Source, find_source


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
    pixel_mean: Mean
    pixel_std: Mean

    def __init__(self, *, model: ResNet, info: EncoderInfo, path: Path) -> None:
        super().__init__()
        self.model = model
        self.info = info
        self.path = path
        self.transform = CentreView(resize=info.original_resize, size=info.original_size, mean=info.mean, std=info.std)
        for module in (self, model):  # evaluators are given either
            module.pixel_mean, module.pixel_std = info.mean, info.std
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
        path: `.safetensors` file to write or replace; its folder, the run's, is not made anew where it is away.
        recipe: its backbone and views are kept in the file.
        fingerprint: of the run, if there is one.
        source: where the weights come from, for example the run id.
    """
    info = info_of(encoder, recipe=recipe, source=source, fingerprint=fingerprint)
    _write(path, _content(encoder, info=info), in_new_folder=False)
    return info


def write_encoder(encoder: nn.Module, *, path: Path, info: EncoderInfo) -> None:
    """Write an encoder file from weights and what is known about them."""
    _write(path, _content(encoder, info=info))


def _content(encoder: nn.Module, *, info: EncoderInfo) -> bytes:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    return safetensors.torch.save(state, metadata={METADATA_KEY: info.model_dump_json()})


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
    return read_source(find_source(ref, runs_root=runs_root, tracking_uri=tracking_uri))


def read_source(source: Source) -> Encoder:
    """Load an encoder that was found.

    Raises:
        UserError: it cannot be read, or its weights do not fit strictly.
    """
    if source.version is not None:
        return _read_version(source.version)
    assert source.path is not None
    return read_encoder(source.path)


def read_encoder(path: Path) -> Encoder:
    """Load the encoder from a weights file; see `load_encoder`."""
    file = read_weights(path)
    info = encoder_info(file.metadata, origin=path)
    if info is None:
        imported = import_read(file, choices=Choices(), origin=path)
        return Encoder(model=imported.encoder, info=imported.info, path=path)
    check_tensors(file.content, spell=str, origin=path)
    model = build_encoder(file.content, backbone=info.backbone, origin=path)
    if weights_hash(model) != info.weights_hash:
        raise UserError(f"The weights in {path} are not those it was written with (hash differs); copy the file again.")
    return Encoder(model=model, info=info, path=path)


def _read_version(version: ModelVersion) -> Encoder:
    """Load a model version: the weights of its module in a ResNet of ours."""
    recipe, origin = version.recipe, Path(version.ref)
    with downloaded_weights(version) as path:
        model = build_encoder(read_module(path, origin=origin), backbone=recipe.backbone, origin=origin)
    info = info_of(model, recipe=recipe, source=version.run_id, fingerprint=version.fingerprint)
    return Encoder(model=model, info=info, path=origin)


def info_of(encoder: nn.Module, *, recipe: Recipe, source: str, fingerprint: str | None) -> EncoderInfo:
    """Return what must be known to use the encoder of a run; see `save_encoder`."""
    mean, std = pixel_statistics(encoder)
    return EncoderInfo(
        backbone=recipe.backbone,
        original_resize=recipe.views.original_resize,
        original_size=recipe.views.original_size,
        mean=mean,
        std=std,
        source=source,
        fingerprint=fingerprint,
        weights_hash=weights_hash(encoder),
    )


def _write(path: Path, content: bytes, *, in_new_folder: bool = True) -> None:
    try:
        if in_new_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


# --------------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class Choices:
    """What a user says about a file of others; what is None or empty follows from the file.

    Attributes:
        network: a key of the file, or a part of its names, that leads to the network to import.
        release: key of the format, one of `RELEASE_KEYS`.
        mean: subtracted from pixels in [0, 1].
        std: divides them.
        padding: that the network was trained with.
        licence: of the weights.
        drop: beginnings of names that are left out.
        plain_objects: as for `read_weights`.
    """

    network: str | None = None
    release: str | None = None
    mean: Mean | None = None
    std: Mean | None = None
    padding: Padding | None = None
    licence: str | None = None
    drop: tuple[str, ...] = ()
    plain_objects: bool = False


@dataclass(frozen=True)
class Imported:
    """What a file of others held.

    Attributes:
        encoder: the student's ResNet (of a full model), or the chosen network of the file; in evaluation mode.
        info: of the encoder.
        found: what is in the file, and what was chosen.
        method: everything that a full model of the authors holds, as a method of ours.
        unused: keys that have no place here, with the reason.
        num_filled: batch norms that lacked `num_batches_tracked`, which is 0 now.
    """

    encoder: ResNet
    info: EncoderInfo
    found: Found
    method: OBoW | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    num_filled: int = 0


def import_weights(path: Path, *, choices: Choices | None = None) -> Imported:
    """Read a weights file of others, strictly.

    The formats are those of `obowlab.weights.releases`. Architecture, stem, width, levels and number of words follow from names
    and shapes.

    Raises:
        UserError: the file is not plain, finite tensors, or a key is missing, left over or of another shape.
    """
    chosen = choices or Choices()
    file = read_weights(path, plain_objects=chosen.plain_objects)
    refuse_own(encoder_info(file.metadata, origin=path), path=path)
    return import_read(file, choices=chosen, origin=path)


def import_read(file: WeightsFile, *, choices: Choices, origin: Path) -> Imported:
    """Import what was read from a file of others; see `import_weights`."""
    found = find(file, network=choices.network, release=choices.release, drop=choices.drop, origin=origin)
    network, parted = found.network, found.parted
    if found.is_full_model and choices.network is None and choices.padding != "same":
        prefix = network.prefix.removesuffix("feature_extractor.")
        dropped = {name: what for name, what in parted.aside.items() if what == DROPPED}
        state = {name.removeprefix(prefix): tensor for name, tensor in network.names.items() if name not in dropped}
        check_tensors(state, spell=lambda name: prefix + name, origin=origin)
        method, backbone, unused = build_model(state, origin=origin, prefix=prefix)
        info = _foreign_info(method.encoder, backbone=backbone, file=file, found=found, choices=choices, origin=origin)
        return Imported(encoder=method.encoder, info=info, found=found, method=method, unused=unused | dropped)

    check_tensors(parted.state, spell=found.spell, origin=origin)
    named = {name: network.naming.tensor(tensor) for name, tensor in parted.state.items()}
    backbone = infer_backbone(named, origin=origin)
    padding = choices.padding or (found.release.padding if found.release is not None else "torchvision")
    backbone = backbone.model_copy(update={"padding": padding})
    encoder = build_encoder(named, backbone=backbone, origin=origin, spell=found.spell, left_over=parted.left_over)
    info = _foreign_info(encoder, backbone=backbone, file=file, found=found, choices=choices, origin=origin)
    num_filled = sum(name.endswith("num_batches_tracked") for name in encoder.state_dict().keys() - parted.state.keys())
    return Imported(encoder=encoder, info=info, found=found, unused=parted.aside, num_filled=num_filled)


def _foreign_info(
    model: ResNet, *, backbone: Backbone, file: WeightsFile, found: Found, choices: Choices, origin: Path
) -> EncoderInfo:
    """Return what is known of an imported encoder: by the user, else by what obowlab exported, else by the format."""
    views, release, kept, hash_ = Views(), found.release, file.kept, weights_hash(model)
    with origin.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if kept is None:
        kept = EncoderInfo(
            backbone=backbone,
            original_resize=views.original_resize,
            original_size=views.original_size,
            mean=MEAN if release is None or release.mean is None else release.mean,
            std=STD if release is None or release.std is None else release.std,
            source=origin.name,
            weights_hash=hash_,
        )
    trained_with = "torchvision" if release is None else release.padding
    lost = f"it was trained with padding '{trained_with}', not '{backbone.padding}'"
    source = kept.origin or Origin(
        sha256=digest,
        release=release.key if release is not None else None,
        degraded=lost if trained_with == "same" != backbone.padding else None,
    )
    is_same = kept.weights_hash == hash_
    return kept.model_copy(
        update={
            "backbone": backbone,
            "mean": choices.mean or kept.mean,
            "std": choices.std or kept.std,
            "source": kept.source if is_same else origin.name,
            "fingerprint": kept.fingerprint if is_same else None,
            "weights_hash": hash_,
            "origin": source if choices.licence is None else source.model_copy(update={"licence": choices.licence}),
        }
    )


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
