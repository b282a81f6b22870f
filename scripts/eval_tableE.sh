#!/usr/bin/env bash
# bash scripts/eval_tableE.sh [mini.finetune options]: fine-tune the embedded model with compression and without, and fill Table E.
# results/tableE/ holds everything; run it again to go on after an interruption. --publish copies the page to docs/results/.
# Example: bash scripts/eval_tableE.sh --steps 20 --limit 20 --pairs 3 --output results/tableE-try
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" eval
cd "$root"
exec python -m mini.finetune "$@"
