#!/usr/bin/env bash
# Install ulrl and what it needs into .venv:  sh/install.sh [--test]
#   --test         also what sh/test.sh needs, all but torch by its hash in requirements/ci.lock
#   PYTHON=...     the Python to build on (default: python3)
# A second run finds everything in place and does nothing. No root needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "ulrl: $*" >&2
    exit 1
}

case "$*" in
    "") extra=base target="." ;;
    --test) extra=test target=".[test]" ;;
    *) fail "usage: sh/install.sh [--test]" ;;
esac

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found; install Python 3.10 to 3.13, or name one with PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) fail "$python is Python $version; 3.10 to 3.13 is needed: name one with PYTHON=..." ;;
esac
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; on Debian: apt-get install python3-venv"

# A venv belongs to one Python and one folder. The stamp is written last, so it stands for a whole install.
made="Python $version in $(pwd -P)"
stamp=$({ echo "$made"; cat pyproject.toml constraints.txt requirements/ci.lock; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')

if [[ ! -x .venv/bin/python || "$(cat .venv/made 2>/dev/null)" != "$made" ]]; then
    echo "ulrl: making .venv, $made"
    "$python" -m venv --clear .venv || fail "$python could not make .venv"
    echo "$made" >.venv/made
elif grep -qsx "$stamp" ".venv/installed-$extra" || grep -qsx "$stamp" .venv/installed-test; then # test has all of base
    exit 0
fi
rm -f .venv/installed-* .venv/pip.log

pip() {
    .venv/bin/python -m pip install --quiet --progress-bar off --disable-pip-version-check --log .venv/pip.log "$@" 2>.venv/pip.err
}

pip_install() { # what is said, then pip's arguments
    echo "ulrl: installing $1"
    shift
    pip --constraint constraints.txt "$@" && return
    if grep -qiE 'connection error|connection broken|NewConnectionError|NameResolutionError|ConnectTimeout' .venv/pip.log; then
        fail "the package registry cannot be reached; check the network and 'pip config list' (details: .venv/pip.log)"
    fi
    cat .venv/pip.err >&2
    fail "pip could not install $target (details: .venv/pip.log)"
}

if [[ $extra == test ]]; then
    echo "ulrl: installing what is locked, by hash"
    if ! pip --require-hashes --no-deps --requirement requirements/ci.lock; then
        if grep -q 'DO NOT MATCH THE HASHES' .venv/pip.err .venv/pip.log; then
            cat .venv/pip.err >&2
            fail "a package is not the file that requirements/ci.lock names; see who serves it ('pip config list')"
        fi
        echo "ulrl: not all that is locked can be had here: installing what can, without hashes" >&2
    fi
fi

# torch by itself: it is most of the download, and the rest then settles for the build that
# pip found (a CPU-only one, where pip is told of one) since the constraint keeps its version.
pip_install "torch (the download can be large)" torch
pip_install "ulrl and the rest" --editable "$target"

echo "$stamp" >.venv/installed-base
if [[ $extra == test ]]; then echo "$stamp" >.venv/installed-test; fi # which includes the base
echo "ulrl: installed in $PWD/.venv"
