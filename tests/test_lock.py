""".ci/locks/ names every package of every part with its hashes, and nothing of the machine that wrote it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = sorted((ROOT / ".ci" / "locks").glob("*.txt"))
PARTS = {
    "": ("torch", "demo"),
    "ffcv": ("torch", "demo", "ffcv"),
    "postgresql": ("torch", "demo", "train"),
    "coco": ("torch", "demo", "train", "test"),
    "onnx": ("torch", "demo", "train", "test"),
    "services": ("torch", "demo", "train", "test"),
    "test": ("torch", "demo", "train", "test"),
    "dev": ("torch", "demo", "train", "test", "dev"),
}
"""Extra -> the files that are installed for it."""
ENTRY = re.compile(r"([a-z0-9][a-z0-9-]*)==(\S+)(?: ; ([^\\\n]+))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def _entries(text: str) -> dict[str, str]:
    """Return the version of every package in a lock file."""
    return {found[1]: found[2] for found in ENTRY.finditer(text)}


LOCKED = {path.stem: _entries(path.read_text(encoding="utf-8")) for path in FILES}


def _needed(wanted: Iterable[Requirement], extras: frozenset[str]) -> Iterable[Requirement]:
    return (each for each in wanted if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_packages_with_hashes_and_nothing_else(path: Path) -> None:
    comment, text = path.read_text(encoding="utf-8").split("\n", 1)
    assert re.fullmatch(r"# .*Written by `make lock`\.", comment)
    assert ENTRY.sub("", text) == ""
    assert _entries(text)


def test_the_files_agree_with_each_other_and_with_the_direct_pins() -> None:
    versions: dict[str, str] = {}
    for file, entries in LOCKED.items():
        for name, version in entries.items():
            assert versions.setdefault(name, version) == version, f"{name} in {file}"
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert {name: versions.get(name) for name, _ in pins} == dict(pins)


@pytest.mark.parametrize("extra", PARTS)
def test_it_has_what_an_extra_asks_for_and_whatever_that_needs(extra: str) -> None:
    """The indirect ones are followed through the packages that are installed here."""
    assert set(PARTS) == {"", *PROJECT["optional-dependencies"]}
    held = {name: version for part in PARTS[extra] for name, version in LOCKED[part].items()}
    todo = [Requirement(each) for each in PROJECT["optional-dependencies"].get(extra, PROJECT["dependencies"])]
    seen = set()
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras) or frozenset({""})
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name == "obowlab":
            todo += [Requirement(each) for inner in extras for each in PROJECT["optional-dependencies"].get(inner, ())]
            continue
        if wanted.marker is None or wanted.marker.evaluate():
            assert name in held, f"{name} is not locked: make lock"
            assert wanted.specifier.contains(held[name], prereleases=True), f"{wanted}, but {held[name]} is locked: make lock"
        try:
            todo += _needed(map(Requirement, requires(name) or ()), extras | {""})
        except PackageNotFoundError:
            continue  # not a package for this machine
