"""What is not as it was: a store that vanishes, a second host, another time zone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, sentence, settle
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
        wanted = 22 + (number * 18) // case.num_faults
        while child.poll() is None and folder.state.step < wanted:
            time.sleep(0.004)
        child.send(case.dice.choice((signal.SIGTERM, signal.SIGKILL)))
        ended_well(child, codes=(0, -signal.SIGKILL, 128 + signal.SIGTERM))
        words = case.dice.choice(
            (["runs", "list", *root], ["runs", "sync", *root], ["report", "--out", str(case.place / "out"), *root])
        )
        reader = partial(_in_zone, case.dice.choice(ZONES), words)
        ended_well(forks.fork(reader, place=case.place, name="reader"))
        times = [attempt["time"] for attempt in folder.attempts()]
        if times != sorted(times) or times[-1] > time.time() + 5:
            raise BrokenError(f"the starts of the run are not in the order they had: {times}")
    settle(case, folder, expected=case.stage.reference())


def _in_zone(zone: str, words: list[str]) -> int:
    os.environ["TZ"] = zone
    time.tzset()
    return forks.main(words)


KINDS = {
    "vanished": Kind("run store or run away for moments", vanished, share=20, per_case=4),
    "hosts": Kind("two hosts on one run", hosts, share=20, per_case=4),
    "zones": Kind("another time zone at each start", zones, share=10, per_case=4),
}
