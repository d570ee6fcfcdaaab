"""Write and read `.beton` files: ffcv's format, version 2, with one JPEG field `image` and one integer field `label`.

    header | 2 field descriptors | metadata, 24 bytes per image | zeros up to a page | JPEG bytes | allocation table

An image never crosses a page (a power of two), which is what lets ffcv fetch page by page. Neither side needs ffcv. Bytes are a
function of the records alone: no time, no order of threads. The image field's arguments, unused by ffcv, hold the content hash.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from obowlab.errors import UserError

FORMAT_VERSION = 2
MIN_PAGE_SIZE = 1 << 21
MAX_PAGE_SIZE = 1 << 31
MAX_SIDE = (1 << 16) - 1
"""Widths and heights are stored in 16 bits."""

_INT_FIELD, _IMAGE_FIELD = 1, 2
_JPEG_MODE = 0
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_images", "<u8"), ("table_pointer", "<u8")], align=True
)
_FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))], align=True)
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_RECORD = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATION = np.dtype([("index", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_METADATA_START = _HEADER.itemsize + 2 * _FIELD.itemsize
_STAMP = b"sha256:"


class ContentHash:
    """SHA-256 over (label, length, JPEG bytes) of every image in order: the same however the file is laid out."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, label: int, jpeg: bytes | memoryview) -> None:
        """Take the next image in."""
        self._hash.update(struct.pack("<qq", label, len(jpeg)))
        self._hash.update(jpeg)

    def hexdigest(self) -> str:
        """Return the hash of everything added so far, in hex."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Record:
    """One image to write: its class, its RGB or grayscale JPEG bytes and its size in pixels."""

    label: int
    jpeg: bytes
    height: int
    width: int


def page_size_for(largest: int) -> int:
    """Return the smallest allowed page size, in bytes, that holds an image of `largest` bytes."""
    size = MIN_PAGE_SIZE
    while size < min(largest, MAX_PAGE_SIZE):
        size *= 2
    return size


class BetonWriter:
    """Stream images into a new file, in order; a context manager.

    The header is written last, so a file whose writer did not finish is no valid file. Callers write to a temporary name
    and rename.

    Args:
        path: the file to create.
        capacity: limit on the number of images (their metadata is stored before them).
        page_size: a power of two, as `page_size_for` gives; no image may be larger.
    """

    def __init__(self, path: Path, *, capacity: int, page_size: int = MIN_PAGE_SIZE) -> None:
        assert capacity > 0
        assert MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE
        assert page_size & (page_size - 1) == 0
        self.page_size = page_size
        self._path = path
        self._records = np.zeros(capacity, _RECORD)
        self._allocations = np.zeros(capacity, _ALLOCATION)
        self._num_images = 0
        self._position = -(-(_METADATA_START + self._records.nbytes) // page_size) * page_size
        self._hash = ContentHash()
        self._file: BinaryIO | None = None

    def __enter__(self) -> BetonWriter:
        self._file = self._path.open("wb")
        self._file.seek(self._position)
        return self

    def append(self, record: Record) -> None:
        """Add one image."""
        assert self._file is not None
        assert 0 < len(record.jpeg) <= self.page_size
        assert 0 < record.height <= MAX_SIDE
        assert 0 < record.width <= MAX_SIDE
        left_in_page = -self._position % self.page_size
        if len(record.jpeg) > left_in_page > 0:
            self._file.write(bytes(left_in_page))
            self._position += left_in_page
        self._records[self._num_images] = ((_JPEG_MODE, record.width, record.height, self._position), record.label)
        self._allocations[self._num_images] = (self._num_images, self._position, len(record.jpeg))
        self._file.write(record.jpeg)
        self._hash.add(record.label, record.jpeg)
        self._position += len(record.jpeg)
        self._num_images += 1

    @property
    def num_images(self) -> int:
        """Images added so far."""
        return self._num_images

    @property
    def content_hash(self) -> str:
        """Content hash of the images added so far."""
        return self._hash.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is not None:
                return
            file.write(self._allocations[: self._num_images].tobytes())
            fields = np.zeros(2, _FIELD)
            fields["kind"] = (_IMAGE_FIELD, _INT_FIELD)
            fields["name"] = (b"image", b"label")
            stamp = _STAMP + self.content_hash.encode()
            fields["arguments"][0, : len(stamp)] = np.frombuffer(stamp, "u1")
            header = np.array((FORMAT_VERSION, 2, self.page_size, self._num_images, self._position), _HEADER)
            file.seek(0)
            file.write(header.tobytes() + fields.tobytes() + self._records.tobytes())
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, eq=False)
class BetonIndex:
    """Everything in a file but the images: N images in order, and where the bytes of each lie."""

    labels: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    sizes: NDArray[np.int64]
    stamp: str | None
    """Content hash noted by our writer; None in a file that another program wrote."""


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file that cannot be used, with the commands that examine and fix it."""
    name = path.parent.name
    return UserError(f"{path} is damaged ({what}): check it with `obowlab data verify {name}`, then {fix_for(name)}.")


def fix_for(dataset: str) -> str:
    """Return what to type to make a data set again."""
    source = "" if dataset == "synthetic" else " --source DIR"
    return f"make it again with `obowlab data prepare {dataset}{source} --force`"


def read_index(path: Path) -> BetonIndex:
    """Read and check header, metadata and allocation table.

    Every pointer is checked against the size of the file, so that no later access can leave it.

    Raises:
        UserError: the file is truncated, was tampered with, or holds other fields than ours.
        OSError: the file cannot be read.
    """
    num_bytes = path.stat().st_size
    if num_bytes < _METADATA_START:
        raise damaged(path, f"only {num_bytes} bytes")
    with path.open("rb") as file:
        header = np.frombuffer(file.read(_HEADER.itemsize), _HEADER)[0]
        if header["version"] != FORMAT_VERSION:
            raise damaged(path, f"format version {header['version']}, not {FORMAT_VERSION}")
        if header["num_fields"] != 2:
            raise damaged(path, f"{header['num_fields']} fields, not 2")
        fields = np.frombuffer(file.read(2 * _FIELD.itemsize), _FIELD)
        if fields["name"].tolist() != [b"image", b"label"] or fields["kind"].tolist() != [_IMAGE_FIELD, _INT_FIELD]:
            raise damaged(path, "the fields are not an image named 'image' and an integer named 'label'")
        num_images, table = int(header["num_images"]), int(header["table_pointer"])
        if num_images == 0:
            raise damaged(path, "it holds no image")
        if table + num_images * _ALLOCATION.itemsize != num_bytes or _METADATA_START + num_images * _RECORD.itemsize > table:
            raise damaged(path, f"{num_bytes} bytes do not fit the {num_images} images of its header: truncated?")
        records = np.frombuffer(file.read(num_images * _RECORD.itemsize), _RECORD)
        file.seek(table)
        allocations = np.frombuffer(file.read(), _ALLOCATION)
    if len(records) != num_images or len(allocations) != num_images:
        raise damaged(path, "it ends early")
    if (records["image"]["mode"] != _JPEG_MODE).any():
        raise damaged(path, "some images are not stored as JPEG")
    # ffcv itself, with several workers, writes the table in another order than the images.
    allocations = allocations[np.argsort(allocations["pointer"], kind="stable")]
    pointers = records["image"]["pointer"]
    places = np.searchsorted(allocations["pointer"], pointers).clip(max=num_images - 1)
    sizes = allocations["size"][places]
    data_start = _METADATA_START + num_images * _RECORD.itemsize
    inside = (pointers >= data_start) & (pointers < table) & (sizes > 0) & (sizes <= table - pointers.clip(max=table))
    if not (inside & (allocations["pointer"][places] == pointers)).all():
        raise damaged(path, f"image {int(np.argmin(inside & (allocations['pointer'][places] == pointers)))} lies outside of it")
    if (records["label"] < 0).any() or (records["image"]["height"] == 0).any() or (records["image"]["width"] == 0).any():
        raise damaged(path, "a label is negative or an image has no pixels")
    arguments = fields["arguments"][0].tobytes().rstrip(b"\0")
    return BetonIndex(
        labels=records["label"].astype(np.int64),
        heights=records["image"]["height"].astype(np.int32),
        widths=records["image"]["width"].astype(np.int32),
        pointers=pointers.astype(np.int64),
        sizes=sizes.astype(np.int64),
        stamp=arguments.removeprefix(_STAMP).decode("ascii", "replace") if arguments.startswith(_STAMP) else None,
    )
