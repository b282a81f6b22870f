#!/usr/bin/env bash
# bash scripts/pretrain.sh [llava.train.train flags]: LLaVA-1.5's first stage, only the projector on 558,000 captions.
# MODEL, DATA, IMAGES, OUTPUT, BATCH and what scripts/train_common.sh names override; later flags win.
# 8 × A100: bash scripts/pretrain.sh      with compression: COMPRESSION=configs/llava7b_r50.yaml bash scripts/pretrain.sh
set -euo pipefail
. "$(dirname "$0")/train_common.sh"
model="${MODEL:-lmsys/vicuna-7b-v1.5}"
launch --deepspeed "$root/scripts/zero2.json" \
    --version plain \
    --data_path "${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-playground/data/LLaVA-Pretrain/images}" \
    --tune_mm_mlp_adapter True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b-pretrain}" \
    --per_device_train_batch_size "${BATCH:-32}" \
    --save_steps 24000 \
    --learning_rate 1e-3 \
    "$@"
