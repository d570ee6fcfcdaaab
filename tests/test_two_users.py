"""Two users of one run store and one data root, side by side, from `data prepare` to `report`: as docs/cluster.md makes them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obowlab.runs.store import CACHES, TRACKING, TURNS
from tests.chaos.judge import audit, sqlite_query
from tests.runs import SMALL_RECIPE
from tests.users import GROUP, User, ended, lacking

MACHINE = """
runs_root = "{place}/runs"
data_root = "{place}/data"
device = "cpu"
workers = 0
threads = 1
loader = "torch"
"""
TABLE = """
title = "Soft codes"
base = "small.toml"
primary = "knn_top1"

[columns]
knn_top1 = "k-NN"

[[row]]
key = "soft"
label = "soft codes"
"""


@pytest.fixture
def place(image_folder: Path) -> Iterator[Path]:
    """A place that everybody may go to: images, a run store and a data root of a group, and a machine file that names them."""
    place = Path(tempfile.mkdtemp(prefix="obowlab-users-"))
    place.chmod(0o755)
    try:
        reason = lacking()
        if reason is not None:
            pytest.skip(reason)
        shutil.copytree(image_folder, place / "images", copy_function=shutil.copyfile)
        for path in (place / "images", *(place / "images").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for name in ("runs", "data"):
            (place / name).mkdir()
            os.chown(place / name, 0, GROUP)
            (place / name).chmod(0o2775)
        (place / "machine.toml").write_text(MACHINE.format(place=place))
        yield place
    finally:
        shutil.rmtree(place)


def settled(place: Path, *, umask: int) -> tuple[User, User]:
    """Return two users with their homes, in which the same recipe and table lie."""
    users = User(50001, umask, place / "alice"), User(50002, umask, place / "bob")
    recipe = SMALL_RECIPE.format(dataset="small", epochs=1, batch_size=12)
    for user in users:
        user.settle()
        (user.home / "small.toml").write_text(recipe.replace("[evaluation]", '[evaluation]\nprotocols = ["knn"]'))
        (user.home / "codes.toml").write_text(TABLE)
    return users


@pytest.mark.long
@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_two_users_of_one_store_side_by_side(place: Path, umask: int) -> None:
    users, runs = settled(place, umask=umask), place / "runs"

    def both(*commands: str) -> list[str]:
        """Let each user type a command, the same or one each, at the same time; return what they print."""
        each = commands * 2 if len(commands) == 1 else commands
        started = [user.start(*each[number].split(), machine=place / "machine.toml") for number, user in enumerate(users)]
        done = [ended(process) for process in started]
        for command, one in zip(each, done, strict=True):
            assert one.code == 0, f"{command}: {one}"
            assert not any(word in one.err + one.out for word in ("Traceback", "Warning", "pending")), f"{command}: {one}"
        return [one.out for one in done]

    source = f"--source {place}/images"
    both(f"data prepare small {source}", f"data prepare flowers {source}")
    assert all("already prepared" in out for out in both(f"data prepare small {source}"))
    both("run small.toml --seed 0", "run small.toml --seed 1")
    (first,), (second,) = (list(runs.glob(f"small-s{seed}-*")) for seed in (0, 1))
    assert [path.stat().st_uid for path in (first, second)] == [user.uid for user in users]
    for out in both("runs list"):
        assert out.count("finished") == 2
        assert first.name in out
        assert second.name in out
    for out in both("ablate codes.toml --seeds 2"):  # whoever trained them
        assert "2 trainings; 2 done" in out
    assert all("2 runs, 1 table" in out for out in both("report"))
    told = sent(runs / ".logs" / "report.log")
    assert all("Warning" not in line for line in told), told
    for out in both("runs sync"):
        assert ": 0 sent\n" in out
        assert "1 run of another user is left to them" in out
    assert all("2 runs, 1 table" in out for out in both("report --wait"))
    for user in users:
        pages = {path.name for path in (user.home / "report" / "runs").iterdir()}
        assert all(any(name.startswith(run.name) for name in pages) for run in (first, second)), pages
    query = sqlite_query(runs)
    found = audit(runs, query)
    assert (found.lost, found.doubled) == (0, 0), found.told
    assert [row[0] for row in query("SELECT value FROM tags WHERE key = 'obowlab.kind' AND value = 'report'")] == ["report"]
    closed = [name for name in (*TRACKING, *TURNS, *CACHES) if (runs / name).exists() and not _is_open(runs / name)]
    assert closed == []


def sent(log: Path) -> list[str]:
    """Return what two processes in the background say of the reports they send."""
    end = time.monotonic() + 240
    while not log.exists() or log.read_text().count("\n") < 2:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return log.read_text().splitlines()


def _is_open(path: Path) -> bool:
    facts = path.stat()
    return facts.st_gid == GROUP and facts.st_mode & 0o060 == 0o060


@pytest.mark.long
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_caches_of_another_user_are_computed_again(place: Path, mode: int) -> None:
    alice, bob = settled(place, umask=0o022)
    runs, machine = place / "runs", place / "machine.toml"

    def good(user: User, command: str) -> tuple[str, list[str]]:
        done = ended(user.start(*command.split(), machine=machine))
        assert done.code == 0, f"{command}: {done}"
        assert "Traceback" not in done.err, f"{command}: {done}"
        return done.out, [line for line in done.err.splitlines() if line.startswith("Warning: ")]

    good(alice, f"data prepare small --source {place}/images")
    closed = [runs / name for name in CACHES] + [place / "data" / "small" / ".hashed"]
    for path in closed:
        if path.suffix:
            path.write_text("{}")
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        path.chmod(mode & (0o666 if path.suffix else 0o777))
        os.chown(path, alice.uid, GROUP)
    out, warnings = good(bob, "run small.toml")
    assert "knn_top1" in out
    kept = runs / ".features"
    assert warnings == [f"Warning: {kept} cannot be used, so features are not kept: chmod -R g+rwX {kept}, by its owner."]
    out, warnings = good(bob, "ablate codes.toml")
    assert "1 trainings; 1 done" in out
    assert len(warnings) == 1
    assert f"cannot write {runs}/.tables" in warnings[0]
    out, warnings = good(bob, "report --wait")
    assert "1 run, 0 tables" in out
    (warning,) = warnings
    if mode == 0o700:  # the folder is closed, whatever is in it
        assert f"chmod -R g+rwX {runs}/.tables" in warning
    else:  # the table that could not be kept
        assert "a table 'codes', which this store does not know" in warning
