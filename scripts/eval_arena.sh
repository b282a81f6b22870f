#!/usr/bin/env bash
# bash scripts/eval_arena.sh [ROW…] [eval.run options]: all methods at equal layers and FLOPs; results/arena/ holds the report.
# The embedded model only. Run it again to go on after an interruption.
# Examples: bash scripts/eval_arena.sh          bash scripts/eval_arena.sh vanilla q75_libra q75_fastv --limit 100
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" arena "$@"
