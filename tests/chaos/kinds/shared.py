"""A run store of several people: links and pipes for files, bad runs among good ones, second users, kept locks, bombs."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import socket
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from obowlab.files.records import parse_checked, with_checksum
from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, equal, sentence, settle, valuables
from tests.chaos.ledger import Case, Kind
from tests.chaos.stage import prepare_group
from tests.users import GROUP, User
from tests.users import lacking as lacking_users

ALICE, BOB = 50001, 50002
SECRET = "mlflow_tracking_password = hunter2"

# ----------------------------------------------------------------------------------------------------------- what may lie there


def _listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)


PLANTS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": _listen,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "huge file": _huge,
}
"""What somebody may put in the place of a file."""


def _instead(name: str, plant: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        (path / name).unlink()
        PLANTS[plant](path / name)

    return harm


def _state(path: Path, **changes: Any) -> None:
    values = {**json.loads((path / "state.json").read_bytes()), **changes}
    (path / "state.json").write_text(json.dumps(values))


def _info(path: Path, **changes: Any) -> None:
    values = {**parse_checked((path / "run.json").read_bytes()), **changes}
    (path / "run.json").write_text(with_checksum(json.dumps(values)))


def _result(path: Path, text: str) -> None:
    (path / "results" / "a.json").write_text(text)


TEXTS = '{"subject": "student", "protocol": "knn", "protocol_hash": "a", "measurements": [{"name": "knn_top1", "value": "x"}]}'

HARMS: dict[str, Callable[[Path], object]] = {
    "torn-state": lambda path: (path / "state.json").write_text('{"status": "fin'),
    "newer-status": lambda path: _state(path, status="paused"),
    "state-is-folder": _instead("state.json", "folder"),
    "state-is-pipe": _instead("state.json", "pipe"),
    "state-is-socket": _instead("state.json", "socket"),
    "state-is-device": _instead("state.json", "device"),
    "info-is-pipe": _instead("run.json", "pipe"),
    "info-is-folder": _instead("run.json", "folder"),
    "info-is-deep": lambda path: (path / "run.json").write_text('{"a": ' + "[" * 99_000 + "]" * 99_000 + "}"),
    "info-is-huge": _instead("run.json", "huge file"),
    "info-is-newer": lambda path: _info(path, version="99.1.0", seed={"of": "weights"}),
    "info-of-newer-format": lambda path: _info(path, format=2),
    "state-of-newer-format": lambda path: _state(path, format=2),
    "info-not-utf8": lambda path: (path / "run.json").write_bytes(b'{"name": "\xff\xfe"}'),
    "time-without-end": lambda path: _info(path, created_at=1e300),
    "name-is-path": lambda path: _info(path, run_id="../../escape"),
    "state-of-2300": lambda path: _state(path, updated_at=1e10),
    "result-is-pipe": lambda path: os.mkfifo(path / "results" / "a.json"),
    "result-is-list": lambda path: _result(path, "[1]"),
    "result-of-texts": lambda path: _result(path, TEXTS),
}
"""What one run of a store may look like; `result...` harms those only who read results."""


def neighbours(case: Case) -> None:
    """Put one bad run beside a good one, and let every reader of a store look: the good one is shown, the bad one is a line."""
    folder = case.stage.copy("finished", case.place)
    root = folder.path.parent
    out = case.place / "out"
    readers: dict[str, list[str]] = {
        "runs list": ["runs", "list"],
        "runs list --json": ["runs", "list", "--json"],
        "jobs": ["jobs", "--all"],
        "table": ["table", "table3", "--scale", "demo"],
        "runs sync": ["runs", "sync", "--dry-run"],
        "report": ["report", "--out", str(out)],
    }
    whole = valuables(folder.path)
    for number in range(case.num_faults):
        name, (reader, words) = case.dice.choice(list(HARMS)), case.dice.choice(list(readers.items()))
        bad = root / f"bad-{number}"
        shutil.copytree(folder.path, bad)
        HARMS[name](bad)
        case.fault(f"{name}, {reader}")
        child = forks.obowlab([*words, "--runs-root", str(root)], place=case.place, name="reader")
        ended_well(child)
        said = child.said()
        deaf = name.startswith("result") and reader not in ("runs list", "runs list --json", "report")
        if not deaf and str(bad) not in said and bad.name not in said:
            raise BrokenError(f"{reader} says nothing of {bad.name} ({name}): {said[-500:]}")
        if "newer" in name and "update obowlab" not in said:
            raise BrokenError(f"{reader} does not say that {name} is newer: {said[-500:]}")
        if not deaf:
            case.sentence()
        shutil.rmtree(bad)
    if valuables(folder.path) != whole:
        raise BrokenError("a reader changed the good run")


WRITTEN = ("metrics.jsonl", "online.jsonl", "attempts.jsonl", "log.txt", "checkpoint.pt.tmp", "worker.lock", "mirror.lock")
SENT = ("dirty.diff", "log.txt", "machine.json", "cost.json", "words/conv5-000.jpg", "results/a.json")


def links(case: Case) -> None:
    """Put links and pipes into a half-trained run, where it is written and where it is sent: no other file is read or changed."""
    folder = case.stage.copy("halfway", case.place)
    secret = case.place / "credentials"
    secret.write_text(SECRET)
    for _ in range(case.num_faults):
        name = case.dice.choice((*WRITTEN, *SENT))
        path = folder.path / name
        kept = path.read_bytes() if path.is_file() else None
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        plant = case.dice.choice(("link", "link", "pipe", "socket"))
        path.symlink_to(secret) if plant == "link" else PLANTS[plant](path)
        case.fault(f"{name} is a {plant}")
        if name in WRITTEN:
            child = forks.train(folder.path, place=case.place)
            time.sleep(case.dice.random())
            child.send(signal.SIGTERM)
            if ended_well(child, codes=(0, 2, 128 + signal.SIGTERM, -signal.SIGTERM)) == 2:  # the last: before it could answer
                case.sentence(sentence(child))
        else:
            child = forks.obowlab(["runs", "sync", "--runs-root", str(folder.path.parent)], place=case.place, name="sync")
            ended_well(child, codes=(0, 1, 2))
        if secret.read_text() != SECRET:
            raise BrokenError(f"{name} changed the file it was a link to")
        if any(
            SECRET.encode() in file.read_bytes() for file in (folder.path.parent / "mlartifacts").rglob("*") if file.is_file()
        ):
            raise BrokenError(f"the file that {name} was a link to is in MLflow")
        if path.is_symlink() or not path.is_file():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            if kept is not None:
                path.write_bytes(kept)
    settle(case, folder, expected=case.stage.reference())


# -------------------------------------------------------------------------------------------------------------------- databases


def databases(case: Case) -> None:
    """Put garbage into mlflow.db or the journal of studies: a sentence; filled anew, MLflow has everything once."""
    folder = case.stage.copy("finished", case.place)
    root = folder.path.parent
    for _ in range(case.num_faults):
        path = case.dice.choice((root / "mlflow.db", root / ".studies" / "studies.journal"))
        path.parent.mkdir(exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        if path.name == "mlflow.db":
            start = case.dice.choice((0, 100, len(before) // 2))
            path.write_bytes(before[:start] + case.dice.randbytes(60_000) + before[start + 60_000 :])
            words = ["runs", "sync", "--runs-root", str(root)]
        else:
            path.write_bytes(case.dice.choice((b"garbage\n", b'{"op_code": 99}\n', case.dice.randbytes(500) + b"\n", b"[1]\n")))
            words = ["tune", "kappa-delta", "--show", "--runs-root", str(root)]
        case.fault(f"{path.name} is garbage")
        child = forks.obowlab(words, place=case.place)
        code = child.wait()
        if "Traceback" in child.said():
            raise BrokenError(f"{' '.join(words[:2])}: {child.said()[-500:]}")
        if code:
            case.sentence(child.said().strip().splitlines()[-1])
        if path.name == "mlflow.db":
            shutil.rmtree(root / "mlartifacts", ignore_errors=True)
            path.unlink()
            folder.mirror_path.unlink(missing_ok=True)
        else:
            path.unlink()
    settle(case, folder, expected=case.stage.reference())


# ------------------------------------------------------------------------------------------------------- processes and locks


def paused(case: Case) -> None:
    """Stop one rank of two for a while (SIGSTOP), and let it go on (SIGCONT): the others wait, and the run is the same."""
    expected = prepare_group(case.stage)
    folder = case.stage.new_run(case.place, procs=2)
    child = forks.obowlab(case.stage.words(case.place, procs=2), place=case.place)
    end = time.monotonic() + 120
    while case.injected < case.num_faults and child.poll() is None and time.monotonic() < end:
        ranks = [pid for pid in child.family() if b"obowlab.training" in _command(pid) and b"torch" not in _command(pid)]
        if len(ranks) < 2 or folder.state.step == 0:
            time.sleep(0.05)
            continue
        chosen = case.dice.choice(ranks[-2:])
        try:
            os.kill(chosen, signal.SIGSTOP)
            time.sleep(0.2 + case.dice.random())
            os.kill(chosen, signal.SIGCONT)
        except ProcessLookupError:
            continue
        case.fault(f"rank {chosen} stopped at step {folder.state.step}")
    ended_well(child)
    equal(folder, expected)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def squatted(case: Case) -> None:
    """Let a process that trains nothing keep the locks of a run: it is named; once it ends, the run goes on."""
    folder = case.stage.copy("halfway", case.place)
    for _ in range(case.num_faults):
        name = case.dice.choice(("lock", "worker.lock"))
        path = folder.path / name
        path.touch()
        ready = case.place / "ready"
        ready.unlink(missing_ok=True)

        def keep(path: Path = path, ready: Path = ready) -> int:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                ready.touch()
                time.sleep(60)
            return 0

        stranger = forks.fork(keep, place=case.place, name="stranger")
        while not ready.exists():
            time.sleep(0.01)
        case.fault(f"{name} kept by {stranger.pid}")
        child = forks.obowlab(case.stage.words(case.place), place=case.place)
        said = sentence(child)
        if f"process {stranger.pid} " not in said:
            raise BrokenError(f"the process that has the lock is not named: {said}")
        case.sentence(said)
        stranger.send(signal.SIGKILL)
        stranger.wait()
    settle(case, folder, expected=case.stage.reference())


# ------------------------------------------------------------------------------------------------------------------------- users


def users(case: Case) -> None:
    """Let a second user train what the first one trains, in a store of both, with any umask: refused, and nothing is harmed."""
    folder = case.stage.copy("halfway", case.place)
    root = folder.path.parent
    for path in (root, *root.rglob("*")):
        os.chown(path, ALICE, GROUP, follow_symlinks=False)
    root.chmod(0o2775)
    train = case.stage.words(case.place)
    for _ in range(case.num_faults):
        bob = User(BOB, case.dice.choice((0o022, 0o002, 0o077)), case.place / f"bob-{case.injected}")
        case.fault(f"umask {bob.umask:03o}")
        said = sentence(_typed(case, bob, case.dice.choice((train, ["runs", "delete", folder.run_id, "--yes", *train[-4:-2]]))))
        if f"belongs to user {ALICE}" not in said:
            raise BrokenError(f"the owner is not named: {said}")
        case.sentence(said)
    child = _typed(case, User(ALICE, 0o022, case.place / "alice"), train)
    while child.poll() is None and folder.state.status != "running":
        time.sleep(0.01)
    time.sleep(case.dice.random())
    child.send(signal.SIGTERM)
    ended_well(child, codes=(0, 128 + signal.SIGTERM))
    for path in (root, *root.rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
    settle(case, folder, expected=case.stage.reference())


def _typed(case: Case, user: User, words: list[str]) -> forks.Child:
    """Start a command line of obowlab as another user types it, in a new home."""
    user.settle()
    become = partial(user.become, *words, machine=case.place / "machine.toml")
    return forks.fork(become, place=case.place / "said", name=user.home.name)


# ------------------------------------------------------------------------------------------------------------------------- bombs


def inflated(case: Case) -> None:
    """Put archives and images that inflate where weights, checkpoints and photographs are read: refused by their headers."""
    folder = case.stage.copy("halfway", case.place)
    for number in range(case.num_faults):
        where = case.dice.choice(("import", "eval", "checkpoint", "image"))
        case.fault(where)
        if where == "image":
            photos = case.place / f"photos-{number}"
            shutil.copytree(case.stage.root / "images" / "small", photos)
            _large_image(next((photos / "train").rglob("*.jpg")).with_suffix(".png"))
            words = ["data", "prepare", "mine", "--source", str(photos), "--data-root", str(case.place / f"data-{number}")]
            child = forks.obowlab(words, place=case.place)
            ended_well(child, codes=(0, 2))
            if "million are decoded" not in child.said():
                raise BrokenError(f"nothing is said of the large image: {child.said()[-500:]}")
            case.sentence()
            continue
        file = folder.path / "checkpoint.pt" if where == "checkpoint" else case.place / "weights.pth"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"network": {}}))
            archive.writestr("archive/data/0", bytes(200_000_000))
        if where == "checkpoint":
            ended_well(forks.train(folder.path, place=case.place))  # from the one before
        else:
            words = {
                "import": ["weights", "import", str(file), "--out", str(case.place / "out.safetensors")],
                "eval": ["eval", str(file), "--dataset", "small", "--data-root", str(case.stage.data_root)],
            }[where]
            case.sentence(sentence(forks.obowlab(words, place=case.place)))
            file.unlink()
    settle(case, folder, expected=case.stage.reference())


def _large_image(path: Path) -> None:
    """Write a PNG file of a few bytes whose header says 178 megapixels."""
    import zlib

    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (13340).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


KINDS = {
    "neighbours": Kind("one bad run among good ones, for every reader", neighbours, share=40, per_case=8),
    "links": Kind("links and pipes in a run folder", links, share=40, per_case=6),
    "databases": Kind("garbage in mlflow.db and the journal of studies", databases, share=15, per_case=3),
    "paused": Kind("one rank of two stopped for a while", paused, share=8, per_case=3),
    "squatted": Kind("locks kept by a process that trains nothing", squatted, share=15, per_case=4),
    "users": Kind("a second user, with any umask", users, share=10, per_case=3, lacking=lacking_users),
    "inflated": Kind("archives and images that inflate", inflated, share=20, per_case=4),
}
