#!/usr/bin/env bash
# bash scripts/serve_vllm.sh MODEL [ROW] [vllm serve's options]: serve a LLaVA-1.5 or Qwen2.5-VL model of transformers' format with vLLM, its
# pictures compressed as ROW says (a YAML file, a shipped row, or a method's name; none: nothing is compressed). Makes .venv-vllm first.
# Example: bash scripts/serve_vllm.sh llava-hf/llava-1.5-7b-hf field/llava7b_c33_divprune_original --port 8000
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,4s/^# //p' "$0"
    exit 2
fi
model="$1"
shift
row=""
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    row="$1"
    shift
fi
. "$root/scripts/vllm_env.sh" ""
if [ -n "$row" ]; then
    export LIBRA_COMPRESSION="$row"
fi
# The second name is for eval.run --server, which reads from it what this server does.
name="$(basename "$model")"
told="$(python -m libra.vllm ${row:+"$row"})"
exec vllm serve "$model" --served-model-name "$name" "$told" "$@"
