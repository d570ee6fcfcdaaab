"""Frozen features of whole splits, computed once and kept on disk under the hash of everything they depend on.

An entry is a folder `CACHE_DIR/KEY` with one `.npy` file and what it was made of. It is written under a temporary name and
renamed, so a killed process leaves no half entry, and its bytes are checked against their hash before use. A key covers the
weights, their padding, the images, the view and the version of this code: no entry is ever stale.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from obowlab.config import Recipe, Views, canonical_hash
from obowlab.data.datasets import Split, open_split, trained_on
from obowlab.errors import UserError
from obowlab.files.opening import UnusableFileError, name_beside, open_file, read_file
from obowlab.files.sharing import share, shared_folder
from obowlab.views.loaders import centre_loader
from obowlab.views.photometric import normalise
from obowlab.views.stretched import stretched_batches
from obowlab.views.views import MEAN, STD

FEATURES_VERSION = 1
"""Raise it when the same weights and images would give other features."""

BATCH_SIZE = 128
REPORT_EVERY_S = 20.0
_TOLD: set[Path] = set()
"""Folders of kept features that cannot be used, of which this process has said so."""

View = Literal["centre", "mirrored", "stretched"]
"""The centre crop of an image (`Views.original_resize`, `original_size`), its mirror image, or all of it, made square."""


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 (hex) over names, types, shapes and bytes of a module's state, whatever its device or memory layout."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


Statistics = tuple[float, float, float]
"""A number of each channel."""


def pixel_statistics(encoder: nn.Module) -> tuple[Statistics, Statistics]:
    """Return the mean and deviation of pixels in [0, 1] that an encoder expects, `pixel_mean` and `pixel_std`, or ImageNet's."""
    mean: Statistics = getattr(encoder, "pixel_mean", MEAN)
    std: Statistics = getattr(encoder, "pixel_std", STD)
    return mean, std


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode without gradients, in true float32, and restore the mode of every part."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


class FeatureStore:
    """The features of one encoder on one data set.

    Args:
        encoder: maps float32 [B, 3, S, S] to pooled features [B, c]; see `pixel_statistics` for what it is shown.
        recipe: its views say what is cut; its data set and images per class are the default.
        dataset: another prepared data set to measure on, then with all its training images.
        data_root: folder of the prepared data sets.
        runs_root: the run store; see `open_split`.
        cache_dir: folder of the entries.
        device: where features are computed and returned.
        backend: loader backend, `auto`, `ffcv` or `torch`; all give the same pixels.
        workers: loader workers.
        channels_last: memory layout of the images.
        report: called with a line now and then.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        recipe: Recipe,
        dataset: str | None,
        data_root: Path,
        runs_root: Path,
        cache_dir: Path,
        device: torch.device,
        backend: Literal["auto", "ffcv", "torch"],
        workers: int,
        channels_last: bool,
        report: Callable[[str], None],
    ) -> None:
        self.encoder = encoder
        self.mean, self.std = pixel_statistics(encoder)
        self.weights_hash = weights_hash(encoder)
        self._padding: str = getattr(encoder, "padding", "torchvision")  # changes what weights compute, and none of them
        self.views: Views = recipe.views
        self.dataset = recipe.data.dataset if dataset is None else dataset
        # The authors' probe sees the labels of the images that were pretrained on, and no others.
        self._trained_on = recipe.data if self.dataset == recipe.data.dataset else None
        self.images_per_class = None if self._trained_on is None else self._trained_on.images_per_class
        self.data_root = data_root
        self.runs_root = runs_root
        self._places = [cache_dir]
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self.device = device
        self.report = report
        self._backend = backend
        self._workers = workers
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._splits: dict[str, Split] = {}

    @property
    def folder(self) -> Path:
        """Folder of the prepared data set."""
        return self.data_root / self.dataset

    def split(self, name: str) -> Split:
        """Return the opened split."""
        if name not in self._splits:
            self._splits[name] = open_split(self.dataset, name, data_root=self.data_root, runs_root=self.runs_root)
        return self._splits[name]

    def indices(self, name: str) -> npt.NDArray[np.int64]:
        """Return the positions that are measured: the recipe's images per class of `train`, all of any other split."""
        return trained_on(self.split(name), self._trained_on if name == "train" else None)

    def labels(self, name: str) -> npt.NDArray[np.int64]:
        """Return the labels of these images, int64 [N]."""
        labels: npt.NDArray[np.int64] = self.split(name).labels[self.indices(name)].astype(np.int64)
        return labels

    def data_hash(self, splits: Sequence[str]) -> str:
        """Return the SHA-256 over the images, labels and positions of the given splits."""
        return canonical_hash({name: self._images_key(name) for name in splits})

    def get(self, name: str, *, views: Sequence[View] = ("centre",)) -> tuple[torch.Tensor, ...]:
        """Return the features of a split for every view, computing those that are not kept yet.

        Returns:
            One float32 [N, c] per view, in the order asked, on the store's device.
        """
        keys = {view: self._key(name, view=view) for view in views}
        missing = [view for view in views if not self._is_sound(keys[view])]
        for alike in (("centre", "mirrored"), ("stretched",)):  # views of the same pixels, computed in one pass
            if wanted := {view: keys[view] for view in missing if view in alike}:
                self._compute(name, keys=wanted)
        return tuple(self._read(keys[view]) for view in views)

    @property
    def num_processes(self) -> int:
        """How many processes a protocol may use besides this one."""
        return max(1, self._workers)

    def place_beside(self, name: str, settings: dict[str, Any]) -> Path:
        """Return the folder, which need not exist, for what a protocol keeps of this encoder on these images."""
        splits = {split: [self._key(split, view=view) for view in ("centre", "stretched")] for split in ("train", "val")}
        return self._places[0] / f"{name}-{canonical_hash({'features': splits, 'settings': settings})[:32]}"

    def _images_key(self, name: str) -> dict[str, Any]:
        positions = np.ascontiguousarray(self.indices(name), dtype="<i8")
        return {"content": self.split(name).content_hash, "positions": hashlib.sha256(positions.data).hexdigest()}

    def _key(self, name: str, *, view: View) -> dict[str, Any]:
        return {
            "version": FEATURES_VERSION,
            "weights": self.weights_hash,
            "images": self._images_key(name),
            "split": name,
            "view": view,
            "resize": self.views.original_resize,
            "size": self.views.original_size,
            "mean": list(self.mean),
            "std": list(self.std),
            **({} if self._padding == "torchvision" else {"padding": self._padding}),
        }

    def _entry(self, key: dict[str, Any]) -> Path:
        """Return where an entry is, or where it is to be written."""
        entries = [place / canonical_hash(key) for place in self._places]
        return next((entry for entry in entries if _is_there(entry)), entries[0])

    def _writable(self) -> Path:
        """Return where entries are written: where they are kept, or for this object only what may not be written there."""
        if self._own is None:
            try:
                if os.access(shared_folder(self._places[0]), os.W_OK | os.X_OK):
                    return self._places[0]
            except (PermissionError, UnusableFileError):
                pass
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise UserError(_refused(self._places[0], error)) from None
            self._give_up_keeping()
        return self._places[0]

    def _give_up_keeping(self) -> None:
        if self._own is None:
            kept = self._places[0]
            if kept not in _TOLD:
                _TOLD.add(kept)
                self.report(f"Warning: {kept} cannot be used, so features are not kept: chmod -R g+rwX {kept}, by its owner.")
            self._own = tempfile.TemporaryDirectory(prefix="obowlab-features-")
            self._places.insert(0, Path(self._own.name))

    def _is_sound(self, key: dict[str, Any]) -> bool:
        """Tell whether an entry is there and unharmed; a damaged one is reported and removed."""
        entry = self._entry(key)
        if not _is_there(entry):
            return False
        try:
            written = json.loads(read_file(entry / "entry.json"))
            with open_file(entry / "features.npy") as file:
                sound = bool(written == {"key": key, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        except PermissionError:  # another user's alone
            self._give_up_keeping()
            return False
        except (OSError, ValueError, RecursionError):
            sound = False
        if not sound:
            self.report(f"Warning: the kept features in {entry} are damaged; computing them again.")
            try:
                shutil.rmtree(entry)
            except OSError:  # somebody else's
                self._give_up_keeping()
        return sound

    def _read(self, key: dict[str, Any]) -> torch.Tensor:
        # Copy on write: pages come from the file as they are used, and nothing can write to it.
        return torch.from_numpy(np.load(self._entry(key) / "features.npy", mmap_mode="c")).to(self.device)

    def _compute(self, name: str, *, keys: dict[View, dict[str, Any]]) -> None:
        indices = self.indices(name)
        loader = self._loader(self.split(name), indices=indices, stretched="stretched" in keys)
        done, last = 0, time.monotonic()
        place = self._writable()
        with ExitStack() as stack:
            stack.enter_context(frozen(self.encoder))
            writers = {
                view: stack.enter_context(_entry_writer(place / canonical_hash(key), key=key, count=len(indices)))
                for view, key in keys.items()
            }
            for positions, pixels in loader:
                assert np.array_equal(positions, indices[done : done + len(positions)]), "the loader must keep the order"
                images = normalise(pixels, device=self.device, mean=self.mean, std=self.std)
                for view, writer in writers.items():
                    seen = images.flip(3) if view == "mirrored" else images
                    writer.append(self.encoder(seen.contiguous(memory_format=self._memory_format)).float().cpu().numpy())
                done += len(positions)
                if time.monotonic() - last > REPORT_EVERY_S:
                    last = time.monotonic()
                    self.report(f"features of {self.dataset}/{name}: {done}/{len(indices)} images")
            assert done == len(indices), "the loader must give every image once"

    def _loader(self, split: Split, *, indices: npt.NDArray[np.int64], stretched: bool) -> Iterable[tuple[Any, torch.Tensor]]:
        if stretched:
            return stretched_batches(split, indices=indices, views=self.views, batch_size=BATCH_SIZE, workers=self._workers)
        return centre_loader(
            split,
            indices=indices,
            views=self.views,
            batch_size=BATCH_SIZE,
            backend=self._backend,
            workers=self._workers,
            pin=self.device.type == "cuda",
        )


class _EntryWriter:
    """Appends rows to an .npy file whose final length is known, hashing the bytes on their way."""

    def __init__(self, file: BinaryIO, *, count: int) -> None:
        self.digest = hashlib.sha256()
        self._file = file
        self._count = count
        self._has_header = False

    def write(self, data: bytes) -> int:
        """Write and hash: numpy's header writer needs nothing more of a file."""
        self.digest.update(data)
        return self._file.write(data)

    def append(self, rows: npt.NDArray[np.float32]) -> None:
        """Add float32 [n, c]."""
        if not np.isfinite(rows).all():
            raise UserError("The encoder gives features that are not finite: its weights are broken, or overflow in float32.")
        if not self._has_header:
            self._has_header = True
            np.lib.format.write_array_header_1_0(
                self, {"descr": "<f4", "fortran_order": False, "shape": (self._count, rows.shape[1])}
            )
        self.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())


@contextmanager
def _entry_writer(entry: Path, *, key: dict[str, Any], count: int) -> Iterator[_EntryWriter]:
    """Write an entry under a temporary name and rename it when the block succeeds."""
    temporary = name_beside(entry)
    try:
        temporary.mkdir()
        share(temporary)
        with (temporary / "features.npy").open("xb") as file:
            writer = _EntryWriter(file, count=count)
            yield writer
        (temporary / "entry.json").write_text(json.dumps({"key": key, "sha256": writer.digest.hexdigest()}), encoding="utf-8")
        for path in temporary.iterdir():
            share(path)
        if not entry.exists():  # another process may have been first; its features are as good
            temporary.rename(entry)
    except OSError as error:
        raise UserError(_refused(entry.parent, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_there(entry: Path) -> bool:
    """Return whether there is an entry; not in a folder that is another user's alone."""
    try:
        return entry.is_dir()
    except PermissionError:
        return False


def _refused(place: Path, error: OSError) -> str:
    return f"Cannot keep features in {place} ({error.strerror}); make room or choose another --runs-root."
