#!/usr/bin/env bash
# bash scripts/test.sh [--all | --soak] [pytest arguments]: the fast tests; with --all the slow ones too; with --soak only the soak tests,
# hours of load, kills and restarts: call it again to go on (results/soak/ remembers what passed). No network, no GPU needed.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" test
cd "$root"
exec python -m pytest -n auto --dist loadfile "$@"
