"""The transcripts of docs/own-data.md, played on folders made on the fly: each command prints what the page says.

Numbers that differ by machine (times, sizes, hashes, results) are left out of the comparison, and so are lines of progress. The
page is written anew with OBOWLAB_WRITE_GOLDEN=1.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[1] / "docs/own-data.md"
TRANSCRIPT = re.compile(r"(?<=<!-- test: transcript -->\n```\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
HOME = "/home/me"
PROGRESS = re.compile(r"(step \d|linear: epoch|Warning: MLflow |.* left · )")
QUICK = ("obowlab data", "obowlab init", "head ")
"""Commands that take a moment."""

DIFFERS = (
    (re.compile(r"\b[0-9a-f]{8,64}\b"), "HASH"),
    (re.compile(r"-?\d+\.\d+ (± \d+\.\d+|\[-?\d+\.\d+, \d+\.\d+\]) %"), "RESULT"),
    (re.compile(r"\b\d+\.\d+ %|\b0\.\d\d\b"), "RESULT"),
    (re.compile(r"\b\d+(\.\d+)? [kMGT]?i?B\b"), "SIZE"),
    (re.compile(r"\b\d+(\.\d+)? (s|min|h|days?)\b( \d+ (s|min|h)\b)?"), "TIME"),
    (re.compile(r"[\d.e-]+ CPU-hours"), "TIME"),
    (re.compile(r"\b(ffcv|torch) loader"), "LOADER"),
    (re.compile(r"[ -]*\s{2,}|-+$"), " "),
)


def picture(kind: int, *, height: int, width: int, random: np.random.Generator) -> Image.Image:
    """Return waves whose directions and widths depend on the class, in a colour that does not."""
    across, down = ((1, 2), (3, 0.5), (2, 2), (0.3, 4), (4, 4))[kind % 5]
    y, x = np.mgrid[0:height, 0:width] / 32.0
    waves = np.sin(2 * np.pi * (across * x + down * y + random.random()))
    pixels = 128 + 100 * random.random(3) * waves[..., None] + random.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folders(root: Path) -> None:
    """Make what the page begins with: five classes of 60 PNG files, 500 photos without classes, and a list of 80."""
    random = np.random.default_rng(0)
    for kind, name in enumerate(("daisy", "iris", "lily", "rose", "tulip")):
        (root / "flowers" / name).mkdir(parents=True)
        for number in range(60):
            height, width = random.integers(41, 97, 2)
            picture(kind, height=height, width=width, random=random).save(root / f"flowers/{name}/{number:03d}.png")
    (root / "holiday").mkdir()
    for number in range(500):
        picture(number, height=96, width=128, random=random).save(root / f"holiday/{number:03d}.jpg")
    (root / "pictures").mkdir()
    lines = ["file,species"]
    for number in range(80):
        picture(number % 4, height=48, width=48, random=random).save(root / f"pictures/{number:02d}.jpg")
        lines.append(f"pictures/{number:02d}.jpg,{('crow', 'gull', 'robin', 'wren')[number % 4]}")
    (root / "birds.csv").write_text("\n".join(lines) + "\n")


def played(command: str, *, root: Path) -> str:
    """Return what a command prints, without progress."""
    words = shlex.split(command)
    if words[0] == "obowlab":
        words[:1] = [sys.executable, "-m", "obowlab.cli"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    lines = done.stdout.replace(str(root), HOME).replace(sys.executable, "python").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines if not PROGRESS.match(line))


def commands_of(transcript: str) -> Iterator[tuple[str, str]]:
    """Yield every command of a transcript with the output below it."""
    for part in re.split(r"(?m)^\$ ", transcript)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def comparable(output: str) -> list[str]:
    lines = []
    for line in output.splitlines():
        for pattern, name in DIFFERS:
            line = pattern.sub(name, line)
        lines.append(line.strip())
    return lines


def play(transcript: str, *, root: Path, only: tuple[str, ...]) -> str:
    """Play a transcript and return it as it is now."""
    now = ""
    for command, expected in commands_of(transcript):
        if command.startswith(only):
            output = played(command, root=root)
            if not os.environ.get("OBOWLAB_WRITE_GOLDEN"):
                assert comparable(output) == comparable(expected), command
            expected = output
        now += f"$ {command}\n{expected}"
    return now


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    make_folders(root)
    return root


def transcripts() -> list[str]:
    return TRANSCRIPT.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_a_way_for_each_kind_of_images() -> None:
    verbs = ["data prepare", "init", "run", "embed", "report"]
    for transcript in transcripts():
        commands = " ".join(command for command, _ in commands_of(transcript))
        assert all(f"obowlab {verb}" in commands for verb in verbs), commands
    assert len(transcripts()) == 3


@pytest.mark.parametrize("number", range(3))
def test_what_comes_before_the_training_is_as_on_the_page(number: int, folders: Path) -> None:
    play(transcripts()[number], root=folders, only=QUICK)


@pytest.mark.long
@pytest.mark.parametrize("number", range(3))
def test_the_whole_way_is_as_on_the_page(number: int, tmp_path: Path) -> None:
    make_folders(tmp_path)
    before = transcripts()[number]
    now = play(before, root=tmp_path, only=("",))
    if os.environ.get("OBOWLAB_WRITE_GOLDEN"):
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(before, now, 1), encoding="utf-8")
