"""Weights files of any kind as state dicts: what a file is follows from its bytes, not from its name.

No code from a file is run: torch files are read with `weights_only=True`. What is no checkpoint is named for what it is.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from obowlab.errors import UserError, memory_sentence
from obowlab.weights.info import (
    DAMAGED,
    beginning,
    is_safetensors,
    is_torch_archive,
    no_torch_file,
    only_member,
    open_archive,
    refuse_other_kinds,
    refuse_part,
    unreadable,
    unreadable_safetensors,
)

State = dict[str, Tensor]

WRAPPERS = ("network", "state_dict", "model")
"""Keys under which a file may hold its state dict; the authors use the first."""

COUNTERS = re.compile(r"(num_batches_tracked|_embedding_ptr|_track_num_batches|_iteration)$")
"""The names of what may be integers."""


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        state: the tensors, without the prefix of their names.
        prefix: that all names have in the file, as `module.` or `backbone.`.
        metadata: of a safetensors file.
        unused: names in the file of what is not under the prefix, with the reason.
    """

    state: State
    prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


def read_weights(path: Path) -> WeightsFile:
    """Read a torch file, a safetensors file, or a zip archive of one of them.

    Raises:
        UserError: it is none of these, damaged, or holds anything but finite tensors of floating point under names.
    """
    try:
        start = beginning(path)
        refuse_part(path)
        if is_safetensors(start):
            state, metadata = _read_safetensors(path)
            return _without_prefix(state, metadata=metadata, origin=path)
        refuse_other_kinds(start, path=path)
        if start.startswith(b"PK"):
            with open_archive(path) as archive:
                if not is_torch_archive(archive):
                    return _read_member(archive, path=path)
        return _without_prefix(_read_torch(path), metadata={}, origin=path)
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None


def _read_member(archive: zipfile.ZipFile, *, path: Path) -> WeightsFile:
    """Read the one weights file of a zip archive, as the authors' release is."""
    name = only_member(archive.namelist(), path=path)
    with tempfile.TemporaryDirectory(prefix="obowlab-weights-") as folder:
        member = Path(archive.extract(name, folder))
        try:
            return read_weights(member)
        except UserError as error:
            raise UserError(str(error).replace(str(member), f"{path} ({name})")) from None


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise unreadable_safetensors(path, error) from None
    except RuntimeError as error:  # the system refuses to open or to map it
        if memory_sentence(error) is not None:
            raise
        raise unreadable(path, error) from None


def _read_torch(path: Path) -> State:
    try:
        with path.open("rb") as file:  # by a name, torch would guess the format from its ending
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch's reader fail in a dozen ways; all mean the same here
        raise no_torch_file(path, reason=_reason(str(error), path=path)) from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state dict: neither at the top nor under {', '.join(WRAPPERS)}.")
    odd = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise UserError(
            f"{path} holds no state dict, neither at the top nor under {', '.join(WRAPPERS)}: "
            f"'{odd}' is no tensor but {type(content[odd]).__name__}."
        )
    return {str(name): tensor for name, tensor in content.items()}


def read_module(path: Path, *, origin: Path) -> State:
    """Return the weights of a module that `torch.save` pickled whole, as MLflow keeps models; no other class is made from it.

    Args:
        path: the file.
        origin: where it comes from, for messages.

    Raises:
        UserError: it is damaged, or holds anything but a ResNet of torchvision.
    """
    try:
        with open_archive(path):
            pass  # its records are looked at, none is read
    except UserError as error:
        raise UserError(str(error).replace(str(path), str(origin))) from None
    try:
        with torch.serialization.safe_globals(list(_OF_A_RESNET)):
            module: Any = torch.load(path, map_location="cpu", weights_only=True)
        state: State = module.state_dict()
    except Exception as error:  # as in `_read_torch`
        raise UserError(f"{origin} holds no encoder of obowlab: {_reason(str(error), path=path)}.") from None
    return _checked(WeightsFile(state=state), origin=origin).state


_OF_A_RESNET = (
    *(ResNet, BasicBlock, Bottleneck),
    *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Sequential),
    *(transforms.Compose, transforms.Resize, transforms.CenterCrop, transforms.ToTensor, transforms.Normalize),
    transforms.InterpolationMode,
)
"""The classes of `obowlab.weights.export.plain_network`."""


def _reason(message: str, *, path: Path) -> str:
    """Return what torch's reader found, without its advice to read the file unsafely."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is not None:
        return (
            f"it holds a Python object ({found[1]}), as a whole module saved with torch.save does, and reading that would run "
            "code from the file; where it was made, save model.state_dict() instead"
        )
    if zipfile.is_zipfile(path):
        return "its archive is damaged; copy it again"
    return DAMAGED


def _without_prefix(state: State, *, metadata: Mapping[str, str], origin: Path) -> WeightsFile:
    """Take off what stands before all names: `module.` of data parallelism, or the name of the network in a larger module."""
    if not state:
        raise UserError(f"{origin} holds no tensors.")
    prefix = "module." if any(name.startswith("module.") for name in state) else ""
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    stems = [name.removesuffix("conv1.weight") for name in inner if name.endswith(".conv1.weight")]
    networks = [stem for stem in stems if f"{stem}bn1.weight" in inner and f"{stem}layer1.0.conv1.weight" in inner]
    if "conv1.weight" in inner or not networks:
        return _checked(WeightsFile(state=inner, prefix=prefix, metadata=metadata), origin=origin)
    if len(networks) > 1:
        raise UserError(f"{origin} holds several networks ({', '.join(networks)}): save the state dict of one of them.")
    stem = networks[0]
    inside = {name.removeprefix(stem): tensor for name, tensor in inner.items() if name.startswith(stem)}
    unused = {f"{prefix}{name}": f"not part of {stem.removesuffix('.')}" for name in inner if not name.startswith(stem)}
    return _checked(WeightsFile(state=inside, prefix=f"{prefix}{stem}", metadata=metadata, unused=unused), origin=origin)


def _checked(file: WeightsFile, *, origin: Path) -> WeightsFile:
    """Refuse weights that are not finite, or no floating-point numbers."""
    for name, tensor in file.state.items():
        shown = f"{file.prefix}{name}"
        if not tensor.is_floating_point() and not COUNTERS.search(name):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{origin} holds weights that are no floating-point numbers: {shown} is of type {kind}.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{origin} holds weights that are not dense: {shown}.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # strides of 0
            raise UserError(f"{origin} holds fewer numbers than {shown} has: save the state dict with contiguous tensors.")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            wrong = int((~tensor.float().isfinite()).sum())
            raise UserError(
                f"{origin} holds weights that are not finite: {wrong} of {tensor.numel()} values of {shown}; "
                "take a checkpoint from before the training diverged."
            )
    return file
