"""Records that tell whether they are whole, and what is said of those that are not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from obowlab.config import load_recipe
from obowlab.data.datasets import open_split
from obowlab.data.identity import NOTES
from obowlab.data.manifest import file_sha256
from obowlab.errors import UserError
from obowlab.files.records import append_whole, checksum_fits, cut_torn_tail, parse_checked, read_all, read_lines, with_checksum
from obowlab.files.sharing import only_we_write
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import list_runs, read_runs
from obowlab.runs.metric_log import parse_point
from obowlab.tracking.outbox import Outbox, Sent
from tests.command_line import Obowlab, finished_run


def flip(path: Path, *, at: bytes) -> None:
    """Change the lowest bit of the byte after some text: a digit stays a digit."""
    content = bytearray(path.read_bytes())
    content[content.index(at) + len(at)] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_sealed_object_comes_back_and_every_flipped_bit_of_it_is_noticed(indent: int | None) -> None:
    value: dict[str, Any] = {"step": 12, "metrics": {"loss": 0.5, "ß": "nan"}, "list": [1, {"a": None}]}
    text = with_checksum(json.dumps(value, indent=indent))
    assert parse_checked(text.encode()) == value
    assert json.loads(text)["crc"]
    content = text.encode()
    digits = content.rindex(b'"crc"') + len('"crc":"')
    for position in (*range(content.rindex(b",", 0, digits - 7)), *range(digits, digits + 8)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            with pytest.raises(ValueError):  # noqa: PT011 - the checksum's, or json's
                parse_checked(bytes(changed))


def test_objects_of_earlier_versions_have_no_seal_and_anything_else_is_refused() -> None:
    assert parse_checked(b'{"a": 1}') == {"a": 1}
    assert checksum_fits(b'{"a": 1}')
    for content in (b"[]", b"null", b"", b"{", b"\x00\x00", b"\xff{}"):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever json says
            parse_checked(content)


def test_a_damaged_line_in_the_middle_is_named_and_at_the_end_left_out(tmp_path: Path) -> None:
    run = RunFolder.create(load_recipe("demo"), seed=0, runs_root=tmp_path)
    with run.metric_log() as log:
        for step in (1, 2, 3):
            log.append(step, {"loss": step / 7})
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    flip(path, at=b'"step":2,"time":')
    for read in (run.metrics, run.metric_log, lambda: read_all(path), lambda: list(read_lines(path))):
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged at line 2: restore it from a copy, or delete"):
            read()
    path.write_bytes(whole)
    other = with_checksum('{"words": "no point"}').encode() + b"\n"
    path.write_bytes(other + whole)
    with pytest.raises(UserError, match="line 1"):
        run.metrics()
    path.write_bytes(whole + other)
    assert [point.step for point in run.metrics()] == [1, 2, 3]
    path.write_bytes(whole)
    flip(path, at=b'"step":3,"time":')
    assert [point.step for point in run.metrics()] == [1, 2]
    assert [line["step"] for line in read_all(path)] == [1, 2]
    cut_torn_tail(path, check=parse_point)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_a_reader_of_all_lines_agrees_with_the_plain_one_on_any_damage(tmp_path: Path) -> None:
    path, dice = tmp_path / "lines.jsonl", random.Random(0)
    lines = [with_checksum(json.dumps({"step": step, "metrics": {}, "time": 0})).encode() + b"\n" for step in range(6)]
    for _ in range(300):
        content = bytearray(b"".join(lines))
        for _ in range(dice.randint(0, 2)):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(content[: dice.randint(0, len(content))]))
        answers = []
        for read in (read_all, lambda path: list(read_lines(path))):
            try:
                found = read(path)
            except UserError as error:
                answers.append(str(error))
            else:
                answers.append(json.dumps([{key: line[key] for key in line if key != "crc"} for line in found]))
        assert answers[0] == answers[1]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        code = 1
        with path.open("ab", buffering=0) as file:
            append_whole(file, b"x" * 59 + b"\n")
            try:
                append_whole(file, b"y" * 59 + b"\n")
            except OSError as error:
                code = 0 if error.errno == errno.EFBIG else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == b"x" * 59 + b"\n"


def test_damaged_results_and_labels_are_named_and_a_damaged_memory_is_a_lost_one(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    path = sorted((run.path / "results").glob("*.json"))[0]
    whole = path.read_bytes()
    flip(path, at=b'"value": ')
    with pytest.raises(UserError, match=r"is damaged: put a copy back, or remove it and measure again with 'obowlab eval'"):
        run.results()
    path.write_bytes(b'{"step": 1}')
    with pytest.raises(UserError, match="is damaged"):
        run.results()
    path.write_bytes(whole)
    (run.path / "labels.json").write_text('{"obowlab.table": 3}')
    with pytest.raises(UserError, match=r"labels\.json is damaged"):
        run.labels()
    outbox = Outbox(run, store="somewhere")
    outbox.save(Sent(run_id="abc", offsets={"metrics": 10}))
    assert outbox.load().run_id == "abc"
    assert run.mlflow_run_id() == "abc"
    for content in (b"[]", b'{"stores": 7}', b'{"stores": {"somewhere": {"offsets": "x"}}}', b""):
        run.mirror_path.write_bytes(content)
        assert outbox.load() == Sent()
        assert run.mlflow_run_id() is None
    outbox.save(Sent(run_id="abc", offsets={"metrics": 10}))
    flip(run.mirror_path, at=b'"metrics": ')
    assert outbox.load() == Sent()


def test_a_finished_run_with_a_damaged_last_line_is_not_silently_short_in_mlflow(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    flip(run.path / "metrics.jsonl", at=b'"time":')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged at line 1"):
        Outbox(run, store="somewhere").pending()


def test_runs_that_cannot_be_listed_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path)
    flip(run.path / "run.json", at=b'"kappa": ')
    assert list_runs(tmp_path) == []
    assert read_runs(tmp_path)[1] == [f"{run.path}/run.json is damaged; move the folder away and start the run again."]
    code, _, err = Obowlab(capsys)("runs", "list", "--runs-root", str(tmp_path))
    assert code == 0
    assert "Warning: " in err
    assert "run.json is damaged" in err


def test_a_data_file_that_changed_is_hashed_again_and_one_that_did_not_is_not(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data_root / "small", tmp_path / "small")
    split = open_split("small", "train", data_root=tmp_path)
    split.check_unchanged()
    assert (tmp_path / "small" / NOTES).exists()
    hashed: list[Path] = []
    monkeypatch.setattr("obowlab.data.identity.file_sha256", lambda path: hashed.append(path) or "other")
    open_split("small", "train", data_root=tmp_path)
    open_split("small", "train", data_root=data_root)  # hashed when it was written
    assert hashed == []
    path = tmp_path / "small" / "train.beton"
    content = bytearray(path.read_bytes())
    content[int(split.pointers[7]) + 300] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"train\.beton was changed or replaced while it was in use"):
        split.check_unchanged()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"train\.beton is damaged \(its SHA-256 is not that of the file that was written\)"):
        open_split("small", "train", data_root=tmp_path)
    with pytest.raises(UserError, match="SHA-256"):  # by its notes, without hashing
        open_split("small", "train", data_root=tmp_path)
    for note in (tmp_path / "small" / NOTES).glob("*.json"):
        note.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="SHA-256"):
        open_split("small", "train", data_root=tmp_path)
    manifest = tmp_path / "small" / "train.json"
    flip(manifest, at=b"class_")
    with pytest.raises(UserError, match=r"train\.json is damaged \(its checksum does not fit\)"):
        open_split("small", "train", data_root=tmp_path)


@pytest.fixture
def read_only(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root in which nothing can be written: `.hashed` is a file there, which binds root too."""
    shutil.copytree(data_root / "small", tmp_path / "data" / "small", ignore=shutil.ignore_patterns(NOTES))
    (tmp_path / "data" / "small" / NOTES).touch()
    return tmp_path / "data"


def _open_counted(data_root: Path, runs_root: Path, counts: Path) -> None:
    """Open a split and append a line to a file when its data file is hashed, slowly."""

    def slow(path: Path) -> str:
        with counts.open("a") as file:
            file.write(f"{path}\n")
        time.sleep(0.2)
        return file_sha256(path)

    with mock.patch("obowlab.data.identity.file_sha256", slow):
        open_split("small", "train", data_root=data_root, runs_root=runs_root)


def test_a_data_root_that_is_only_read_is_hashed_once_by_all_processes_and_remembered_in_the_run_store(
    tmp_path: Path, read_only: Path
) -> None:
    store, counts = tmp_path / "runs", tmp_path / "hashed.txt"
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_open_counted, args=(read_only, store, counts)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    path = read_only / "small" / "train.beton"
    assert counts.read_text().splitlines() == [str(path)]
    _open_counted(read_only, store, counts)  # the next start
    assert len(counts.read_text().splitlines()) == 1
    path.touch()
    _open_counted(read_only, store, counts)
    assert len(counts.read_text().splitlines()) == 2
    content = path.read_bytes()
    flip(path, at=content[len(content) // 2 :][:32])
    for _ in range(2):
        with pytest.raises(UserError, match="its SHA-256 is not that of the file that was written"):
            open_split("small", "train", data_root=read_only, runs_root=store)


def test_of_the_notes_in_a_run_store_only_the_own_ones_count(
    tmp_path: Path, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = tmp_path / "hashed.txt"
    _open_counted(read_only, tmp_path / "runs", counts)
    (note,) = (tmp_path / "runs" / NOTES).glob("*.json")
    owner = note.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    note.rename(note.with_name(note.name.replace(f"-{owner}.", f"-{owner + 1}.")))  # as somebody else would forge it
    _open_counted(read_only, tmp_path / "runs", counts)
    assert len(counts.read_text().splitlines()) == 2


def test_complaints_show_what_is_not_printable_and_cut_what_has_no_end() -> None:
    assert str(UserError("There is no recipe 'a\x1b[2J\x00'.")) == "There is no recipe 'a\\x1b[2J\\x00'."
    shown = str(UserError(f"Unknown key '{'x' * 5000}' (a.toml)."))
    assert len(shown) < 200
    assert shown.endswith("... (a.toml).")


@pytest.mark.parametrize("text", ["title = " + "1" * 5000, "title = " + "[" * 3000])
def test_numbers_and_brackets_without_end_are_no_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match="is not valid TOML"):
        load_recipe(str(tmp_path / "a.toml"))
    with pytest.raises(UserError):
        load_recipe("demo", overrides=(text.replace(" ", ""),))
    with pytest.raises(UserError, match=r"there is no method \[\]"):
        load_recipe("demo", overrides=("method.name=[]",))


def test_only_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    assert only_we_write(place)
    assert only_we_write(place / "not" / "there")
    for mode, safe in ((0o775, False), (0o757, False), (0o1777, True), (0o755, True)):
        place.parent.chmod(mode)
        assert only_we_write(place) == safe, oct(mode)
    place.chmod(0o1777)  # what is made in it is ours, but not what is there
    assert not only_we_write(place)
    place.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert only_we_write(place) == (place.stat().st_uid == 0)
