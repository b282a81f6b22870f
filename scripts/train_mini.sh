#!/usr/bin/env bash
# bash scripts/train_mini.sh [FOLDER] [mini.train options]: train the embedded model from nothing into FOLDER (default: mini/run).
# Run it again to go on after an interruption. `--seed N` trains another than the shipped one (seed 0); name another FOLDER for it.
# NPROC (default: the cores, at most 2) processes of one thread each; needs no network and no GPU.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/scripts/env.sh" train
cd "$root"
folder=mini/run
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then folder="$1" && shift; fi
cores="$(python -c 'from libra.utils.provenance import cores; print(cores())')"
processes="${NPROC:-$((cores < 2 ? cores : 2))}"
compile=()
if command -v c++ >/dev/null || command -v g++ >/dev/null; then compile=(--compile); fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
python -m torch.distributed.run --standalone --nproc_per_node "$processes" \
    -m mini.train --output "$folder" "${compile[@]+"${compile[@]}"}" "$@"
echo "The checkpoint is in $folder/checkpoint ($folder/work holds its working files)."
