"""Fixtures that several test modules share; importing this module enters the hermetic environment."""

from __future__ import annotations

from tests import hermetic, optimized

# Before anything is imported that reads the environment, or is obowlab's.
PLACE = hermetic.enter()
optimized.enter()

import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HELPERS = ("chaos", "contracts", "fork_server", "gpu", "lab", "processes", "runs", "services")
pytest.register_assert_rewrite(*(f"tests.{name}" for name in HELPERS))  # their asserts stay, also without the package's

from tests.browser import chromium
from tests.command_line import Obowlab, finished_run

PHOTOS_VARIABLE = "OBOWLAB_TEST_PHOTOS"
NEEDS = {"browser": "chromium", "lab": "postgresql", "postgresql": "postgresql"}
"""Fixture -> the marker of tests that use it."""
LONGEST = "services ablate mirror stages distributed ranks launch study resume tune nodes report chaos words"
"""The modules that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A module is played by one process. The longest come first, so that no process waits for another in the end.
    first = [f"test_{name}" for name in LONGEST.split()]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))
    for item in items:
        for fixture, marker in NEEDS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU: `make test-gpu` on a machine that has one")
    if item.get_closest_marker("long") and not os.environ.get("OBOWLAB_TEST_ALL"):
        pytest.skip("takes long: `make test-all` plays it")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Give the next test the environment that this one got, whatever the code under test has set."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


# ----------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which the test runs, and an empty home, so that whatever a command writes is seen."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return place


@pytest.fixture
def obowlab(capsys: pytest.CaptureFixture[str]) -> Obowlab:
    """The command line, called in this process."""
    return Obowlab(capsys)


@pytest.fixture
def finished(workplace: Path) -> Any:
    """A finished run in the working folder."""
    return finished_run(workplace / "runs")


@pytest.fixture
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch without MLflow, which takes seconds to import; test_mirror.py tests it."""
    from obowlab.launch import local
    from tests.processes import NoMirror

    monkeypatch.setattr(local, "Mirror", NoMirror)


# ------------------------------------------------------------------------------------------------- what may not be installed


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A selenium WebDriver with a fresh profile, shared by a module: starting one costs seconds."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server of our own, which asks for a password."""
    found = shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    pytest.importorskip("psycopg")
    tools = Path(found).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="obowlab-postgresql-"))
    (folder / "password").write_text("s3cret-pass")
    before: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
        before = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(*words: str) -> None:
        subprocess.run([*before, *words], check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    password = f"--pwfile={folder / 'password'}"
    call(str(tools / "initdb"), "-D", str(data), "-U", "tuner", "--auth=scram-sha-256", password, "--no-sync", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call(str(tools / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://tuner:s3cret-pass@127.0.0.1:{port}/postgres"
    finally:
        call(str(tools / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with photos200/CLASS/*.JPEG (unpacked) and tinyimagenet100.tar; skips where there are no photographs."""
    named = os.environ.get(PHOTOS_VARIABLE)
    found = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    missing = [name for name in ("photos200.tar", "tinyimagenet100.tar") if not (found / name).is_file()]
    if missing:
        pytest.skip(f"no photographs: {found} has no {' and no '.join(missing)} (set {PHOTOS_VARIABLE} to a folder that has)")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(found / "photos200.tar") as archive:
        archive.extractall(folder, filter="data")
    (folder / "tinyimagenet100.tar").symlink_to(found / "tinyimagenet100.tar")
    return folder


def draw_photo(seed: int, *, height: int, width: int) -> Image.Image:
    """Return a smooth RGB picture with some noise: something that JPEG, crops and colours have an effect on."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder: 5 classes with 12 train and 6 val images of varied sizes; one is a PNG, one is a grayscale JPEG."""
    folder = tmp_path_factory.mktemp("image_folder")
    seed = 0
    for split, count in (("train", 12), ("val", 6)):
        for label in range(5):
            class_dir = folder / split / f"class_{label}"
            class_dir.mkdir(parents=True)
            for number in range(count):
                seed += 1
                photo = draw_photo(seed, height=40 + 5 * (seed % 9), width=40 + 7 * (seed % 7))
                if (split, label, number) == ("train", 1, 3):
                    photo.save(class_dir / f"image_{number:02}.png")
                elif (split, label, number) == ("train", 2, 4):
                    photo.convert("L").save(class_dir / f"image_{number:02}.jpg", quality=90)
                else:
                    photo.save(class_dir / f"image_{number:02}.jpg", quality=90, progressive=bool(number % 2))
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A data root in which `small`, the images of `image_folder`, is prepared; treat it as read-only."""
    from obowlab.data.datasets import prepare

    root = tmp_path_factory.mktemp("data_root")
    prepare("small", source=image_folder, data_root=root, workers=1)
    return root
