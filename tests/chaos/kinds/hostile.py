"""Files made to do harm: pickles that run code, archives that leave their folder, names that are paths or HTML."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from obowlab.data.beton import read_index
from obowlab.files.records import with_checksum
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import RunInfo
from tests.chaos import forks
from tests.chaos.judge import BrokenError, ended_well, sentence, settle, valuables
from tests.chaos.ledger import Case, Kind
from tests.conftest import draw_photo

SCRIPT = "<script>alert('chaos')</script>"
IMAGE = "<img src=x onerror=alert('chaos')>"
NAMES = ("../escape", "../../etc/passwd", "/etc/passwd", "..", SCRIPT, IMAGE, "a\x1b[2Jb", "a b", "-rf", "a/b")


class Bomb:
    """Runs a command when it is unpickled: makes a file, which must not be there afterwards."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def bomb_bytes(marker: Path, *, form: int) -> bytes:
    """Return a torch file that runs code in a reader which unpickles: bare, as a torch archive, inside a state dict."""
    if form == 0:
        return pickle.dumps(Bomb(marker))
    if form == 1:
        buffer = io.BytesIO()
        torch.save({"network": {"conv1.weight": torch.zeros(1)}, "extra": Bomb(marker)}, buffer)
        return buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Bomb(marker)}))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def pickles(case: Case) -> None:
    """Put pickles that run code where checkpoints and weights are read."""
    marker = case.place / "exploded"
    folder = case.stage.copy("halfway", case.place)
    root = ["--runs-root", str(folder.path.parent)]
    for number in range(case.num_faults):
        content = bomb_bytes(marker, form=(number + case.seed) % 3)
        where = ("checkpoint", "import", "eval", "words")[case.dice.randrange(4)]
        file = case.place / f"weights-{number}.pth"
        file.write_bytes(content)
        if where in ("checkpoint", "words"):
            for name in ("checkpoint.pt", "checkpoint.previous.pt")[: 1 + (where == "words")]:
                (folder.path / name).write_bytes(content)
        case.fault(f"a bomb of form {(number + case.seed) % 3} for {where}")
        if where == "checkpoint":
            ended_well(forks.train(folder.path, place=case.place))
            settle(case, folder, expected=case.stage.reference())
        else:
            words = {
                "import": ["weights", "import", str(file), "--out", str(case.place / "out.safetensors")],
                "eval": ["eval", str(file), "--dataset", "small", "--data-root", str(case.stage.data_root), *root],
                "words": ["words", folder.run_id, "--data-root", str(case.stage.data_root), *root],
            }[where]
            case.sentence(sentence(forks.obowlab(words, place=case.place)))
        if marker.exists():
            raise BrokenError(f"the code in the file was run ({where})")
        if where in ("checkpoint", "words"):
            shutil.rmtree(folder.path.parent)
            folder = case.stage.copy("halfway", case.place)


def archives(case: Case) -> None:
    """Prepare data from archives with members that leave their folder, link out of it or are devices."""
    for number in range(case.num_faults):
        source = case.place / f"source-{number}.tar"
        outside = case.place / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        secret = outside / "secret.jpg"
        draw_photo(1, height=40, width=40).save(secret)
        before = secret.read_bytes()
        member = _hostile_member(case, outside)
        with tarfile.open(source, "w") as archive:
            for split in ("train", "val"):
                for label in range(2):
                    _add_photo(archive, f"{split}/class_{label}/a.jpg", seed=label + 2)
            if member.isreg():
                photo = _jpeg(9)
                member.size = len(photo)
                archive.addfile(member, io.BytesIO(photo))
            else:
                archive.addfile(member)
        case.fault(f"{member.name} ({member.type!r} {member.linkname})")
        data_root = case.place / f"data-{number}"
        words = ["data", "prepare", "mine", "--source", str(source), "--data-root", str(data_root)]
        child = forks.obowlab(words, place=case.place / "work")
        if ended_well(child, codes=(0, 2)) == 2:
            case.sentence(sentence(child))
        else:
            index = read_index(data_root / "mine" / "train.beton")
            if member.issym() or member.islnk():
                content = (data_root / "mine" / "train.beton").read_bytes()
                if before in content:
                    raise BrokenError("a file outside of the archive became an image")
            case.notes.append(f"  prepared {len(index.labels)} images")
        strangers = {path for path in case.place.iterdir() if path.name not in _known(case, number)}
        if secret.read_bytes() != before or len(list(outside.iterdir())) != 1 or strangers:
            raise BrokenError(f"the archive wrote outside of the data set: {strangers}")


def names(case: Case) -> None:
    """Use names that are paths or HTML: for recipes, data sets, runs, titles, labels, classes."""
    folder = case.stage.copy("finished", case.place)
    root = ["--runs-root", str(folder.path.parent), "--data-root", str(case.stage.data_root)]
    whole = valuables(folder.path)
    for _ in range(case.num_faults):
        name = case.dice.choice(NAMES)
        attack = case.dice.choice(("recipe", "dataset", "run", "study", "prepare", "page", "page"))
        case.fault(f"{attack} {name!r}")
        if attack == "page":
            _write_pages(case, folder, name=case.dice.choice((SCRIPT, IMAGE, f'"{IMAGE}', f"'{SCRIPT}")))
            continue
        words = {
            "recipe": ["run", str(_recipe(case, name)), "--dry-run", *root],
            "dataset": ["run", str(case.stage.recipe), "--set", f"data.dataset={name}", *root],
            "run": ["runs", "show", "--runs-root", str(folder.path.parent), "--", name],
            "study": ["tune", "--show", *root[:2], "--", name],
            "prepare": ["data", "prepare", "--source", str(case.stage.root / "images" / "small"), *root[2:], "--", name],
        }[attack]
        case.sentence(sentence(forks.obowlab(words, place=case.place / "work")))
    if valuables(folder.path) != whole or (case.place / "escape").exists() or (case.place.parent / "escape").exists():
        raise BrokenError("a name was taken for a path")


def _write_pages(case: Case, folder: RunFolder, *, name: str) -> None:
    """Let a title, a label and a class be HTML, and look for live HTML in every page of a report."""
    place = case.place / "pages"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder.path.parent, place / "runs", ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    run = RunFolder.open(place / "runs" / folder.run_id)
    values = {**run.info.recipe_values, "title": name}
    sources = {**run.info.sources, "title": name}
    hostile = RunInfo.model_validate({**run.info.model_dump(by_alias=True), "recipe": values, "sources": sources})
    (run.path / "run.json").write_text(with_checksum(hostile.model_dump_json(by_alias=True)))
    run.add_labels({"obowlab.table": name, "obowlab.row": name})
    run.append_attempt({"commit": name, "host": name, "device": name, "versions": {name: name}})
    run.set_state(message=name)
    ended_well(forks.obowlab(["report", "--out", str(place / "out"), "--runs-root", str(place / "runs")], place=place))
    for page in (place / "out").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if SCRIPT in text or IMAGE in text:
            raise BrokenError(f"{page.name} holds live HTML from a name")


# --------------------------------------------------------------------------------------------------------------- helpers


def _hostile_member(case: Case, outside: Path) -> tarfile.TarInfo:
    inside = "train/class_0/evil.jpg"
    name, kind, link = case.dice.choice(
        (
            ("../outside/evil.jpg", tarfile.REGTYPE, ""),
            ("train/../../outside/evil.jpg", tarfile.REGTYPE, ""),
            (f"{outside}/evil.jpg", tarfile.REGTYPE, ""),
            ("train/class_0/../../../../evil.jpg", tarfile.REGTYPE, ""),
            ("train/../val/class_0/b.jpg", tarfile.REGTYPE, ""),
            (inside, tarfile.SYMTYPE, str(outside / "secret.jpg")),
            (inside, tarfile.SYMTYPE, "../../../outside/secret.jpg"),
            (inside, tarfile.LNKTYPE, str(outside / "secret.jpg")),
            (inside, tarfile.CHRTYPE, ""),
            (inside, tarfile.FIFOTYPE, ""),
            ("train/class_0", tarfile.SYMTYPE, str(outside)),
            (f"train/{SCRIPT.replace('/', '')}/c.jpg", tarfile.REGTYPE, ""),
            ("train/class\x1b[2J/c.jpg", tarfile.REGTYPE, ""),
        )
    )
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    if kind == tarfile.CHRTYPE:
        member.devmajor, member.devminor = 1, 5
    return member


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_photo(seed, height=40, width=40).save(buffer, "JPEG")
    return buffer.getvalue()


def _add_photo(archive: tarfile.TarFile, name: str, *, seed: int) -> None:
    content = _jpeg(seed)
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _known(case: Case, number: int) -> Iterator[str]:
    yield from ("outside", "work")
    for earlier in range(number + 1):
        yield from (f"source-{earlier}.tar", f"data-{earlier}")


def _recipe(case: Case, name: str) -> Path:
    """Write a recipe file whose own name, or whose `extends`, is hostile."""
    place = case.place / "work"
    place.mkdir(exist_ok=True)
    if "/" in name or name == "..":
        path = place / "hostile.toml"
        path.write_text(f'extends = "{name}"\n')
    else:
        path = place / f"{name}.toml"
        path.write_text('extends = "demo"\n')
    return path


KINDS = {
    "pickles": Kind("checkpoints and weights that run code when unpickled", pickles, share=30, per_case=6),
    "archives": Kind("archive members that leave their folder", archives, share=40, per_case=10),
    "names": Kind("names that are paths or HTML", names, share=50, per_case=12),
}
