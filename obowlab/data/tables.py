"""Read images that stand in the rows of tables: Parquet files, and folders that Hugging Face's `datasets` has saved to disk.

Both need pyarrow alone; `datasets` itself is not imported. A table is read twice from front to back, once for the sizes of its
images and once for the images themselves, and a few blocks of rows are in memory at a time.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from obowlab.data.sources import Entry, FetchedImage, Source, SourceImage, source_of_entries
from obowlab.data.split_names import splits_of_shards
from obowlab.errors import UserError

NEEDS_PYARROW = "Reading Parquet and Arrow files needs pyarrow, which comes with mlflow: `pip install pyarrow`."
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture", "bytes", "image_bytes")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "category", "target", "fine_label", "coarse_label")
_BLOCKS_IN_MEMORY = 4


class _Table(Protocol):
    """A file of rows in blocks."""

    schema: Any
    num_blocks: int

    def block(self, number: int, columns: Sequence[str]) -> Any:
        """Return some columns of a block as a pyarrow table."""


class _ParquetTable:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self._file = pq.ParquetFile(path)
        self.schema, self.num_blocks = self._file.schema_arrow, self._file.num_row_groups
        self._lock = threading.Lock()

    def block(self, number: int, columns: Sequence[str]) -> Any:
        with self._lock:  # one file cannot be read by several threads
            return self._file.read_row_group(number, columns=list(columns))


class _ArrowTable:
    """A file of Arrow's stream or file format, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        mapped = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_stream(mapped)
            self._batches = list(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.schema, self.num_blocks = reader.schema, len(self._batches)

    def block(self, number: int, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        return pa.Table.from_batches([self._batches[number]]).select(list(columns))


class _Blocks:
    """The images of one table, block by block; the last few blocks stay in memory."""

    def __init__(self, table: _Table, *, column: str) -> None:
        self._table, self._column = table, column
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, block: int, row: int, *, folder: Path) -> bytes:
        """Return the bytes of an image, which stand in its row or in the file that its row names."""
        with self._lock:
            if block not in self._recent:
                self._recent[block] = self._table.block(block, [self._column]).column(0).combine_chunks()
                if len(self._recent) > _BLOCKS_IN_MEMORY:
                    self._recent.popitem(last=False)
            value = self._recent[block][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return folder.joinpath(str(value["path"])).read_bytes()
        return bytes(data or b"")


def read_tables(path: Path, files: Sequence[tuple[str | None, Path]], *, labelled: bool = True) -> Source:
    """List the images of Parquet or Arrow files: an image column (bytes, or Hugging Face's `image`), and a label column if any.

    Args:
        path: what `--source` names.
        files: the word that tells the split of each, None for train, and the file.
        labelled: whether to use the labels.

    Raises:
        UserError: pyarrow is not installed, a file cannot be read, or has no column of images.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(NEEDS_PYARROW) from None
    entries: list[Entry] = []
    class_names: list[str] | None = None
    notes: dict[str, None] = {}
    for split, file in files:
        try:
            table: _Table = _ParquetTable(file) if file.suffix == ".parquet" else _ArrowTable(file)
            image, label = _columns(file, table.schema)
            label = label if labelled else None
            names = _class_names(table.schema, label) if label is not None else None
            if label is not None:
                notes[f"labels are those of the column '{label}'"] = None
            class_names = class_names or names
            entries += _rows(file, table, split=split, image=image, label=label, names=names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"--source {file} cannot be read ({str(error).splitlines()[0]}).") from None
    if not entries:
        raise UserError(f"--source {path} holds no image: its tables have no rows.")
    return source_of_entries(path, entries, class_names=class_names, notes=list(notes))


def files_of_saved(folder: Path) -> list[tuple[str | None, Path]]:
    """Return the Arrow files of a folder that `datasets.save_to_disk` has written, with their splits.

    Raises:
        UserError: it is damaged, or its rows were selected without being written anew.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            parts: list[tuple[str | None, Path]] = [(str(split), folder / str(split)) for split in splits]
        else:
            parts = [(None, folder)]
        files: list[tuple[str | None, Path]] = []
        for split, part in parts:
            state = json.loads((part / "state.json").read_text(encoding="utf-8"))
            if state.get("_indices_data_files"):
                raise UserError(f"--source {part} selects rows of its tables: save it again after `flatten_indices()`.")
            files += [(split, part / str(file["filename"])) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--source {folder} is no complete folder of `datasets.save_to_disk` ({error}).") from None
    return files


def files_of_folder(folder: Path, files: Sequence[Path]) -> list[tuple[str | None, Path]]:
    """Return files of tables with the splits that their names or folders tell."""
    return list(zip(splits_of_shards(files, below=folder), files, strict=True))


def _columns(file: Path, schema: Any) -> tuple[str, str | None]:
    """Return the column of the images and that of the labels.

    Raises:
        UserError: there is none of images.
    """
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [name for name in schema.names if holds_images(schema.field(name).type)]
    image = next((name for name in _IMAGE_COLUMNS if name in found), found[0] if len(found) == 1 else None)
    if image is None:
        raise UserError(
            f"--source {file} has no column of encoded images among {', '.join(schema.names[:8])}: call the one that holds the "
            "bytes of JPEG or PNG files `image`."
        )
    return image, next((name for name in _LABEL_COLUMNS if name in schema.names), None)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` notes in a schema, None where it does not."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in noted] if isinstance(noted, list) and len(set(noted)) == len(noted) else None


def _rows(
    file: Path, table: _Table, *, split: str | None, image: str, label: str | None, names: Sequence[str] | None
) -> Iterator[Entry]:
    """Yield the images of one table, in order."""
    blocks = _Blocks(table, column=image)
    count = 0
    for block in range(table.num_blocks):
        rows = table.block(block, [image, label] if label is not None else [image])
        labels = rows.column(label).to_pylist() if label is not None else [None] * rows.num_rows
        for row, (size, value) in enumerate(zip(_sizes(rows.column(image)), labels, strict=True)):
            class_name = names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value
            if value is not None and not isinstance(value, str | int):
                raise UserError(
                    f"--source {file}: the column '{label}' holds {str(value)!r:.40}, which is no label of one class."
                )
            found = SourceImage(-1, f"{file.stem}/{count:08d}", str(file), offset=0, size=size)
            fetch = partial(blocks.fetch, block, row, folder=file.parent)
            unlabelled = class_name is None or value == -1
            yield Entry(split, None if unlabelled else str(class_name), FetchedImage(**vars(found), fetch=fetch))
            count += 1


def _sizes(column: Any) -> list[int]:
    """Return the bytes of every image of a column; 0 where they stand in another file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return [size or 0 for size in pc.binary_length(column).to_pylist()]
