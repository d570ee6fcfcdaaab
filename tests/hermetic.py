"""The machine as tests see it: what `.ci/install.sh` installs and the basic programs of any Unix, nothing found by chance.

`enter` is called once, before anything is imported that reads the environment. Programs are found through one folder of links,
so that Slurm, Docker or an `nvidia-smi` of the machine is as invisible as it is on the next machine. Environment variables, the
home folder and git's settings are those of nobody in particular, and GPUs are hidden.

Variables that steer the tests (`make test` and its siblings set them):
    OBOWLAB_TEST_HIDE: groups of programs to hide as well, separated by commas: `postgresql`, `chromium`, `compilers`.
    OBOWLAB_TEST_ALL: 1 plays all rounds of the slow tests.
    OBOWLAB_TEST_OPTIMIZE: 1 plays them on a package without its asserts (tests/optimized.py).
    OBOWLAB_TEST_GPU: 1 shows the machine's GPUs, or those that CUDA_VISIBLE_DEVICES names.
    OBOWLAB_TEST_DOCKER: 1 shows `docker`.
    OBOWLAB_TEST_PHOTOS: the folder of photographs.
    OBOWLAB_WRITE_GOLDEN: 1 writes golden files anew instead of comparing with them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

BASE = """
awk basename bash cat chmod chown cp cut date dirname echo env expr false find getent git grep head hostname id kill ldconfig ln
ls mkdir mktemp mount mv nice nproc ps pwd readlink rm rmdir runuser sed seq setpriv setsid sh sleep sort stat tail tar tee test
touch tr true umount uname uniq unshare wc which xargs
"""
GROUPS = {
    "compilers": ("as", "c++", "cc", "g++", "gcc", "ld", "pkg-config"),
    "postgresql": (
        "createdb",
        "dropdb",
        "initdb",
        "openssl",
        "pg_ctl",
        "pg_dump",
        "pg_isready",
        "pg_restore",
        "postgres",
        "psql",
    ),
    "chromium": ("chromium", "chromium-browser", "google-chrome", "chromedriver"),
}
"""What `.ci/install.sh test` installs beside Python packages."""
KEPT = {"LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER", "VIRTUAL_ENV"}
KEPT_PREFIXES = ("COV_", "COVERAGE_", "MUTANT", "OBOWLAB_TEST_", "OBOWLAB_WRITE_GOLDEN", "OMP_", "PYTEST", "PYTHON")
ENTERED = "PYTEST_OBOWLAB_HERMETIC"
"""Names the folder that `enter` made, for the processes of pytest-xdist."""


def enter() -> Path:
    """Hide the machine from this process and its children, through the environment; return the folder with programs and home."""
    if ENTERED in os.environ:
        return Path(os.environ[ENTERED])
    place = Path(tempfile.mkdtemp(prefix="obowlab-tests-"))
    atexit.register(_remove, place, os.getpid())
    programs = _link_programs(place / "bin")
    root = Path(__file__).resolve().parents[1]
    libraries = [root, *([root / ".gpu-kit" / "site"] if os.environ.get("OBOWLAB_TEST_GPU") else [])]
    for name in set(os.environ) - KEPT - ({"CUDA_VISIBLE_DEVICES"} if os.environ.get("OBOWLAB_TEST_GPU") else set()):
        if not name.startswith(KEPT_PREFIXES):
            del os.environ[name]
    home = place / "home"
    home.mkdir()
    # A checkout may belong to somebody else than who tests it.
    (home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    os.environ |= {
        ENTERED: str(place),
        "GIT_CONFIG_NOSYSTEM": "1",
        "HOME": str(home),
        # Tests must not fight over the cores.
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), str(programs)]),
        "PYTHONPATH": os.pathsep.join(map(str, libraries)),
        "TZ": "UTC",
    }
    if not os.environ.get("OBOWLAB_TEST_GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.umask(0o022)
    return place


def hidden() -> set[str]:
    """Return the groups of programs that are hidden on request.

    Raises:
        SystemExit: there is no such group.
    """
    found = {name.strip() for name in os.environ.get("OBOWLAB_TEST_HIDE", "").split(",") if name.strip()}
    if unknown := found - GROUPS.keys():
        sys.exit(f"OBOWLAB_TEST_HIDE (make test HIDE=...) has {', '.join(sorted(unknown))}; known are {', '.join(GROUPS)}.")
    return found


def search_path() -> str:
    """Return PATH with the newest PostgreSQL in front, whose Debian packages put its programs on nobody's PATH."""
    databases = [] if "postgresql" in hidden() else sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    return os.pathsep.join([*map(str, databases), os.environ.get("PATH", os.defpath)])


def _version(folder: Path) -> float:
    return float(folder.parent.name)


def _link_programs(folder: Path) -> Path:
    folder.mkdir()
    names = [*BASE.split(), *(name for group in GROUPS.keys() - hidden() for name in GROUPS[group])]
    if os.environ.get("OBOWLAB_TEST_DOCKER"):
        names += ["docker", "docker-compose"]
    if os.environ.get("OBOWLAB_TEST_GPU"):
        names += ["nvidia-smi"]
    path = os.pathsep.join([search_path(), "/usr/sbin", "/sbin"])
    for name in names:
        if found := shutil.which(name, path=path):
            (folder / name).symlink_to(found)
    return folder


def _remove(place: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        shutil.rmtree(place, ignore_errors=True)
