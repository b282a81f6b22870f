#!/usr/bin/env bash
# bash scripts/eval_table.sh TABLE [SUITE] [ROW…] [eval.run options]: what the scripts eval_table1.sh … eval_arena.sh share.
# Makes or finds an environment, fills the table's cells and prints it. Run it again to go on after an interruption.
# Which tables, suites and rows there are is declared in eval/suites.py.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || { echo "error: name a table, such as 1" >&2 && exit 2; }
. "$root/scripts/env.sh" eval
cd "$root"
exec python -m eval.run --table "$@"
