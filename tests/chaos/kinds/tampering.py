"""Files that are torn or changed behind the program's back: records of a run, checkpoints, images, recipes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from obowlab.data.beton import read_index
from obowlab.data.manifest import read_manifest, write_manifest
from obowlab.runs.folder import RunFolder
from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, sentence, settle, valuables
from tests.chaos.ledger import Case, Kind

SHAPES = (b"[]\n", b"null\n", b'{"step": "x", "metrics": 3}\n', b'{"stores": 7, "steps": []}\n', b'"text"\n', b"1e999\n")
HALFWAY = ("metrics.jsonl", "metrics.jsonl", "online.jsonl", "attempts.jsonl", "run.json", "state.json", "mirror.json")
RECORDS = (
    "run.json",
    "state.json",
    "machine.json",
    "mirror.json",
    "labels.json",
    "metrics.jsonl",
    "online.jsonl",
    "attempts.jsonl",
    "results",
    "lock",
    "encoder.safetensors",
)
"""Files of a run that are tampered with; of a folder, any file in it."""


def truncated(content: bytes, dice: random.Random) -> bytes:
    """Cut a file anywhere, as a full disk or a power cut does."""
    return content[: dice.randrange(len(content))] if content else b"x"


def flipped(content: bytes, dice: random.Random) -> bytes:
    """Change one bit."""
    changed = bytearray(content or b"x")
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def appended(content: bytes, dice: random.Random) -> bytes:
    """Add garbage at the end."""
    return content + dice.randbytes(dice.randint(1, 400))


def zeroed(content: bytes, dice: random.Random) -> bytes:
    """Put zeros where data were, as file systems do after a power cut."""
    start = dice.randrange(max(1, len(content)))
    length = dice.randint(1, 600)
    return (content[:start] + bytes(length) + content[start + length :])[: max(1, len(content))]


def emptied(content: bytes, dice: random.Random) -> bytes:
    """Leave a file of no bytes."""
    return b"" if content else b"\0"


def reshaped(content: bytes, dice: random.Random) -> bytes:
    """Put valid JSON of another shape there."""
    return dice.choice(SHAPES)


def scrambled(content: bytes, dice: random.Random) -> bytes:
    """Put random bytes over a part of the file."""
    start = dice.randrange(max(1, len(content)))
    return content[:start] + dice.randbytes(min(64, len(content) - start) or 1) + content[start + 64 :]


HARMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncated, flipped, appended, zeroed, emptied, reshaped, scrambled,
)  # fmt: skip


def harm(case: Case, path: Path, *, harms: tuple[Callable[[bytes, random.Random], bytes], ...] = HARMS) -> bytes:
    """Tamper with a file and return what was in it."""
    before = path.read_bytes()
    kind = case.dice.choice(harms)
    after = kind(before, case.dice)
    while after == before:
        after = flipped(before, case.dice)
    path.write_bytes(after)
    case.fault(f"{path.name} {kind.__name__}, {len(before)} -> {len(after)} bytes")
    return before


# ------------------------------------------------------------------------------------------------------ a finished run


def records(case: Case) -> None:
    """Tamper with one file of a finished run, let a reader look, put the file back: nothing else may have changed."""
    folder = case.stage.copy("finished", case.place)
    folder.add_labels({"obowlab.table": "table3"})
    expected = case.stage.reference()
    for _ in range(case.num_faults):
        path = _choose(case, folder)
        before, whole = path.read_bytes(), valuables(folder.path)
        harm(case, path)
        words = case.dice.choice(_readers(case, folder))
        said = _look(case, words)
        if said:
            case.sentence(f"{' '.join(words[:2])}: {said}")
        else:
            case.notes.append(f"  {' '.join(words[:2])}: went on")
        path.write_bytes(before)
        changed = {name for name, digest in valuables(folder.path).items() if whole.get(name) != digest}
        if missing := (set(whole) - set(valuables(folder.path))) | (changed - {path.relative_to(folder.path).as_posix()}):
            raise BrokenError(f"`{' '.join(words[:2])}` changed {sorted(missing)} while {path.name} was damaged")
    ended_well(forks.obowlab(case.stage.words(case.place), place=case.place))
    settle(case, folder, expected=expected)


def _choose(case: Case, folder: RunFolder) -> Path:
    path = folder.path / case.dice.choice(RECORDS)
    return case.dice.choice(sorted(path.iterdir())) if path.is_dir() else path


def _readers(case: Case, folder: RunFolder) -> list[list[str]]:
    root = ["--runs-root", str(folder.path.parent)]
    data = ["--data-root", str(case.stage.data_root)]
    out = case.place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return [
        ["runs", "list", *root],
        ["runs", "list", "--json", *root],
        ["runs", "show", folder.run_id, *root],
        ["runs", "show", folder.run_id, "--json", *root],
        ["runs", "sync", *root],
        ["runs", "export", folder.run_id, "--out", str(out / "bundle.tar.gz"), *root],
        ["table", "table3", "--scale", "demo", *root],
        ["report", "--out", str(out / "report"), *root],
        ["eval", folder.run_id, "--protocol", "knn", "--dry-run", *data, *root],
        ["weights", "export", folder.run_id, "--format", "safetensors", "--out", str(out / "encoder.safetensors"), *root],
        ["words", folder.run_id, "--out", str(out / "words"), "--dry-run", *data, *root],
        case.stage.words(case.place),
    ]


def _look(case: Case, words: list[str]) -> str:
    """Run a command; return its sentence, or nothing when it succeeded."""
    child = forks.obowlab(words, place=case.place, name="reader")
    code = ended_well(child, codes=(0, 1, 2) if words[1] == "sync" else (0, 2))
    if code == 2:
        return sentence(child)
    return child.said().strip().splitlines()[-1] if code == 1 else ""


# ---------------------------------------------------------------------------------------------------- an unfinished run


def checkpoints(case: Case) -> None:
    """Tamper with the checkpoint of a half-trained run, or with the one before it, or with both."""
    folder = case.stage.copy("halfway", case.place)
    current, previous = folder.path / "checkpoint.pt", folder.path / "checkpoint.previous.pt"
    for number in range(case.num_faults):
        for path in case.dice.choice(((current,), (current,), (previous,), (current, previous))):
            if path.exists():
                harm(case, path, harms=(truncated, flipped, appended, zeroed, emptied, scrambled))
                break
        child = forks.train(folder.path, place=case.place)
        if number < case.num_faults - 1:
            time.sleep(0.3 + case.dice.random() * 0.5)
            child.send(case.dice.choice((signal.SIGTERM, signal.SIGKILL)))
            child.wait()
            if (folder.path / "encoder.safetensors").exists():  # it was faster: it has no further use for its checkpoint
                ended_well(forks.train(folder.path, place=case.place))
                settle(case, folder, expected=case.stage.reference())
                shutil.rmtree(folder.path.parent)
                folder = case.stage.copy("halfway", case.place)
                current, previous = folder.path / "checkpoint.pt", folder.path / "checkpoint.previous.pt"
        elif ended_well(child, codes=(0, 2)) == 2:
            raise BrokenError(f"the run does not go on: {child.said()[-300:]}")
    settle(case, folder, expected=case.stage.reference())


def logs(case: Case) -> None:
    """Tamper with the metric files and records of a half-trained run; a refusal must leave them, mended they go on."""
    folder = case.stage.copy("halfway", case.place)
    pristine = case.place / "pristine"
    shutil.copytree(folder.path, pristine)
    for number in range(case.num_faults):
        name = case.dice.choice(HALFWAY)
        path = folder.path / name
        harm(case, path)
        torn = path.read_bytes()
        if case.dice.random() < 0.4:
            words = ["runs", "sync", "--runs-root", str(folder.path.parent)]
            ended_well(forks.obowlab(words, place=case.place, name="sync"), codes=(0, 1, 2))
        child = forks.train(folder.path, place=case.place)
        code = ended_well(child, codes=(0, 2))
        if code == 2:
            case.sentence(sentence(child))
            if name.endswith(".jsonl") and path.read_bytes() != torn:
                raise BrokenError(f"{name} was refused, and changed")
            path.write_bytes((pristine / name).read_bytes())
            if number == case.num_faults - 1:
                break
            continue
        settle(case, folder, expected=case.stage.reference())
        if number < case.num_faults - 1:
            shutil.rmtree(folder.path.parent)
            folder = case.stage.copy("halfway", case.place)
    settle(case, folder, expected=case.stage.reference())


# -------------------------------------------------------------------------------------------------------------- images


def images(case: Case) -> None:
    """Tamper with data files and manifests: refused in a sentence; put back, the run goes on."""
    folder, data_root = _own_data(case)
    for _ in range(case.num_faults):
        path = data_root / "small" / case.dice.choice(("train.beton", "train.beton", "val.beton", "train.json", "val.json"))
        whole = valuables(folder.path)
        before = harm(case, path)
        child = forks.obowlab([*case.stage.words(case.place, data_root=data_root)], place=case.place)
        case.sentence(sentence(child))
        if valuables(folder.path) != whole:
            raise BrokenError(f"the run changed although {path.name} was refused")
        path.write_bytes(before)
    ended_well(forks.obowlab(case.stage.words(case.place, data_root=data_root), place=case.place))
    settle(case, folder, expected=case.stage.reference())


def exchanged(case: Case) -> None:
    """Put another valid data set in the place of the run's, between its starts or under a start: refused, with both hashes."""
    folder, data_root = _own_data(case)
    small, other = data_root / "small", case.place / "exchange"
    shutil.copytree(case.stage.data_root / "other", other)
    for split in ("train", "val"):
        manifest = read_manifest(case.stage.data_root, "other", split)
        assert manifest is not None
        write_manifest(other / f"{split}.json", manifest.model_copy(update={"dataset": "small"}))
    for _ in range(case.num_faults):
        _swap(small, other)
        case.fault("another data set")
        child = forks.train(folder.path, place=case.place)
        said = sentence(child)
        if "hash" not in said:
            raise BrokenError(f"the sentence names no hash: {said}")
        case.sentence(said)
        _swap(small, other)
    settle(case, folder, expected=case.stage.reference())


def swapped(case: Case) -> None:
    """Put another data set in the place of the run's while it trains: nothing learnt from it may be kept."""
    folder, data_root = _own_data(case)
    path = data_root / "small" / "train.beton"
    before = path.read_bytes()
    for _ in range(case.num_faults):
        step = folder.state.step
        child = forks.train(folder.path, place=case.place)
        while child.poll() is None and folder.state.step <= step:
            pass
        changed = bytearray(before)
        start = int(read_index(path).pointers[0])
        for place in range(start, len(before) - 4000, 300):
            changed[place] ^= 0xFF
        if case.dice.random() < 0.5:  # in place, or as a new file
            path.write_bytes(changed)
        else:
            beside = path.with_suffix(".new")
            beside.write_bytes(changed)
            beside.replace(path)
        if child.poll() is None:
            case.fault("images changed under the run")
        code = ended_well(child, codes=(0, 2, -signal.SIGBUS))  # a mapped file that gets shorter kills
        if code == 2:
            case.sentence(sentence(child))
        path.write_bytes(before)
        if code == 0:
            break
    settle(case, folder, expected=case.stage.reference())


def _own_data(case: Case) -> tuple[RunFolder, Path]:
    data_root = case.place / "data"
    shutil.copytree(case.stage.data_root / "small", data_root / "small")
    folder = case.stage.copy("halfway", case.place)
    folder.write_machine(case.stage.machine(folder.path.parent, data_root=data_root))
    return folder, data_root


def _swap(one: Path, other: Path) -> None:
    beside = one.with_name("beside")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


# -------------------------------------------------------------------------------------------------------------- recipes


def recipes(case: Case) -> None:
    """Tamper with the recipe and the machine file: another valid recipe is another run, anything else a sentence."""
    folder = case.stage.copy("halfway", case.place)
    recipe = case.place / "small.toml"
    shutil.copyfile(case.stage.recipe, recipe)
    words = case.stage.words(case.place)
    words[1] = str(recipe)
    machine = case.place / "machine.toml"
    for _ in range(case.num_faults):
        path = case.dice.choice((recipe, recipe, machine))
        whole = valuables(folder.path)
        before = harm(case, path, harms=(truncated, flipped, appended, zeroed, scrambled))
        child = forks.obowlab([*words, "--dry-run"], place=case.place)
        if ended_well(child, codes=(0, 2)) == 2:
            case.sentence(sentence(child))
        path.write_bytes(before)
        if valuables(folder.path) != whole:
            raise BrokenError("the run changed")
    ended_well(forks.obowlab(words, place=case.place))
    settle(case, folder, expected=case.stage.reference())


KINDS = {
    "records": Kind("torn or tampered files of a finished run", records, share=200, per_case=20),
    "checkpoints": Kind("torn or tampered checkpoints", checkpoints, share=60, per_case=4),
    "logs": Kind("torn or tampered metric files of a half-trained run", logs, share=50, per_case=4),
    "images": Kind("torn or tampered data files", images, share=50, per_case=8),
    "exchanged": Kind("another data set in the place of the run's", exchanged, share=15, per_case=3),
    "swapped": Kind("data file changed while it is trained on", swapped, share=10, per_case=2),
    "recipes": Kind("torn or tampered recipe and machine files", recipes, share=60, per_case=12),
}
