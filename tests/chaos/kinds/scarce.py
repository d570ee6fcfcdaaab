"""What runs out or fails in a process or on a disk: memory, open files, inodes, and single calls that make files last."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from obowlab.runs.folder import RunFolder
from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, equal, sentence, settle, unmeasured, valuables
from tests.chaos.kinds.disks import mounted, no_mounts
from tests.chaos.ledger import Case, Kind
from tests.chaos.stage import TOTAL_STEPS

CALLS = ("fsync", "rename", "replace")
"""Functions of `os` that make a file last."""


def memory(case: Case) -> None:
    """Let a training process have only some more memory than it begins with."""
    folder, missed = case.stage.copy("halfway", case.place), set[int]()
    for _ in range(case.num_faults):
        more = int(2 ** case.dice.uniform(16, 26))
        folder = _starve(
            case, folder, partial(_limit_memory, more), note=f"{more // 1024} KiB more than at the start", missed=missed
        )
    settle(case, folder, expected=case.stage.reference(), missed=missed)


def _limit_memory(more: int) -> None:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    limit = int(fields["VmSize"].split()[0]) * 1024 + more  # of which the heap may have some left
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def descriptors(case: Case) -> None:
    """Let a training process open only a few files more than it begins with."""
    folder, missed = case.stage.copy("halfway", case.place), set[int]()
    for _ in range(case.num_faults):
        more = case.dice.randint(1, 16)
        note = f"{more} files more than at the start"
        folder = _starve(case, folder, partial(_limit_files, more), note=note, missed=missed)
    settle(case, folder, expected=case.stage.reference(), missed=missed)


def _limit_files(more: int) -> None:
    taken, free, limit = {int(path.name) for path in Path("/proc/self/fd").iterdir()}, 0, 0
    while free < more:
        free += limit not in taken
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _starve(case: Case, folder: RunFolder, first: Callable[[], None], *, note: str, missed: set[int]) -> RunFolder:
    """Train under a limit: to the end, or to a sentence and a state that says the same; return the run to go on with.

    A measurement during training that cannot be made is left out with a warning, by design; nothing else may differ.

    Args:
        case: whose fault this is.
        folder: the run, as earlier faults have left it.
        first: sets the limit, in the training process.
        note: the limit in words.
        missed: epochs that could not be measured, of this run; changed.
    """
    whole = valuables(folder.path)
    child = forks.train(folder.path, place=case.place, first=first)
    case.fault(note)
    if ended_well(child, codes=(0, 2)) == 2:
        case.sentence(sentence(child))
        if folder.current_state().status in ("running", "finished"):
            raise BrokenError(f"the run was refused, and its state is {folder.current_state().status}")
    _nothing_gone(folder, whole)
    missed |= unmeasured(child)
    if child.code == 2:
        return folder
    equal(folder, case.stage.reference(), missed=missed)
    missed.clear()
    shutil.rmtree(folder.path.parent)
    return case.stage.copy("halfway", case.place)


def _nothing_gone(folder: RunFolder, whole: dict[str, str]) -> None:
    """Refuse files that went away; `checkpoint.pt` may, when it has just got the name of the one before it."""
    if gone := {name for name in whole if not (folder.path / name).exists()} - {"checkpoint.pt"}:
        raise BrokenError(f"{gone} went away")


def inodes(case: Case) -> None:
    """Take the last inodes of the disk of the run store at a random moment: as with bytes, a sentence, and later it goes on."""
    disk = case.place / "disk"
    with mounted(disk, options="nr_inodes=400"):
        folder, missed = case.stage.copy("halfway", disk), set[int]()
        for number in range(case.num_faults):
            child = forks.train(folder.path, place=case.place)
            wanted = min(TOTAL_STEPS - 2, 22 + (number * 18) // case.num_faults + case.dice.randint(0, 2))
            while child.poll() is None and folder.state.step < wanted:
                pass
            files = _take_inodes(disk / "ballast", leave=case.dice.choice((0, 0, 1, 2)))
            if child.poll() is None:
                case.fault(f"no inodes from step {folder.state.step} on")
            if ended_well(child, codes=(0, 2)) == 2:
                case.sentence(sentence(child))
            for path in files:
                path.unlink()
            missed |= unmeasured(child)
        settle(case, folder, expected=case.stage.reference(), missed=missed)


def _take_inodes(place: Path, *, leave: int) -> list[Path]:
    files: list[Path] = []
    try:
        place.mkdir(exist_ok=True)
        while True:
            (place / f"{len(files)}").touch(exist_ok=False)
            files.append(place / f"{len(files)}")
    except OSError:
        pass
    for path in files[len(files) - leave :]:
        path.unlink()
    return files[: len(files) - leave]


def refused(case: Case) -> None:
    """Let one fsync or rename of a process that trains or sends fail, or all from one on, with ENOSPC or EIO."""
    folder = case.stage.copy("halfway", case.place)
    root = folder.path.parent
    for _ in range(case.num_faults):
        number, lasting = int(2 ** case.dice.uniform(0, 7)), case.dice.random() < 0.5
        code, hit = case.dice.choice((errno.ENOSPC, errno.EIO)), case.place / "hit"
        hit.unlink(missing_ok=True)
        break_calls = partial(_break_calls, number=number, lasting=lasting, code=code, hit=hit)
        is_training = case.dice.random() < 0.75
        whole = valuables(folder.path)
        if is_training:
            child = forks.train(folder.path, place=case.place, first=break_calls)
        else:
            sync = ["runs", "sync", "--runs-root", str(root)]
            child = forks.fork(lambda words=sync, first=break_calls: first() or forks.main(words), place=case.place, name="sync")  # type: ignore[misc]
        ended = ended_well(child, codes=(0, 2) if is_training else (0, 1, 2))
        if hit.exists():
            case.fault(f"{os.strerror(code)}, {hit.read_text()} {number}{' and later' * lasting}")
            if ended == 2:
                case.sentence(sentence(child))
        _nothing_gone(folder, whole)
        if ended == 0 and is_training:
            break
    settle(case, folder, expected=case.stage.reference())


def _break_calls(*, number: int, lasting: bool, code: int, hit: Path) -> None:
    """Replace the calls: the one of this number, counted over all of them, fails."""
    count = 0

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number or (lasting and count > number):
                if not hit.exists():
                    hit.write_text(name)
                named = [os.fspath(one) for one in arguments if isinstance(one, str | os.PathLike)]
                raise OSError(code, os.strerror(code), *named[:1])
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, breaking(name, getattr(os, name)))


KINDS = {
    "memory": Kind("memory that runs out", memory, share=20, per_case=4),
    "descriptors": Kind("too few open files", descriptors, share=20, per_case=4),
    "inodes": Kind("disk without inodes", inodes, share=15, per_case=4, lacking=no_mounts),
    "refused": Kind("fsync and rename that fail", refused, share=40, per_case=6),
}
