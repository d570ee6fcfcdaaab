"""Features of a folder of images that is no data set."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from obowlab.data.decoding import check_size
from obowlab.data.image_folder import list_images
from obowlab.errors import UserError
from obowlab.evaluation.features import BATCH_SIZE, REPORT_EVERY_S, frozen
from obowlab.views.photometric import normalise
from obowlab.views.pil_views import Pixels
from obowlab.weights.encoder_file import Encoder

logger = logging.getLogger(__name__)


FORMATS = (".npz", ".parquet")
"""What the names of files of features end in."""


def embed(
    encoder: Encoder,
    folder: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device | None = None,
    workers: int | None = None,
) -> tuple[npt.NDArray[np.float32], list[Path]]:
    """Return the features of all images below a folder, and their files.

    They are those of `obowlab eval`: the centre view, in evaluation mode, in float32. The default batch size is its own too;
    with another one, features may differ in their last bits. What is no JPEG is shown as it is, where a prepared data set has
    it encoded as JPEG. Hidden files are left out, and so are images that cannot be read: one warning of this module's logger
    names them.

    Args:
        encoder: as `obowlab.load` returns it, or trained further; its mode and its place are left as they were.
        folder: with images in it or in folders below.
        batch_size: images at a time.
        device: where to compute; where the encoder is if absent.
        workers: threads that read images; by default as many as torch computes with.

    Returns:
        The features, float32 [N, D], and the N files, by the order of their names relative to the folder.

    Raises:
        UserError: there is no such folder or device, no image can be read, or a feature is not finite.
    """
    folder = Path(folder)
    names = list_images(folder)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}.")
    before, there = encoder.device, encoder.device if device is None else torch.device(device)
    if there.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch sees no GPU for device '{there}': choose 'cpu'.")
    features: list[npt.NDArray[np.float32]] = []
    kept: list[Path] = []
    broken: list[str] = []
    last = time.monotonic()
    try:
        encoder.to(there)
        with frozen(encoder):
            for done, batch in _batches(encoder, folder, names, batch_size=batch_size, workers=workers):
                kept += [folder / name for name, pixels in batch if isinstance(pixels, np.ndarray)]
                broken += [f"{name} ({reason})" for name, reason in batch if isinstance(reason, str)]
                shown = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
                if shown:
                    pixels = torch.from_numpy(np.stack(shown))
                    images = normalise(pixels, device=there, mean=encoder.info.mean, std=encoder.info.std)
                    features.append(encoder(images).float().cpu().numpy())
                if time.monotonic() - last > REPORT_EVERY_S:
                    last = time.monotonic()
                    logger.info("features of %s: %d/%d images", folder, done, len(names))
    finally:
        encoder.to(before)
    if not features:
        raise UserError(f"None of the {len(names)} images in {folder} can be read, as {broken[0]}.")
    if broken:
        some = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        logger.warning("%d of %d images in %s cannot be read and are left out: %s.", len(broken), len(names), folder, some)
    array = np.concatenate(features)
    if not np.isfinite(array).all():
        raise UserError("The encoder gives features that are not finite: its weights are broken, or overflow in float32.")
    return array, kept


def write_features(path: Path, *, features: npt.NDArray[np.float32], names: Sequence[str], facts: Mapping[str, str]) -> None:
    """Write features whole or not at all, as `.npz` or `.parquet`.

    In an .npz, `features` is float32 [N, D] and `paths` [N]; in a Parquet file `path` and `features` are the columns. The facts
    are 0-dim arrays there, and the metadata of the schema here.

    Args:
        path: ends in one of `FORMATS`.
        features: float32 [N, D].
        names: of the N images.
        facts: where the features come from.

    Raises:
        UserError: the disk refuses.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {"features": features, "paths": np.array(names), **facts}
            with beside.open("wb") as file:
                np.savez(file, **arrays)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            # Names need not be UTF-8; what is not is replaced.
            paths = [os.fsencode(name).decode("utf-8", "replace") for name in names]
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
            table = pa.table({"path": paths, "features": values}).replace_schema_metadata(dict(facts))
            pq.write_table(table, str(beside))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):  # of a disk that refuses everything; what it refused before is the error to tell
            beside.unlink(missing_ok=True)


def _batches(
    encoder: Encoder, folder: Path, names: Sequence[str], *, batch_size: int, workers: int | None
) -> Iterator[tuple[int, list[tuple[str, Pixels | str]]]]:
    """Yield the number of images up to here, and the next names, each with its pixels or with the reason why it has none.

    One batch is read while the one before is computed.
    """

    def read(name: str) -> tuple[str, Pixels | str]:
        try:
            with Image.open(folder / name) as image:
                check_size(image)
                return name, encoder.transform.pixels(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files; every one is reported
            return name, _reason(error)

    def submit(start: int) -> list[Future[tuple[str, Pixels | str]]]:
        return [pool.submit(read, name) for name in names[start : start + batch_size]]

    pool = ThreadPoolExecutor(torch.get_num_threads() if workers is None else max(1, workers))
    try:
        ahead = submit(0)
        for start in range(0, len(names), batch_size):
            batch, ahead = ahead, submit(start + batch_size)
            yield min(start + batch_size, len(names)), [one.result() for one in batch]
    finally:
        pool.shutdown(cancel_futures=True)


def _reason(error: Exception) -> str:
    """Return why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its own text holds the whole path
        return "not an image in a format Pillow knows"
    return (str(error) or type(error).__name__).rstrip(".")
