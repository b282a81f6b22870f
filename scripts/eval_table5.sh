#!/usr/bin/env bash
# bash scripts/eval_table5.sh [SUITE] [ROW…] [eval.run options]: Table 5, IGM, IGM-pos, IGM-neg; results/table5/ holds the report.
# Without a suite the embedded model's; llava7b downloads the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table5.sh          bash scripts/eval_table5.sh llava7b --dry-run
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 5 "$@"
