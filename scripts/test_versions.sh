#!/usr/bin/env bash
# bash scripts/test_versions.sh MODE [pytest arguments]: the tests of tests/versions.txt with other versions of the packages, in an
# environment that is made for them and deleted again. MODE is one of
#   locked   requirements.txt, to try another Python: PYTHON=python3.13 bash scripts/test_versions.sh locked
#   lowest   the lower bounds of setup.py
#   newest   the newest packages that setup.py allows
#   beyond   the newest packages there are, whatever setup.py's upper bounds say
# Says which packages differ from requirements.txt. Needs uv and the package index. Run before a release; docs/versions.md has results.
set -euo pipefail
cd "$(dirname "$0")/.."
mode="${1:-}"
[ $# -eq 0 ] || shift

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

resolution=highest
case "$mode" in
locked | newest | beyond) ;;
lowest) resolution=lowest-direct ;;
*) fail "name what to test: locked, lowest, newest or beyond." ;;
esac
uv --version >/dev/null 2>&1 || fail "uv is needed to resolve the versions: pip install uv"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
uv venv -q --python "${PYTHON:-python3}" "$work/env"
python="$work/env/bin/python"

if [ "$mode" = locked ]; then
    cp requirements.txt "$work/chosen.txt"
else
    "$python" - "$mode" >"$work/asked.in" <<'PYTHON'
import re
import runpy
import sys

setup = runpy.run_path("setup.py", run_name="setup")
for line in dict.fromkeys([*setup["CORE"], *setup["EXTRAS"]["test"]]):
    print(re.sub(r",?<[\w.]+", "", line) if sys.argv[1] == "beyond" else line)
PYTHON
    uv pip compile -q --python "$python" --resolution "$resolution" --prerelease disallow --no-annotate --no-header \
        "$work/asked.in" -o "$work/chosen.txt"
fi
uv pip install -q --python "$python" -r "$work/chosen.txt"

# The packages that are not as in requirements.txt, the ones that setup.py names first.
uv pip freeze -q --python "$python" | sort >"$work/installed.txt"
grep -oE '^[A-Za-z0-9._-]+(\[[^]]*\])?==[^ ;]+' requirements.txt | sed 's/\[.*\]//' | sort >"$work/locked.txt"
moved="$(comm -13 "$work/locked.txt" "$work/installed.txt" | while IFS== read -r name _ version; do
    printf '%s %s → %s\n' "$name" "$(sed -n "s/^$name==//p" "$work/locked.txt" | paste -sd/)" "$version"
done)"
printf '%s, %s: %d packages\n' "$mode" "$("$python" --version)" "$(wc -l <"$work/installed.txt")"
printf 'not as in requirements.txt:\n%s\n' "${moved:-nothing}"

status=0
grep -v '^#' tests/versions.txt | PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 \
    xargs "$python" -m pytest -q -n auto --dist loadfile "$@" || status=$?
if [ "$status" -ne 0 ]; then
    printf '\n%s fails. Moved against requirements.txt:\n%s\n' "$mode" "${moved:-nothing}"
fi
exit "$status"
