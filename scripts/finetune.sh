#!/usr/bin/env bash
# bash scripts/finetune.sh [llava.train.train flags]: LLaVA-1.5's second stage, decoder and projector on 665,000 conversations.
# MODEL, PROJECTOR, DATA, IMAGES, OUTPUT, BATCH, ZERO (2, 3 or 3_offload) and what scripts/train_common.sh names
# override; later flags win. 8 × A100: COMPRESSION=configs/llava7b_r50.yaml bash scripts/finetune.sh
set -euo pipefail
. "$(dirname "$0")/train_common.sh"
launch --deepspeed "$root/scripts/zero${ZERO:-3}.json" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --version v1 \
    --data_path "${DATA:-playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-playground/data}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b}" \
    --per_device_train_batch_size "${BATCH:-16}" \
    --save_steps 1000 \
    --learning_rate 2e-5 \
    "$@"
