#!/usr/bin/env bash
# bash scripts/eval_table3.sh [SUITE] [ROW…] [eval.run options]: Table 3, hierarchical, PTI and IGM switched on one by one; results/table3/ holds the report.
# Without a suite the embedded model's; llava7b downloads the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table3.sh          bash scripts/eval_table3.sh llava7b --limit 100
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 3 "$@"
