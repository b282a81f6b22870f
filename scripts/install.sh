#!/usr/bin/env bash
# bash scripts/install.sh [--new] [EXTRA]: print the path of a Python that can run the project with setup.py's EXTRA (default: test).
# The active environment (VIRTUAL_ENV, conda, or the python on PATH) if it passes scripts/check_env.py; otherwise .venv, made from
# requirements.txt. --new: .venv in any case.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD" venv="$PWD/.venv" log="$PWD/.venv.log"
new=""
if [ "${1:-}" = --new ]; then new=yes && shift; fi
extra="${1:-test}"
stamp="$venv/libra-requirements" # empty while an install is under way, then the checksum of what was installed
pins="$(cksum <requirements.txt)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

case "$extra" in
eval | train | test) ;;
*) fail "there is no extra '$extra': use eval, train or test." ;;
esac

# check PYTHON: whether it can run the project; answer is its path, or why not.
check() { answer="$("$1" "$root/scripts/check_env.py" "$extra")"; }

installed() { [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; }

# Ends the script: .venv was made from requirements.txt, so only something that lies over its packages makes it fail.
use_venv() {
    check "$venv/bin/python" || fail "$answer: take what lies over .venv's packages off PYTHONPATH, or delete .venv and run again."
    printf '%s\n' "$answer"
    exit 0
}

active="" refused=""
if [ -n "${VIRTUAL_ENV:-}" ]; then
    active="$VIRTUAL_ENV/bin/python"
elif [ -n "${CONDA_PREFIX:-}" ]; then
    active="$CONDA_PREFIX/bin/python"
else
    active="$(command -v python || command -v python3 || true)"
fi
if [ -z "$new" ] && [ "$active" != "$venv/bin/python" ] && "$active" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    if check "$active"; then
        printf '%s\n' "$answer"
        exit 0
    fi
    refused="$answer"
    # A bare python on PATH is not news; an environment that was activated, or has everything and fails, is.
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [[ "$refused" != *" lacks "* ]]; then
        printf '%s: using .venv instead.\n' "$refused" >&2
    fi
fi

if installed; then use_venv; fi

exec 9>"$root/.venv.lock"
if command -v flock >/dev/null && ! flock -n 9; then
    echo "Another call is making .venv; waiting for it." >&2
    flock 9
fi
if installed; then use_venv; fi # another call has just made it

# An environment that somebody else made at this place and that works.
if [ -x "$venv/bin/python" ] && [ ! -f "$stamp" ] && check "$venv/bin/python"; then use_venv; fi

base=""
for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; then
        base="$("$candidate" -c 'import sys; print(sys.executable)')"
        break
    fi
done
[ -n "$base" ] || fail "requirements.txt needs Python 3.11 to 3.14 and none is on PATH: install one, or activate an environment" \
    "that has the packages of 'pip install -e .[$extra]'."

uv=""
if uv --version >/dev/null 2>&1; then uv=uv; fi
printf '%s\n' "${refused:-}" >"$log"
printf 'Installing requirements.txt into .venv (once; several GB, some minutes) … ' >&2
start=$SECONDS

# An empty stamp means killed: half a package may lie there, so begin again. What others made is never deleted.
if [ -f "$stamp" ] && [ ! -s "$stamp" ] || [ ! -x "$venv/bin/python" ]; then
    rm -rf "$venv"
    mkdir "$venv"
    : >"$stamp"
    if [ -n "$uv" ]; then
        made() { uv venv -q --allow-existing --python "$base" "$venv"; }
    else
        made() { "$base" -m venv "$venv"; }
    fi
    if ! made >>"$log" 2>&1; then
        echo >&2
        fail "no environment could be made with $base: install its venv module (python3-venv on Debian) or uv. Details: .venv.log"
    fi
elif [ -f "$stamp" ]; then
    : >"$stamp"
fi

# The second try is for networks whose certificates only the system knows.
with_uv() {
    "$1" pip install -q --python "$venv/bin/python" -r requirements.txt ||
        UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 "$1" pip install -q --python "$venv/bin/python" -r requirements.txt
}

install() {
    local python="$venv/bin/python"
    if [ -n "$uv" ] && with_uv "$uv"; then return 0; fi
    "$python" -m pip --version || "$python" -m ensurepip || return 1
    if [ -z "$uv" ] && "$python" -m pip install -q --retries 1 uv && with_uv "$venv/bin/uv"; then return 0; fi
    # pip may know more about this network (an index, a certificate) than uv. The lock holds all packages, so it has no dependencies
    # to look for, and pip 23 stumbles over a locked package that another wants with an extra.
    "$python" -m pip install -q --retries 1 --no-deps -r requirements.txt
}

if ! install >>"$log" 2>&1; then
    echo >&2
    if grep -qiE 'failed to connect|connection error|error sending request|name resolution|dns error|network is unreachable|timed out' "$log"; then
        fail "no package index could be reached: connect to the network and run again, or activate an environment that has the" \
            "packages of setup.py's extra '$extra'. Details: .venv.log"
    fi
    fail "requirements.txt could not be installed: $(grep -iE '^ *(error|cause|.*no space left)' "$log" | tail -n 1 | cut -c1-200) Details: .venv.log"
fi
printf '%s' "$pins" >"$stamp"
printf 'done in %d s\n' "$((SECONDS - start))" >&2
use_venv
