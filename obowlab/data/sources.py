"""Find the images of a source: a folder or a plain .tar in ImageFolder layout, `SPLIT/CLASS/*.JPEG` or `CLASS/*.JPEG`.

An archive is read in place, by offset: nothing is unpacked, so nothing can be written outside of the data root. Order and
class numbers are those of torchvision's `ImageFolder`: classes sorted by name, then images by folder and name.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from obowlab.errors import UserError

SPLITS = ("train", "val")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG (or CLASS/*.JPEG alone, which becomes train)"


@dataclass(frozen=True)
class SourceImage:
    """One image file: its class number, its name below the split's folder, and where its bytes are."""

    label: int
    name: str
    path: str
    """Of the file or of the archive; text, as millions of Path objects take longer to make than to list."""
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes of the file."""
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class SourceSplit:
    """The images of one split in their final order; `class_names` are those of train, for every split."""

    name: str
    class_names: tuple[str, ...]
    images: tuple[SourceImage, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images together."""
        return sum(image.size for image in self.images)

    @property
    def listing_hash(self) -> str:
        """SHA-256 (hex) of every image's name and size: a change of the source shows without reading images."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.name}\0{image.size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """The splits found, and how many files are neither image nor in train or val, and left out."""

    path: Path
    splits: tuple[SourceSplit, ...]
    num_ignored: int

    def split(self, name: str) -> SourceSplit | None:
        """Return the split of that name, if the source has it."""
        return next((split for split in self.splits if split.name == name), None)


def read_source(path: Path) -> Source:
    """List the images of a folder or a .tar; no image is read.

    Raises:
        UserError: there is nothing at `path`, it is not in ImageFolder layout, or val has classes that train has not.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        files = list(_walk(path))
    elif path.is_file():
        files = list(_members(path))
    else:
        raise UserError(f"--source {path} is neither a folder nor a .tar file.")
    images = [file for file in files if file.name.lower().endswith(IMAGE_SUFFIXES)]
    splits = _splits(path, images)
    return Source(path=path, splits=splits, num_ignored=len(files) - sum(len(split.images) for split in splits))


def _walk(folder: Path) -> Iterator[SourceImage]:
    # Links are followed, as ImageFolder does: on clusters data sets are often folders of links.
    for parent, _, names in os.walk(folder, followlinks=True):
        below = Path(parent).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for name in names:
            file = f"{parent}/{name}"
            try:
                status = os.stat(file)  # noqa: PTH116
            except OSError as error:
                raise UserError(
                    f"--source holds {file}, which cannot be read ({error.strerror}): remove it or make it readable."
                ) from None
            if stat.S_ISREG(status.st_mode):
                yield SourceImage(label=-1, name=prefix + name, path=file, offset=0, size=status.st_size)


def _members(archive: Path) -> Iterator[SourceImage]:
    try:
        with tarfile.open(archive, "r:") as tar:
            members = {member.name: member for member in tar if member.isreg() and not member.sparse}  # the last of a name counts
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"--source {archive} is not a plain .tar ({error}): unpack it and give the folder.") from None
    for name, member in members.items():
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"--source {archive} holds '{name}', which points outside of the archive: unpack it and give the folder."
            )
        clean = PurePosixPath(name).as_posix()
        yield SourceImage(label=-1, name=clean, path=str(archive), offset=member.offset_data, size=member.size)


def _splits(path: Path, images: Iterable[SourceImage]) -> tuple[SourceSplit, ...]:
    """Sort images into splits and classes, looking through single outer folders."""
    parts = [(tuple(image.name.split("/")), image) for image in images]
    if not parts:
        raise UserError(f"--source {path} holds no image; expected {LAYOUT}.")
    while True:
        tops = {names[0] for names, _ in parts}
        if tops & set(SPLITS) or len(tops) > 1 or min(len(names) for names, _ in parts) < 3:
            break
        parts = [(names[1:], image) for names, image in parts]
    if not tops & set(SPLITS):
        parts = [(("train", *names), image) for names, image in parts]
    groups: dict[str, dict[str, list[tuple[str, str, SourceImage]]]] = {}
    for names, image in parts:
        if names[0] not in SPLITS:
            continue
        if len(names) < 3:
            where = f"{names[0]}/" if tops & set(SPLITS) else ""
            raise UserError(f"--source {path} has images without a class folder, such as {where}{names[-1]}; expected {LAYOUT}.")
        groups.setdefault(names[0], {}).setdefault(names[1], []).append(("/".join(names[1:-1]), names[-1], image))
    if "train" not in groups:
        raise UserError(f"--source {path} has val/ but no train/; expected {LAYOUT}.")
    class_names = tuple(sorted(groups["train"]))
    unknown = sorted(set(groups.get("val", {})) - set(class_names))
    if unknown:
        raise UserError(f"--source {path} has classes in val/ that train/ does not have, such as '{unknown[0]}'.")
    splits = []
    for split in SPLITS:
        if split in groups:
            ordered: list[SourceImage] = []
            for label, class_name in enumerate(class_names):
                for folder, name, image in sorted(groups[split].get(class_name, []), key=lambda found: found[:2]):
                    ordered.append(SourceImage(label, f"{folder}/{name}", image.path, image.offset, image.size))
            splits.append(SourceSplit(name=split, class_names=class_names, images=tuple(ordered)))
    return tuple(splits)
