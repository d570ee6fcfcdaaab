"""Disks that are full, or that may only be read."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, sentence, settle, valuables
from tests.chaos.ledger import Case, Kind
from tests.chaos.stage import TOTAL_STEPS

DISK_MIB = 24


def full(case: Case) -> None:
    """Fill the disk of the run store at a random moment: refused in a sentence; with room again, the run goes on."""
    disk = case.place / "disk"
    with mounted(disk):
        folder = case.stage.copy("halfway", disk)
        for number in range(case.num_faults):
            child = forks.train(folder.path, place=case.place)
            wanted = min(TOTAL_STEPS - 2, 22 + (number * 18) // case.num_faults + case.dice.randint(0, 2))
            while child.poll() is None and folder.state.step < wanted:
                time.sleep(0.003)
            ballast = disk / "ballast"
            _fill(ballast, leave=case.dice.choice((0, 0, 4096, 100_000)))
            if child.poll() is None:
                case.fault(f"no room from step {folder.state.step} on")
            code = ended_well(child, codes=(0, 2))
            if code == 2:
                case.sentence(sentence(child))
            ballast.unlink()
            if code == 0:
                break
        settle(case, folder, expected=case.stage.reference())


def limited(case: Case) -> None:
    """Let no file of the training process grow beyond a few kilobytes, as a quota does."""
    folder = case.stage.copy("halfway", case.place)
    for _ in range(case.num_faults):
        limit = case.dice.randint(1_000, 100_000)

        def tighten(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        whole = valuables(folder.path)
        child = forks.train(folder.path, place=case.place, first=tighten)
        case.fault(f"files of at most {limit} bytes")
        code = child.wait()
        if "Traceback" in child.said() or code not in (0, 2):
            raise BrokenError(f"exit code {code}: {child.said()[-500:]!r}")
        if code == 2:
            case.sentence(sentence(child))
        lost = {name for name in whole if name.endswith(".pt") and not (folder.path / name).exists()}
        if lost:
            raise BrokenError(f"{lost} are gone")
    settle(case, folder, expected=case.stage.reference())


def read_only(case: Case) -> None:
    """Make the run folder, or the whole run store, read-only before a start or under a run."""
    for _ in range(case.num_faults):
        shutil.rmtree(case.place / "runs", ignore_errors=True)
        folder = case.stage.copy("halfway", case.place)
        target = case.dice.choice((folder.path, folder.path.parent))
        whole = valuables(folder.path)
        early = case.dice.random() < 0.6
        child = None
        if not early:
            child = forks.train(folder.path, place=case.place)
            while child.poll() is None and folder.state.step < 25:
                time.sleep(0.003)
        with frozen(target):
            if child is None:
                case.fault(f"{target.name} read-only before the start")
                child = forks.obowlab(case.stage.words(case.place), place=case.place)
                case.sentence(sentence(child))
                if valuables(folder.path) != whole:
                    raise BrokenError("files of the run changed")
            else:
                if child.poll() is None:
                    case.fault(f"{target.name} read-only from step {folder.state.step} on")
                if ended_well(child, codes=(0, 2)) == 2:
                    case.sentence(sentence(child))
        settle(case, folder, expected=case.stage.reference())


# --------------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def mounted(disk: Path, *, options: str = "") -> Iterator[None]:
    """Mount a small disk of its own, with further options of tmpfs."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,{options}".rstrip(","), "chaos", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Make a folder and all below it read-only, also for root, by a mount over itself."""
    # In one step, as what was opened for writing through a mount keeps it writable: it is made read-only elsewhere, then copied.
    aside = Path(tempfile.mkdtemp(prefix="obowlab-chaos-frozen-"))
    subprocess.run(["mount", "--rbind", str(folder), str(aside)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(aside)], check=True)
        subprocess.run(["mount", "--rbind", str(aside), str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(aside)], check=True)
        aside.rmdir()
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def no_mounts() -> str | None:
    """Return why this machine cannot mount, or None."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        return "mounting needs root"
    place = Path(f"/tmp/.obowlab-chaos-mount-{os.getpid()}")
    place.mkdir()
    try:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "chaos", str(place)], capture_output=True, text=True)
        if tried.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)
            return None
        return tried.stderr.strip() or "mounting is not allowed"
    finally:
        place.rmdir()


def _fill(path: Path, *, leave: int) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)) == 2**16:
                pass
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


KINDS = {
    "full": Kind("full disk", full, share=30, per_case=4, lacking=no_mounts),
    "limited": Kind("files that must not grow (quota)", limited, share=20, per_case=4),
    "read_only": Kind("read-only run folder and run store", read_only, share=20, per_case=2, lacking=no_mounts),
}
