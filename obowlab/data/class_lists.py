"""Lists of classes that few-shot episodes draw from: all, a file's, or a key of `lowshot_classes.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obowlab.config import canonical_hash, nearest
from obowlab.errors import UserError

LOWSHOT_FILE = "lowshot_classes.json"
"""Named lists of class indices, beside a prepared data set: `DATA_ROOT/DATASET/lowshot_classes.json`."""


@dataclass(frozen=True)
class ClassList:
    """The classes that episodes draw from.

    Attributes:
        name: as the recipe names it.
        indices: positions among the sorted class names, in the order of the list (the authors' sampler depends on it).
        names_hash: SHA-256 of the class names in that order.
    """

    name: str
    indices: tuple[int, ...]
    names_hash: str


def class_list(spec: str, *, class_names: Sequence[str], folder: Path) -> ClassList:
    """Find the classes that a recipe's `evaluation.fewshot.classes` stands for.

    Args:
        spec: `all`; or the path of a .txt (one name per line) or .json (list of names) file; or a key of
            `lowshot_classes.json`, whose numbers are used as indices of the sorted class names, as the authors' code does
            (their file numbers another order, so most are not the benchmark's intended classes).
        class_names: all classes of the data set, sorted.
        folder: the prepared data set, `DATA_ROOT/DATASET`.

    Raises:
        UserError: the list is absent, unreadable or names classes that the data set does not have, or one twice.
    """
    if spec == "all":
        indices = list(range(len(class_names)))
    elif Path(spec).suffix in (".txt", ".json"):
        indices = _indices_of_names(_read_names(Path(spec)), class_names=class_names, origin=spec)
    else:
        indices = _indices_of_key(spec, num_classes=len(class_names), file=folder / LOWSHOT_FILE)
    if len(set(indices)) != len(indices):
        raise UserError(f"evaluation.fewshot.classes = '{spec}' lists a class twice.")
    return ClassList(name=spec, indices=tuple(indices), names_hash=canonical_hash([class_names[index] for index in indices]))


def _read_names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read the class list {path} (evaluation.fewshot.classes): {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"The class list {path} (evaluation.fewshot.classes) cannot be read: {error}.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"The class list {path} (evaluation.fewshot.classes) must be one JSON list of class names.")
    return names


def _indices_of_names(names: Sequence[str], *, class_names: Sequence[str], origin: str) -> list[int]:
    positions = {name: index for index, name in enumerate(class_names)}
    for name in names:
        if name not in positions:
            raise UserError(
                f"The class list {origin} (evaluation.fewshot.classes) names '{name}', which the data set does not have."
            )
    return [positions[name] for name in names]


def _indices_of_key(key: str, *, num_classes: int, file: Path) -> list[int]:
    if not file.is_file():
        raise UserError(f"evaluation.fewshot.classes = '{key}' needs {file}; put it there, use 'all' or name a .txt file.")
    try:
        lists: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None
    known = [name for name in lists if _is_indices(lists[name])] if isinstance(lists, dict) else []
    if key not in known:
        raise UserError(f"{file} has no list of class indices '{key}' (evaluation.fewshot.classes).{nearest(key, known)}")
    indices: list[int] = lists[key]
    outside = [index for index in indices if not 0 <= index < num_classes]
    if outside:
        raise UserError(f"'{key}' of {file} names class {outside[0]}, but the data set has {num_classes} classes.")
    return indices


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)
