#!/usr/bin/env bash
# bash scripts/eval_table2.sh [SUITE] [ROW…] [eval.run options]: Table 2, 75% removed after one layer, VideoLLaMA-2 on Video-MME; results/table2/ holds the report.
# Without a suite the embedded model's; videollama2 downloads the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_table2.sh          bash scripts/eval_table2.sh videollama2 --dry-run
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" 2 "$@"
