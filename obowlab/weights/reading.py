"""Weights files of any kind as state dicts: what a file is follows from its bytes, not from its name.

No code from a file is run: torch files are read with `weights_only=True`. What is no checkpoint is named for what it is.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from obowlab.errors import UserError, memory_sentence
from obowlab.weights.info import (
    DAMAGED,
    METADATA_KEY,
    EncoderInfo,
    beginning,
    encoder_info,
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

COUNTERS = re.compile(r"(num_batches_tracked|_embedding_ptr|_track_num_batches|_iteration)$")
"""The names of what may be integers."""


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        content: as it is nested in the file; tensors, and whatever is beside them.
        container: what kind of file it is.
        metadata: of a safetensors file.
        kept: what an export of obowlab in torchvision's names says of its encoder.
    """

    content: Mapping[str, Any]
    container: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    kept: EncoderInfo | None = None


def read_weights(path: Path, *, plain_objects: bool = False) -> WeightsFile:
    """Read a torch file, a safetensors file, or a zip archive of one of them.

    Args:
        path: the file.
        plain_objects: read `argparse.Namespace` and numbers and arrays of numpy too, which carry no code.

    Raises:
        UserError: it is none of these, damaged, or holds what only code of the file could make.
    """
    try:
        start = beginning(path)
        refuse_part(path)
        if is_safetensors(start):
            state, metadata = _read_safetensors(path)
            return WeightsFile(content=state, container="safetensors file", metadata=metadata)
        refuse_other_kinds(start, path=path)
        if start.startswith(b"PK"):
            with open_archive(path) as archive:
                if not is_torch_archive(archive):
                    return _read_member(archive, path=path, plain_objects=plain_objects)
        kind = "torch file" if start.startswith(b"PK") else "torch file as before torch 1.6"
        content = _read_torch(path, plain_objects=plain_objects)
        return WeightsFile(content=content, container=kind, kept=_kept_info(content, origin=path))
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None


def _read_member(archive: zipfile.ZipFile, *, path: Path, plain_objects: bool) -> WeightsFile:
    """Read the one weights file of a zip archive, as the authors' release is."""
    name = only_member(archive.namelist(), path=path)
    with tempfile.TemporaryDirectory(prefix="obowlab-weights-") as folder:
        member = Path(archive.extract(name, folder))
        try:
            inner = read_weights(member, plain_objects=plain_objects)
            return replace(inner, container=f"zip archive with {name}, a {inner.container}")
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


def _read_torch(path: Path, *, plain_objects: bool) -> Mapping[str, Any]:
    try:
        # Opened here: by a name, torch would guess the format from its ending.
        with path.open("rb") as file, torch.serialization.safe_globals(list(_PLAIN) if plain_objects else []):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch's reader fail in a dozen ways; all mean the same here
        raise no_torch_file(path, reason=_reason(str(error), path=path, plain_objects=plain_objects)) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no state dict: it holds one {type(content).__name__}.")
    return content


def _kept_info(content: Mapping[str, Any], *, origin: Path) -> EncoderInfo | None:
    said = vars(content).get(METADATA_KEY) if isinstance(content, OrderedDict) else None
    return None if said is None else encoder_info({METADATA_KEY: json.dumps(said, default=str)}, origin=origin)


_OF_NUMPY: dict[str, Any] = {"scalar": np.float64(0), "_reconstruct": np.zeros(0)}
"""What numpy's functions that make numbers and arrays from a file are called, each with one that it makes."""

_PLAIN: tuple[Any, ...] = (
    argparse.Namespace,
    *(
        (made.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, made in _OF_NUMPY.items()
    ),
    *(np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilBefd")),
)
"""The classes of settings and of numbers that files of others hold beside tensors; none of them runs code when it is read."""


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
    check_tensors(state, spell=str, origin=origin)
    return state


_OF_A_RESNET = (
    *(ResNet, BasicBlock, Bottleneck),
    *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Sequential),
    *(transforms.Compose, transforms.Resize, transforms.CenterCrop, transforms.ToTensor, transforms.Normalize),
    transforms.InterpolationMode,
)
"""The classes of `obowlab.weights.export.plain_network`."""


def _reason(message: str, *, path: Path, plain_objects: bool = True) -> str:
    """Return what torch's reader found, without its advice to read the file unsafely."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is not None and not plain_objects and re.match(r"argparse\.Namespace$|numpy\b", found[1]):
        return (
            f"it holds a Python object besides tensors ({found[1]}), which carries no code: "
            "`obowlab weights import --allow-plain-objects` reads it"
        )
    if found is not None:
        return (
            f"it holds a Python object ({found[1]}), as a whole module saved with torch.save does, and reading that would run "
            "code from the file; where it was made, save model.state_dict() instead"
        )
    if zipfile.is_zipfile(path):
        return "its archive is damaged; copy it again"
    return DAMAGED


def check_tensors(state: Mapping[str, Tensor], *, spell: Callable[[str], str], origin: Path) -> None:
    """Refuse weights that are not finite, no floating-point numbers, or not all there.

    Args:
        state: names and tensors.
        spell: returns the file's own name of one.
        origin: the file.

    Raises:
        UserError: names the first tensor that will not do.
    """
    for name, tensor in state.items():
        shown = spell(name)
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
