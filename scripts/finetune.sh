#!/usr/bin/env bash
# bash scripts/finetune.sh [llava.train.train flags]: LLaVA-1.5's second stage, decoder and projector on 665,000 conversations.
# MODEL is a plain language model, to which PROJECTOR belongs, or a LLaVA checkpoint, which brings its projector and settings along.
# MODEL, PROJECTOR, DATA, IMAGES, OUTPUT, BATCH, ZERO (2, 3 or 3_offload) and what scripts/train_common.sh names
# override; later flags win. 8 × A100: COMPRESSION=configs/llava7b_r50.yaml bash scripts/finetune.sh
set -euo pipefail
. "$(dirname "$0")/train_common.sh"
model="${MODEL:-lmsys/vicuna-7b-v1.5}"
start=()
if ! is_llava "$model"; then
    start=(--version v1 --image_aspect_ratio pad)
    PROJECTOR="${PROJECTOR:-checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}"
fi
if [ -n "${PROJECTOR:-}" ]; then start+=(--pretrain_mm_mlp_adapter "$PROJECTOR"); fi
launch --deepspeed "$root/scripts/zero${ZERO:-3}.json" \
    ${start[@]+"${start[@]}"} \
    --data_path "${DATA:-playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-playground/data}" \
    --group_by_modality_length True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b}" \
    --per_device_train_batch_size "${BATCH:-16}" \
    --save_steps 1000 \
    --learning_rate 2e-5 \
    "$@"
