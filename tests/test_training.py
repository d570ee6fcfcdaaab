"""What stops a run: a loss that is no number, other images, somebody else's checkpoint, a full disk."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import resource
import signal
import tracemalloc
from pathlib import Path

import pytest
import torch

from obowlab.config import Machine
from obowlab.data.datasets import prepare
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import ENCODER_FILE
from obowlab.runs.metric_log import MetricLog
from obowlab.training import checkpoint as checkpoints
from obowlab.training.__main__ import main
from tests.conftest import draw_photo
from tests.runs import small_recipe

CPU = torch.device("cpu")


def run_here(folder: Path, *, data_root: Path, overrides: tuple[str, ...] = (), epochs: int = 1) -> tuple[int, RunFolder]:
    """Carry a run out in this process; return its exit code and its folder."""
    machine = Machine(data_root=data_root, runs_root=folder / "runs", device="cpu", loader="torch", workers=0)
    loaded = small_recipe(folder, dataset="small", epochs=epochs, overrides=("evaluation.protocols=[]", *overrides))
    run = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    run.write_machine(machine)
    return main([str(run.path)]), run


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, data_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, run = run_here(tmp_path, data_root=data_root, overrides=("optimizer.learning_rate=1e30",), epochs=4)
    assert code == 2
    state = run.state
    assert state.status == "failed"
    assert "not finite at step" in state.message
    assert "training images" in state.message
    assert "optimizer.learning_rate" in state.message
    assert f"Error: {state.message}" in capfd.readouterr().err
    assert len(run.metrics()) < 4 * 7
    assert "Traceback" not in (run.path / "log.txt").read_text()


def test_other_images_are_refused_and_nothing_is_lost(tmp_path: Path, data_root: Path) -> None:
    code, run = run_here(tmp_path, data_root=data_root)
    assert code == 0
    before = (run.path / "checkpoint.pt").read_bytes()
    for label in range(2):
        (tmp_path / "images" / "train" / f"class_{label}").mkdir(parents=True)
        for number in range(8):
            draw_photo(label * 8 + number, height=32, width=32).save(
                tmp_path / "images" / "train" / f"class_{label}" / f"{number}.jpg"
            )
    prepare("small", source=tmp_path / "images", data_root=tmp_path / "other", workers=1)
    run.set_state(status="interrupted")
    (run.path / ENCODER_FILE).unlink()  # a run that has it is trained
    code, run = run_here(tmp_path, data_root=tmp_path / "other")
    assert code == 2
    assert "not those that" in run.state.message
    assert "--fresh" in run.state.message
    assert (run.path / "checkpoint.pt").read_bytes() == before


def some_checkpoint(fingerprint: str = "f") -> checkpoints.Checkpoint:
    tensors = {"weight": torch.arange(1000.0)}
    return checkpoints.Checkpoint(step=3, fingerprint=fingerprint, data_hash="d", method=tensors, optimizer={})


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint=some_checkpoint("one"))
    with pytest.raises(UserError, match="another recipe or seed"):
        checkpoints.newest(tmp_path, fingerprint="other", map_location=CPU)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_checkpoint_gives_way_to_the_one_before(damage: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint=some_checkpoint())
    checkpoints.save(tmp_path, checkpoint=some_checkpoint())
    path = tmp_path / checkpoints.CURRENT
    content = bytearray(path.read_bytes())
    middle = content.find(torch.arange(1000.0).numpy().tobytes()) + 2000
    content[middle] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "flip": bytes(content), "empty": b"", "text": b"hello"}[damage])
    found, complaints = checkpoints.newest(tmp_path, fingerprint="f", map_location=CPU)
    assert found is not None
    assert torch.equal(found.method["weight"], torch.arange(1000.0))
    assert len(complaints) == 1
    assert str(path) in complaints[0]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"format": 1, "step": Evil()}, tmp_path / checkpoints.CURRENT)
    found, complaints = checkpoints.newest(tmp_path, fingerprint="f", map_location=CPU)
    assert found is None
    assert len(complaints) == 1
    assert not (tmp_path / "executed").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, checkpoint=some_checkpoint())
    before = (tmp_path / checkpoints.CURRENT).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.save(tmp_path, checkpoint=some_checkpoint())
    assert (tmp_path / checkpoints.CURRENT).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("room", [0, 1000, 100_000, 399_000, 401_500])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path, room: int) -> None:
    large = dataclasses.replace(some_checkpoint(), method={"weight": torch.arange(100_000.0)})  # 402 kB with its frame
    checkpoints.save(tmp_path, checkpoint=some_checkpoint())
    before = (tmp_path / checkpoints.CURRENT).read_bytes()
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, allowed[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write the checkpoint in .* \(File too large\)"):
            checkpoints.save(tmp_path, checkpoint=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / checkpoints.CURRENT).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    checkpoints.save(tmp_path, checkpoint=large)
    assert (tmp_path / checkpoints.PREVIOUS).read_bytes() == before


def test_a_checkpoint_is_never_a_second_time_in_memory(tmp_path: Path) -> None:
    large = dataclasses.replace(some_checkpoint(), method={"weight": torch.zeros(2_000_000)})  # 8 MB
    checkpoints.save(tmp_path, checkpoint=large)  # whatever is imported or made only once
    tracemalloc.start()
    try:
        checkpoints.save(tmp_path, checkpoint=large)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    same = io.BytesIO()
    torch.save({"format": checkpoints.FORMAT, **vars(large)}, same)
    assert (tmp_path / checkpoints.CURRENT).read_bytes() == same.getvalue()


def test_full_disk_in_the_middle_is_one_sentence(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(self: MetricLog, step: int, values: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(MetricLog, "append", full)
    code, run = run_here(tmp_path, data_root=data_root)
    assert code == 2
    assert "Error: Cannot use metrics.jsonl (No space left on device; `df -h` and `df -i` show" in capfd.readouterr().err
    assert run.state.status == "failed"
