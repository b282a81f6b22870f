#!/usr/bin/env bash
# bash scripts/eval_table4.sh [SUITE] [ROW…] [eval.run options]: Table 4, pruning, merging or IGM, with Sim; results/table4/ holds the report.
# Without a suite the embedded model's; llava7b downloads the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table4.sh          bash scripts/eval_table4.sh mini igm_l1 prune_l1
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 4 "$@"
