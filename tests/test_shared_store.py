"""A run store of several people: nobody reads, breaks or stops what is not theirs. Each test makes an attack."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from obowlab.cli import main
from obowlab.config import Backbone, load_recipe
from obowlab.data.decoding import UnreadableImageError, to_jpeg
from obowlab.errors import UserError
from obowlab.files.locks import file_lock, is_held, lock_holder, locked
from obowlab.files.opening import UnusableFileError, copy_file, copy_tree, open_file, overwrite, read_file
from obowlab.files.records import parse_checked
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import leads_astray, share, shared_file, shared_folder
from obowlab.launch.jobs import reap, stop
from obowlab.launch.processes import start
from obowlab.launch.slurm import submitted_jobs
from obowlab.methods import build_backbone
from obowlab.report.read import find_gallery
from obowlab.runs import provenance
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import RunInfo
from obowlab.runs.listing import list_runs, read_runs
from obowlab.runs.locks import RunTakenError
from obowlab.runs.store import check_store
from obowlab.runs.trash import put_aside, remove_for_good, trashed_runs
from obowlab.tracking.local_store import damage_of, make_usable
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.outbox import Outbox
from obowlab.training import checkpoint
from obowlab.training.reporter import Reporter
from obowlab.weights.encoder_file import read_encoder
from obowlab.weights.reading import read_weights
from tests.chaos.kinds.shared import HARMS
from tests.command_line import Obowlab, finished_run
from tests.fork_server import Fork

SECRET = "mlflow_tracking_password = hunter2"
ALICE, BOB, GROUP = 50001, 50002, 50000
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="two real users need tests that run as root")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel who has a lock")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """End a test that hangs at a pipe."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "runs")


# ------------------------------------------------------------------------------------------------------------ opening files


def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path: Path, secret: Path) -> None:
    link, pipe, listening = tmp_path / "link", tmp_path / "pipe", tmp_path / "socket"
    link.symlink_to(secret)
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        for path, what in (
            (link, "a link"),
            (pipe, "a pipe"),
            (tmp_path, "a folder"),
            (listening, "a socket"),
            (Path("/dev/null"), "a device"),
        ):
            for mode in ("rb", "ab", "r+b"):
                with pytest.raises(UnusableFileError, match=f"it is {what}"):
                    open_file(path, mode)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "nothing")
    with open_file(secret) as file:
        assert file.read() == SECRET.encode()


def test_a_file_that_fits_into_no_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(UnusableFileError, match="larger than 64 MiB"):
        read_file(path)


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_deeply_nested_json_is_damaged(depth: int) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_checked(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
    assert parse_checked(b'{"a": ' + b"[" * 50 + b"]" * 50 + b', "b": [' + b"[], " * 200 + b"[]]}")


@pytest.mark.parametrize("name", ["lock", "worker.lock", "labels.lock", "mirror.lock"])
def test_a_planted_lock_is_no_way_to_another_file(folder: RunFolder, secret: Path, name: str) -> None:
    path = folder.path / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(OSError, match="a link"), locked(path):
        pass
    assert not is_held(path)
    with pytest.raises(OSError, match="a link"):
        overwrite(path, "{}")
    if name == "lock":
        with pytest.raises(UserError, match=r"Cannot lock the run folder .* \(it is a link"), folder.lock():
            pass
    assert secret.read_text() == SECRET


WRITERS: dict[str, Callable[[RunFolder], object]] = {
    "metrics.jsonl": lambda run: run.metric_log(),
    "system.jsonl": lambda run: run.metric_log("system"),
    "attempts.jsonl": lambda run: run.append_attempt({"host": "here"}),
    "log.txt": lambda run: Reporter(run.path / "log.txt"),
    "terminal.txt": lambda run: start(["true"], environment={}, output=run.path / "terminal.txt"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_appended_goes_through_no_link(folder: RunFolder, secret: Path, name: str) -> None:
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(secret)
    with pytest.raises(OSError, match="it is a link"):
        WRITERS[name](folder)
    assert secret.read_text() == SECRET


def test_a_checkpoint_goes_through_no_link(folder: RunFolder, secret: Path) -> None:
    (folder.path / "checkpoint.pt.tmp").symlink_to(secret)
    checkpoint._write(folder.path / "checkpoint.pt.tmp", content={"format": 1})
    assert secret.read_text() == SECRET
    assert not (folder.path / "checkpoint.pt.tmp").is_symlink()


# ----------------------------------------------------------------------------------------------------- what leaves a folder


def test_nothing_but_regular_files_of_a_run_is_sent(folder: RunFolder, secret: Path) -> None:
    words = folder.path / "words"
    words.mkdir()
    for name in ("index.html", "conv5-000.jpg", "credentials.txt", "id_rsa"):
        (words / name).write_text("own")
    (words / "conv5-001.jpg").symlink_to(secret)
    os.mkfifo(words / "conv5-002.jpg")
    (folder.path / "dirty.diff").symlink_to(secret)
    os.mkfifo(folder.path / "log.txt")
    outbox = Outbox(folder, store="x")
    sent = {path.relative_to(folder.path).as_posix() for path in outbox.artifacts()}
    assert sent == {"run.json", "attempts.jsonl", "words/index.html", "words/conv5-000.jpg"}
    assert outbox.left_out() == ["dirty.diff (it is a link, and links are not followed here)", "log.txt (it is a pipe)"]
    shutil.rmtree(words)
    words.symlink_to(secret.parent)
    shutil.rmtree(folder.path / "results")
    (folder.path / "results").symlink_to(secret.parent)
    (secret.parent / "other.json").write_text("{}")
    assert {path.name for path in outbox.artifacts()} == {"run.json", "attempts.jsonl"}
    assert outbox.results() == folder.results() == []
    assert find_gallery(words) is None


def test_copies_hold_no_link_and_nothing_of_another_user(tmp_path: Path, secret: Path) -> None:
    source = tmp_path / "model"
    (source / "data").mkdir(parents=True)
    (source / "data" / "own").write_text("own")
    (source / "link").symlink_to(secret)
    (source / "place").symlink_to(secret.parent)
    os.mkfifo(source / "pipe")
    copy_tree(source, tmp_path / "copy", owner=os.geteuid())
    assert [path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")] == ["data", "data/own"]
    with pytest.raises(UnusableFileError, match="it belongs to"):
        copy_file(secret, tmp_path / "taken", owner=os.geteuid() + 1)


def test_the_bundle_of_a_run_holds_no_link(folder: RunFolder, secret: Path, tmp_path: Path, obowlab: Obowlab) -> None:
    (folder.path / "dirty.diff").symlink_to(secret)
    out = tmp_path / "bundle.tar.gz"
    code, _, _ = obowlab("runs", "export", folder.run_id, "--out", str(out), "--runs-root", str(folder.path.parent))
    assert code == 0
    with tarfile.open(out) as bundle:
        names = {Path(name).name for name in bundle.getnames()}
    assert "run.json" in names
    assert "dirty.diff" not in names


# ------------------------------------------------------------------------------------------------- one bad run among good ones


@pytest.fixture
def store(workplace: Path) -> Path:
    """A store of one good run and one of every harm."""
    root = workplace / "runs"
    good = finished_run(root)
    for name, harm in HARMS.items():
        shutil.copytree(good.path, root / f"bad-{name}")
        harm(root / f"bad-{name}")
    return root


def _complained(text: str, *, without: tuple[str, ...] = ()) -> None:
    """Check that there is one line about every bad run."""
    for name in HARMS:
        lines = [line for line in text.splitlines() if f"bad-{name}/" in line or f"bad-{name} " in line]
        assert len(lines) == (0 if name.startswith(without) else 1), (name, lines)
        if "newer" in name:
            assert "update obowlab" in lines[0]
            assert "remove" not in lines[0]
    assert "Traceback" not in text


def test_one_bad_run_is_one_line_of_runs_list(store: Path, obowlab: Obowlab) -> None:
    code, out, err = obowlab("runs", "list")
    assert (code, out.count("finished")) == (0, 4)  # those with bad results too
    _complained(err)
    assert len(list_runs(store)) == 4
    assert len(read_runs(store)[1]) == len(HARMS) - 3


def test_one_bad_run_is_one_line_of_jobs(store: Path, obowlab: Obowlab) -> None:
    code, out, err = obowlab("jobs", "--all")
    assert code == 0
    assert out.count("done") == 4
    _complained(err, without=("result",))
    assert reap(store) == []


def test_one_bad_run_is_one_line_of_a_table(store: Path, obowlab: Obowlab) -> None:
    code, out, err = obowlab("table", "table3", "--scale", "demo", "--runs-root", str(store))
    assert code == 0
    assert "Table 3" in out
    _complained(err, without=("result",))  # several runs of one fingerprint: the first counts


def test_one_bad_run_is_one_line_of_a_report(store: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = obowlab("report", "--out", str(store.parent / "out"))
    assert code == 0
    assert list((store.parent / "out" / "runs").glob("demo-s0-*.html"))
    _complained(out + err)


def test_one_bad_run_is_one_line_of_a_sync(store: Path, obowlab: Obowlab) -> None:
    code, out, err = obowlab("runs", "sync", "--dry-run")
    assert code == 0
    assert "Would send" in out
    _complained(err, without=("result",))


def test_a_bad_order_of_the_cluster_hides_no_other(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (
        ("a", "[" * 9000),
        ("b", '{"jobs": [{"id": "--me", "arguments": [], "runs": [], "what": ""}], "submitted_at": 1}'),
    ):
        (store / ".jobs" / name).mkdir(parents=True)
        (store / ".jobs" / name / "order.json").write_text(text)
    os.mkfifo(store / ".jobs" / "pipe")
    (store / ".jobs" / "c").mkdir()
    (store / ".jobs" / "c" / "order.json").write_text(
        '{"jobs": [{"id": "17", "arguments": ["run"], "runs": [], "what": "a run"}], "submitted_at": 1}'
    )
    assert [job.id for job in submitted_jobs(store)] == ["17"]
    assert "'--me' is no number of a job" in caplog.text


# ------------------------------------------------------------------------------------------------------------ locks and pids


@on_linux
@pytest.mark.parametrize("pid", [-1, 0, 1, True, "1", None])
def test_cancel_signals_nobody_but_a_launcher(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, pid: object) -> None:
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail(f"a signal for {args}"))
    with file_lock(folder.path / "lock"):
        (folder.path / "lock").write_text(json.dumps({"pid": pid, "host": socket.gethostname(), "token": "0"}))
        with pytest.raises(UserError, match="names no process"):
            stop(folder.run_id, runs_root=folder.path.parent)


@on_linux
def test_cancel_signals_no_process_that_the_lock_file_only_names(folder: RunFolder) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    with file_lock(folder.path / "lock"):
        assert lock_holder(folder.path / "lock") == os.getpid()
        (folder.path / "lock").write_text(json.dumps({"pid": victim.pid, "host": socket.gethostname(), "token": "0"}))
        with pytest.raises(UserError, match=f"is held by process {os.getpid()} .*, which does not train it"):
            stop(folder.run_id, runs_root=folder.path.parent)
    with file_lock(folder.path / "worker.lock"), pytest.raises(UserError, match="is saving itself"):
        stop(folder.run_id, runs_root=folder.path.parent)
    assert victim.poll() is None
    victim.kill()
    victim.wait()


SQUAT = """
import fcntl, sys, time
file = open(sys.argv[1], "rb")  # whoever may read it
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@on_linux
def test_who_keeps_a_lock_is_named_and_not_waited_for(folder: RunFolder) -> None:
    with folder.lock():
        pass
    stranger = subprocess.Popen([sys.executable, "-c", SQUAT, str(folder.path / "lock")], stdout=subprocess.PIPE, text=True)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == "held\n"
    (folder.path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": "0"}))
    with (
        pytest.raises(RunTakenError, match=rf"is held by process {stranger.pid} \(.* of .*\), which does not train it"),
        folder.lock(),
    ):
        pass
    said = rf"has been locked for 0 s by process {stranger.pid} \(.* of .*\): end that process, or ask its user to"
    with pytest.raises(UserError, match=said), locked(folder.path / "lock", patience_s=0.1):
        pass
    stranger.kill()
    stranger.wait()


# ---------------------------------------------------------------------------------------------------------- git and dirty.diff


def test_a_checkout_runs_no_program_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, marker = tmp_path / "checkout", tmp_path / "ran"
    package = root / "obowlab" / "runs"
    package.mkdir(parents=True)

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for name in ("pyproject.toml", "obowlab/code.py", "obowlab/.env.local", "notes.txt", "obowlab/data.bin"):
        (root / name).write_text("before\n")
    (root / ".gitattributes").write_text("* filter=evil diff=evil\n")
    git("add", ".")
    git("commit", "-qm", "all")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 $@ >> {marker}\ncat\n")
    program.chmod(0o755)
    for key in (
        "core.fsmonitor",
        "filter.evil.clean",
        "filter.evil.process",
        "diff.evil.textconv",
        "diff.evil.command",
        "diff.external",
    ):
        git("config", key, str(program))
    for name in ("obowlab/code.py", "obowlab/.env.local", "notes.txt"):
        (root / name).write_text(f"after {name}\n")
    (root / "obowlab" / "new.py").write_text("new\n")
    (root / "obowlab" / "credentials.json").write_text("new\n")
    marker.unlink(missing_ok=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    found = provenance.code()
    assert not marker.exists(), marker.read_text()
    assert found.dirty
    assert found.commit is not None
    assert len(found.commit) == 40
    assert "+after obowlab/code.py" in found.diff
    assert "new file, not in git: obowlab/new.py" in found.diff
    assert not any(name in found.diff for name in ("env.local", "notes.txt", "credentials"))


# --------------------------------------------------------------------------------------------------------------------- bombs


def test_weights_and_checkpoints_that_inflate_are_refused_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"network": {}}))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match=r"no weights file: .* grow to 50\.0 MB"):
        read_weights(path)
    assert "grow to 50.0 MB" in str(checkpoint._read(path, map_location=torch.device("cpu")))
    os.mkfifo(tmp_path / "checkpoint.previous.pt")
    assert "it is a pipe" in str(checkpoint._read(tmp_path / "checkpoint.previous.pt", map_location=torch.device("cpu")))


def test_tensors_of_more_numbers_than_their_file_holds_are_refused(tmp_path: Path) -> None:
    state = build_backbone(Backbone(width=4)).state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"holds fewer numbers than conv1\.weight has"):
        read_encoder(tmp_path / "small.pth")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused_by_their_header() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (13340).to_bytes(4, "big") * 2  # width and height: 178 megapixels
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableImageError, match="13340x13340 pixels: at most 89 million are decoded"):
        to_jpeg(bytes(content))


def test_damaged_pages_of_a_database_are_found(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (a TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [(str(number) * 50,) for number in range(3000)])
    database.close()
    assert damage_of(f"sqlite:///{path}") is None
    content = bytearray(path.read_bytes())
    content[20000:60000] = os.urandom(40000)
    path.write_bytes(content)
    assert "is damaged: restore it from a copy" in str(damage_of(f"sqlite:///{path}"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not used, for it is a pipe"):
        make_usable(f"sqlite:///{path}")


# ------------------------------------------------------------------------------------------------------------ two real users


def become(uid: int, umask: int) -> None:
    """Be another user of the group from now on."""
    os.chdir("/")  # the folders of these tests are closed to others
    os.environ["HOME"] = "/"
    os.setgroups([GROUP])
    os.setgid(uid)
    os.setuid(uid)
    os.umask(umask)


def keep(root: Path, uid: int, umask: int) -> int:
    """Use what is shared of a store, as a user."""
    become(uid, umask)
    place = shared_folder(root / ".features")
    (place / f"{uid}-{umask}").mkdir()
    with locked(root / ".publish.lock", patience_s=1):
        pass
    path = root / "mlflow.db"
    path.open("ab").close()
    share(path)  # as `prepare_store` does
    if (root / ".costs.json").exists():
        read_file(root / ".costs.json")
    write_atomic(root / ".costs.json", "{}", shared=True)
    check_store(root, tracking=True)
    return 0


def check(root: Path, uid: int) -> int:
    """Check a store as a user."""
    become(uid, 0o022)
    try:
        check_store(root, tracking=True)
    except UserError as error:
        print(error, end="", file=sys.stderr)
        return 2
    return 0


def send_of(root: Path, run_id: str) -> int:
    """Send a run as the second user, and say what became of it."""
    become(BOB, 0o022)
    report = Mirror(RunFolder.open(root / run_id), tracking_uri="http://127.0.0.1:9").sync(timeout_s=1)
    print(report.error, file=sys.stderr)
    return int(report.error is not None)


def outcome(child: Fork) -> tuple[int | None, str]:
    """Return the exit code of a process and what it complained of."""
    _, errors = child.communicate()
    return child.returncode, errors.decode()


def look(root: Path, uid: int, words: list[str]) -> int:
    """Call a command as another user, in a process that has imported it before."""
    with tempfile.TemporaryDirectory() as empty:
        main(["runs", "list", "--runs-root", empty])
        finished_run(Path(empty))
        main(["runs", "list", "--runs-root", empty])
    become(uid, 0o022)
    return main([*words, "--runs-root", str(root)])


@pytest.fixture
def shared_root() -> Iterator[Path]:
    """A store of a group, in a place that everybody may go to."""
    place = Path(tempfile.mkdtemp(prefix="obowlab-shared-"))
    place.chmod(0o755)
    root = place / "runs"
    root.mkdir()
    os.chown(root, 0, GROUP)
    root.chmod(0o2775)
    yield root
    shutil.rmtree(place)


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_what_the_first_of_a_group_makes_the_second_can_use(shared_root: Path, umask: int) -> None:
    assert outcome(Fork(keep, shared_root, ALICE, umask)) == (0, "")
    assert (shared_root / ".features").stat().st_mode & 0o2070 == 0o2070
    assert outcome(Fork(keep, shared_root, BOB, umask)) == (0, "")


def take(root: Path, uid: int, at: float) -> int:
    """Make the same locks, folders and files as another user does, in the same moments."""
    become(uid, 0o022)
    for number in range(100):
        while time.time() < at + number / 200:
            pass
        with locked(root / f".{number}.lock", patience_s=10):
            pass
        (shared_folder(root / f".{number}") / str(uid)).mkdir()
        with open_file(shared_file(root / f".{number}.log"), "ab") as file:
            file.write(b"x")
    return 0


@as_root
def test_two_users_may_make_what_they_share_in_the_same_moment(shared_root: Path) -> None:
    at = time.time() + 0.5
    users = [Fork(take, shared_root, uid, at) for uid in (ALICE, BOB)]
    assert [outcome(user) for user in users] == [(0, ""), (0, "")]
    assert len(list(shared_root.iterdir())) == 300  # nothing is left beside them
    assert all(path.read_bytes() == b"xx" for path in shared_root.glob("*.log"))
    assert all(len(list((shared_root / f".{number}").iterdir())) == 2 for number in range(100))


def prepare_again(place: Path, uid: int) -> int:
    """Prepare a data set anew as a user, in a process that has imported what that takes before."""
    words = ["data", "prepare", "small", "--source", str(place / "images"), "--force", "--workers", "1", "--data-root"]
    with tempfile.TemporaryDirectory() as empty:
        main([*words, empty])
    become(uid, 0o077)
    return main([*words, str(place / "runs")])


@as_root
def test_a_data_set_of_a_group_is_replaced_by_any_of_them(shared_root: Path, image_folder: Path) -> None:
    place = shared_root.parent
    shutil.copytree(image_folder, place / "images")
    (place / "images").chmod(0o755)
    for uid in (ALICE, BOB):
        code, complaint = outcome(Fork(prepare_again, place, uid))
        assert code == 0, complaint
        assert all(path.stat().st_mode & 0o060 == 0o060 for path in (shared_root / "small").iterdir())
    (shared_root / "small").chmod(0o755)
    said = f"Error: You may not write to {shared_root / 'small'}, which belongs to user {ALICE}: "
    code, complaint = outcome(Fork(prepare_again, place, BOB))
    assert (code, complaint.startswith(said)) == (2, True), complaint
    left = shared_root / ".small.preparing"
    left.mkdir()
    (left / "train.beton").touch()
    os.chown(left, ALICE, GROUP)
    code, complaint = outcome(Fork(prepare_again, place, BOB))
    assert (code, f"let user {ALICE} remove it" in complaint) == (2, True), complaint


@as_root
def test_the_run_of_another_is_left_to_them_by_name_too(shared_root: Path) -> None:
    run = finished_run(shared_root)
    (run.path / "mirror.lock").touch()
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, ALICE, GROUP)
    code, said = outcome(Fork(send_of, shared_root, run.run_id))
    assert code == 1
    assert f"the run belongs to user {ALICE}, who types `obowlab runs sync {run.run_id}`" in said


@as_root
def test_what_cannot_be_written_is_told_with_the_line_to_type(shared_root: Path) -> None:
    path = shared_root / "mlflow.db"
    path.touch(0o644)
    os.chown(path, ALICE, ALICE)
    path.chmod(0o644)
    code, said = outcome(Fork(check, shared_root, BOB))
    line = f"chgrp -R {GROUP} {path} && chmod -R g+rwX {path}"
    assert (code, said) == (2, f"You may not write to {path}: let user {ALICE} type `{line}`, or choose another --runs-root.")
    os.chown(path, ALICE, GROUP)
    path.chmod(0o664)
    assert outcome(Fork(check, shared_root, BOB)) == (0, "")
    shared_root.chmod(0o2755)
    code, said = outcome(Fork(check, shared_root, BOB))
    assert said.startswith(f"You may not write to the run store {shared_root}: let root type `chmod g+rwxs {shared_root}`")


@as_root
def test_a_run_of_somebody_else_is_looked_at_and_not_trained(shared_root: Path, obowlab: Obowlab) -> None:
    run = finished_run(shared_root)
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, ALICE, GROUP)
    assert not run.add_labels({"obowlab.table": "table3"})
    assert [found.info.run_id for found in list_runs(shared_root)] == [run.run_id]
    run.path.joinpath("run.json").unlink()
    with pytest.raises(UserError, match=rf"belongs to user {ALICE}: train the run in a --runs-root of your own"):
        RunFolder.create(load_recipe("demo"), seed=0, runs_root=shared_root)
    code, out, _ = obowlab("runs", "sync", "--runs-root", str(shared_root))
    assert code == 0
    assert "There are no runs" in out


@as_root
def test_the_trash_is_emptied_of_ones_own_runs(shared_root: Path, obowlab: Obowlab) -> None:
    theirs, ours = (RunFolder.create(load_recipe("demo"), seed=seed, runs_root=shared_root) for seed in (0, 1))
    os.chown(put_aside(theirs, deleted=True), ALICE, GROUP)
    put_aside(ours, deleted=True)
    killed = shared_root / ".trash" / ".killed"
    killed.mkdir()
    os.chown(killed, ALICE, GROUP)
    root = ("--runs-root", str(shared_root))
    code, _, err = obowlab("runs", "restore", theirs.run_id, *root)
    assert (code, err) == (2, f"Error: Run '{theirs.run_id}' in the trash belongs to user {ALICE}: ask them to restore it.\n")
    code, _, err = obowlab("runs", "trash", theirs.run_id, "--empty", "--yes", *root)
    assert (code, f"belongs to user {ALICE}: ask them to remove it" in err) == (2, True)
    code, out, _ = obowlab("runs", "trash", "--empty", "--yes", *root)
    assert code == 0
    assert out.startswith("1 run(s) of other users are left to them.\nRemoved 1 run(s) for good")
    assert [run.run_id for run in trashed_runs(shared_root)] == [theirs.run_id]
    assert killed.exists()
    with pytest.raises(UserError, match=f"belongs to user {ALICE}"):
        remove_for_good(trashed_runs(shared_root), runs_root=shared_root)


@as_root
def test_sync_without_names_leaves_the_runs_of_others(shared_root: Path, obowlab: Obowlab) -> None:
    run = finished_run(shared_root)
    os.chown(run.path, ALICE, GROUP)
    code, out, _ = obowlab("runs", "sync", "--dry-run", "--runs-root", str(shared_root))
    assert code == 0
    assert "1 run of another user is left to them" in out
    assert "Would send" not in out
    with file_lock(run.path / "lock"):
        (run.path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": "0"}))
        with pytest.raises(UserError, match=f"belongs to user {ALICE}: ask them to cancel it"):
            stop(run.run_id, runs_root=shared_root)


@as_root
def test_a_folder_of_mode_700_is_one_line_for_others(shared_root: Path) -> None:
    finished_run(shared_root)
    closed = RunFolder.create(load_recipe("demo"), seed=1, runs_root=shared_root)
    closed.path.chmod(0o700)
    line = f"{closed.path / 'run.json'} cannot be read (Permission denied): ask the owner of the folder for the right to."
    for words in (["runs", "list"], ["jobs", "--all"]):
        code, said = outcome(Fork(look, shared_root, BOB, words))
        assert said == f"Warning: {line}\n"
        assert code == 0
    code, said = outcome(Fork(look, shared_root, BOB, ["run", "demo", "--seed", "1", "--dry-run", "--device", "cpu"]))
    assert (code, f"The run folder {closed.path} belongs to root: train the run in a --runs-root of your own" in said) == (
        2,
        True,
    )


@as_root
def test_links_of_strangers_are_not_followed(shared_root: Path, tmp_path: Path) -> None:
    target = tmp_path / "private"
    target.mkdir()
    run = finished_run(target)
    link = shared_root / "demo-link"
    link.symlink_to(run.path)
    assert len(list_runs(shared_root)) == 1  # one's own
    os.lchown(link, BOB, GROUP)
    assert leads_astray(link)
    assert list_runs(shared_root) == []
    assert "a link that somebody made to a folder that is not theirs" in read_runs(shared_root)[1][0]
    (shared_root / ".features").symlink_to(target)
    os.lchown(shared_root / ".features", BOB, GROUP)
    with pytest.raises(UnusableFileError, match="a link that somebody made"):
        shared_folder(shared_root / ".features")


def test_names_of_runs_are_no_paths() -> None:
    values = {"name": "demo", "seed": 0, "fingerprint": "a", "recipe": {}, "created_at": 0.0, "version": "0"}
    RunInfo.model_validate({**values, "run_id": "demo-s0-12"})
    for wrong in ("../x", "a/b", "", ".x", "a b"):
        with pytest.raises(ValueError, match="pattern"):
            RunInfo.model_validate({**values, "run_id": wrong})
