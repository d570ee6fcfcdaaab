"""What is known of a weights file before torch is imported: what kind it is and, of obowlab's own, what encoder it holds."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
from pydantic import ValidationError

from obowlab.config import Backbone, Positive, Section, canonical_hash
from obowlab.errors import UserError
from obowlab.files.replacing import inflated_record
from obowlab.views.views import MEAN, STD
from obowlab.weights import WEIGHTS_SUFFIXES

METADATA_KEY = "obowlab"

PICKLE = b"\x80"
"""How files of older versions of torch begin."""

STATE_DICT = "where it was made, save model.state_dict() with torch.save"
DAMAGED = "it is damaged or of another kind; copy it again, or save model.state_dict() with torch.save"

LONGEST_HEADER = 100 * 2**20
"""No header of a safetensors file is longer, in bytes."""


class Origin(Section):
    """Where an imported encoder comes from; every later export carries it on.

    Attributes:
        sha256: of the file that was imported.
        release: the format, a key of `obowlab.weights.releases.RELEASES`; None where none was recognised.
        licence: of the weights, as the user who imported them says.
        degraded: why the encoder is less than its authors'; None as a rule.
    """

    sha256: str
    release: str | None = None
    licence: str | None = None
    degraded: str | None = None


class EncoderInfo(Section):
    """What must be known to use an encoder: how to build it and what to show it."""

    backbone: Backbone
    original_resize: int
    original_size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[Positive, Positive, Positive] = STD
    source: str
    fingerprint: str | None = None
    weights_hash: str
    origin: Origin | None = None

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what it makes of images: of its weights, and of pixels and padding where they are not the usual."""
        own = {"mean": list(self.mean), "std": list(self.std), "padding": self.backbone.padding}
        if own == {"mean": list(MEAN), "std": list(STD), "padding": "torchvision"}:
            return self.weights_hash
        return canonical_hash({"weights": self.weights_hash, **own})


def peek(path: Path) -> EncoderInfo | None:
    """Return what obowlab wrote about the encoder in a file; None for a file of others, whose weights torch must read first.

    Raises:
        UserError: the file cannot be what it should, as its first bytes and its index of contents say.
    """
    try:
        start = beginning(path)
        refuse_part(path)
        if is_safetensors(start):
            return encoder_info(safetensors_metadata(path), origin=path)
        refuse_other_kinds(start, path=path)
        if start.startswith(b"PK"):
            with open_archive(path) as archive:
                if not is_torch_archive(archive):
                    only_member(archive.namelist(), path=path)
        elif not start.startswith(PICKLE):
            raise no_torch_file(path, reason=DAMAGED)
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None
    return None


def refuse_own(info: EncoderInfo | None, *, path: Path) -> None:
    """Refuse to import what obowlab wrote itself.

    Raises:
        UserError: the file is one of obowlab's own.
    """
    if info is not None:
        raise UserError(f"{path} is an encoder file of obowlab already; use it as it is.")


def encoder_info(metadata: Mapping[str, str], *, origin: Path) -> EncoderInfo | None:
    """Return what the metadata of a safetensors file says about the encoder; None when obowlab did not write it.

    Raises:
        UserError: another version of obowlab wrote it.
    """
    if METADATA_KEY not in metadata:
        return None
    try:
        return EncoderInfo.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        raise UserError(f"{origin} was written by another version of obowlab: {error.errors()[0]['msg']}.") from None


# --------------------------------------------------------------------------------------------------- kinds of weights files


def beginning(path: Path) -> bytes:
    """Return the first bytes of a file, which tell its kind.

    Raises:
        UserError: it is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weights file{_inside(path)}.")
    with path.open("rb") as file:
        return file.read(512)


def refuse_part(path: Path) -> None:
    """Refuse one of several files that hold the weights together, as their names say.

    Raises:
        UserError: it is one of these.
    """
    found = re.search(r"-\d+-of-(\d+)\.", path.name)
    if found is not None and int(found[1]) > 1:
        raise UserError(
            f"{path} is one of {int(found[1])} files that hold the weights together; save them as one file where they were made."
        )


def _inside(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(WEIGHTS_SUFFIXES))
    return f"; name the file in it: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def is_safetensors(start: bytes) -> bool:
    """Return whether a file with these first bytes is of safetensors."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, whose length must be the one that its header says.

    Raises:
        UserError: it is damaged or cut off.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise unreadable_safetensors(path, error) from None


def unreadable_safetensors(path: Path, error: Exception) -> UserError:
    """Return the error for a safetensors file that its library refuses."""
    found = re.sub(r"^Error while deserializing header: |\.$", "", str(error))
    lengths = ("incomplete metadata", "metadata incomplete", "invalid header length", "header too")
    why = "its length is not what its header says, as of a file that is cut off" if found.lower().startswith(lengths) else found
    return UserError(f"{path} is not a readable safetensors file: {why}; copy it again.")


def refuse_other_kinds(start: bytes, *, path: Path) -> None:
    """Refuse what is often found in place of a weights file, by its name.

    Raises:
        UserError: the file is one of these.
    """
    what = _what_else(start)
    if what is not None:
        raise UserError(f"{path} is no weights file: {what}.")


_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")
"""How gzip, bzip2, xz, 7z, zstd and rar begin."""


def _what_else(start: bytes) -> str | None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "it is empty"
    if not start.strip(b"\0"):
        return "it holds zeros, as a download or copy that was broken off leaves; copy it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is the pointer of git LFS in place of the file; `git lfs pull` fetches it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page (HTML), as a download link gives that needs a login or a click; download the file itself"
    if text.startswith(b"{") and b'"weight_map"' in text:
        return "it is the index of weights that lie in several files; save them as one file where they were made"
    if start.startswith(_PACKED) or start[257:262] == b"ustar":
        return "it is a packed archive; unpack it and name the file in it"
    if start.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as Keras writes; save a state dict of PyTorch"
    if start.startswith(b"\x93NUMPY"):
        return "it is an array of numpy; save a state dict of PyTorch"
    if re.fullmatch(rb"[\t\r\n -~]+", start):
        return f"it is a text, which begins with '{start[:40].decode().strip()}'"
    return None


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a file that begins as a zip archive, as torch's files do.

    Raises:
        UserError: it is damaged, encrypted, would inflate to what no weights need, or is what torch writes besides plain tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off: the end of a torch file or zip archive is missing; copy it again.")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/archive_format") for name in names):
            raise no_torch_file(path, reason=f"it is a program of torch.export; {STATE_DICT}")
        if is_torch_archive(archive) and any("/code/" in name for name in names):
            raise no_torch_file(path, reason=f"it is a TorchScript module; {STATE_DICT}")
        if any(member.flag_bits & 1 for member in archive.infolist()):
            raise UserError(f"{path} is a zip archive with a password; unpack it and name the file in it.")
        inflated = inflated_record(archive)
        if inflated is not None:
            raise UserError(f"{path} is no weights file: {inflated}.")
        yield archive


def is_torch_archive(archive: zipfile.ZipFile) -> bool:
    """Return whether torch.save wrote a zip archive."""
    return any(name.endswith("/data.pkl") for name in archive.namelist())


def only_member(names: Sequence[str], *, path: Path) -> str:
    """Return the name of the one weights file in a zip archive, as the authors' release is.

    Raises:
        UserError: there is none, or several.
    """
    files = [name for name in names if not name.startswith("__MACOSX/")]
    weights = [name for name in files if name.lower().endswith(WEIGHTS_SUFFIXES)]
    if len(weights) != 1:
        found = f"several weights files: {', '.join(weights)}" if weights else "no weights file"
        raise UserError(f"{path} is a zip archive with {found}; unpack it and name one file.")
    return weights[0]


def no_torch_file(path: Path, *, reason: str) -> UserError:
    """Return the error for a file that is no torch file as it should be."""
    return UserError(f"{path} is not a torch file of plain tensors: {reason}.")


def unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a file that the system, or the reader of zip archives, refuses."""
    return UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.")
