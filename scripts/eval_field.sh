#!/usr/bin/env bash
# bash scripts/eval_field.sh [--suite fine] [MODEL] [ROW…] [eval.run options]: the field's methods at equal average visual tokens; results/field/
# holds the report. --suite fine asks what compression is known to harm (POPE, VQAv2 lite, RefCOCO, DocVQA, ChartQA, OCRBench), results/fine/.
# Without a model the embedded one's; llava7b, next8b download the real checkpoints and data. Run it again to go on.
# Examples: bash scripts/eval_field.sh          bash scripts/eval_field.sh --suite fine llava7b vanilla c22_divprune_original --limit 100
set -euo pipefail
table=field
if [ "${1:-}" = --suite ] && [ "${2:-}" = fine ]; then
    table=fine
    shift 2
fi
exec bash "$(dirname "$0")/eval_table.sh" "$table" "$@"
