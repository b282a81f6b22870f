#!/usr/bin/env bash
# bash scripts/eval_field.sh [SUITE] [ROW…] [eval.run options]: the field's methods at equal average visual tokens; results/field/ holds the report.
# Without a suite the embedded model's; llava7b, next8b download the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_field.sh          bash scripts/eval_field.sh llava7b vanilla c22_divprune_original --limit 100
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" field "$@"
