"""What is not as it was: a store that vanishes, files of a newer version, a second host, another time zone or umask."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from obowlab.files.records import parse_checked, with_checksum
from obowlab.runs.folder import RunFolder
from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, sentence, settle, valuables
from tests.chaos.ledger import Case, Kind
from tests.chaos.stage import TOTAL_STEPS

ZONES = (
    "UTC",
    "Asia/Kathmandu",
    "Pacific/Kiritimati",
    "Pacific/Pago_Pago",
    "America/St_Johns",
    "UTC-14",
    "UTC+12",
    "No/Where",
    "",
)


def vanished(case: Case) -> None:
    """Take the run store, or the run, away for moments while it is trained and sent: nothing is put into its place.

    An empty folder may be left there, as where a disk was mounted.
    """
    folder = case.stage.copy("halfway", case.place)
    for number in range(case.num_faults):
        child = forks.train(folder.path, place=case.place)
        wanted = min(TOTAL_STEPS - 2, 22 + (number * 18) // case.num_faults)
        while child.poll() is None and folder.state.step < wanted:
            time.sleep(0.004)
        sync = None
        if case.dice.random() < 0.4:
            sync = forks.obowlab(["runs", "sync", "--runs-root", str(folder.path.parent)], place=case.place, name="sync")
            time.sleep(case.dice.random())
        there, away = case.dice.choice((folder.path, folder.path.parent)), case.place / "away"
        step, alive = folder.state.step, child.poll() is None
        there.rename(away)
        if is_empty := sync is None and case.dice.random() < 0.5:
            there.mkdir()
        time.sleep(case.dice.choice((0.01, 0.1, 0.5, 1.5)))
        if there.exists() and (not is_empty or any(there.iterdir())):
            planted = [str(path.relative_to(there)) for path in there.rglob("*")]
            raise BrokenError(f"while {there.name} was away, {planted[:5]} were put in its place")
        away.rename(there)  # an empty folder is replaced
        if alive:
            case.fault(f"{there.name} away at step {step}{', an empty folder left' * is_empty}")
        if ended_well(child, codes=(0, 2)) == 2:
            case.sentence(sentence(child))
        if sync is not None:
            ended_well(sync, codes=(0, 1, 2))
        if child.code == 0:
            settle(case, folder, expected=case.stage.reference())
            shutil.rmtree(folder.path.parent)
            folder = case.stage.copy("halfway", case.place)
    settle(case, folder, expected=case.stage.reference())


# ------------------------------------------------------------------------------------------------------------ newer files


def _json(name: str, **changes: Any) -> Callable[[Path], Path]:
    def harm(path: Path) -> Path:
        file = next(path.glob(name))
        file.write_text(with_checksum(json.dumps({**parse_checked(file.read_bytes()), **changes})))
        return file

    return harm


def _checkpoints(path: Path) -> Path:
    import torch

    for file in path.glob("checkpoint*.pt"):
        torch.save({**torch.load(file, weights_only=True), "format": 99, "moments": {}}, file)
    return path / "checkpoint.pt"


def _machine(path: Path) -> Path:
    file = path / "machine.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "warp": 9}))
    return file


def _study(path: Path) -> Path:
    file = path.parent / ".studies" / "ours" / "study.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"format": 99, "name": "ours", "trials": {"of": "study"}}))
    return file


NEWER: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "run.json of another shape": (_json("run.json", version="99.1.0", seed={"of": "weights"}), ("run", "show", "list")),
    "run.json of another format": (_json("run.json", format=99), ("run", "show", "list")),
    "a recipe with new settings": (_json("run.json", version="99.1.0", recipe={"warp": {"factor": 9}}), ("run",)),
    "a new status": (_json("state.json", status="paused"), ("run", "show", "list")),
    "state.json of another format": (_json("state.json", format=99, step={"of": "training"}), ("run", "show", "list")),
    "machine.json with a new setting": (_machine, ("train",)),
    "a result of another format": (_json("results/*.json", format=99), ("show", "list", "report")),
    "checkpoints of another format": (_checkpoints, ("run",)),
    "study.json of another format": (_study, ("report",)),
}
"""What a newer version may have written, which returns the file, and who reads it."""


def newer(case: Case) -> None:
    """Let files of a newer version lie in a run store: who cannot read them says to update, not to remove, and leaves them."""
    for _ in range(case.num_faults):
        shutil.rmtree(case.place / "runs", ignore_errors=True)
        name = case.dice.choice(list(NEWER))
        harm, readers = NEWER[name]
        folder = case.stage.copy("finished" if "result" in name else "halfway", case.place)
        pristine = case.place / "pristine"
        shutil.copytree(folder.path, pristine)
        shutil.rmtree(case.place / "out", ignore_errors=True)
        file = harm(folder.path)
        content, whole, root = file.read_bytes(), valuables(folder.path), ["--runs-root", str(folder.path.parent)]
        commands = {
            "run": case.stage.words(case.place),
            "show": ["runs", "show", folder.run_id, *root],
            "list": ["runs", "list", *root],
            "report": ["report", "--wait", "--out", str(case.place / "out"), *root],
        }
        reader = case.dice.choice(readers)
        case.fault(f"{name}, {reader}")
        is_training = reader == "train"  # by a launcher of another version
        child = forks.train(folder.path, place=case.place) if is_training else forks.obowlab(commands[reader], place=case.place)
        ended_well(child, codes=(0, 2))
        said = " ".join(child.said().split())
        pages = "".join(page.read_text() for page in (case.place / "out").rglob("*.html")) if reader == "report" else ""
        if "update obowlab" not in said + pages or "remove" in said or "--fresh" in said:
            raise BrokenError(f"{reader} does not say that {name} is newer: {said[-600:]}")
        case.sentence(said[-200:])
        if file.read_bytes() != content or valuables(folder.path) != whole:
            raise BrokenError(f"{reader} changed the run, whose {file.name} is newer")
        shutil.rmtree(folder.path)
        pristine.rename(folder.path)
    settle(case, folder, expected=case.stage.reference())


# ------------------------------------------------------------------------------------------------------------- two hosts


def hosts(case: Case) -> None:
    """Let a second host read, cancel and train what the first one trains, and take over when that one dies."""
    folder = case.stage.copy("halfway", case.place)
    root = ["--runs-root", str(folder.path.parent)]
    commands = (["jobs", "cancel", folder.run_id, *root], case.stage.words(case.place), ["runs", "list", *root])
    for number in range(case.num_faults):
        first, second = (f"node-{(number + place) % 2}" for place in range(2))
        child = forks.train(folder.path, place=case.place, first=partial(_name_host, first))
        while child.poll() is None and not (folder.state.status == "running" and folder.state.pid == child.pid):
            time.sleep(0.004)
        time.sleep(0.5 * case.dice.random())
        words = case.dice.choice(commands)
        if child.send(signal.SIGSTOP) and folder.state.status == "running":  # and stays what the other one asks about
            case.fault(f"{' '.join(words[:2])} on {second} while {first} trains at step {folder.state.step}")
            other = _on_host(second, words, place=case.place)
            if words[1] == "list":
                ended_well(other)
                if "running" not in other.said():
                    raise BrokenError(f"{second} does not say that the run is running: {other.said()[-300:]}")
            else:
                said = sentence(other)
                if first not in said or second in said:
                    raise BrokenError(f"{second} does not name {first}: {said}")
                case.sentence(said)
        child.send(signal.SIGKILL)
        child.wait()
    for sync in [_on_host(name, ["runs", "sync", *root], place=case.place / name) for name in ("node-0", "node-1")]:
        ended_well(sync, codes=(0, 1, 2))
    settle(case, folder, expected=case.stage.reference())


def _name_host(name: str) -> None:
    socket.gethostname = lambda: name


def _on_host(name: str, words: list[str], *, place: Path) -> forks.Child:
    """Run a command as on another host."""

    def work() -> int:
        _name_host(name)
        return forks.main(words)

    return forks.fork(work, place=place, name=f"command-{name}")


# ------------------------------------------------------------------------------------------------------------ time zones


def zones(case: Case) -> None:
    """Change the time zone from one start to the next: nothing that is kept depends on it."""
    folder = case.stage.copy("halfway", case.place)
    root = ["--runs-root", str(folder.path.parent)]
    for number in range(case.num_faults):
        zone = case.dice.choice(ZONES)
        child = forks.train(folder.path, place=case.place, environment={"TZ": zone}, first=time.tzset)
        case.fault(f"TZ={zone!r}")
        _reach(child, folder, step=22 + (number * 18) // case.num_faults)
        child.send(case.dice.choice((signal.SIGTERM, signal.SIGKILL)))
        ended_well(child, codes=(0, -signal.SIGKILL, 128 + signal.SIGTERM))
        words = case.dice.choice(
            (["runs", "list", *root], ["runs", "sync", *root], ["report", "--wait", "--out", str(case.place / "out"), *root])
        )
        reader = partial(_in_zone, case.dice.choice(ZONES), words)
        ended_well(forks.fork(reader, place=case.place, name="reader"))
        times = [attempt["time"] for attempt in folder.attempts()]
        if times != sorted(times) or times[-1] > time.time() + 5:
            raise BrokenError(f"the starts of the run are not in the order they had: {times}")
    settle(case, folder, expected=case.stage.reference())


def _reach(child: forks.Child, folder: RunFolder, *, step: int) -> None:
    """Wait until this process trains, and has come to a step; or has ended."""
    while child.poll() is None and not (folder.state.pid == child.pid and folder.state.step >= step):
        time.sleep(0.004)


def _in_zone(zone: str, words: list[str]) -> int:
    os.environ["TZ"] = zone
    time.tzset()
    return forks.main(words)


# ----------------------------------------------------------------------------------------------------------------- umask


def umask(case: Case) -> None:
    """Change the umask from one start to the next: every new file of the run has the rights of that umask, no more, no less."""
    folder = case.stage.copy("halfway", case.place)
    for number in range(case.num_faults):
        mask = case.dice.choice((0o022, 0o002, 0o077, 0o027))
        before = {path.stat().st_ino for path in folder.path.rglob("*")}
        child = forks.train(folder.path, place=case.place, first=partial(_set_umask, mask))
        case.fault(f"umask {mask:03o}")
        _reach(child, folder, step=22 + (number * 18) // case.num_faults)
        if number < case.num_faults - 1:
            child.send(case.dice.choice((signal.SIGTERM, signal.SIGKILL)))
        ended_well(child, codes=(0, -signal.SIGKILL, 128 + signal.SIGTERM))
        for path in folder.path.rglob("*"):
            mode, right = path.stat().st_mode & 0o777, (0o777 if path.is_dir() else 0o666) & ~mask
            if path.stat().st_ino not in before and not path.name.endswith("lock") and mode != right:
                raise BrokenError(f"{path.relative_to(folder.path)} has mode {mode:03o} under umask {mask:03o}, not {right:03o}")
    settle(case, folder, expected=case.stage.reference())


def _set_umask(mask: int) -> None:
    os.umask(mask)


KINDS = {
    "vanished": Kind("run store or run away for moments", vanished, share=20, per_case=4),
    "newer": Kind("files of a newer version", newer, share=30, per_case=6),
    "hosts": Kind("two hosts on one run", hosts, share=20, per_case=4),
    "umask": Kind("another umask at each start", umask, share=10, per_case=4),
    "zones": Kind("another time zone at each start", zones, share=10, per_case=4),
}
