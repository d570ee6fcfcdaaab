"""Which split a folder, a shard or a word is named after: `Train`, `val2017`, `train-00000-of-00004`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from obowlab.errors import UserError

SPLITS = ("train", "val")
_SPLIT_WORD = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|eval(?:uation)?)|(?P<test>test(?:ing)?))(?:[-_]?set)?",
    re.IGNORECASE,
)


class Reading(NamedTuple):
    """A split that a folder may be named after, and what stands around the word, in lower case."""

    kind: str
    before: str
    after: str

    @property
    def is_word(self) -> bool:
        """Whether the word stands alone, not within another one as in `constraints`."""
        return not (self.before[-1:].isalpha() or self.after[:1].isalpha())


def readings_of(name: str) -> list[Reading]:
    """Return every split that a folder may be named after."""
    return [
        Reading(str(found.lastgroup), name[: found.start()].lower(), name[found.end() :].lower())
        for found in _SPLIT_WORD.finditer(name)
    ]


def preferred(names: Sequence[str]) -> Sequence[str]:
    """Return the one of several names that is a split's own, if there is one."""
    return [name for name in names if name in SPLITS] or names


def is_bare_split(name: str) -> bool:
    """Return whether a folder is named after a split and nothing else, but for digits and signs."""
    return any(not any(map(str.isalpha, reading.before + reading.after)) for reading in readings_of(name))


def splits_of_words(path: Path, words: Sequence[str]) -> dict[str, str]:
    """Return which of the words that name splits are train and val; `test` is val only where nothing else is.

    Raises:
        UserError: none is train, or several are.
    """
    kinds: dict[str, list[str]] = {}
    for word in words:
        if is_bare_split(word):
            kinds.setdefault(readings_of(word)[0].kind, []).append(word)
    train, val = preferred(kinds.get("train", [])), preferred(kinds.get("val") or kinds.get("test") or [])
    if len(train) != 1 or len(val) > 1:
        raise UserError(
            f"--source {path} has the splits {', '.join(map(repr, words[:6]))}, and it is not clear which is train and which is "
            "val: name them 'train' and 'val'."
        )
    return {train[0]: "train"} | ({val[0]: "val"} if val else {})


def splits_of_shards(files: Sequence[Path], *, below: Path) -> list[str | None]:
    """Return the split that each shard's name or folder tells, as `data/train-00000-of-00004.parquet` does.

    Where none tells one, all are None; where some do, the others bear their own names, which are no split's.

    Args:
        files: the shards.
        below: the folder that `--source` names; folders above it do not count.
    """
    found: list[str | None] = []
    for file in files:
        kinds = [reading.kind for reading in readings_of(file.stem) if reading.is_word]
        folders = file.relative_to(below).parts[:-1]
        kinds += [readings_of(folder)[0].kind for folder in reversed(folders) if is_bare_split(folder)]
        found.append(kinds[0] if kinds else None)
    return [split or (file.stem if any(found) else None) for split, file in zip(found, files, strict=True)]
