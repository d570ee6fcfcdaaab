"""The checkpoint of a run: one file, written beside and renamed, loaded strictly and without unpickling code.

It holds the step, the method (student, teacher, vocabulary, prediction head), the optimiser and the sums of metrics that are not
logged yet. There is no random state: views, order and word sampling are functions of (seed, epoch, image index).
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from obowlab.errors import UserError
from obowlab.files.replacing import archive_damage
from obowlab.methods import METHODS, Method, OneProcess
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import CHECKPOINT_FILES, no_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = 1
ADDED_LATER = ("logged_step", "measured_step", "window", "scaler")
"""Fields that checkpoints of earlier versions do not have."""

CURRENT, PREVIOUS = CHECKPOINT_FILES


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from.

    Attributes:
        step: optimiser updates done.
        fingerprint: of the run.
        data_hash: of the training images.
        method: state of the method.
        optimizer: state of the optimiser.
        logged_step: of the last point in the metric file by then; None in checkpoints of earlier versions.
        measured_step: of the last result during training by then, -1 before the first; None in checkpoints of earlier versions.
        window: metrics of the steps since that point, `MetricWindow.state`; None in checkpoints of earlier versions.
        scaler: state of the loss scaler; None for precisions other than float16.
    """

    step: int
    fingerprint: str
    data_hash: str
    method: dict[str, Any]
    optimizer: dict[str, Any]
    logged_step: int | None = None
    measured_step: int | None = None
    window: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None


class _Refusable:
    """A file for torch's writer, which hides the reason when the disk refuses: that is kept, and what follows is dropped."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.refusal: OSError | None = None

    def write(self, content: Buffer) -> int:
        """Write all of it, or nothing once the disk has refused; return its length in bytes either way."""
        if self.refusal is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.refusal = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Do nothing: `save` flushes, and hears what the disk says."""


def _write(path: Path, *, content: dict[str, Any]) -> None:
    """Write the content to the disk, record by record: it is never a second time in memory.

    Raises:
        OSError: the disk refused.
    """
    path.unlink(missing_ok=True)  # of a start that was killed
    with path.open("xb") as file:
        refusable = _Refusable(file)
        torch.save(content, cast(BinaryIO, refusable))
        if refusable.refusal is not None:
            raise refusable.refusal
        file.flush()
        os.fsync(file.fileno())


def save(folder: Path, *, checkpoint: Checkpoint) -> None:
    """Write the checkpoint and keep the one before it; at no moment is there no valid file.

    Raises:
        UserError: the disk refused; the newest checkpoint that was there is still there, under one of the two names.
    """
    temporary = folder / f"{CURRENT}.tmp"
    try:
        _write(temporary, content={"format": FORMAT, **vars(checkpoint)})
        current = folder / CURRENT
        if current.exists():
            current.replace(folder / PREVIOUS)
        temporary.replace(current)
    except OSError as error:
        with suppress(OSError):  # a disk that may only be read refuses this too
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise UserError(
            f"Cannot write the checkpoint in {folder} ({reason}): fix that or free some space, and run the command again."
        ) from None


class Writer:
    """Writes the checkpoints of a run, one after the other.

    On a GPU a checkpoint is copied to pinned memory behind the step that is queued, and a thread writes the copy while training
    goes on. On a CPU it is written at once: a copy would cost as much memory as it saves time.
    """

    def __init__(self, folder: Path, *, device: torch.device, in_background: bool | None = None) -> None:
        """Write nothing yet.

        Args:
            folder: of the run.
            device: where the state lies.
            in_background: whether a thread writes; by default on a GPU.
        """
        self._folder, self._device = folder, device
        background = device.type == "cuda" if in_background is None else in_background
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, or begin to.

        Raises:
            UserError: the disk refused, this one or the one before.
        """
        self.finish()
        if self._thread is None:
            save(self._folder, checkpoint=checkpoint)
            return
        copy: Checkpoint = _host_copy(checkpoint)
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._writing = self._thread.submit(_save_copy, self._folder, copy, copied)

    def check(self) -> None:
        """Raise what a thread met that is done; do not wait.

        Raises:
            UserError: the disk refused.
        """
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: the disk refused.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _save_copy(folder: Path, checkpoint: Checkpoint, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
    save(folder, checkpoint=checkpoint)


def _host_copy(value: Any) -> Any:
    """Return the same structure with copies of its tensors in the host's memory; from a GPU they are on their way."""
    if isinstance(value, Tensor):
        pin = value.device.type == "cuda"
        return torch.empty_like(value, device="cpu", pin_memory=pin, requires_grad=False).copy_(value.detach(), non_blocking=pin)
    if isinstance(value, Checkpoint):
        return replace(value, **{name: _host_copy(each) for name, each in vars(value).items()})
    if isinstance(value, dict):
        return {key: _host_copy(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(each) for each in value)
    return value


def newest(folder: Path, *, fingerprint: str, map_location: torch.device) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, or None, and a sentence for every damaged file that was passed over.

    Raises:
        UserError: a checkpoint belongs to another recipe or seed, or is of a newer version of obowlab.
    """
    complaints: list[str] = []
    for name in (CURRENT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        found = _read(path, map_location=map_location)
        if isinstance(found, str):
            complaints.append(found)
        elif found.fingerprint != fingerprint:
            raise UserError(f"{path} belongs to another recipe or seed: move it away, or start over with --fresh.")
        else:
            return found, complaints
    return None, complaints


def _read(path: Path, *, map_location: torch.device) -> Checkpoint | str:
    """Load one file; return a sentence when it is damaged. torch checks no sums itself, the zip archive holds them."""
    damage = archive_damage(path)
    if damage is not None:
        return damage
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        return f"{path} is damaged ({str(error).splitlines()[0]})."
    names = set(Checkpoint.__annotations__)
    written = content.get("format") if isinstance(content, dict) else None
    if isinstance(written, int) and written > FORMAT:  # passed over, it would be written over
        raise UserError(f"{path} was written by a newer version of obowlab: update obowlab, and leave the file as it is.")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT or {*content, *ADDED_LATER} != names:
        return f"{path} is not a checkpoint of this version of obowlab."
    return Checkpoint(**content)


def restore(checkpoint: Checkpoint, *, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state into method and optimiser, strictly, and return the step to resume from."""
    method.load_state_dict(checkpoint.method, strict=True)
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint.optimizer)
    for group, of_this_device in zip(optimizer.param_groups, fused, strict=True):
        if "fused" in group:  # how it is computed here, whatever device wrote the checkpoint
            group["fused"] = of_this_device
    return checkpoint.step


def open_method(run: RunFolder, *, map_location: torch.device) -> tuple[Method[Any], int, list[str]]:
    """Return the method of a run as its newest valid checkpoint left it, the number of updates done, and complaints (`newest`).

    For looking at: nothing but the run folder is read, and the schedules do not know how long training lasts.

    Raises:
        UserError: the run has no usable checkpoint, or one of another version of obowlab.
    """
    recipe = run.info.recipe
    found, complaints = newest(run.path, fingerprint=run.info.fingerprint, map_location=map_location)
    if found is None:
        raise no_checkpoint(run.info, reason=" ".join(complaints) or f"There is no {CURRENT} in {run.path}.")
    # Of the data set, which need not be here: how many classes the online classifier or that of supervised training has.
    classes = found.method.get("monitor.fc.bias", found.method.get("classifier.bias"))
    method = METHODS[recipe.method.name](
        recipe.method,
        backbone=recipe.backbone,
        total_steps=max(1, found.step),
        seed=run.info.seed,
        num_classes=None if classes is None else len(classes),
        comm=OneProcess(),
    )
    try:
        method.load_state_dict(found.method, strict=True)
    except RuntimeError:
        raise UserError(
            f"The checkpoint of run '{run.run_id}' was written by obowlab {run.info.version} and does not fit this version; "
            "install that one."
        ) from None
    return method.to(map_location), found.step, complaints
