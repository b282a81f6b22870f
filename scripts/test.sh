#!/usr/bin/env bash
# bash scripts/test.sh [--all] [pytest arguments]: the fast tests; with --all the slow ones too. No network, no GPU needed.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" test
cd "$root"
exec python -m pytest -n auto --dist loadfile "$@"
