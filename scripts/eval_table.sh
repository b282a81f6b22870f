#!/usr/bin/env bash
# bash scripts/eval_table.sh TABLE [SUITE] [ROW…] [eval.run options]: what the scripts eval_table1.sh … eval_arena.sh share.
# Makes or finds an environment, fills the table's cells and prints it. Run it again to go on after an interruption.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
[ $# -gt 0 ] || { echo "error: name a table: 1 to 7, or arena" >&2 && exit 2; }
table="$1" && shift
. "$root/scripts/env.sh" eval
cd "$root"
options=() rows=""
case "${1:-}" in
mini | llava7b | llava13b | next8b | videollama2 | qwen2vl7b) options+=(--suite "$1") && shift ;;
esac
while [ $# -gt 0 ] && [[ "$1" != -* ]]; do rows="$rows,$1" && shift; done
if [ -n "$rows" ]; then options+=(--rows "${rows#,}"); fi
exec python -m eval.run --table "$table" "${options[@]+"${options[@]}"}" "$@"
