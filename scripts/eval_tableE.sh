#!/usr/bin/env bash
# bash scripts/eval_tableE.sh [ROW…] [mini.finetune options]: Table E, the embedded model fine-tuned with compression and without;
# results/tableE/ holds the report. Fine-tunes first (two runs), then fills the table's cells. Run it again to go on.
# --dry-run says what there is to do.
# Example: bash scripts/eval_tableE.sh --steps 20 --limit 20 --pairs 3 --output results/tableE-try
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" eval
cd "$root"
exec python -m mini.finetune "$@"
