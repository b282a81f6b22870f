#!/usr/bin/env bash
# bash scripts/true_size.sh [options]: write LLaVA-1.5-7B with random weights (14 GB, temporary), load it, time Libra against vanilla.
# A slice for a smaller machine: bash scripts/true_size.sh --layers 8        All options: bash scripts/true_size.sh --help
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" eval
cd "$root"
exec python -m libra.latency --true-size "$@"
