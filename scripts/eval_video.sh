#!/usr/bin/env bash
# bash scripts/eval_video.sh [ROW…] [eval.run options]: methods for videos on the embedded model's moving digits; results/video/ holds the report.
# Run it again to go on. Example: bash scripts/eval_video.sh vanilla c33_evs_original --limit 20
set -euo pipefail
exec bash "$(dirname "$0")/eval_table.sh" video "$@"
