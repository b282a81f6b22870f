#!/usr/bin/env bash
# bash scripts/test_vllm.sh [pytest arguments]: the plug-in's tests in vLLM itself, with its CPU build (requirements-vllm-cpu.txt, in .venv-vllm).
# Half an hour on two cores. Run by hand and weekly; it gates nothing. The last result stands in docs/versions.md.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/vllm_env.sh" cpu
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -q --all tests/test_vllm.py tests/test_vllm_engine.py tests/test_vllm_http.py "$@"
