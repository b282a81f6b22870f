#!/usr/bin/env bash
# bash scripts/eval_table6.sh [SUITE] [ROW…] [eval.run options]: Table 6, time, memory and score after one layer; results/table6/ holds the report.
# Without a suite the embedded model's; llava7b downloads the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table6.sh          bash scripts/eval_table6.sh llava7b --limit 100
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 6 "$@"
