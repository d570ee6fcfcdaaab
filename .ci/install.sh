#!/usr/bin/env bash
# Installs obowlab into .venv, in parts of which each contains the ones before it; safe to run again: what is there stays.
#   demo    obowlab and the libraries it runs with: PyTorch, MLflow, Optuna
#   train   ffcv, the fast image loader, with the Debian packages it is built with; PostgreSQL's client
#   test    pytest, the services without Docker; Debian's PostgreSQL, and Chromium, which opens the pages
#   dev     ruff, mypy, import-linter, pre-commit, mutmut
# Environment variables:
#   PYTHON               the interpreter that makes .venv (3.11 or newer)
#   OBOWLAB_TORCH_INDEX  a package index for torch and torchvision instead of the default one, for example
#                        https://download.pytorch.org/whl/cu126; on a machine without an NVIDIA GPU, PyTorch's index of CPU wheels is
#                        tried by itself; set to nothing, only the default index is asked
#   OBOWLAB_LOCK=0       takes versions that pyproject.toml allows, with those of constraints.txt for the direct requirements, instead of
#                        the files of .ci/locks/, which name every package with the hashes of its files on PyPI; for an index of other files
#   OBOWLAB_FFCV=0       leaves ffcv and its Debian packages out
#   OBOWLAB_BROWSER=0    leaves the browser out
set -eu
cd "$(dirname "$0")/.."
part=${1:-}
case $part in
    demo) parts="demo" ;;
    train) parts="demo train" ;;
    test) parts="demo train test" ;;
    dev) parts="demo train test dev" ;;
    *) echo "Usage: .ci/install.sh demo|train|test|dev" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "obowlab needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '\n== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@" 2>&1 | { grep -v -e '^WARNING: Location' -e '^$' || true; }; return "${PIPESTATUS[0]}"; }
version() { sed -n "s/^$1==//p" constraints.txt; }

installed() { # PART: it is there, and nothing has changed what it consists of
    local stamp=.venv/.installed-$1 source
    [ -e "$stamp" ] || return 1
    for source in pyproject.toml constraints.txt .ci/locks/*.txt .ci/install.sh; do [ ! "$source" -nt "$stamp" ] || return 1; done
}

as_root=""
[ "$(id -u)" = 0 ] || as_root=sudo
debian() { # PURPOSE WITHOUT PACKAGE...: installs packages, or says what goes without them
    command -v apt-get >/dev/null || return 0
    local purpose=$1 without=$2
    shift 2
    say "Debian packages $purpose: $*"
    DEBIAN_FRONTEND=noninteractive $as_root apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "$@" >/dev/null \
        || note "could not be installed; $without"
}
have_libraries() { command -v pkg-config >/dev/null && command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg; }
have_browser() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }
have_database() { command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; }

# ---------------------------------------------------------------------------------------------------------------------- lock
tested_python() { "$python" -c 'import sys; sys.exit(sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 14))'; }
if [ "${OBOWLAB_LOCK:-1}" != 0 ] && tested_python; then locked=yes; else locked=""; fi
locked() { # PART...: installs these parts of the lock, nothing beside them; false if they do not fit this machine
    [ -n "$locked" ] || return 1
    local part files=() errors=.venv/.lock-errors
    for part in "$@"; do files+=(-r ".ci/locks/$part.txt"); done
    if pip install --no-deps --no-build-isolation --require-hashes "${files[@]}" >"$errors"; then
        rm "$errors"
        return 0
    fi
    cat "$errors" >&2
    if grep -q "DO NOT MATCH THE HASHES" "$errors"; then
        echo "A file is not the one that was tested. If your index has files of its own, install with OBOWLAB_LOCK=0." >&2
        exit 1
    fi
    note "the locked versions ($*) could not be installed, as said above; versions that pyproject.toml allows are taken"
    return 1
}

# ------------------------------------------------------------------------------------------------------------------- PyTorch
# The default index has torch for CUDA on x86-64 Linux, and for the CPU elsewhere.
default_is_cuda() { [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; }
have_gpu() { [ -e /proc/driver/nvidia/version ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }
answers() { # INDEX: it has the tested version of torch, and says so within seconds
    "$python" - "$1" "$(version torch)" <<'PROBE' 2>/dev/null
import sys, urllib.request
index, version = sys.argv[1:]
page = urllib.request.urlopen(index.rstrip("/") + "/torch/", timeout=4).read().decode()
sys.exit(f"torch-{version}" not in page)
PROBE
}
torch_index() { # prints the index for torch and torchvision; nothing for the default one
    if [ -n "${OBOWLAB_TORCH_INDEX+set}" ]; then
        echo "$OBOWLAB_TORCH_INDEX"
    elif default_is_cuda && ! have_gpu && answers "$cpu_index"; then
        echo "$cpu_index"
    fi
}
have_torch() { .venv/bin/python -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$(version torch)')" 2>/dev/null; }

install_torch() {
    local wanted=("torch==$(version torch)" "torchvision==$(version torchvision)")
    if [ -n "$index" ]; then
        note "torch and torchvision, from $index"
        # What they need comes from the default index, with obowlab.
        pip install --no-deps --index-url "$index" "${wanted[@]}" && return 0
        note "$index does not have them for this Python; taken from the default index"
    fi
    note "torch and torchvision"
    locked torch || pip install -c constraints.txt "${wanted[@]}"
}

# -------------------------------------------------------------------------------------------------------------- what it takes
todo=""
for each in $parts; do installed "$each" || todo="$todo $each"; done
[ -n "$todo" ] || exit 0

say "Installing into .venv:$todo (disk, download and time on two cores, beside the download)"
index=""
case " $todo " in *" demo "*)
    have_torch || index=$(torch_index)
    if have_torch; then
        note "demo    obowlab and its libraries; PyTorch is there: up to 1.3 GB, 0.4 GB to download, 2 minutes"
    elif [ -n "$index" ]; then
        note "demo    obowlab, PyTorch from $index: 2 GB if it is for the CPU, 0.6 GB to download, 2 minutes"
    elif default_is_cuda; then
        note "demo    obowlab, PyTorch with its CUDA libraries: 6.8 GB, of which PyTorch 5.6; 3.4 GB to download, 4 minutes"
        have_gpu || note "        There is no NVIDIA GPU here, but $cpu_index, which has PyTorch without CUDA, does not answer."
    else
        note "demo    obowlab, PyTorch: 2 GB, 0.6 GB to download, 2 minutes"
    fi ;;
esac
case " $todo " in *" train "*) note "train   ffcv, numba, OpenCV; PostgreSQL's client: 0.4 GB, 0.2 GB to download, 2 minutes" ;; esac
case " $todo " in *" test "*) note "test    test tools and the services' programs: 0.4 GB, 0.2 GB to download, 1 minute" ;; esac
case " $todo " in *" dev "*) note "dev     checkers: 0.2 GB, 0.1 GB to download, 1 minute" ;; esac

# ------------------------------------------------------------------------------------------------------------------- installing
for each in $todo; do
    case $each in
        train) [ "${OBOWLAB_FFCV:-1}" = 0 ] || have_libraries || debian "that ffcv is built with" "images will be read by the torch loader, with the same pixels" g++ pkg-config libturbojpeg0-dev libopencv-dev ;;
        test)
            [ "${OBOWLAB_BROWSER:-1}" = 0 ] || have_browser || debian "that open the pages in tests" "the tests of pages will be skipped" chromium chromium-driver
            have_database || debian "that the database of studies and services is tested with" "those tests will be skipped" postgresql
            ;;
    esac
done

say "Python packages ($([ -n "$locked" ] && echo "the tested ones, .ci/locks/" || echo "as pyproject.toml and constraints.txt say; not the lock"))"
[ -x .venv/bin/python ] || "$python" -m venv .venv
have_torch || install_torch
case $part in
    demo) extras="" ;;
    train) extras="[postgresql]" ;;
    *) extras="[$part]" ;;
esac
note "obowlab$extras and what it needs"
# With the lock nothing else is fetched: what the package is built with is in it.
if locked build $parts; then
    pip install --no-deps --no-build-isolation -e .
else
    pip install -c constraints.txt -e ".$extras"
fi
case " $todo " in *" train "*)
    if [ "${OBOWLAB_FFCV:-1}" = 1 ] && have_libraries; then
        note "ffcv (built from source, under a minute)"
        locked ffcv || pip install -c constraints.txt -e '.[ffcv]' || note "ffcv could not be built; images will be read by the torch loader, with the same pixels"
    fi ;;
esac
for each in $parts; do touch ".venv/.installed-$each"; done
say "Installed: $parts"
