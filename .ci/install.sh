#!/usr/bin/env bash
# Installs everything obowlab needs into .venv, and says what it does. Run by the Makefile; safe to run again.
# PYTHON chooses the interpreter (3.11 or newer); OBOWLAB_FFCV=0 leaves ffcv and its Debian packages out,
# OBOWLAB_BROWSER=0 the browser that pages are tested with.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "obowlab needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }

say() { printf '\n== %s\n' "$*"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@" 2>&1 | { grep -v -e '^WARNING: Location' -e '^$' || true; }; return "${PIPESTATUS[0]}"; }

as_root=""
[ "$(id -u)" = 0 ] || as_root=sudo
debian() { # PURPOSE WITHOUT PACKAGE...: installs packages, or says what goes without them
    command -v apt-get >/dev/null || return 0
    local purpose=$1 without=$2
    shift 2
    say "Debian packages that $purpose: $*"
    DEBIAN_FRONTEND=noninteractive $as_root apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "$@" >/dev/null \
        || echo "   could not be installed; $without"
}

have_libraries() { command -v pkg-config >/dev/null && command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg; }
if [ "${OBOWLAB_FFCV:-1}" = 1 ] && ! have_libraries; then
    debian "ffcv is built with" "obowlab will read images with its torch loader" g++ pkg-config libturbojpeg0-dev libopencv-dev
fi

have_browser() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }
if [ "${OBOWLAB_BROWSER:-1}" = 1 ] && ! have_browser; then
    debian "pages are tested with" "the tests of pages will be skipped" chromium chromium-driver
fi

have_database() { command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; }
if ! have_database; then
    debian "studies and tracking on a database are tested with" "those tests will be skipped" postgresql
fi

say "Python packages into .venv (the tested set of constraints.txt)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "   torch and torchvision"
pip install -c constraints.txt torch torchvision
echo "   obowlab with its tests and checkers"
pip install -c constraints.txt -e '.[dev]'
if [ "${OBOWLAB_FFCV:-1}" = 1 ] && have_libraries; then
    echo "   ffcv (built from source, under a minute)"
    pip install -c constraints.txt -e '.[ffcv]' || echo "   ffcv could not be built; obowlab will read images with its torch loader"
fi
touch .venv/.installed
say "Installed"
