"""Write .env from .env.example: random values for secrets that have none, everything that is there already left alone.

Usage: python write_env.py EXAMPLE ENV. Needs nothing but Python.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

LINE = re.compile(r"(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)")
SECRET = re.compile(r".*_(PASSWORD|KEY)")


def values(text: str) -> dict[str, str]:
    """Return the NAME=VALUE lines of an environment file, values as they stand."""
    found = (LINE.fullmatch(line.strip()) for line in text.splitlines())
    return {match["name"]: match["value"] for match in found if match}


def complete(example: str, *, present: str) -> tuple[str, list[str]]:
    """Return the environment file with what it lacks, and the names of the secrets that were drawn.

    Args:
        example: text of `.env.example`; a name that ends in _PASSWORD or _KEY is a secret, which has 32 random bytes when drawn.
        present: text of `.env`, empty when there is none. Its lines stay as they are, empty secrets apart.
    """
    drawn: list[str] = []

    def filled(line: str) -> str:
        match = LINE.fullmatch(line.strip())
        if match is None or match["value"] or not SECRET.fullmatch(match["name"]):
            return line
        drawn.append(match["name"])
        return f"{match['name']}={secrets.token_urlsafe(32)}"

    if not present.strip():
        return "".join(f"{filled(line)}\n" for line in example.splitlines()), drawn
    known = values(present)
    missing = [f"{name}={value}" for name, value in values(example).items() if name not in known]
    return "".join(f"{filled(line)}\n" for line in [*present.splitlines(), *missing]), drawn


def main(example: Path, env: Path) -> None:
    """Complete the file, which only its owner may read, and say what was drawn."""
    present = env.read_text(encoding="utf-8") if env.exists() else ""
    text, drawn = complete(example.read_text(encoding="utf-8"), present=present)
    beside = env.with_name(f"{env.name}.new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    beside.chmod(0o600)  # also where an older file of that name was more open
    beside.replace(env)
    print(f"{env}: " + (f"new values for {', '.join(drawn)}" if drawn else "nothing was missing"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
