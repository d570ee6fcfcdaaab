"""Where drawn images are written: a new folder, which is there when all of them are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.replacing import folder_written


@contextmanager
def drawn_into(place: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `place` when the block succeeds; an error or Ctrl-C leaves nothing of it.

    Raises:
        UserError: there is something already, or the disk refuses.
    """
    try:
        if place.exists():
            raise UserError(f"{place} is there already: remove it, or name another folder.")
        with folder_written(place) as folder:
            yield folder
    except OSError as error:
        raise UserError(f"Cannot draw into {place} ({error.strerror}): name another folder.") from None
