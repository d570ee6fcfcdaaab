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
from torch import Tensor

from obowlab import text
from obowlab.errors import UserError
from obowlab.weights import WEIGHTS_SUFFIXES

State = dict[str, Tensor]

WRAPPERS = ("network", "state_dict", "model")
"""Keys under which a file may hold its state dict; the authors use the first."""

COUNTERS = re.compile(r"(num_batches_tracked|_embedding_ptr|_track_num_batches|_iteration)$")
"""The names of what may be integers."""

MOST_INFLATED = 20
"""Weights are stored as they are, and shrink by a tenth where another program packs them."""

LONGEST_HEADER = 100 * 2**20
"""No header of a safetensors file is longer, in bytes."""


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
        start = _beginning(path)
        if _is_safetensors(start):
            state, metadata = _read_safetensors(path)
            return _without_prefix(state, metadata=metadata, origin=path)
        what = _what_else(start)
        if what is not None:
            raise UserError(f"{path} is no weights file: {what}.")
        if start.startswith(b"PK"):
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path} is cut off: the end of a torch file or zip archive is missing; copy it again.")
            with zipfile.ZipFile(path) as archive:
                if (inflated := inflated_record(archive)) is not None:
                    raise UserError(f"{path} is no weights file: {inflated}.")
                if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                    return _read_member(archive, path=path)
        return _without_prefix(_read_torch(path), metadata={}, origin=path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def inflated_record(archive: zipfile.ZipFile) -> str | None:
    """Return in words what an archive says of itself that no weights do: a record grows more than `MOST_INFLATED` times."""
    for record in archive.infolist():
        if record.file_size > MOST_INFLATED * (record.compress_size + 1024):
            size, packed = text.size(record.file_size), text.size(record.compress_size)
            return f"{packed} in it grow to {size} when they are unpacked ({record.filename[:100]})"
    return None


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _what_else(start: bytes) -> str | None:
    """Name what is often found in place of a weights file."""
    begun = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "it is empty"
    if begun.startswith(b"version https://git-lfs"):
        return "it is the pointer of git LFS in place of the file; `git lfs pull` fetches it"
    if begun.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page (HTML), as a download link gives that needs a login or a click; download the file itself"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar":
        return "it is a packed archive; unpack it and name the file in it"
    if start.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as Keras writes; save a state dict of PyTorch"
    return None


def _read_member(archive: zipfile.ZipFile, *, path: Path) -> WeightsFile:
    """Read the one weights file of a zip archive, as the authors' release is."""
    files = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    names = [name for name in files if name.lower().endswith(WEIGHTS_SUFFIXES)]
    if len(names) != 1:
        found = f"several weights files: {', '.join(names)}" if names else "no weights file"
        raise UserError(f"{path} is a zip archive with {found}; unpack it and name one file.")
    with tempfile.TemporaryDirectory(prefix="obowlab-weights-") as folder:
        member = Path(archive.extract(names[0], folder))
        try:
            return read_weights(member)
        except UserError as error:
            raise UserError(str(error).replace(str(member), f"{path} ({names[0]})")) from None


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}.") from None


def _read_torch(path: Path) -> State:
    try:
        with path.open("rb") as file:  # by a name, torch would guess the format from its ending
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch's reader fail in a dozen ways; all mean the same here
        raise UserError(f"{path} is not a torch file of plain tensors: {_reason(str(error), path=path)}.") from None
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
    return "it is damaged or of another kind; copy it again, or save model.state_dict() with torch.save"


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
