"""What the machine refuses: memory, files of somebody else, a store that is gone. Each is one sentence and a true state."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from obowlab.config import Loaded, Recipe
from obowlab.data.manifest import read_manifest
from obowlab.errors import UserError, memory_sentence, refusal_of
from obowlab.files.opening import read_file
from obowlab.methods.backbones import build_backbone
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import ENCODER_FILE
from obowlab.runs.listing import list_runs, read_runs
from obowlab.runs.store import check_store
from obowlab.runs.trash import put_aside
from obowlab.training import __main__ as compute
from obowlab.training.reporter import Reporter
from obowlab.weights.encoder_file import save_encoder
from tests.command_line import Obowlab


def made(root: Path, *, seed: int = 0) -> RunFolder:
    return RunFolder.create(Loaded(name="demo", recipe=Recipe(title="A demo"), sources={}), seed=seed, runs_root=root)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("could not create a primitive"),
    SystemError("error return without exception set"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_in_training_is_a_failed_run_and_one_sentence(tmp_path: Path, error: Exception) -> None:
    said: list[str] = []
    folder = made(tmp_path)
    folder.set_state(status="running", step=3)
    run: Any = SimpleNamespace(
        folder=folder,
        world=SimpleNamespace(is_main=True, world_size=1),
        reporter=SimpleNamespace(say=said.append, log=lambda text: None),
    )

    def part(run: Any) -> None:
        raise error

    assert compute.carry_out(part, run=run) == (2, None)
    (line,) = said
    assert folder.state.status == "failed"
    assert folder.state.step == 3
    if not isinstance(error, OSError):
        assert "training.batch_size" in line
        assert ("GPU" in line) == isinstance(error, torch.OutOfMemoryError)
        run.world.world_size = 2  # the other ranks wait for this one: it has to end at once, after saying why
        folder.set_state(status="running")
        with pytest.raises(type(error)):
            compute.carry_out(part, run=run)
        assert folder.state.status == "failed"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_in_a_command(
    tmp_path: Path, error: Exception, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_runs(root: Path) -> list[Any]:
        raise error

    monkeypatch.setattr("obowlab.runs.selection.read_runs", read_runs)
    code, _, err = obowlab("runs", "list", "--runs-root", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "memory" in err


def test_other_errors_are_not_taken_for_memory() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("memory"), OSError(5, "I/O error")):
        assert memory_sentence(error) is None


def test_what_cannot_be_read_for_want_of_open_files_blames_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)

    def refuse(path: Path, **options: Any) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("obowlab.files.records.read_file", refuse)
    with pytest.raises(UserError, match=r"run.json \(Too many open files\): fix that and run the command again"):
        RunFolder.open(folder.path)
    with pytest.raises(UserError, match=r"train.json \(Too many open files\): fix that and run the command again"):
        read_manifest(tmp_path, "mine", "train")


def test_a_small_file_is_read_with_little_memory_whatever_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a line\n")
    tracemalloc.start()
    try:
        assert read_file(path, limit=2**28) == b"a line\n"
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_is_said_is_printed_where_the_console_cannot_open_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("rich.console.Console.print", refuse)
    Reporter(tmp_path / "log.txt").say("Error: the reason.")
    assert capsys.readouterr().err == "Error: the reason.\n"
    assert "the reason" in (tmp_path / "log.txt").read_text()


def test_a_disk_without_room_for_files_says_how_to_see_it() -> None:
    assert "`df -i`" in refusal_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"))


def forbid(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Refuse all that is below a folder, as its mode 700 does to others; the superuser of a test would be let in."""

    def refusing(real: Any) -> Any:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if place in Path(path).parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(os, "open", refusing(os.open))
    for name in ("stat", "open", "read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))


def test_the_run_of_somebody_else_is_one_line_and_the_others_are_shown(
    tmp_path: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = made(tmp_path), made(tmp_path, seed=1)
    forbid(monkeypatch, theirs.path)
    assert [run.info.run_id for run in list_runs(tmp_path)] == [ours.run_id]
    (line,) = read_runs(tmp_path)[1]
    assert line == f"{theirs.path / 'run.json'} cannot be read (Permission denied): ask the owner of the folder for the right to."
    code, out, err = obowlab("runs", "list", "--runs-root", str(tmp_path))
    assert (code, err) == (0, f"Warning: {line}\n")
    assert ours.run_id in out
    assert obowlab("runs", "show", theirs.run_id, "--runs-root", str(tmp_path))[0] == 2


def test_a_damaged_state_hides_no_other_run(tmp_path: Path) -> None:
    broken, ours = made(tmp_path), made(tmp_path, seed=1)
    (broken.path / "state.json").write_text("{")
    assert [run.info.run_id for run in list_runs(tmp_path)] == [ours.run_id]
    assert "state.json is damaged" in read_runs(tmp_path)[1][0]


def test_fresh_without_the_right_to_write_leaves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)

    def refusing(real: Any, place: Path) -> Any:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if path == place:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    for name, place in (("mkdir", tmp_path / ".trash"), ("rename", folder.path)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refusing(getattr(Path, name), place))
            with pytest.raises(UserError, match="it is left as it is"):
                put_aside(folder)
        assert folder.state.status == "created"


def test_eval_without_the_right_to_write_is_refused_before_measuring(
    tmp_path: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path)
    recipe = folder.info.recipe
    save_encoder(
        build_backbone(recipe.backbone, seed=0), path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=None, source=""
    )
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != folder.path)
    code, _, err = obowlab("eval", folder.run_id, "--runs-root", str(tmp_path), "--device", "cpu")
    assert code == 2
    assert f"you may not write to {folder.path}" in err
    assert f"`obowlab eval {folder.path / 'encoder.safetensors'}`" in err


def test_a_store_that_is_gone_for_a_while_is_a_sentence(
    tmp_path: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_runs(root: Path) -> list[Any]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(root))

    monkeypatch.setattr("obowlab.runs.selection.read_runs", read_runs)
    code, _, err = obowlab("runs", "list", "--runs-root", str(tmp_path))
    assert (code, err) == (2, f"Error: Cannot use {tmp_path} (Stale file handle): fix that and run the command again.\n")


def test_a_run_store_that_cannot_be_made_is_refused_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_store(tmp_path / "new" / "runs", tracking=True)
    with pytest.raises(UserError, match=r"cannot be made, as .*file takes no folder: choose another --runs-root"):
        check_store(tmp_path / "file" / "runs", tracking=True)
