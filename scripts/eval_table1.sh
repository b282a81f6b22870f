#!/usr/bin/env bash
# bash scripts/eval_table1.sh [SUITE] [ROW…] [eval.run options]: Table 1, methods on image benchmarks; results/table1/ holds the report.
# Without a suite the embedded model's; llava7b, llava13b, next8b download the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table1.sh          bash scripts/eval_table1.sh llava7b r50 vanilla --limit 100
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 1 "$@"
