"""The gallery of a run's visual words: one page made of its facts, that needs no server and nothing but the sheets beside it."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from obowlab.errors import UserError
from obowlab.pages import environment, templates

TEMPLATE = "words.html"
SCRIPT = "words.js"
FACTS = "words.json"
LARGEST = 256 * 2**20
"""No file of a gallery is larger, in bytes: the facts of 8192 words with eight patches each take 12 MB, a sheet far less."""

PICTURES = {".jpg": b"\xff\xd8\xff", ".png": b"\x89PNG\r\n\x1a\n", ".webp": b"RIFF"}
"""What sheets may end in, and how such files begin."""


# ------------------------------------------------------------------------------------------------ what others have written


class _Given(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class _Word(_Given):
    number: int
    use: float
    coherence: float | None
    score: float
    age: int
    places: int
    sheet: int = Field(ge=0)
    row: int = Field(ge=0)


class _Level(_Given):
    num_words: int
    used: int
    delta: float
    distance: float
    patch_side: int
    coherence: float | None
    coherence_of_others: float | None
    words_per_sheet: int = Field(ge=1)
    sheets: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}\.(jpg|png|webp)$")]]
    words: list[_Word]


class _View(_Given):
    size: int


class _Facts(_Given):
    format: Literal[1]
    run_id: str
    title: str
    version: str
    step: int
    network: str
    dataset: str
    split: str
    num_images: int
    view: _View
    patches_per_word: int = Field(ge=1)
    levels: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,40}$")], _Level] = Field(min_length=1)


def read_words(folder: Path) -> dict[str, Any]:
    """Return what a page needs of the `words.json` of a gallery, every value of the kind that it has to be.

    Args:
        folder: of the gallery; whoever may write to the run store may have written it.

    Raises:
        OSError: there is none, or it cannot be read.
        UserError: it is not what `obowlab words` writes.
    """
    try:
        facts = _Facts.model_validate_json(read_plain(folder / FACTS))
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        raise UserError(f"{folder / FACTS} is not what `obowlab words` of this version writes ({place or 'no JSON'}).") from None
    for name, level in facts.levels.items():
        if any(word.sheet >= len(level.sheets) for word in level.words):
            raise UserError(f"{folder / FACTS} is not what `obowlab words` of this version writes (levels.{name}.sheets).")
    return facts.model_dump()


def read_sheet(path: Path) -> bytes:
    """Return a picture of a gallery.

    Raises:
        OSError: there is none, or it cannot be read.
        UserError: it is no picture, whatever its name says.
    """
    content = read_plain(path)
    if not content.startswith(PICTURES[path.suffix]):
        raise UserError(f"{path} is not a picture of the kind that its name says.")
    return content


def read_plain(path: Path) -> bytes:
    """Return the content of a regular file of at most `LARGEST` bytes.

    Raises:
        OSError: there is none, it cannot be read, or it is a link.
        UserError: it is no file, or it is too large.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
            raise UserError(f"{path} is no file, or larger than {LARGEST // 2**20} MiB.")
        return file.read(LARGEST)


# --------------------------------------------------------------------------------------------------------------- the page


def render_words(facts: Mapping[str, Any], *, script: str | None = None) -> str:
    """Return `index.html` for the facts of `words.json` (`evaluation.words.gallery.show_words`).

    The page carries its numbers along, as a browser gives a page that was opened from a file no other file to read. It runs
    its own script and no other.

    Args:
        facts: of the gallery.
        script: address of `words.js` as seen from the page; None puts the script into the page.
    """
    from markupsafe import Markup

    template = environment(templates()).get_template(TEMPLATE)
    levels = {name: _shown(level) for name, level in facts["levels"].items()}
    program = (templates() / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    return template.render(
        facts=facts,
        levels=levels,
        data={"levels": levels, "columns": facts["patches_per_word"], "view": facts["view"]["size"]},
        script=Markup(program),
        script_address=script,
        script_source="'self' file:" if script else f"'sha256-{digest}'",
    )


def _shown(level: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page needs of a level: a short row per word, numbers to the digits that are shown."""
    words = [
        (
            word["number"],
            float(f"{word['use']:.4g}"),
            None if word["coherence"] is None else round(word["coherence"], 4),
            float(f"{word['score']:.4g}"),
            word["age"],
            word["places"],
            word["sheet"],
            word["row"],
        )
        for word in level["words"]
    ]
    kept = ("num_words", "used", "delta", "distance", "patch_side", "coherence", "coherence_of_others", "words_per_sheet")
    return {**{key: level[key] for key in (*kept, "sheets")}, "words": words}
