#!/usr/bin/env bash
# bash scripts/eval_table7.sh [SUITE] [ROW…] [eval.run options]: Table 7, hybrid attention on and off; results/table7/ holds the report.
# Without a suite the embedded model's; qwen2vl7b, llava7b download the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table7.sh          bash scripts/eval_table7.sh qwen2vl7b --dry-run
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 7 "$@"
