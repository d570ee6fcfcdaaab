#!/usr/bin/env bash
# Writes .ci/locks/*.txt: every package of every part, the indirect ones too, with its version and the hashes of its files on PyPI, for
# all systems and Pythons (markers say which). Direct versions come from constraints.txt; the others stay as they are where they
# can. UPGRADE=1 takes the newest.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# PyPI's hashes count, whatever index or folder of wheels this machine is set up with.
resolve() { # OUTPUT ARGUMENT...
    env -u UV_DEFAULT_INDEX -u UV_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS \
        "${UV:-.venv/bin/uv}" --no-config pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
        --output-file "$@" >/dev/null
}
names() { sed -n 's/^\([a-z0-9][a-z0-9-]*\)==.*/\1/p' "$@" | sort -u; }

printf '%s\n' hatchling editables setuptools >"$work/build.in"
printf '%s\n' torch torchvision >"$work/torch.in"
printf '%s\n' boto3 'mlflow[auth]' optuna optuna-dashboard 'psycopg[binary]' >"$work/server.in"

# All parts are resolved together, so that they agree on every version.
mkdir -p .ci/locks
[ -n "${UPGRADE:-}" ] || cat .ci/locks/*.txt >"$work/all" 2>/dev/null || true
resolve "$work/all" --all-extras pyproject.toml "$work/build.in" "$work/server.in" -c constraints.txt

lock() { # PART WHAT LEFT-OUT ARGUMENT...: what it takes, without the packages that are left out
    local part=$1 what=$2 left_out=$3 package arguments=()
    shift 3
    for package in $left_out; do arguments+=(--no-emit-package "$package"); done
    resolve "$work/$part" --generate-hashes -c "$work/all" "${arguments[@]}" "$@"
    { echo "# $what. Written by \`make lock\`."; cat "$work/$part"; } >".ci/locks/$part.txt"
}
# PyPI's torch for Linux is made for CUDA and brings the libraries; other indexes have other files of the same versions.
of_torch=$(names "$work/all" | grep -E '^(torch|torchvision|triton|cuda-.*|nvidia-.*)$' | grep -vx nvidia-ml-py)
others=$(names "$work/all" | grep -vxF "$of_torch")
lock build "What obowlab is built with" "" "$work/build.in"
lock torch "PyTorch as PyPI has it, with its CUDA libraries on Linux; what else it needs is in demo.txt" "$others" "$work/torch.in"
lock demo "What obowlab needs beside PyTorch" "$of_torch" pyproject.toml
before="$of_torch $(names .ci/locks/demo.txt)"
lock ffcv "What the extra ffcv adds to demo.txt" "$before" --extra ffcv pyproject.toml
lock train "What the extra postgresql adds to demo.txt" "$before" --extra postgresql pyproject.toml
before="$before $(names .ci/locks/train.txt)"
lock test "What the extra test adds to train.txt" "$before" --extra test pyproject.toml
lock dev "What the extra dev adds to test.txt" "$before $(names .ci/locks/test.txt)" --extra dev pyproject.toml
lock server "What the image of the services holds" "" "$work/server.in"
