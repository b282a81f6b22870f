#!/usr/bin/env bash
# bash scripts/eval_table1.sh [SUITE] [ROW…] [eval.run options]: fill Table 1 and print it; results/table1/ holds the report.
# Without a suite the embedded model's; llava7b downloads LLaVA-1.5-7B. Run it again to go on after an interruption.
# Examples: bash scripts/eval_table1.sh          bash scripts/eval_table1.sh llava7b r50 vanilla --limit 100
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" eval
cd "$root"
options=() rows=""
case "${1:-}" in
mini | llava7b | llava13b | next8b) options+=(--suite "$1") && shift ;;
esac
while [ $# -gt 0 ] && [[ "$1" != -* ]]; do rows="$rows,$1" && shift; done
if [ -n "$rows" ]; then options+=(--rows "${rows#,}"); fi
exec python -m eval.run --table 1 "${options[@]+"${options[@]}"}" "$@"
