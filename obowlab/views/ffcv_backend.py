"""The ffcv backend: one JPEG decode per image, then all of its views, in compiled threads.

ffcv reads the file, owns the threads and compiles the pipeline; the one operation in it, `CutViews`, is ours. It decodes with
libturbojpeg's accurate transform (ffcv's own decoder takes the fast one, whose pixels differ from PIL's) and cuts with
`pil_resize`, so its bytes are those of the torch backend. A record that libturbojpeg rejects is decoded by PIL, which accepts
stray bytes; if PIL rejects it as well, the user gets an error.

numba compiles global and enclosing variables as constants, so the epoch reaches the operation as an argument: in place of the
image indices, ffcv is given one row of whole numbers per image, the place of its bytes and the geometry of its views.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from obowlab.randomness import Ints
from obowlab.views.pil_resize import cut_view, transpose
from obowlab.views.pil_views import BATCHES_AHEAD, CutBatch, Cutter, Pixels, broken_record
from obowlab.views.views import Geometry

# Of numba's threading layers its own is always there and works after a fork (TBB warns, OpenMP crashes). ffcv starts the layer
# when it is imported.
if numba.config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

import ffcv._libffcv
import ffcv.loader.loader
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline.compiler import Compiler

if TYPE_CHECKING:
    from obowlab.data.datasets import Split

POLL_S = 0.1
"""How long the reading thread waits for room in the queue before it checks whether it should end."""

RECORD_FIELDS = 4
VIEW_FIELDS = 9
"""Whole numbers that describe an image and each of its views: see `plans`."""

NUM_KINDS = 4
"""Kinds of views at most: original, crops, patch source, small crops. Compiled code unpacks so many arrays."""

RGB = 0
ACCURATE = 0
"""libturbojpeg's pixel format, and its flags: none, that is the accurate inverse transform and smooth chroma, as in PIL."""

# ffcv is linked against libturbojpeg, so its library finds the very one that ffcv decodes with.
_turbojpeg = ctypes.CDLL(ffcv._libffcv.__file__)
_pointer, _int = ctypes.c_void_p, ctypes.c_int
_start_decoder = _turbojpeg.tjInitDecompress
_start_decoder.argtypes, _start_decoder.restype = [], _pointer
_end_decoder = _turbojpeg.tjDestroy
_end_decoder.argtypes, _end_decoder.restype = [_pointer], _int
_read_header = _turbojpeg.tjDecompressHeader3
_read_header.argtypes, _read_header.restype = [_pointer, _pointer, ctypes.c_ulong, *[_pointer] * 4], _int
_decompress = _turbojpeg.tjDecompress2
_decompress.argtypes, _decompress.restype = [_pointer, _pointer, ctypes.c_ulong, _pointer, *[_int] * 5], _int

_parallel_region = threading.Lock()
"""Held while compiled threads work: that layer must not be entered by two Python threads at once."""


class _MappedFile(OSCacheManager):  # type: ignore[misc]
    """The mapped file alone, from which our operation reads by itself.

    ffcv would add a set of file pages for every image (600 MB on ImageNet, per loader), and compile a reader, for which it
    marks numba's one type of all byte arrays as read-only: the second loader of a process would not compile.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.ptrs = self.sizes = np.zeros(0, np.uint64)
        self.context = OSCacheContext(self)

    def compile_reader(self) -> None:
        """Compile nothing."""


ffcv.loader.loader.OSCacheManager = _MappedFile


class FfcvBackend:
    """Cuts views in compiled threads; compiled once, at the first batch, and used for all epochs."""

    def __init__(self, cutter: Cutter, *, batch_size: int, workers: int, pin: bool) -> None:
        """Build ffcv's loader.

        Args:
            cutter: What to cut.
            batch_size: Images in a batch; only the last one of a run may have fewer.
            workers: Threads; at least one and at most one per core is used.
            pin: Whether views lie in pinned memory.

        Raises:
            UserError: the file is shorter than its records.
        """
        split = cutter.split
        cut_off = np.flatnonzero(split.pointers + split.sizes > split.path.stat().st_size)
        if len(cut_off):
            raise broken_record(split, int(cut_off[0]), "it lies beyond the end of the file")
        self._cutter, self._pin = cutter, pin
        self._loader = Loader(
            str(split.path),
            batch_size=batch_size,
            num_workers=min(max(1, workers), numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
            os_cache=True,
            order=OrderOption.SEQUENTIAL,  # not used: every iteration has its own order
            pipelines={"image": [CutViews(cutter)], "label": None},
            drop_last=False,
            batches_ahead=BATCHES_AHEAD,
        )

    def run(self, batches: Sequence[Ints], *, epoch: int, num_uniforms: int = 0) -> Generator[CutBatch, None, None]:
        """Yield each batch in order.

        Raises:
            UserError: a record cannot be decoded.
        """
        if not batches:
            return
        iterator = _Reader(self._loader, np.concatenate(batches), self._cutter, epoch, num_uniforms, pin=self._pin)
        try:
            while (batch := iterator.next_batch()) is not None:
                yield batch
        finally:
            iterator.close()


class CutViews(SimpleRGBImageDecoder):  # type: ignore[misc]
    """ffcv operation: decode every image of a batch once and cut all of its views."""

    def __init__(self, cutter: Cutter) -> None:
        super().__init__()
        heights, widths = cutter.split.heights.astype(np.int64), cutter.split.widths.astype(np.int64)
        self._pixels = int((heights * widths).max()) * 3
        self._between = int(heights.max()) * max(side for _, side in cutter.groups) * 3

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        """Ask ffcv for no memory: it would be overwritten by a later batch, so each batch brings its own."""
        return previous_state, None

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that ffcv compiles."""
        iterate, shares = Compiler.get_iterator(), Compiler.num_threads
        pixels, between_bytes = self._pixels, self._between

        def cut(plans: Ints, memory: Any, metadata: Any, storage_state: Any) -> Any:
            """Write the views of B images to `memory`: four kinds at most, and whether the row failed.

            Args:
                plans: One row per image, see `plans`.
                memory: uint8 [B, count, side, side, 3] of each kind and bool [B].
                metadata: ffcv's, not needed.
                storage_state: ffcv's: the mapped file first.
            """
            first, second, third, fourth, failed = memory
            file = storage_state[0]
            for share in iterate(shares):
                decoder = _start_decoder()
                image_memory, column_memory = np.empty(pixels, np.uint8), np.empty(pixels, np.uint8)
                between = np.empty(between_bytes, np.uint8)
                header = np.empty(4, np.int32)
                for row in range(len(plans) * share // shares, len(plans) * (share + 1) // shares):
                    start, size, height, width = plans[row, 0], plans[row, 1], plans[row, 2], plans[row, 3]
                    data = file[start : start + size]
                    at = header.ctypes.data
                    failed[row] = True
                    if _read_header(decoder, data.ctypes.data, data.size, at, at + 4, at + 8, at + 12) != 0:
                        continue
                    if header[0] != width or header[1] != height:
                        continue
                    image = image_memory[: height * width * 3].reshape(height, width, 3)
                    if _decompress(decoder, data.ctypes.data, data.size, image.ctypes.data, width, 0, height, RGB, ACCURATE) != 0:
                        continue
                    columns = column_memory[: height * width * 3].reshape(width, height, 3)
                    transpose(image, columns)
                    place = RECORD_FIELDS
                    for kind in (first, second, third, fourth):
                        for view in range(kind.shape[1]):
                            cut_view(columns, plans[row, place : place + VIEW_FIELDS], between, kind[row, view])
                            place += VIEW_FIELDS
                    failed[row] = False
                _end_decoder(decoder)
            return memory

        cut.is_parallel = True  # type: ignore[attr-defined]
        return cut


class _Reader(EpochIterator):  # type: ignore[misc]
    """ffcv's reading thread over an explicit order, with fresh memory for every batch and errors that reach the caller."""

    def __init__(self, loader: Any, order: Ints, cutter: Cutter, epoch: int, num_uniforms: int, *, pin: bool) -> None:
        self._cutter, self._epoch, self._num_uniforms, self._pin = cutter, epoch, num_uniforms, pin
        self._failure: BaseException | None = None
        super().__init__(loader, order)  # starts the thread

    def run(self) -> None:
        """Prepare the batches in order; replaces ffcv's loop, whose caller waits for ever after an error."""
        try:
            numba.set_num_threads(self.loader.num_workers)  # ffcv would change torch's number of threads as well
            for number, indices in enumerate(self.iter_ixes):
                if not self._put(self._cut(number, indices)):
                    return
        except BaseException as error:  # handed over to the caller
            self._failure = error
        self._put(None)

    def next_batch(self) -> CutBatch | None:
        """Return the next batch, or None at the end; raise the exception that ended the thread."""
        batch: CutBatch | None = self.output_queue.get()
        if batch is None and self._failure is not None:
            raise self._failure
        return batch

    def close(self) -> None:
        """End the thread and wait for it; at most the current batch is finished first."""
        self.terminate_event.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join()
        super().close()

    def _cut(self, number: int, indices: Ints) -> CutBatch:
        geometry = self._cutter.geometry(indices, epoch=self._epoch)
        shapes = [(len(indices), count, side, side, 3) for count, side in self._cutter.groups]
        kinds = [torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin) for shape in shapes]
        arrays: list[Pixels] = [kind.numpy() for kind in kinds]
        absent = [np.empty((len(indices), 0, 1, 1, 3), dtype=np.uint8)] * (NUM_KINDS - len(kinds))
        failed = np.zeros(len(indices), dtype=np.bool_)
        (node,) = self.memory_allocations["operation"]
        with _parallel_region:
            self.memory_allocations["operation"][node] = tuple(array[None] for array in (*arrays, *absent, failed))
            self.run_pipeline(number, plans(self._cutter.split, indices, geometry), 0, None)
        for row in np.flatnonzero(failed).tolist():
            self._cutter.cut_image(int(indices[row]), geometry, row, arrays)
        numbers = self._cutter.numbers(indices, epoch=self._epoch, num_uniforms=self._num_uniforms, pieces=not self._pin)
        return CutBatch(kinds, numbers.pin_memory() if numbers is not None and self._pin else numbers)

    def _put(self, item: CutBatch | None) -> bool:
        """Queue an item; return False if the reader should end instead."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False


def plans(split: Split, indices: Ints, geometry: Geometry) -> Ints:
    """Return one row of whole numbers per image, [N, 4 + 9 V].

    Where its bytes start, how many they are, height, width; then each view as `pil_resize.cut_view` expects it.
    """
    record = np.stack([values[indices] for values in (split.pointers, split.sizes, split.heights, split.widths)], axis=1)
    bicubic = np.broadcast_to(np.array(geometry.bicubic)[None, :, None], (*geometry.boxes.shape[:2], 1))
    views = np.concatenate([geometry.boxes, geometry.resized, geometry.windows, bicubic], axis=-1)
    return np.concatenate([record, views.reshape(len(indices), -1)], axis=1, dtype=np.int64)
