"""JSON that tells whether it is whole: its last entry, `crc`, is the CRC-32 of every byte before that entry.

A torn file is no JSON any more, but a bit that flips inside a number still is. The seal tells both apart from what was
written; it protects against accidents of disks and editors, not against somebody who computes it anew. JSON without a seal,
which earlier versions wrote, is taken as it is.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

KEY = "crc"
_SEAL = re.compile(rb',\s*"crc":\s*"([0-9a-f]{8})"\s*\}\s*$')
_LONGEST = 48
"""No seal is longer, in bytes."""


def seal(text: str) -> str:
    """Return the text of a JSON object, with at least one entry, with its seal as last entry; indented if the text is."""
    body = text.rstrip()
    assert body.startswith("{")
    assert body.endswith("}")
    between = "\n " if body.endswith("\n}") else ""
    body = body[:-1].rstrip()
    return f'{body},{between}"{KEY}":"{zlib.crc32(body.encode()):08x}"{between.rstrip(" ")}}}'


def is_whole(content: bytes) -> bool:
    """Return whether the seal fits to the bytes; also without a seal."""
    found = _SEAL.search(content, max(0, len(content) - _LONGEST))
    return found is None or zlib.crc32(content[: found.start()]) == int(found[1], 16)


def unseal(content: bytes) -> dict[str, Any]:
    """Parse a JSON object and return it without its seal.

    Raises:
        ValueError: it is no JSON object, or its seal does not fit.
    """
    if not is_whole(content):
        raise ValueError("its checksum does not fit")
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no object but {type(value).__name__}")
    value.pop(KEY, None)
    return value


def read_sealed(path: Path) -> dict[str, Any]:
    """Parse a file that `seal` made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return unseal(path.read_bytes())
